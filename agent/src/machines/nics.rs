//! Nics that come and go, while a machine runs and while it is off, each with a tap, addresses and a rate of its own.
//!
//! ```text
//! add:    checked ─► stored (adding) ─► tap and rate ─► monitor told ─► stored (here) ─► guest agent told ─► answered
//!                        └── refused, failed or cut off: tap and record taken back ◄──┘
//! limit:  checked ─► stored (new rate) ─► tap's rate ─► answered
//! remove: checked ─► stored (removing) ─► monitor told ─► the guest lets go ─► tap removed ─► stored ─► guest agent told ─► answered
//!                        └── the guest does not answer: stored (here) ─► refused, and the nic stays
//! ```
//! All as with disks: see [`super::disks`]. The monitor knows a nic by its MAC address. The first nic, `net0`, comes with the machine, and
//! its rate is part of the machine's shape; it can go, but does not come again. A guest agent that does not answer is told when it does,
//! see [`tell_guest`]; until then the nic is there without addresses, which is said.

mod check;
mod settle;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use lathe_vmm::control::wire::{Answer, Command, NicConfig, NicStatus, NicsStatus};
use tokio::sync::oneshot;
use tokio::time::Instant;

pub(super) use self::check::allot;
use self::check::{check_limit, check_removal, new_nic, planned, view_of};
pub(super) use self::settle::{down, settle};
#[cfg(test)]
pub(super) use self::told::network_request;
use self::told::{After, answer_after_guest, seen};
pub(super) use self::told::{catch_up, tell_guest};
use super::actor::{Actor, Ask};
use super::core::Core;
use super::disks::{check_settled, intend, monitor_of, put, record_of, release_default, release_time};
use super::enforced::Limit;
use super::record::{Net, Plug, Record};
use super::{Machines, gone, launch, spec, uplink, view};
use crate::api::wire::{NicAddRequest, NicList, NicView, PlanView, Removed, SCHEMA};
use crate::monitor::{Monitor, MonitorError};
use crate::network::Ports;
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// A change of a machine's nics.
#[derive(Clone, Debug)]
pub enum NicChange {
    /// One more.
    Add(NicAddRequest),
    /// One gets another rate.
    Limit {
        /// Its name.
        nic: String,
        /// bit/s each way, 0 is unlimited.
        bit_per_sec: u64,
    },
    /// One goes.
    Remove {
        /// Its name.
        nic: String,
        /// Seconds that a running guest has to let it go, 1..=3600; `None`: 30.
        timeout_sec: Option<u32>,
    },
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum NicChanged {
    /// The nic as it is now.
    Nic(NicView),
    /// It is gone.
    Removed(Removed),
}

/// Told what came of a change.
pub(super) type Reply = oneshot::Sender<Result<NicChanged, Problem>>;

/// Nics of one machine that its guest has been asked to let go, by name.
#[derive(Default)]
pub(super) struct Unplugs(BTreeMap<String, Leaving>);

struct Leaving {
    deadline: Instant,
    timeout: Duration,
    waiting: Vec<Reply>,
}

impl Unplugs {
    /// When [`tick`] is due; `None`: not until something happens.
    pub(super) fn wake(&self) -> Option<Instant> {
        self.0.values().map(|leaving| leaving.deadline).min()
    }
}

impl Machines {
    /// A machine's nics, in order.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn nics(&self, name: &str) -> Result<NicList, Problem> {
        let entry = self.core.entry(name)?;
        let record = entry.with(|shared| shared.record.clone());
        let mut nics = Vec::new();
        for nic in record.all_nics() {
            nics.push(view_of(&self.core, &entry, &record, nic).await);
        }
        Ok(NicList { schema: SCHEMA, nics })
    }

    /// Adds, limits or removes a nic; answers when that is done, or refused.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-busy`, `machine-paused`, `no-such-nic`, `nic-busy`, `nic-name-taken`, `nic-not-released`,
    /// `nic-rate-elsewhere`, `no-nic-slot`, `no-network`, `net-over-capacity`, `addresses-exhausted`, `bad-amount`, `bad-name`.
    pub async fn change_nic(&self, name: &str, change: NicChange) -> Result<NicChanged, Problem> {
        let entry = self.core.entry(name)?;
        let (reply, result) = oneshot::channel();
        entry.asks.send(Ask::Nic(change, reply)).await.map_err(|_| gone(name))?;
        result.await.map_err(|_| gone(name))?
    }

    /// What [`Machines::change_nic`] would do.
    ///
    /// # Errors
    /// The same, as far as they can be known.
    pub async fn plan_nic(&self, name: &str, change: &NicChange) -> Result<PlanView, Problem> {
        let entry = self.core.entry(name)?;
        let record = entry.with(|shared| shared.record.clone());
        let (after, step) = planned(&self.core, &record, change)?;
        view::plan(&self.core, &after, record.revision, step.into_iter().collect())
    }
}

fn answer(reply: Reply, result: Result<NicChanged, Problem>) {
    // Whoever asked may have gone.
    let _ = reply.send(result);
}

/// Begins a change, and answers as soon as it is over.
pub(super) async fn change(actor: &mut Actor, change: NicChange, reply: Reply) {
    match change {
        NicChange::Add(request) => match add(actor, &request).await {
            Ok(name) => {
                let machine = &actor.entry.name;
                actor.core.tell("nic-added", machine, format!("{machine} has a nic {name} more"));
                answer_after_guest(actor, vec![reply], After::Seen(name));
            }
            Err(problem) => answer(reply, Err(problem)),
        },
        NicChange::Limit { nic, bit_per_sec } => match limit(actor, &nic, bit_per_sec).await {
            Ok(()) => answer(reply, seen(&actor.core, &actor.entry, &nic).await),
            Err(problem) => answer(reply, Err(problem)),
        },
        NicChange::Remove { nic, timeout_sec } => remove(actor, &nic, timeout_sec, reply).await,
    }
}

/// The nics that a monitor has which was started from `record`.
pub(super) fn plugged_at_start(core: &Core, record: &Record) -> BTreeSet<String> {
    let given = record.all_nics().filter(|nic| nic.plug != Plug::Adding && core.ports.is_some());
    given.map(|nic| nic.name.clone()).collect()
}

fn ports(core: &Core) -> Result<&dyn Ports, Problem> {
    core.ports.as_deref().ok_or_else(spec::no_host_network)
}

/// Stores the intent of one more nic and plugs it in if the machine runs. Answers its name.
async fn add(actor: &mut Actor, request: &NicAddRequest) -> Result<String, Problem> {
    let record = record_of(actor);
    let nic = {
        // No other machine gets the same addresses.
        let core = Arc::clone(&actor.core);
        let _one_at_a_time = core.admission.lock().await;
        check_settled(&record)?;
        ports(&core)?;
        let mut nic = new_nic(&core, &record, request)?;
        let mut intent = record.clone();
        match monitor_of(actor) {
            Some(monitor) => check_room(&record.name, &monitor).await?,
            None => {
                nic.plug = Plug::Here;
                intent.revision += 1;
            }
        }
        intent.insert_nic(nic.clone());
        intend(actor, intent).await?;
        nic
    };
    let Some(monitor) = monitor_of(actor) else { return Ok(nic.name) };
    match join(actor, &monitor, &nic).await {
        Ok(()) => Ok(nic.name),
        Err(problem) => {
            take_back(actor, &nic.name).await;
            Err(problem)
        }
    }
}

/// Whether a running machine can be given one more nic.
async fn check_room(machine: &str, monitor: &Monitor) -> Result<(), Problem> {
    let status = monitor.status().await.map_err(|cause| Problem::internal("looking at its nics", cause))?;
    match status.nics {
        Some(nics) if nics.free > 0 => Ok(()),
        Some(_) => Err(no_slot(machine, "no slot is free in it for another nic")),
        None => Err(no_slot(machine, "it was started by an earlier release")),
    }
}

fn no_slot(machine: &str, why: &str) -> Problem {
    let message = format!("{machine} cannot be given a nic while it runs: {why}");
    Problem::new(Kind::Conflict, "no-nic-slot", message)
        .detail(format!(
            "{} disks and nics more than at its start at most; any number up to {} nics while it is off",
            launch::HOTPLUG_SLOTS,
            spec::MAX_NICS
        ))
        .fix(format!(
            "lathe nic remove {machine} NIC        or: lathe stop {machine}, and start it with the nic"
        ))
}

/// Plugs in a nic whose intent is stored, and makes it one of the machine.
async fn join(actor: &Actor, monitor: &Monitor, nic: &Net) -> Result<(), Problem> {
    attach(actor, monitor, nic).await?;
    let mut record = record_of(actor);
    if let Some(nic) = record.nic_mut(&nic.name) {
        nic.plug = Plug::Here;
    }
    record.revision += 1;
    put(actor, record).await
}

/// Makes a nic's tap with its rate, and plugs it in. When that fails there is no tap.
async fn attach(actor: &Actor, monitor: &Monitor, nic: &Net) -> Result<(), Problem> {
    let ports = ports(&actor.core)?;
    let record = record_of(actor);
    let rate = record.rate_of(nic);
    let plugged = async {
        let queue = launch::open_nic(ports, &record, nic).await?;
        // A guest may answer by any of its nics.
        launch::find_ports(&actor.core, &record).await?;
        // No guest has it before it is limited.
        ports.limit(&nic.tap, rate).await?;
        uplink::join(&actor.core, &record, vec![nic.tap.clone()]).await;
        plug(&actor.entry.name, monitor, nic, queue).await
    };
    let attached = plugged.await;
    match &attached {
        Ok(()) => {
            actor.entry.with(|shared| shared.nics.insert(nic.name.clone()));
            read_first(actor).await;
        }
        Err(_) => remove_tap(&actor.core, nic).await,
    }
    attached
}

async fn plug(machine: &str, monitor: &Monitor, nic: &Net, queue: OwnedFd) -> Result<(), Problem> {
    let command = Command::AttachNic(NicConfig { tap: 0, mac: nic.mac, mtu: None });
    match monitor.call(command, &[queue.as_fd()]).await {
        Ok(Answer::Attached { .. }) => Ok(()),
        Ok(_) => Err(Problem::internal("attaching a nic", "the monitor answered something else")),
        Err(MonitorError::Refused { message, .. }) => Err(no_slot(machine, &message)),
        // Nobody knows whether it was carried out.
        Err(cause) => match nics_of(machine, monitor).await {
            Some(nics) if has(&nics, nic).is_some() => Ok(()),
            _ => Err(Problem::internal(format!("cannot attach nic {} to {machine}", nic.name), cause)),
        },
    }
}

async fn remove_tap(core: &Core, nic: &Net) {
    if let Some(ports) = &core.ports
        && let Err(problem) = ports.remove(&nic.tap).await
    {
        tracing::error!(tap = nic.tap, %problem, "cannot remove a tap that nothing uses");
    }
}

/// Notes what the port of the machine's first nic has in force: that is shown of the machine.
async fn read_first(actor: &Actor) {
    let port = actor.read_port().await;
    actor.entry.with(|shared| shared.port = port);
}

/// What the monitor has; `None` when it cannot tell.
async fn nics_of(machine: &str, monitor: &Monitor) -> Option<NicsStatus> {
    match monitor.status().await {
        Ok(status) => status.nics,
        Err(cause) => {
            tracing::warn!(machine, %cause, "a monitor does not say which nics it has");
            None
        }
    }
}

fn has<'a>(nics: &'a NicsStatus, nic: &Net) -> Option<&'a NicStatus> {
    nics.nics.iter().find(|status| status.mac == nic.mac)
}

/// Stores what has happened anyway: what cannot be stored is found again after a restart of lathed.
async fn note(actor: &Actor, record: Record) {
    if let Err(problem) = put(actor, record.clone()).await {
        tracing::error!(machine = record.name, %problem, "cannot store a machine's nics");
        actor.entry.with(|shared| shared.record = record);
    }
}

/// Undoes what was done for a nic that nobody was promised.
async fn take_back(actor: &mut Actor, name: &str) {
    let mut record = record_of(actor);
    let Some(nic) = record.nic(name).cloned() else { return };
    if let Some(monitor) = monitor_of(actor)
        && let Some(nics) = nics_of(&record.name, &monitor).await
        && let Some(status) = has(&nics, &nic)
    {
        // Only a store that fails leads here: the nic is in the guest, but nobody may rely on it.
        if let Some(nic) = record.nic_mut(name) {
            nic.plug = Plug::Removing;
        }
        note(actor, record).await;
        return let_go(actor, &monitor, &status.device, name).await;
    }
    if let Err(problem) = erase(actor, &nic).await {
        tracing::error!(machine = record.name, nic = name, %problem, "cannot take a nic back");
    }
}

/// Takes a nic that no monitor has out of the machine, with its tap and addresses.
async fn erase(actor: &Actor, nic: &Net) -> Result<(), Problem> {
    if let Some(ports) = &actor.core.ports {
        ports.remove(&nic.tap).await?;
    }
    let mut record = record_of(actor);
    record.take_nic(&nic.name);
    if monitor_of(actor).is_some() {
        // Its addresses may be another machine's from now on.
        launch::find_ports(&actor.core, &record).await?;
    }
    // One that nobody was promised was never a change.
    record.revision += u64::from(nic.plug != Plug::Adding);
    note(actor, record).await;
    uplink::follow(&actor.core).await;
    actor.entry.with(|shared| {
        shared.nics.remove(&nic.name);
        shared.configured.remove(&nic.name);
    });
    read_first(actor).await;
    Ok(())
}

/// Stores another rate, then sets it.
async fn limit(actor: &Actor, name: &str, bit_per_sec: u64) -> Result<(), Problem> {
    let before = record_of(actor);
    check_settled(&before)?;
    let nic = check_limit(&before, name, bit_per_sec)?.clone();
    if nic.bit_per_sec == bit_per_sec {
        return Ok(());
    }
    let mut record = before.clone();
    if let Some(nic) = record.nic_mut(name) {
        nic.bit_per_sec = bit_per_sec;
    }
    record.revision += 1;
    if record.held().net > before.held().net {
        intend(actor, record).await?;
    } else {
        // Nobody else is promised what this one gives back before the kernel has it back.
        actor.core.store.apply(Change::Put(Box::new(record.clone()))).await?;
        actor.entry.with(|shared| shared.record = record);
    }
    if !actor.entry.with(|shared| shared.nics.contains(name)) {
        settle_books(actor);
        return Ok(());
    }
    let decided = Instant::now();
    let limited = match ports(&actor.core) {
        Ok(ports) => ports.limit(&nic.tap, bit_per_sec).await.map(drop),
        Err(problem) => Err(problem),
    };
    match &limited {
        Ok(()) => {
            actor.core.enforced.after(Limit::Net, decided.elapsed());
            settle_books(actor);
        }
        Err(_) => note(actor, before).await,
    }
    uplink::follow(&actor.core).await;
    read_first(actor).await;
    limited
}

/// The books hold what is recorded.
fn settle_books(actor: &Actor) {
    let record = record_of(actor);
    actor.core.with_books(|books| books.enter(&record.name, record.booking()));
}

/// Begins to remove a nic; `reply` is told when it is gone, or that it stays.
async fn remove(actor: &mut Actor, name: &str, timeout_sec: Option<u32>, reply: Reply) {
    match begin_removal(actor, name, timeout_sec).await {
        Err(problem) => answer(reply, Err(problem)),
        Ok(()) => match actor.unplugs.0.get_mut(name) {
            Some(leaving) => leaving.waiting.push(reply),
            None => finish(actor, name, Some(reply)).await,
        },
    }
}

/// Stores the intent, and asks the guest if there is one that has it.
async fn begin_removal(actor: &mut Actor, name: &str, timeout_sec: Option<u32>) -> Result<(), Problem> {
    let timeout = release_time(timeout_sec)?;
    let mut record = record_of(actor);
    check_settled(&record)?;
    // The same again, perhaps because the first answer got lost, joins what is under way.
    let again = record.nic(name).is_some_and(|nic| nic.plug == Plug::Removing);
    if !again {
        check_removal(&record, name)?;
        if let Some(nic) = record.nic_mut(name) {
            nic.plug = Plug::Removing;
        }
        put(actor, record.clone()).await?;
    }
    let (Some(monitor), Some(nic)) = (monitor_of(actor), record.nic(name)) else { return Ok(()) };
    let told = match monitor.status().await.map(|status| status.nics) {
        Ok(Some(nics)) => match has(&nics, nic) {
            Some(status) => monitor.tell(Command::Detach { device: status.device.clone() }).await,
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
    let fix = format!("lathe stop {machine}, then: lathe nic remove {machine} {name}");
    match cause {
        MonitorError::Refused { message, .. } => {
            let message = format!("{machine} cannot let its nic {name} go while it runs: {message}");
            Problem::new(Kind::Conflict, "no-nic-slot", message).fix(fix)
        }
        other => Problem::internal(format!("cannot ask {machine} to let its nic {name} go"), other).fix(fix),
    }
}

fn wait_for(actor: &mut Actor, name: &str, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    let leaving = Leaving { deadline, timeout, waiting: Vec::new() };
    actor.unplugs.0.entry(name.to_owned()).or_insert(leaving);
}

/// Asks the guest to let a nic go, and waits for that.
async fn let_go(actor: &mut Actor, monitor: &Monitor, device: &str, name: &str) {
    wait_for(actor, name, release_default());
    if let Err(cause) = monitor.tell(Command::Detach { device: device.to_owned() }).await {
        // At the deadline it stays.
        tracing::warn!(machine = actor.entry.name, nic = name, %cause, "a guest cannot be asked for a nic");
    }
}

/// A nic that nobody uses any more is taken out of the machine, and whoever waits for that is told.
async fn finish(actor: &mut Actor, name: &str, reply: Option<Reply>) {
    let record = record_of(actor);
    let mut waiting = actor.unplugs.0.remove(name).map(|leaving| leaving.waiting).unwrap_or_default();
    waiting.extend(reply);
    let erased = match record.nic(name) {
        Some(nic) => erase(actor, nic).await,
        None => Ok(()),
    };
    if let Err(problem) = erased {
        tracing::error!(machine = record.name, nic = name, %problem, "cannot take a nic out of a machine");
        waiting.into_iter().for_each(|reply| answer(reply, Err(problem.clone())));
        return;
    }
    let machine = &record.name;
    actor.core.tell("nic-removed", machine, format!("{machine} has its nic {name} no more"));
    let removed = Removed { schema: SCHEMA, name: name.to_owned(), kept: None };
    // Its default routes are another's now.
    answer_after_guest(actor, waiting, After::Gone(removed));
}

/// A nic that was to go stays.
async fn stays(actor: &Actor, name: &str) {
    let mut record = record_of(actor);
    if let Some(nic) = record.nic_mut(name) {
        nic.plug = Plug::Here;
        note(actor, record).await;
    }
}

/// Gives up what guests do not let go in time.
pub(super) async fn tick(actor: &mut Actor) {
    let now = Instant::now();
    let due: Vec<String> = actor
        .unplugs
        .0
        .iter()
        .filter(|(_, leaving)| leaving.deadline <= now)
        .map(|(name, _)| name.clone())
        .collect();
    for name in due {
        let Some(leaving) = actor.unplugs.0.remove(&name) else { continue };
        stays(actor, &name).await;
        let machine = actor.entry.name.clone();
        let seconds = leaving.timeout.as_secs();
        let message = format!("{machine} has not let its nic {name} go within {seconds} s; it stays");
        actor.core.tell("nic-stays", &machine, message.clone());
        let problem = Problem::new(Kind::Conflict, "nic-not-released", message)
            .detail("its guest does not answer; if it lets go later it gets it again")
            .fix(format!("try again; or: lathe stop {machine}, lathe nic remove {machine} {name}"));
        for reply in leaving.waiting {
            answer(reply, Err(problem.clone()));
        }
    }
}
