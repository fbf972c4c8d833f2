//! One task per machine: takes what happens, asks [`life::decide`], stores the answer, then does it.
//!
//! It is the only writer of its machine's record. A state is stored before its effects begin; an effect's result is the next event.
//! Asks from outside wait while an effect runs, except that stopping never blocks: the guest's time is a timer.

mod adopt;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use lathe_guest::protocol::{self as guest_protocol, ShutdownMode};
use lathe_vmm::control::wire::{Command, Event as MonitorEvent, ExitReason, Phase};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::core::{Core, Entry, Usage};
use super::disks::{self, DiskChange, Plugs};
use super::launch::{self, Live};
use super::life::{self, Decision, Effect, End, EndKind, Event, Life, Refused, Rules};
use super::nics::{self, NicChange, Unplugs};
use super::resize::Shaper;
use super::sight::Sight;
use super::{files, guest, inside, resize, sculpt, shape, uplink};
use crate::api::wire::foresight::{AskedBy, ForesightRequest};
use crate::api::wire::{OnTrouble, OperationView, ResizeRequest, ResizeView};
use crate::host::books::Grant;
use crate::monitor::Notice;
use crate::network::PortState;
use crate::problem::{Kind, Problem};
use crate::store::Change;

/// Asks waiting for one machine.
pub const ASK_QUEUE: usize = 32;
/// How long a start may take in all, image copies aside.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(120);
/// How often clearing up is tried before the machine goes on without.
const CLEAR_ATTEMPTS: u32 = 5;
/// Between two attempts.
const CLEAR_PAUSE: Duration = Duration::from_secs(1);
/// A machine that ran this long has no restarts in a row.
const PEACE: Duration = Duration::from_secs(60);
/// Between the end of a monitor's reader without a word and the belief that the monitor is gone.
const READER_GRACE: Duration = Duration::from_secs(1);
/// How long the guest agent may take to accept a shutdown before the power button is pressed instead.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between two presses of the power button.
const PRESS_AGAIN: Duration = if cfg!(test) { Duration::from_millis(50) } else { Duration::from_secs(5) };

/// What somebody wants of a machine.
pub enum Ask {
    /// An event from outside; answered when it was decided, not when it is done.
    Event(Event, oneshot::Sender<Result<(), Problem>>),
    /// A change of shape, with the revision it is based on; answered when it has ended or goes on without the host.
    Resize(AskedBy, ResizeRequest, Option<u64>, oneshot::Sender<Result<ResizeView, Problem>>),
    /// Another say of its own about its future; answered when it is stored.
    Foresight(ForesightRequest, oneshot::Sender<Result<(), Problem>>),
    /// Goes on after a restart of lathed; answered when it is decided how.
    Resume {
        /// The host has booted since.
        reboot: bool,
        /// Told when decided.
        decided: oneshot::Sender<()>,
    },
    /// Ends an operation, by its number, as if it had not been asked for; answered when what was before is on its way back.
    Cancel(u64, oneshot::Sender<Result<OperationView, Problem>>),
    /// A change of its disks; answered when it is done or refused.
    Disk(DiskChange, disks::Reply),
    /// A change of its nics; answered when it is done or refused.
    Nic(NicChange, nics::Reply),
    /// The file of a disk of this name is made, or is not.
    DiskMade(String, Result<(), Problem>),
    /// What came of a step of a change of shape.
    Shape(shape::Event),
    /// The guest agent was found or lost.
    GuestAgent(bool),
}

/// Whether a state that cannot be stored may be entered.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Storing {
    /// Somebody asked: no promise without a record.
    Must,
    /// It has happened, whatever the store says; after a restart the kernel tells.
    Should,
}

pub(super) struct Actor {
    pub(super) core: Arc<Core>,
    pub(super) entry: Arc<Entry>,
    live: Option<Live>,
    notices: Option<mpsc::Receiver<Notice>>,
    exit: Option<ExitReason>,
    /// It has been told to end at once; if it does not, it is killed.
    told_to_quit: bool,
    timer: Option<Instant>,
    /// When the power button is pressed once more: a guest that just starts does not watch it yet.
    press_again: Option<Instant>,
    guest: Option<AbortHandle>,
    since: Instant,
    attempts: u32,
    pub(super) shape: Shaper,
    pub(super) plugs: Plugs,
    pub(super) unplugs: Unplugs,
}

impl Actor {
    /// Starts the machine's task, which begins with `first`.
    pub(super) fn spawn(core: Arc<Core>, entry: Arc<Entry>, asks: mpsc::Receiver<Ask>, first: Vec<Effect>) {
        let shape = entry.with(|shared| Shaper::new(&shared.record));
        let actor = Self {
            core,
            entry,
            shape,
            plugs: Plugs::default(),
            unplugs: Unplugs::default(),
            live: None,
            notices: None,
            exit: None,
            told_to_quit: false,
            timer: None,
            press_again: None,
            guest: None,
            since: Instant::now(),
            attempts: 0,
        };
        tokio::spawn(actor.run(asks, first));
    }

    fn life(&self) -> Life {
        self.entry.with(|shared| shared.record.life.clone())
    }

    async fn run(mut self, mut asks: mpsc::Receiver<Ask>, first: Vec<Effect>) {
        self.carry_out(first).await;
        while self.life() != Life::Gone {
            let deadline = self.timer.unwrap_or_else(far_away);
            let look = resize::wake(&self).map(Instant::from_std);
            let disk = self.plugs.wake();
            let nic = self.unplugs.wake();
            tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.take(ask).await,
                    None => break,
                },
                notice = next(&mut self.notices) => self.notice(notice).await,
                () = sleep_until(deadline), if self.timer.is_some() => {
                    self.timer = None;
                    self.happen(Event::TimeIsUp).await;
                }
                () = sleep_until(self.press_again.unwrap_or_else(far_away)), if self.press_again.is_some() => {
                    self.press_again = None;
                    if self.life() == Life::Stopping {
                        self.press_button().await;
                    }
                }
                () = sleep_until(disk.unwrap_or_else(far_away)), if disk.is_some() => disks::tick(&mut self).await,
                () = sleep_until(nic.unwrap_or_else(far_away)), if nic.is_some() => nics::tick(&mut self).await,
                () = sleep_until(look.unwrap_or_else(far_away)), if look.is_some() => {
                    resize::tick(&mut self).await;
                }
            }
        }
        self.let_go();
    }

    async fn take(&mut self, ask: Ask) {
        match ask {
            Ask::Event(event, reply) => {
                let (decision, answer) = match self.decide(event) {
                    Ok(decision) => (Some(decision), Ok(())),
                    Err(problem) => (None, Err(problem)),
                };
                // Stored before it is acknowledged, acknowledged before it is done.
                let stored = match &decision {
                    Some(decision) => self.enter(decision.life.clone(), Storing::Must).await,
                    None => answer,
                };
                let go_on = stored.is_ok();
                // Whoever asked may have gone.
                let _ = reply.send(stored);
                if let (Some(decision), true) = (decision, go_on) {
                    self.carry_out(decision.effects).await;
                }
            }
            Ask::Resize(by, request, revision, reply) => {
                let _ = reply.send(resize::resize(self, by, &request, revision).await);
            }
            Ask::Foresight(request, reply) => {
                let _ = reply.send(sculpt::set(self, &request).await);
            }
            Ask::Resume { reboot, decided } => self.resume(reboot, decided).await,
            Ask::Cancel(number, reply) => {
                let _ = reply.send(resize::cancel(self, number).await);
            }
            Ask::Disk(change, reply) => disks::change(self, change, reply).await,
            Ask::Nic(change, reply) => nics::change(self, change, reply).await,
            Ask::DiskMade(disk, made) => disks::made(self, &disk, made).await,
            Ask::Shape(event) => resize::take_in(self, event).await,
            Ask::GuestAgent(there) => {
                self.entry.with(|shared| shared.guest_agent = there);
                nics::catch_up(self);
                resize::take_in(self, shape::Event::Agent(there)).await;
            }
        }
    }

    fn rules(&self) -> Rules {
        let restart = self.entry.with(|shared| shared.record.restart);
        Rules { restart, attempts: self.attempts }
    }

    /// Decides on something asked for; a start needs room in the books first.
    fn decide(&self, event: Event) -> Result<Decision, Problem> {
        let name = &self.entry.name;
        let life = self.life();
        let decision =
            life::decide(&life, event, self.rules()).map_err(|refused| refusal(name, refused, &life))?;
        if decision.life.holds_shards() && !life.holds_shards() {
            if self.core.is_closing() && matches!(decision.life, Life::Starting { .. }) {
                return Err(Problem::new(Kind::Unavailable, "closing", "the host is going down"));
            }
            if matches!(decision.life, Life::Starting { .. }) {
                let mut record = self.entry.with(|shared| shared.record.clone());
                record.life = decision.life.clone();
                self.core.with_books(|books| books.set(name, record.booking()))?;
            }
        }
        Ok(decision)
    }

    /// Something happened by itself: decide, store, do.
    async fn happen(&mut self, event: Event) {
        match life::decide(&self.life(), event, self.rules()) {
            Ok(decision) => {
                let _ = self.enter(decision.life, Storing::Should).await;
                self.carry_out(decision.effects).await;
            }
            Err(refused) => tracing::debug!(machine = self.entry.name, ?refused, "an event came too late"),
        }
    }

    /// Makes `life` the machine's state, durably, and corrects the books.
    async fn enter(&mut self, life: Life, storing: Storing) -> Result<(), Problem> {
        let mut record = self.entry.with(|shared| shared.record.clone());
        if record.life == life {
            return Ok(());
        }
        let before = std::mem::replace(&mut record.life, life.clone());
        if life == Life::Gone {
            self.core.with_books(|books| books.enter(&record.name, Grant::default()));
        } else {
            if matches!(life, Life::Waiting { .. }) {
                record.restarts += 1;
                self.attempts += 1;
            }
            if life == Life::Running {
                self.since = Instant::now();
            }
            if !life.holds_shards() {
                (record.booted, record.holds) = (None, None);
            }
            let stored = self.core.store.apply(Change::Put(Box::new(record.clone()))).await;
            if let Err(problem) = &stored {
                tracing::error!(machine = record.name, %problem, "cannot store a machine's state");
            }
            if storing == Storing::Must {
                stored?;
            }
            self.core.with_books(|books| books.enter(&record.name, record.booking()));
        }
        self.entry.with(|shared| shared.record = record);
        uplink::follow(&self.core).await;
        self.announce(&before, &life);
        if life == Life::Running {
            nics::catch_up(self);
        }
        self.entry.life.send_replace(life);
        Ok(())
    }

    fn announce(&self, before: &Life, life: &Life) {
        let name = &self.entry.name;
        let (kind, message) = match life {
            // The pause failed, which whoever asked for it is told.
            Life::Running if *before == Life::Pausing => return,
            Life::Running if matches!(before, Life::Panicked { .. }) => return,
            Life::Running if matches!(before, Life::Paused | Life::Resuming) => {
                ("machine-resumed", format!("{name} runs again"))
            }
            Life::Paused if *before == Life::Resuming => return,
            Life::Paused => ("machine-paused", format!("{name} is paused")),
            Life::Running => ("machine-running", format!("{name} runs")),
            Life::Stopped { reason } => ("machine-stopped", format!("{name} is off: {reason}")),
            Life::Failed { reason } => ("machine-failed", format!("{name} failed: {reason}")),
            Life::Waiting { end } => {
                ("machine-restarting", format!("{name} will be started again: {}", end.reason))
            }
            Life::Gone => ("machine-removed", format!("{name} is removed")),
            _ => return,
        };
        self.core.tell(kind, name, message);
    }

    /// Carries effects out, and what follows from them.
    async fn carry_out(&mut self, effects: Vec<Effect>) {
        let mut queue = VecDeque::from(effects);
        while let Some(effect) = queue.pop_front() {
            let Some(event) = self.effect(effect).await else { continue };
            match life::decide(&self.life(), event, self.rules()) {
                Ok(decision) => {
                    let _ = self.enter(decision.life, Storing::Should).await;
                    queue.extend(decision.effects);
                }
                Err(refused) => {
                    tracing::debug!(machine = self.entry.name, ?refused, "an effect came too late")
                }
            }
        }
    }

    async fn effect(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Prepare => Some(self.prepare().await),
            Effect::Launch => Some(self.launch().await),
            Effect::Watch => {
                self.watch_guest();
                None
            }
            Effect::Pause => Some(self.switch(Command::Pause {}, Event::Paused, Event::PauseFailed).await),
            Effect::Resume => {
                Some(self.switch(Command::Resume {}, Event::Resumed, Event::ResumeFailed).await)
            }
            Effect::PressPower => {
                self.press_power().await;
                None
            }
            Effect::CutPower => self.cut_power().await,
            Effect::Clear => {
                self.clear().await;
                Some(Event::Cleared)
            }
            Effect::Erase => Some(self.erase().await),
            Effect::Timer(after) => {
                self.timer = Some(Instant::now() + after);
                None
            }
            Effect::NoTimer => {
                self.timer = None;
                None
            }
        }
    }

    async fn prepare(&self) -> Event {
        let record = self.entry.with(|shared| shared.record.clone());
        let config = self.core.config.clone();
        let prepared = tokio::task::spawn_blocking(move || files::prepare(&config, &record)).await;
        match prepared.unwrap_or_else(|cause| Err(Problem::internal("preparing a machine", cause))) {
            Ok(()) => Event::Prepared,
            Err(problem) => {
                self.fail(problem);
                Event::PrepareFailed
            }
        }
    }

    fn fail(&self, problem: Problem) -> String {
        tracing::warn!(machine = self.entry.name, "{} cannot be started: {problem}", self.entry.name);
        let reason = problem.message.clone();
        self.entry.with(|shared| shared.problem = Some(problem));
        reason
    }

    async fn launch(&mut self) -> Event {
        self.exit = None;
        self.told_to_quit = false;
        let record = self.entry.with(|shared| shared.record.clone());
        let first = matches!(record.life, Life::Starting { first: true });
        let launching = launch::launch(&self.core, &record, &self.entry.console);
        let launched = timeout(LAUNCH_TIMEOUT, launching).await.unwrap_or_else(|_| {
            let message = format!("{} did not start within {} s", record.name, LAUNCH_TIMEOUT.as_secs());
            Err(Problem::new(Kind::Internal, "launch-failed", message))
        });
        match launched {
            Ok(started) => {
                self.entry.with(|shared| {
                    shared.record.booted = Some(started.booted);
                    shared.problem = None;
                    shared.usage = Usage::default();
                    *shared.sight = Sight::default();
                    shared.reboots = 0;
                    shared.plugged = disks::plugged_at_start(&record);
                    shared.nics = nics::plugged_at_start(&self.core, &record);
                    shared.seen.clear();
                });
                self.connect(started.live, started.notices).await;
                resize::up(self, resize::Found::Started(started.placed, started.standing)).await;
                if first {
                    files::forget_uploads(&self.core.config, &record);
                }
                Event::Launched
            }
            Err(problem) => Event::LaunchFailed(self.fail(problem)),
        }
    }

    /// Takes a monitor over and reads back what is in force.
    async fn connect(&mut self, live: Live, notices: mpsc::Receiver<Notice>) {
        let limits = live.launched.tree.as_ref().and_then(|tree| tree.cpu().ok());
        // Earlier releases limited the vCPUs only.
        let quota = limits.and_then(|limits| limits.machine.max.or(limits.vcpu.max));
        let port = self.read_port().await;
        self.entry.with(|shared| {
            shared.launched = Some(live.launched.clone());
            shared.monitor = Some(live.monitor.clone());
            shared.quota_milli = quota.map(|quota| quota.0);
            shared.port = port;
        });
        self.live = Some(live);
        self.notices = Some(notices);
    }

    /// What the port of the first nic has in force.
    pub(super) async fn read_port(&self) -> PortState {
        let tap = self.entry.with(|shared| shared.record.all_nics().next().map(|nic| nic.tap.clone()));
        match (&self.core.ports, tap) {
            (Some(ports), Some(tap)) => ports.read(&tap).await.unwrap_or_default(),
            _ => PortState::default(),
        }
    }

    /// Lets go of everything that belongs to the present monitor.
    fn let_go(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.abort();
        }
        self.live = None;
        self.notices = None;
        self.entry.console.detach();
        self.entry.with(|shared| {
            shared.launched = None;
            shared.monitor = None;
            shared.guest_agent = false;
            shared.quota_milli = None;
            shared.force = None;
            shared.plugged.clear();
            shared.nics.clear();
            shared.configured.clear();
            shared.port = PortState::default();
            shared.usage = Usage::default();
            *shared.sight = Sight::default();
            (shared.panic, shared.expired) = (None, false);
        });
        self.entry.profile(|profile| profile.forget_inside());
    }

    async fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Event(MonitorEvent::Ended(reason)) => self.exit = Some(reason),
            Notice::Event(MonitorEvent::Rebooted {}) => {
                self.entry.with(|shared| {
                    shared.reboots += 1;
                    shared.guest_agent = false;
                    shared.configured.clear();
                    (shared.panic, shared.expired) = (None, false);
                });
                self.entry.profile(|profile| profile.forget_inside());
                self.core.tell("machine-rebooted", &self.entry.name, format!("{} reboots", self.entry.name));
                self.watch_guest();
                resize::rebooted(self).await;
                self.happen(Event::Rebooted).await;
            }
            Notice::Event(MonitorEvent::CpusChanged(status)) => {
                resize::take_in(self, shape::Event::Cpus(status)).await;
            }
            Notice::Event(MonitorEvent::MemoryChanged(status)) => {
                resize::take_in(self, shape::Event::Memory(status)).await;
            }
            Notice::Event(MonitorEvent::Phase(phase)) => {
                let paused = phase == Phase::Paused;
                self.entry.with(|shared| shared.expired &= phase != Phase::Running);
                resize::take_in(self, shape::Event::Paused(paused)).await;
                self.follow_phase().await;
            }
            Notice::Event(MonitorEvent::DeviceNeedsReset { device, reason }) => {
                let message = format!("{device} of {} stands still: {reason}", self.entry.name);
                self.core.tell("machine-device", &self.entry.name, message);
            }
            Notice::Event(MonitorEvent::WatchdogExpired {}) => {
                let name = &self.entry.name;
                self.entry.with(|shared| shared.expired = shared.record.watchdog == Some(OnTrouble::Pause));
                self.core.tell("machine-hangs", name, format!("{name}: {}", life::WATCHDOG_REASON));
            }
            Notice::Event(MonitorEvent::GuestPanicked { message }) => {
                let name = &self.entry.name;
                let words = format!("{name}: {}", life::panic_reason(&message));
                self.core.tell("machine-panicked", name, words);
                self.entry.with(|shared| shared.panic = Some(message.clone()));
                self.happen(Event::Panicked(message)).await;
            }
            Notice::Event(MonitorEvent::TripleFault {}) => {
                let message = format!("{} reset itself by a triple fault", self.entry.name);
                self.core.tell("machine-triple-fault", &self.entry.name, message);
            }
            Notice::Event(MonitorEvent::DeviceDetached { .. }) => {
                disks::settle(self).await;
                nics::settle(self).await;
            }
            Notice::Answer(id, result) => resize::answered(self, id, result).await,
            Notice::Gone => {
                let end = self.how_it_ended().await;
                if self.since.elapsed() > PEACE {
                    self.attempts = 0;
                }
                self.let_go();
                self.happen(Event::MonitorEnded(end)).await;
            }
        }
    }

    /// The monitor has entered a phase, perhaps because of somebody else. Its status counts: the notice may be older than what was asked
    /// of it since.
    async fn follow_phase(&mut self) {
        let Some(live) = &self.live else { return };
        match live.monitor.status().await.map(|status| status.phase) {
            Ok(Phase::Paused) => self.happen(Event::Paused).await,
            Ok(Phase::Running) => self.happen(Event::Resumed).await,
            // It is over, and says so in another notice.
            Ok(_) | Err(_) => {}
        }
    }

    /// Stops the vCPUs or lets them go.
    async fn switch(&self, command: Command, done: Event, failed: Event) -> Event {
        let told = match &self.live {
            Some(live) => live.monitor.tell(command).await.map_err(|problem| problem.to_string()),
            None => Err("it has no monitor".to_owned()),
        };
        let Err(problem) = told else { return done };
        let name = &self.entry.name;
        tracing::error!(machine = name, problem, "cannot pause or resume a machine");
        let message = format!("{name} was not paused or resumed: {problem}");
        self.entry.with(|shared| shared.problem = Some(Problem::new(Kind::Internal, "internal", message)));
        failed
    }

    async fn how_it_ended(&mut self) -> End {
        match self.exit.take() {
            Some(exit) => end_of(exit),
            None => self.core.launcher.how_it_ended(&self.entry.name).await,
        }
    }

    async fn press_power(&mut self) {
        let socket = self.core.config.socket_dir(&self.entry.name).join("vsock.sock");
        let asked = async {
            let mut stream = guest::connect(&socket).await?;
            let request = guest_protocol::Request::Shutdown { mode: ShutdownMode::PowerOff };
            guest::tell(&mut stream, &request).await
        };
        if self.entry.with(|shared| shared.guest_agent)
            && let Ok(Ok(())) = timeout(SHUTDOWN_TIMEOUT, asked).await
        {
            return;
        }
        self.press_button().await;
    }

    /// Again and again until the machine is off: nobody says whether it was heard.
    async fn press_button(&mut self) {
        self.press_again = Some(Instant::now() + PRESS_AGAIN);
        if let Some(live) = &self.live
            && let Err(problem) = live.monitor.tell(Command::PowerButton {}).await
        {
            tracing::warn!(machine = self.entry.name, %problem, "cannot press the power button");
        }
    }

    async fn cut_power(&mut self) -> Option<Event> {
        self.press_again = None;
        let told = match &self.live {
            Some(live) if !self.told_to_quit => live.monitor.tell(Command::Quit {}).await.is_ok(),
            _ => false,
        };
        self.told_to_quit = told;
        if told {
            // Its end comes as a notice.
            return None;
        }
        if let Err(problem) = self.core.launcher.end(&self.entry.name).await {
            tracing::error!(machine = self.entry.name, %problem, "cannot end a monitor");
            return None;
        }
        self.let_go();
        Some(Event::MonitorEnded(End { kind: EndKind::Asked, reason: "power cut on request".to_owned() }))
    }

    /// Removes monitor, tap and socket, whatever there is.
    async fn clear(&mut self) {
        self.let_go();
        resize::down(self).await;
        for attempt in 1..=CLEAR_ATTEMPTS {
            match self.try_clear().await {
                Ok(()) => break,
                Err(problem) => {
                    tracing::error!(machine = self.entry.name, attempt, %problem, "cannot clear up after a machine");
                }
            }
            tokio::time::sleep(CLEAR_PAUSE).await;
        }
        disks::down(self).await;
        nics::down(self).await;
    }

    async fn try_clear(&self) -> Result<(), Problem> {
        let name = &self.entry.name;
        // While the host goes down systemd stops units only after lathed has ended: waiting for one here would wait for ourselves.
        if !self.core.is_closing() {
            self.core.launcher.end(name).await?;
        }
        let record = self.entry.with(|shared| shared.record.clone());
        for nic in record.all_nics() {
            if let Some(ports) = &self.core.ports {
                ports.remove(&nic.tap).await?;
            }
        }
        files::remove_folder(&self.core.config.socket_dir(name))
    }

    async fn erase(&self) -> Event {
        let record = self.entry.with(|shared| shared.record.clone());
        let purge = matches!(record.life, Life::Removing { purge: true });
        let config = self.core.config.clone();
        let name = record.name.clone();
        let now = super::core::unix_sec();
        let erased = tokio::task::spawn_blocking(move || files::erase(&config, &record, purge, now)).await;
        let erased = erased.unwrap_or_else(|cause| Err(Problem::internal("removing a machine", cause)));
        let deleted = match erased {
            Ok(kept) => {
                self.entry.with(|shared| shared.kept = kept);
                self.core.store.apply(Change::Delete(name.clone())).await
            }
            Err(problem) => Err(problem),
        };
        match deleted {
            Ok(()) => {
                self.core.forget(&name);
                Event::Erased
            }
            Err(problem) => {
                tracing::error!(machine = name, %problem, "cannot remove a machine");
                Event::EraseFailed
            }
        }
    }

    /// Looks for the guest agent until it answers, configures its network, and notices when it is gone.
    fn watch_guest(&mut self) {
        if let Some(earlier) = self.guest.take() {
            earlier.abort();
        }
        let socket = self.core.config.socket_dir(&self.entry.name).join("vsock.sock");
        let (core, entry) = (Arc::clone(&self.core), Arc::clone(&self.entry));
        let task = tokio::spawn(async move {
            let mut pause = guest::FIRST_PAUSE;
            loop {
                if let Ok(mut stream) = guest::connect(&socket).await
                    && let Ok(hello) = guest::hello(&mut stream).await
                {
                    pause = guest::FIRST_PAUSE;
                    nics::tell_guest(&core, &entry, &mut stream, hello.version).await;
                    if entry.asks.send(Ask::GuestAgent(true)).await.is_err() {
                        return;
                    }
                    // Ends when the guest agent does, or breaks the rules.
                    inside::follow(&core, &entry, &mut stream, hello.version).await;
                    if entry.asks.send(Ask::GuestAgent(false)).await.is_err() {
                        return;
                    }
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(guest::LONGEST_PAUSE);
            }
        });
        self.guest = Some(task.abort_handle());
    }

    /// The monitor, while there is one.
    pub(super) fn live(&self) -> Option<&Live> {
        self.live.as_ref()
    }
}

/// How a monitor that could still say so has ended.
fn end_of(exit: ExitReason) -> End {
    let end = |kind, reason: &str| End { kind, reason: reason.to_owned() };
    match exit {
        ExitReason::PowerOff => end(EndKind::PowerOff, "powered off by the guest"),
        ExitReason::Reboot => end(EndKind::PowerOff, "the guest asked for a reset"),
        ExitReason::Panic { message } => end(EndKind::Failure, &life::panic_reason(&message)),
        ExitReason::Watchdog => end(EndKind::Failure, life::WATCHDOG_REASON),
        ExitReason::TripleFault => end(EndKind::Failure, "the guest reset itself by a triple fault"),
        ExitReason::Quit => end(EndKind::Asked, "its monitor was told to end"),
        ExitReason::Crash { message } => end(EndKind::Failure, &format!("the guest crashed: {message}")),
    }
}

/// A time that never comes: `select!` needs a deadline even when none counts.
fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

async fn next(notices: &mut Option<mpsc::Receiver<Notice>>) -> Notice {
    match notices {
        Some(receiver) => match receiver.recv().await {
            Some(notice) => notice,
            None => {
                // A reader that ended without a word is an end as well, unless lathed itself is ending, reader first.
                tokio::time::sleep(READER_GRACE).await;
                Notice::Gone
            }
        },
        None => std::future::pending().await,
    }
}

fn refusal(name: &str, refused: Refused, life: &Life) -> Problem {
    match refused {
        Refused::Running => Problem::new(Kind::Conflict, "machine-running", format!("{name} is running"))
            .fix(format!("lathe stop {name}        or: lathe rm --force {name}")),
        Refused::Paused => {
            Problem::new(Kind::Conflict, "machine-paused", format!("{name} is paused, not off"))
                .fix(format!("lathe resume {name}"))
        }
        Refused::Off => Problem::new(Kind::Conflict, "machine-not-running", format!("{name} is not running"))
            .detail(life.reason())
            .fix(format!("lathe start {name}")),
        Refused::Busy => {
            let message = format!("{name} is {} at the moment", life.word());
            Problem::new(Kind::Conflict, "machine-busy", message).fix("try again in a moment")
        }
    }
}
