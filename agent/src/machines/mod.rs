//! Machines: the core of lathed. Owns their state, starts and ends them, changes their shape, finds them again.
//!
//! ```text
//! api ──► Machines (this handle) ──asks──► actor (one task per machine) ──► life::decide ─► store ─► effects
//!                                            │            ▲
//!             launch, resize, files, guest ◄─┘            └── monitor's notices, timers
//! sample: once a second what is used; the control loop's heartbeat
//! ```
//! | file | what |
//! |---|---|
//! | [`life`] | every state, every event, the pure decision; what to do after a crash |
//! | [`record`] | what is stored of a machine |
//! | `actor` | one task per machine: decides, stores, does |
//! | [`shape`] | what is desired and what is in force, the pure decision of what to do next |
//! | `launch`, [`files`], `resize`, `disks`, `nics`, [`guest`], [`console`] | the doing |
//! | [`spec`], [`config`] | requests and configuration, checked |
//! | `core`, `view`, `sample` | what machines share, what is shown, what is used |
//! | [`enforced`] | how long it takes until what is decided is in force |
//! | `tiers` | what the kernel is told about who comes first |
//! | `relief` | memory that harvest machines give back while the host is short of it |
//! | `iomax` | what stands behind the limit of their disks |
//! | `cores` | who runs on which of the host's CPUs |
//! | `walls` | the CPU that a whole machine may use, and what of it its monitor needs |
//! | `foresee` | what they ask for over time, and will ask for |
//! | `sculpt` | resized ahead of that, and why |
//! | `inside` | what their guest agents tell of it, and want |
//! | `by_hand` | what people say of it |
//! | `sight` | whether they get what they are granted while they want it |
//! | [`uplink`] | the host's uplink shared between them |
//!
//! The books are an upper bound at every moment, and nothing is promised that is not stored. See DESIGN, "The books are always an
//! upper bound of what is held".

mod actor;
mod by_hand;
pub mod config;
pub mod console;
mod core;
mod cores;
mod disks;
pub mod enforced;
pub mod files;
mod foresee;
pub mod guest;
mod inside;
mod iomax;
mod launch;
pub mod life;
mod nics;
pub mod record;
mod relief;
mod resize;
mod sample;
mod sculpt;
pub mod shape;
mod sight;
pub mod spec;
mod start;
mod tiers;
pub mod uplink;
mod view;
mod walls;

#[cfg(test)]
mod disks_tests;
#[cfg(test)]
mod foresee_tests;
#[cfg(test)]
mod inside_tests;
#[cfg(test)]
mod limits_tests;
#[cfg(test)]
mod nics_tests;
#[cfg(test)]
mod reshape_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod uplink_tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::net::UnixStream;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

pub use self::config::{
    CoreConfig, ImageFile, ImageSource, LauncherKind, NetworkConfig, NoImages, Overcommit, Reserve,
};
pub use self::console::ConsoleHandle;
pub use self::disks::{DiskChange, DiskChanged};
pub use self::nics::{NicChange, NicChanged};
pub use self::sculpt::{Came as SculptCame, Counts as SculptCounts};
pub use self::tiers::SLICE;

use self::actor::{ASK_QUEUE, Actor, Ask};
use self::core::{Core, Entry};
use self::life::{Event, Life};
use self::record::Record;
use crate::api::wire::by_hand::{AnnounceRequest, BlueprintRequest, ByHandView};
use crate::api::wire::forecast::ForecastView;
use crate::api::wire::foresight::{AskedBy, ForesightRequest, WhyView};
use crate::api::wire::{
    EventView, HostResources, HostView, MachineState, MachineView, OperationList, OperationView, PlanView,
    Removed, ResizeOutcome, ResizeRequest, ResizeView, RunRequest, SCHEMA, StopRequest,
};
use crate::foresight::Mode;
use crate::host::books::Grant;
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// Longest time that a guest gets to power off, seconds.
const MAX_STOP_SEC: u32 = 3600;
/// Lowest vsock context id of a guest (vsock(7): 0 to 2 are reserved).
const FIRST_CID: u32 = 3;
/// How long `guest_stream` waits for the guest agent of a machine that has just been started.
const YOUNG_GUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// And of one that has been up for longer.
const OLD_GUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// What "just been started" means.
const YOUNG: Duration = Duration::from_secs(120);
/// Between two attempts to reach a guest agent that somebody waits for.
const GUEST_PAUSE: Duration = Duration::from_millis(50);
/// Within this after the power of every machine should be off, the host goes down anyway.
const CLOSING_MARGIN: Duration = Duration::from_secs(15);

/// Why lathed ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// It will be back: machines run on.
    Restart,
    /// The host goes down: machines get the power button, then a time-out.
    HostGoesDown {
        /// What every guest gets.
        timeout: Duration,
    },
}

/// All machines of this host; a cloneable handle.
#[derive(Clone)]
pub struct Machines {
    core: Arc<Core>,
}

impl Machines {
    /// Opens the store, finds every machine again, finishes or undoes what was under way.
    ///
    /// # Errors
    /// `store`, `internal`: lathed cannot work on this host.
    pub async fn start(config: CoreConfig) -> Result<Self, Problem> {
        start::start(config).await.map(|core| Self { core })
    }

    /// All machines, by name.
    pub async fn list(&self) -> Vec<MachineView> {
        self.core.entries().iter().map(|entry| self.shown(entry)).collect()
    }

    /// One machine.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn show(&self, name: &str) -> Result<MachineView, Problem> {
        Ok(self.shown(&*self.core.entry(name)?))
    }

    fn shown(&self, entry: &Entry) -> MachineView {
        MachineView { wanted: inside::wanted(&self.core, entry), ..view::machine(entry) }
    }

    /// Makes and starts a machine; answers when its guest code runs. If that fails everything is undone.
    ///
    /// # Errors
    /// See `CORE_API`: `name-taken`, `…-over-capacity`, `kernel-image`, `launch-failed`, ….
    pub async fn run(&self, request: RunRequest) -> Result<MachineView, Problem> {
        let entry = self.admit(&request).await?;
        // From here on the machine is there, whatever becomes of whoever asked.
        entry.until(|life| matches!(life, Life::Running | Life::Gone) || life.is_settled()).await;
        match entry.with(|shared| (shared.record.life.clone(), shared.problem.clone())) {
            (Life::Gone, Some(problem)) => Err(problem),
            (Life::Gone, None) => {
                let message = format!("{} was removed before it ran", request.name);
                Err(Problem::new(Kind::Conflict, "launch-failed", message))
            }
            _ => Ok(view::machine(&entry)),
        }
    }

    /// Checks the request, reserves name, shards and addresses, stores all that, and starts the machine's task.
    async fn admit(&self, request: &RunRequest) -> Result<Arc<Entry>, Problem> {
        if self.core.is_closing() {
            return Err(Problem::new(Kind::Unavailable, "closing", "the host is going down"));
        }
        let _one_at_a_time = self.core.admission.lock().await;
        let record = self.record_of(request)?;
        let name = record.name.clone();
        self.core.with_books(|books| books.set(&name, record.booking()))?;
        if let Err(problem) = self.core.store.apply(Change::Insert(Box::new(record.clone()))).await {
            self.core.with_books(|books| books.enter(&name, Grant::default()));
            return Err(problem);
        }
        let (entry, asks) = self.core.new_entry(record);
        self.core.add(Arc::clone(&entry));
        Actor::spawn(Arc::clone(&self.core), Arc::clone(&entry), asks, vec![life::Effect::Prepare]);
        Ok(entry)
    }

    /// The complete record of a new machine; nothing is reserved yet.
    fn record_of(&self, request: &RunRequest) -> Result<Record, Problem> {
        let mut record = spec::record_of(request, &self.core.config)?;
        if self.core.entry(&record.name).is_ok() {
            let message = format!("there is already a machine {}", record.name);
            return Err(Problem::new(Kind::Conflict, "name-taken", message)
                .fix(format!("lathe show {0}        or remove it: lathe rm {0}", record.name)));
        }
        for drive in &record.source.disks {
            let record::Disk::Path { .. } = drive.disk else { continue };
            let path = files::disk_path(&self.core.config, &record.name, drive);
            if let Some(owner) = self.core.user_of_disk(&path, &record.name) {
                let message = format!("{} is in use by machine {owner}", path.display());
                return Err(
                    Problem::new(Kind::Conflict, "disk-in-use", message).fix(format!("lathe stop {owner}"))
                );
            }
        }
        let taken = self.core.taken();
        // There are far fewer machines than context ids.
        record.cid = (FIRST_CID..u32::MAX).find(|cid| !taken.cids.contains(cid)).unwrap_or(FIRST_CID);
        if request.net
            && let Some(network) = &self.core.config.network
        {
            record.net = Some(nics::allot(network, &self.core.config.host_name, &record.name, 0, &taken)?);
        }
        Ok(record)
    }

    /// What [`Machines::run`] would do.
    ///
    /// # Errors
    /// As [`Machines::run`], as far as it can be known.
    pub async fn plan_run(&self, request: &RunRequest) -> Result<PlanView, Problem> {
        let record = self.record_of(request)?;
        view::plan_run(&self.core, &record)
    }

    /// Changes a machine's shape; answers when that has ended, or the time to wait has.
    ///
    /// # Errors
    /// `no-such-machine`, `revision`, `bad-amount`, `over-bound`, `…-over-capacity`, `machine-busy`; then nothing changed.
    pub async fn resize(
        &self,
        name: &str,
        request: ResizeRequest,
        if_revision: Option<u64>,
    ) -> Result<ResizeView, Problem> {
        let entry = self.core.entry(name)?;
        let begin = Instant::now();
        let wait = request.wait_msec.map(|msec| Duration::from_millis(msec.min(resize::MAX_DEADLINE_MSEC)));
        let (reply, result) = oneshot::channel();
        let asked = entry.asks.send(Ask::Resize(AskedBy::Person, request, if_revision, reply)).await;
        asked.map_err(|_| gone(name))?;
        let view = result.await.map_err(|_| gone(name))??;
        let Some((_, number)) = view::parse_operation_id(&view.operation) else { return Ok(view) };
        if view.outcome != ResizeOutcome::UnderWay {
            return Ok(view);
        }
        let mut ended = entry.ended.subscribe();
        let end = ended.wait_for(|last| *last >= number);
        // The sender lives as long as the entry; every operation but those in the background has a deadline.
        let waited = tokio::time::timeout(wait.unwrap_or(Duration::MAX), end).await.is_ok();
        Ok(view::resized(&entry, number, waited.then(|| begin.elapsed())))
    }

    /// What a machine asked for over time, and what it is likely to ask for next.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`.
    pub async fn forecast(&self, name: &str) -> Result<ForecastView, Problem> {
        foresee::view(&self.core, name)
    }

    /// Changes what a machine has of its own about its future.
    ///
    /// # Errors
    /// `no-such-machine`, `bad-amount`, `store`.
    pub async fn set_foresight(&self, name: &str, request: ForesightRequest) -> Result<MachineView, Problem> {
        let entry = self.core.entry(name)?;
        let (reply, result) = oneshot::channel();
        entry.asks.send(Ask::Foresight(request, reply)).await.map_err(|_| gone(name))?;
        result.await.map_err(|_| gone(name))??;
        Ok(view::machine(&entry))
    }

    /// The last decisions about a machine's shape, and how good its forecasts were.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`.
    pub async fn why(&self, name: &str) -> Result<WhyView, Problem> {
        sculpt::why::view(&self.core, name)
    }

    /// What was decided about all machines' shapes, and what became of it, since lathed started.
    pub fn sculpted(&self) -> SculptCounts {
        self.core.sculpting.counts()
    }

    /// Says by hand what a machine will ask for.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`, `bad-blueprint`.
    pub async fn set_blueprint(&self, name: &str, request: BlueprintRequest) -> Result<ByHandView, Problem> {
        by_hand::set(&self.core, name, Some(request)).await
    }

    /// Takes back what was said by hand.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`.
    pub async fn unset_blueprint(&self, name: &str) -> Result<ByHandView, Problem> {
        by_hand::set(&self.core, name, None).await
    }

    /// Announces an event; it takes the place of one of the same name.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`, `bad-event`.
    pub async fn announce(
        &self,
        name: &str,
        event: String,
        request: AnnounceRequest,
    ) -> Result<ByHandView, Problem> {
        by_hand::announce(&self.core, name, event, request).await
    }

    /// Takes an event back.
    ///
    /// # Errors
    /// `no-such-machine`, `foresight-off`, `no-such-event`.
    pub async fn withdraw(&self, name: &str, event: &str) -> Result<ByHandView, Problem> {
        by_hand::withdraw(&self.core, name, event).await
    }

    /// The operations of a machine that are remembered, the newest last.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn operations(&self, name: &str) -> Result<OperationList, Problem> {
        let operations = view::operations(&*self.core.entry(name)?);
        Ok(OperationList { schema: SCHEMA, operations })
    }

    /// One operation.
    ///
    /// # Errors
    /// `no-such-operation`.
    pub async fn operation(&self, id: &str) -> Result<OperationView, Problem> {
        let (entry, number) = self.operation_of(id)?;
        view::operation(&entry, number)
    }

    /// Ends an operation as if it had not been asked for; answers when what was before is on its way back.
    ///
    /// # Errors
    /// `no-such-operation`, `operation-ended`, `…-over-capacity`.
    pub async fn cancel(&self, id: &str) -> Result<OperationView, Problem> {
        let (entry, number) = self.operation_of(id)?;
        let (reply, result) = oneshot::channel();
        entry.asks.send(Ask::Cancel(number, reply)).await.map_err(|_| gone(&entry.name))?;
        result.await.map_err(|_| gone(&entry.name))?
    }

    fn operation_of(&self, id: &str) -> Result<(Arc<Entry>, u64), Problem> {
        let (name, number) = view::parse_operation_id(id).ok_or_else(|| view::no_operation(id))?;
        let entry = self.core.entry(name).map_err(|_| view::no_operation(id))?;
        Ok((entry, number))
    }

    /// What [`Machines::resize`] would do.
    ///
    /// # Errors
    /// As [`Machines::resize`].
    pub async fn plan_resize(
        &self,
        name: &str,
        request: &ResizeRequest,
        if_revision: Option<u64>,
    ) -> Result<PlanView, Problem> {
        let entry = self.core.entry(name)?;
        let record = entry.with(|shared| shared.record.clone());
        resize::check_revision(&record, if_revision)?;
        view::plan_resize(&self.core, &entry, resize::target(&record, request)?)
    }

    /// Powers a machine off; answers when it is. Twice is once.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-busy`, `bad-amount`.
    pub async fn stop(&self, name: &str, request: StopRequest) -> Result<MachineView, Problem> {
        if request.timeout_sec > MAX_STOP_SEC {
            let message = format!("{} s: at most {MAX_STOP_SEC}", request.timeout_sec);
            return Err(Problem::new(Kind::BadRequest, "bad-amount", message));
        }
        let seconds = if request.force { 0 } else { request.timeout_sec };
        let entry = self.core.entry(name)?;
        ask(&entry, Event::StopAsked(Duration::from_secs(u64::from(seconds)))).await?;
        entry.until(|life| !matches!(life, Life::Stopping | Life::Clearing { .. } | Life::Running)).await;
        Ok(view::machine(&entry))
    }

    /// Starts a machine that is off; answers when its guest code runs. A running one stays as it is.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-busy`, `…-over-capacity`, `launch-failed`, ….
    pub async fn start_machine(&self, name: &str) -> Result<MachineView, Problem> {
        let entry = self.core.entry(name)?;
        ask(&entry, Event::StartAsked).await?;
        match entry.until(Life::is_settled).await {
            Life::Running => Ok(view::machine(&entry)),
            life => Err(entry.with(|shared| shared.problem.clone()).unwrap_or_else(|| {
                let message = format!("{name} did not start: {}", life.reason());
                Problem::new(Kind::Internal, "launch-failed", message).fix(format!("lathe logs {name}"))
            })),
        }
    }

    /// Stops a machine's vCPUs between two instructions; answers when they stand still. Twice is once.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-not-running`, `machine-busy`.
    pub async fn pause(&self, name: &str) -> Result<MachineView, Problem> {
        self.switch(name, Event::PauseAsked, &Life::Paused).await
    }

    /// Lets a paused machine go on. One that runs stays as it is.
    ///
    /// # Errors
    /// As [`Machines::pause`].
    pub async fn resume(&self, name: &str) -> Result<MachineView, Problem> {
        self.switch(name, Event::ResumeAsked, &Life::Running).await
    }

    async fn switch(&self, name: &str, event: Event, wanted: &Life) -> Result<MachineView, Problem> {
        let entry = self.core.entry(name)?;
        ask(&entry, event).await?;
        let life = entry.until(|life| !matches!(life, Life::Pausing | Life::Resuming)).await;
        if life == *wanted {
            return Ok(view::machine(&entry));
        }
        // It stands as before and says why, or something else has come in between.
        Err(entry.with(|shared| shared.problem.take()).unwrap_or_else(|| {
            let message = format!("{name} is {} instead", life.word());
            Problem::new(Kind::Conflict, "machine-busy", message).detail(life.reason())
        }))
    }

    /// Removes a machine; its private disks are kept aside unless `purge`.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-running` without `force`, `machine-busy`.
    pub async fn remove(&self, name: &str, purge: bool, force: bool) -> Result<Removed, Problem> {
        let entry = self.core.entry(name)?;
        ask(&entry, Event::RemoveAsked { purge, force }).await?;
        entry.until(|life| *life == Life::Gone).await;
        let kept = entry.with(|shared| shared.kept.clone());
        let kept = kept.map(|path| path.to_string_lossy().into_owned());
        Ok(Removed { schema: SCHEMA, name: name.to_owned(), kept })
    }

    /// A connection to the guest agent of a running machine, ready for frames of `lathe_guest::protocol`.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-not-running`, `guest-agent-unreachable`.
    pub async fn guest_stream(&self, name: &str) -> Result<UnixStream, Problem> {
        let entry = self.running(name)?;
        let still = || {
            let message = format!("{name} is paused: nothing in it can answer");
            Problem::new(Kind::Conflict, "machine-paused", message).fix(format!("lathe resume {name}"))
        };
        let is_still = || entry.with(|shared| shared.record.life.state() == MachineState::Paused);
        if is_still() {
            return Err(still());
        }
        let socket = self.core.config.socket_dir(name).join("vsock.sock");
        let young = entry.with(|shared| {
            shared.record.booted.as_ref().is_some_and(|booted| {
                !shared.guest_agent && core::unix_sec().saturating_sub(booted.at_unix_sec) < YOUNG.as_secs()
            })
        });
        let limit = if young { YOUNG_GUEST_TIMEOUT } else { OLD_GUEST_TIMEOUT };
        let deadline = Instant::now() + limit;
        loop {
            match guest::connect(&socket).await {
                Ok(stream) => return Ok(stream),
                Err(cause) if Instant::now() >= deadline => {
                    let message =
                        format!("{name}: its guest agent does not answer within {} s", limit.as_secs());
                    return Err(Problem::new(Kind::Unavailable, "guest-agent-unreachable", message)
                        .detail(format!("{cause}; it may still be booting, or have no lathe-guest"))
                        .fix(format!("lathe logs {name}        or: lathe console {name}")));
                }
                Err(_) => {}
            }
            self.running(name)?;
            if is_still() {
                return Err(still());
            }
            tokio::time::sleep(GUEST_PAUSE).await;
        }
    }

    fn running(&self, name: &str) -> Result<Arc<Entry>, Problem> {
        let entry = self.core.entry(name)?;
        let life = entry.with(|shared| shared.record.life.clone());
        if life.has_monitor() {
            return Ok(entry);
        }
        let message = format!("{name} is not running");
        Err(Problem::new(Kind::Conflict, "machine-not-running", message)
            .detail(life.reason())
            .fix(format!("lathe start {name}")))
    }

    /// Attaches to the console of a running machine.
    ///
    /// # Errors
    /// `no-such-machine`, `machine-not-running`.
    pub async fn console(&self, name: &str) -> Result<ConsoleHandle, Problem> {
        let entry = self.running(name)?;
        entry.console.handle().ok_or_else(|| {
            Problem::new(
                Kind::Conflict,
                "machine-not-running",
                format!("{name} has no console at the moment"),
            )
        })
    }

    /// The last lines of a machine's console, also of one that is off.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn logs(&self, name: &str, lines: usize) -> Result<String, Problem> {
        Ok(self.core.entry(name)?.console.lines(lines))
    }

    /// The last lines, and what comes from then on.
    ///
    /// # Errors
    /// `no-such-machine`.
    pub async fn logs_follow(
        &self,
        name: &str,
        lines: usize,
    ) -> Result<(String, broadcast::Receiver<Vec<u8>>), Problem> {
        let console = Arc::clone(&self.core.entry(name)?.console);
        // Subscribed first: what is printed in between comes twice rather than never.
        let output = console.follow();
        Ok((console.lines(lines), output))
    }

    /// How long it took from decisions until they were in force, since lathed started.
    pub fn enforced(&self) -> Vec<(enforced::Limit, enforced::Took)> {
        self.core.enforced.view().to_vec()
    }

    /// The host and its books; `peers_alive` is for whoever knows peers.
    pub fn host(&self) -> HostView {
        let core = &self.core;
        let entries = core.entries();
        let failed = entries
            .iter()
            .filter(|entry| entry.with(|shared| matches!(shared.record.life, Life::Failed { .. })))
            .count();
        // Copied before: within the expression below it would be held while machines are locked.
        let resources = *core.shape.borrow();
        HostView {
            schema: SCHEMA,
            name: core.config.host_name.clone(),
            state: if failed == 0 { "healthy".to_owned() } else { format!("{failed} machine(s) failed") },
            revision: core.with_books(|books| books.revision()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_sec: core.started.elapsed().as_secs(),
            resources,
            machines: entries.len() as u64,
            peers_alive: 0,
            launcher: core.launcher.kind().to_owned(),
            psi_cpu_centipercent: core.probe.pressure("cpu"),
            psi_memory_centipercent: core.probe.pressure("memory"),
            psi_io_centipercent: core.probe.pressure("io"),
            worst_delivered: view::worst_delivered(&entries),
            foresight: core.config.foresight.mode.into(),
            machines_sculpted: entries.iter().filter(|entry| entry.foresight().mode == Mode::On).count()
                as u64,
        }
    }

    /// The books, whenever they change: for adverts.
    pub fn local_shape(&self) -> watch::Receiver<HostResources> {
        self.core.shape.subscribe()
    }

    /// What happens to machines.
    pub fn events(&self) -> broadcast::Receiver<EventView> {
        self.core.subscribe()
    }

    /// Where complete uploads are put, each under its id.
    pub fn uploads_dir(&self) -> PathBuf {
        self.core.config.uploads_dir()
    }

    /// Beaten once a second by the control loop: whoever feeds a watchdog waits for changes.
    pub fn heartbeat(&self) -> watch::Receiver<Instant> {
        self.core.heartbeat.subscribe()
    }

    /// Ends what lathed does with machines.
    pub async fn shutdown(&self, reason: Shutdown) {
        if let Err(problem) = foresee::keep(&self.core).await {
            tracing::warn!(%problem, "what machines asked for last is not kept");
        }
        let Shutdown::HostGoesDown { timeout } = reason else { return };
        self.core.closing.store(true, Ordering::Release);
        let entries = self.core.entries();
        for entry in &entries {
            // A machine that is busy is on its way down or is taken care of by systemd.
            let _ = ask(entry, Event::StopAsked(timeout)).await;
        }
        let all_off = async {
            for entry in &entries {
                entry.until(|life| !life.holds_shards()).await;
            }
        };
        if tokio::time::timeout(timeout + CLOSING_MARGIN, all_off).await.is_err() {
            tracing::error!("the host goes down although not all machines are off");
        }
    }
}

fn gone(name: &str) -> Problem {
    Problem::new(Kind::NotFound, "no-such-machine", format!("machine {name} has just been removed"))
}

async fn ask(entry: &Entry, event: Event) -> Result<(), Problem> {
    let (reply, answer) = oneshot::channel();
    entry.asks.send(Ask::Event(event, reply)).await.map_err(|_| gone(&entry.name))?;
    answer.await.map_err(|_| gone(&entry.name))?
}

impl Core {
    fn new_entry(&self, mut record: Record) -> (Arc<Entry>, mpsc::Receiver<Ask>) {
        record.name_drives();
        let (sender, asks) = mpsc::channel(ASK_QUEUE);
        let folder = self.config.machine_dir(&record.name);
        (Arc::new(Entry::new(record, &folder, sender, self.config.foresight)), asks)
    }
}
