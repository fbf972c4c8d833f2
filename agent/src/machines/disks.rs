//! Disks that come, grow and go, while a machine runs and while it is off.
//!
//! ```text
//! add:    checked ─► stored (adding) ─► file made ─► monitor told ─► stored (here) ─► answered
//!                        └── refused, failed or cut off: file and record taken back ◄──┘
//! grow:   checked ─► stored (new size) ─► file grown ─► monitor told ─► answered
//! remove: checked ─► stored (removing) ─► monitor told ─► the guest lets go ─► file kept or deleted ─► stored ─► answered
//!                        └── the guest does not answer: stored (here) ─► refused, and the disk stays
//! ```
//! A machine that is off has no monitor to be told. The monitor knows a disk by its serial, which is its name here, so that after a
//! restart of lathed, and whenever a device has gone, [`settle()`] can compare both and finish or take back what differs. A guest that lets
//! go after the deadline gets the disk again, because whoever asked was told that it stays.

mod check;
mod settle;

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

use lathe_shard::Bytes;
use lathe_vmm::control::wire::{Answer, Command, DiskStatus, DisksStatus};
use tokio::sync::oneshot;
use tokio::time::Instant;

use self::check::{check_growth, check_here, check_removal, new_drive, planned, view_of};
use super::actor::{Actor, Ask};
use super::core::{Core, Entry, unix_sec};
use super::life::Life;
use super::record::{Drive, Link, Record};
use super::{Machines, files, gone, launch, spec, view};
use crate::api::wire::{DiskAddRequest, DiskList, DiskView, PlanView, Removed, SCHEMA};
use crate::monitor::{Monitor, MonitorError};
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// How long a guest has to let a disk go unless told otherwise, seconds.
pub const RELEASE_SEC: u32 = 30;
pub(super) use self::check::{check_settled, plugged_at_start, release_time};
pub(super) use self::settle::{down, settle};

/// A change of a machine's disks.
#[derive(Clone, Debug)]
pub enum DiskChange {
    /// One more.
    Add(DiskAddRequest),
    /// One grows.
    Grow {
        /// Its name.
        disk: String,
        /// Bytes.
        size_bytes: u64,
    },
    /// One goes.
    Remove {
        /// Its name.
        disk: String,
        /// With its data.
        purge: bool,
        /// Seconds that a running guest has to let it go, 1..=3600; `None`: 30.
        timeout_sec: Option<u32>,
    },
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum DiskChanged {
    /// The disk as it is now.
    Disk(DiskView),
    /// It is gone.
    Removed(Removed),
}

/// Told what came of a change.
pub(super) type Reply = oneshot::Sender<Result<DiskChanged, Problem>>;

/// Changes of one machine's disks that are under way, by the disk's name.
#[derive(Default)]
pub(super) struct Plugs {
    /// Their files are being made.
    making: BTreeMap<String, Reply>,
    /// The guest has been asked to let them go.
    leaving: BTreeMap<String, Leaving>,
}

struct Leaving {
    deadline: Instant,
    timeout: Duration,
    waiting: Vec<Reply>,
}

impl Plugs {
    /// When [`tick`] is due; `None`: not until something happens.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.leaving.values().map(|leaving| leaving.deadline).min()
    }
}

impl Machines {
    /// A machine's disks, in order.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn disks(&self, name: &str) -> Result<DiskList, Problem> {
        let entry = self.core.entry(name)?;
        let (record, plugged) = entry.with(|shared| (shared.record.clone(), shared.plugged.clone()));
        let disks =
            record.source.disks.iter().map(|drive| view_of(&self.core, &record, drive, &plugged)).collect();
        Ok(DiskList { schema: SCHEMA, disks })
    }

    /// Adds, grows or removes a disk; answers when that is done, or refused.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-busy`, `no-such-disk`, `disk-busy`, `disk-name-taken`, `disk-boots`, `disk-in-use`, `disk-not-allowed`,
    /// `disk-not-released`, `disk-read-only`, `disk-cannot-shrink`, `disk-not-ours`, `no-disk-slot`, `no-such-upload`, `no-such-image`,
    /// `bad-amount`, `bad-name`, `bad-request`, `disk-over-capacity`, `disk-full`, ….
    pub async fn change_disk(&self, name: &str, change: DiskChange) -> Result<DiskChanged, Problem> {
        let entry = self.core.entry(name)?;
        let (reply, result) = oneshot::channel();
        entry.asks.send(Ask::Disk(change, reply)).await.map_err(|_| gone(name))?;
        result.await.map_err(|_| gone(name))?
    }

    /// What [`Machines::change_disk`] would do.
    ///
    /// # Errors
    /// The same, as far as they can be known.
    pub async fn plan_disk(&self, name: &str, change: &DiskChange) -> Result<PlanView, Problem> {
        let entry = self.core.entry(name)?;
        let record = entry.with(|shared| shared.record.clone());
        let (after, step) = planned(&self.core, &record, change)?;
        view::plan(&self.core, &after, record.revision, step.into_iter().collect())
    }
}

pub(super) fn record_of(actor: &Actor) -> Record {
    actor.entry.with(|shared| shared.record.clone())
}

pub(super) fn monitor_of(actor: &Actor) -> Option<Monitor> {
    actor.live().map(|live| live.monitor.clone())
}

/// Stores a record and makes it the machine's; when this fails nothing has changed.
pub(super) async fn put(actor: &Actor, record: Record) -> Result<(), Problem> {
    actor.core.store.apply(Change::Put(Box::new(record.clone()))).await?;
    actor.core.with_books(|books| books.enter(&record.name, record.booking()));
    actor.entry.with(|shared| shared.record = record);
    Ok(())
}

/// The same for one that may hold more than before.
pub(super) async fn intend(actor: &Actor, record: Record) -> Result<(), Problem> {
    let (name, before) = (record.name.clone(), record_of(actor).booking());
    actor.core.with_books(|books| books.set(&name, record.booking()))?;
    let stored = put(actor, record).await;
    if stored.is_err() {
        actor.core.with_books(|books| books.enter(&name, before));
    }
    stored
}

/// Works on files where that may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|cause| Err(Problem::internal("working on a disk's file", cause)))
}

fn answer(reply: Reply, result: Result<DiskChanged, Problem>) {
    // Whoever asked may have gone.
    let _ = reply.send(result);
}

fn seen(core: &Core, entry: &Entry, name: &str) -> Result<DiskChanged, Problem> {
    let (record, plugged) = entry.with(|shared| (shared.record.clone(), shared.plugged.clone()));
    let drive = check_here(&record, name)?;
    Ok(DiskChanged::Disk(view_of(core, &record, drive, &plugged)))
}

/// Begins a change, and answers as soon as it is over.
pub(super) async fn change(actor: &mut Actor, change: DiskChange, reply: Reply) {
    match change {
        DiskChange::Add(request) => match add(actor, &request).await {
            Ok(name) => drop(actor.plugs.making.insert(name, reply)),
            Err(problem) => answer(reply, Err(problem)),
        },
        DiskChange::Grow { disk, size_bytes } => {
            let grown = grow(actor, &disk, size_bytes).await;
            answer(reply, grown.and_then(|()| seen(&actor.core, &actor.entry, &disk)));
        }
        DiskChange::Remove { disk, purge, timeout_sec } => {
            remove(actor, &disk, purge, timeout_sec, reply).await;
        }
    }
}

/// Stores the intent of one more disk and begins to make its file; [`made`] goes on. Answers its name.
async fn add(actor: &Actor, request: &DiskAddRequest) -> Result<String, Problem> {
    let record = record_of(actor);
    check_settled(&record)?;
    let drive = new_drive(&actor.core, &record, request)?;
    if let Some(monitor) = monitor_of(actor) {
        check_room(&record.name, &monitor).await?;
    }
    let mut intent = record.clone();
    intent.insert_drive(drive.clone());
    intend(actor, intent).await?;
    let (config, asks) = (actor.core.config.clone(), actor.entry.asks.clone());
    let name = drive.name.clone();
    tokio::spawn(async move {
        let disk = drive.name.clone();
        let made = blocking(move || files::add_disk(&config, &record.name, &drive)).await;
        // Nobody is there any more when the machine is not.
        let _ = asks.send(Ask::DiskMade(disk, made)).await;
    });
    Ok(name)
}

/// Whether a running machine can be given one more disk.
async fn check_room(machine: &str, monitor: &Monitor) -> Result<(), Problem> {
    let status = monitor.status().await.map_err(|cause| Problem::internal("looking at its disks", cause))?;
    match status.disks {
        Some(disks) if disks.free > 0 => Ok(()),
        Some(_) => Err(no_slot(machine, "no slot is free in it for another disk")),
        None => Err(no_slot(machine, "it was started by an earlier release")),
    }
}

fn no_slot(machine: &str, why: &str) -> Problem {
    let message = format!("{machine} cannot be given a disk while it runs: {why}");
    Problem::new(Kind::Conflict, "no-disk-slot", message)
        .detail(format!(
            "{} more than at its start at most; any number up to {} while it is off",
            launch::HOTPLUG_SLOTS,
            spec::MAX_DISKS
        ))
        .fix(format!(
            "lathe disk remove {machine} NAME        or: lathe stop {machine}, and start it with the disk"
        ))
}

/// The file of a new disk is made, or is not.
pub(super) async fn made(actor: &mut Actor, name: &str, made: Result<(), Problem>) {
    let Some(reply) = actor.plugs.making.remove(name) else { return };
    let joined = match made {
        Ok(()) => join(actor, name).await,
        Err(problem) => Err(problem),
    };
    let result = match joined {
        Ok(()) => {
            let machine = &actor.entry.name;
            actor.core.tell("disk-added", machine, format!("{machine} has a disk {name} more"));
            seen(&actor.core, &actor.entry, name)
        }
        Err(problem) => {
            take_back(actor, name).await;
            Err(problem)
        }
    };
    answer(reply, result);
}

/// A disk whose file is there becomes one of the machine, plugged in if it runs.
async fn join(actor: &Actor, name: &str) -> Result<(), Problem> {
    let mut record = record_of(actor);
    let Some(drive) = record.drive(name).cloned() else {
        return Err(Problem::internal("adding a disk", format!("{name} is no more")));
    };
    // A machine on its way down finds it at its next start.
    if let Some(monitor) = monitor_of(actor).filter(|_| record.life != Life::Stopping) {
        attach(actor, &monitor, &drive).await?;
    }
    if let Some(drive) = record.drive_mut(name) {
        drive.link = Link::Here;
    }
    record.revision += 1;
    put(actor, record).await?;
    files::forget_upload(&actor.core.config, &drive);
    Ok(())
}

/// Plugs a disk in.
async fn attach(actor: &Actor, monitor: &Monitor, drive: &Drive) -> Result<(), Problem> {
    let name = &actor.entry.name;
    let file = launch::open_disk(&actor.core, name, drive)?;
    let command = Command::AttachDisk(launch::disk_config(drive, 0));
    let attached = match monitor.call(command, &[file.as_fd()]).await {
        Ok(Answer::Attached { .. }) => Ok(()),
        Ok(_) => Err(Problem::internal("attaching a disk", "the monitor answered something else")),
        Err(MonitorError::Refused { message, .. }) => Err(no_slot(name, &message)),
        // Nobody knows whether it was carried out.
        Err(cause) => match disks_of(name, monitor).await {
            Some(disks) if has(&disks, &drive.name).is_some() => Ok(()),
            _ => Err(Problem::internal(format!("cannot attach disk {} to {name}", drive.name), cause)),
        },
    };
    if attached.is_ok() {
        actor.entry.with(|shared| shared.plugged.insert(drive.name.clone()));
    }
    attached
}

/// What the monitor has; `None` when it cannot tell.
async fn disks_of(machine: &str, monitor: &Monitor) -> Option<DisksStatus> {
    match monitor.status().await {
        Ok(status) => status.disks,
        Err(cause) => {
            tracing::warn!(machine, %cause, "a monitor does not say which disks it has");
            None
        }
    }
}

fn has<'a>(disks: &'a DisksStatus, name: &str) -> Option<&'a DiskStatus> {
    disks.disks.iter().find(|disk| disk.serial == name)
}

/// Undoes what was done for a disk that nobody was promised.
async fn take_back(actor: &mut Actor, name: &str) {
    let mut record = record_of(actor);
    let Some(drive) = record.drive(name).cloned() else { return };
    if let Some(monitor) = monitor_of(actor)
        && let Some(disk) = disks_of(&record.name, &monitor).await.as_ref().and_then(|disks| has(disks, name))
    {
        // Only a store that fails leads here: the disk is in the guest, but nobody may rely on it.
        if let Some(drive) = record.drive_mut(name) {
            drive.link = Link::Removing { purge: true };
        }
        note(actor, record).await;
        return let_go(actor, &monitor, &disk.device, name, release_default()).await;
    }
    if let Err(problem) = erase(actor, &drive, true).await {
        tracing::error!(machine = record.name, disk = name, %problem, "cannot take a disk back");
    }
}

pub(super) fn release_default() -> Duration {
    Duration::from_secs(u64::from(RELEASE_SEC))
}

/// Stores what has happened anyway: what cannot be stored is found again after a restart of lathed.
async fn note(actor: &Actor, record: Record) {
    if let Err(problem) = put(actor, record.clone()).await {
        tracing::error!(machine = record.name, %problem, "cannot store a machine's disks");
        actor.entry.with(|shared| shared.record = record);
    }
}

/// Takes a disk that no monitor has out of the machine. Answers where its data is kept.
async fn erase(actor: &Actor, drive: &Drive, purge: bool) -> Result<Option<String>, Problem> {
    let (config, machine, taken) = (actor.core.config.clone(), actor.entry.name.clone(), drive.clone());
    let kept = blocking(move || files::take_disk(&config, &machine, &taken, purge, unix_sec())).await?;
    let mut record = record_of(actor);
    record.source.disks.retain(|other| other.name != drive.name);
    // One that nobody was promised was never a change.
    record.revision += u64::from(drive.link != Link::Adding);
    note(actor, record).await;
    actor.entry.with(|shared| shared.plugged.remove(&drive.name));
    Ok(kept.map(|path| path.to_string_lossy().into_owned()))
}

/// Grows a disk: its file first, then the guest's view of it.
async fn grow(actor: &Actor, name: &str, size_bytes: u64) -> Result<(), Problem> {
    let before = record_of(actor);
    check_settled(&before)?;
    let growth = check_growth(&actor.core, &before, name, size_bytes)?;
    let mut record = before.clone();
    if let Some(drive) = record.drive_mut(name)
        && growth.to > growth.from
    {
        drive.disk.set_private_bytes(growth.to);
        record.revision += 1;
        intend(actor, record.clone()).await?;
    }
    if let Err(problem) = grow_file(actor, &record, name, growth.to).await {
        note(actor, before).await;
        return Err(problem);
    }
    let Some(monitor) = monitor_of(actor) else { return Ok(()) };
    let disks = disks_of(&record.name, &monitor).await;
    let Some(disk) = disks.as_ref().and_then(|disks| has(disks, name)) else { return Ok(()) };
    tell_size(&monitor, disk).await.map_err(|cause| {
        Problem::internal(format!("{} was not told that its disk {name} has grown", record.name), cause)
            .detail(format!(
                "its file has {} now; the guest sees that after its next start",
                Bytes(growth.to)
            ))
            .fix(format!("lathe disk grow {} {name} {}", record.name, growth.to))
    })
}

async fn grow_file(actor: &Actor, record: &Record, name: &str, bytes: u64) -> Result<(), Problem> {
    let Some(drive) = record.drive(name).cloned() else { return Ok(()) };
    let path = files::disk_path(&actor.core.config, &record.name, &drive);
    let on = record.life.has_monitor();
    let is_file = path.metadata().is_ok_and(|metadata| metadata.is_file());
    let locked = match (on, is_file) {
        // Its size is as it is.
        (_, false) => return Ok(()),
        // Its monitor has it locked.
        (true, _) => None,
        (false, _) => Some(launch::open_disk(&actor.core, &record.name, &drive)?),
    };
    let grown = blocking(move || files::set_size(&path, bytes)).await;
    drop(locked);
    grown
}

async fn tell_size(monitor: &Monitor, disk: &DiskStatus) -> Result<(), MonitorError> {
    monitor.tell(Command::GrowDisk { device: disk.device.clone() }).await
}

/// Begins to remove a disk; `reply` is told when it is gone, or that it stays.
async fn remove(actor: &mut Actor, name: &str, purge: bool, timeout_sec: Option<u32>, reply: Reply) {
    match begin_removal(actor, name, purge, timeout_sec).await {
        Err(problem) => answer(reply, Err(problem)),
        Ok(()) => match actor.plugs.leaving.get_mut(name) {
            Some(leaving) => leaving.waiting.push(reply),
            None => {
                let removed = finish(actor, name).await;
                answer(reply, removed.map(DiskChanged::Removed));
            }
        },
    }
}

/// Stores the intent, and asks the guest if there is one that has it.
async fn begin_removal(
    actor: &mut Actor,
    name: &str,
    purge: bool,
    timeout_sec: Option<u32>,
) -> Result<(), Problem> {
    let timeout = release_time(timeout_sec)?;
    let mut record = record_of(actor);
    check_settled(&record)?;
    // The same again, perhaps because the first answer got lost, joins what is under way.
    let again = matches!(record.drive(name).map(|drive| drive.link), Some(Link::Removing { .. }));
    if !again {
        check_removal(&record, name)?;
        if let Some(drive) = record.drive_mut(name) {
            drive.link = Link::Removing { purge };
        }
        put(actor, record.clone()).await?;
    }
    let Some(monitor) = monitor_of(actor) else { return Ok(()) };
    let told = match monitor.status().await.map(|status| status.disks) {
        Ok(Some(disks)) => match has(&disks, name) {
            Some(disk) => monitor.tell(Command::Detach { device: disk.device.clone() }).await,
            None => return Ok(()),
        },
        Ok(None) => {
            let message = "it was started by an earlier release".to_owned();
            Err(MonitorError::Refused { code: "unsupported-version".to_owned(), message })
        }
        Err(cause) => Err(cause),
    };
    match told {
        Ok(()) => {
            wait_for(actor, name, timeout);
            Ok(())
        }
        Err(cause) => {
            stays(actor, name).await;
            Err(cannot_let_go(&record.name, name, cause))
        }
    }
}

fn cannot_let_go(machine: &str, name: &str, cause: MonitorError) -> Problem {
    let fix = format!("lathe stop {machine}, then: lathe disk remove {machine} {name}");
    match cause {
        MonitorError::Refused { message, .. } => {
            let message = format!("{machine} cannot let its disk {name} go while it runs: {message}");
            Problem::new(Kind::Conflict, "no-disk-slot", message).fix(fix)
        }
        other => Problem::internal(format!("cannot ask {machine} to let its disk {name} go"), other).fix(fix),
    }
}

fn wait_for(actor: &mut Actor, name: &str, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    let leaving = Leaving { deadline, timeout, waiting: Vec::new() };
    actor.plugs.leaving.entry(name.to_owned()).or_insert(leaving);
}

/// Asks the guest to let a disk go, and waits as long as given.
async fn let_go(actor: &mut Actor, monitor: &Monitor, device: &str, name: &str, timeout: Duration) {
    wait_for(actor, name, timeout);
    if let Err(cause) = monitor.tell(Command::Detach { device: device.to_owned() }).await {
        // At the deadline it stays.
        tracing::warn!(machine = actor.entry.name, disk = name, %cause, "a guest cannot be asked for a disk");
    }
}

/// A disk that nobody uses any more is taken out of the machine, and whoever waits for that is told.
async fn finish(actor: &mut Actor, name: &str) -> Result<Removed, Problem> {
    let record = record_of(actor);
    let waiting = actor.plugs.leaving.remove(name).map(|leaving| leaving.waiting).unwrap_or_default();
    let erased = match record.drive(name) {
        Some(drive) => {
            let purge = matches!(drive.link, Link::Removing { purge: true });
            erase(actor, drive, purge).await
        }
        None => Ok(None),
    };
    let result = erased.map(|kept| Removed { schema: SCHEMA, name: name.to_owned(), kept });
    match &result {
        Ok(_) => {
            let machine = &record.name;
            actor.core.tell("disk-removed", machine, format!("{machine} has its disk {name} no more"));
        }
        Err(problem) => {
            tracing::error!(machine = record.name, disk = name, %problem, "cannot take a disk out of a machine");
        }
    }
    for reply in waiting {
        answer(reply, result.clone().map(DiskChanged::Removed));
    }
    result
}

/// A disk that was to go stays.
async fn stays(actor: &Actor, name: &str) {
    let mut record = record_of(actor);
    if let Some(drive) = record.drive_mut(name) {
        drive.link = Link::Here;
        note(actor, record).await;
    }
}

/// Gives up what guests do not let go in time.
pub(super) async fn tick(actor: &mut Actor) {
    let now = Instant::now();
    let due: Vec<String> = actor
        .plugs
        .leaving
        .iter()
        .filter(|(_, leaving)| leaving.deadline <= now)
        .map(|(name, _)| name.clone())
        .collect();
    for name in due {
        let Some(leaving) = actor.plugs.leaving.remove(&name) else { continue };
        stays(actor, &name).await;
        let machine = actor.entry.name.clone();
        let seconds = leaving.timeout.as_secs();
        let message = format!("{machine} has not let its disk {name} go within {seconds} s; it stays");
        actor.core.tell("disk-stays", &machine, message.clone());
        let problem = Problem::new(Kind::Conflict, "disk-not-released", message)
            .detail("its guest does not answer, or something in it uses the disk; if it lets go later it gets it again")
            .fix(format!("umount it in the guest, then again; or: lathe stop {machine}, lathe disk remove {machine} {name}"));
        for reply in leaving.waiting {
            answer(reply, Err(problem.clone()));
        }
    }
}
