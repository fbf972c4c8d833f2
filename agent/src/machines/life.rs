//! A machine's life: every state, every event, and the one function that decides what follows.
//!
//! [`decide`] is pure. The state is written to the store before any effect is carried out, so a state in between *is* the durable
//! intent: after a crash [`resume`] looks at what the kernel shows and goes on from there.
//!
//! ```text
//! Creating ─► Starting ─► Running ─► Stopping ─► Clearing ─► Stopped | Failed ─► Removing ─► (gone)
//!                ▲          ▲ │ └────────────────▲   │
//!                │  Resuming │ ▼ Pausing          │   │
//!                │          Paused ───────────────┘   │
//!                └────────── Waiting ◄────────────────┘ restart policy
//! ```
//! `Creating`, `Starting`, `Pausing`, `Resuming`, `Clearing` and `Removing` always have an effect under way; `Stopping` and `Waiting`
//! have a timer; `Running` and `Paused` have a watched monitor; `Stopped` and `Failed` rest. From `Running`, `Panicked` is where a guest
//! has time to reset by itself before its power is cut.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::api::wire::{MachineState, RestartPolicy};

/// First pause before a restart; doubled each time.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest pause before a restart.
const LONGEST_BACKOFF: Duration = Duration::from_secs(60);
/// What a stop that lathed itself repeats after its own restart gives the guest.
const RESUMED_STOP_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause before another try to remove what could not be removed.
const REMOVE_RETRY: Duration = Duration::from_secs(10);
/// How long a guest whose kernel has panicked has to reset by itself (`panic=` on its command line; 10 and 30 are usual).
const PANIC_TIMEOUT: Duration = Duration::from_secs(45);

/// Where a machine is; stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Its folder and disks are being made.
    Creating,
    /// Its monitor is being started and told.
    Starting {
        /// It has never run: if it does not start it is taken back.
        first: bool,
    },
    /// Guest code runs.
    Running,
    /// Its kernel has panicked and has not reset yet.
    Panicked {
        /// What it said last.
        message: String,
    },
    /// Its vCPUs are being stopped.
    Pausing,
    /// Its vCPUs stand still.
    Paused,
    /// Its vCPUs are being let go again.
    Resuming,
    /// Somebody wants it off.
    Stopping,
    /// The monitor is over; unit, tap and sockets are being removed.
    Clearing {
        /// How it ended.
        end: End,
    },
    /// It will be started again after a pause.
    Waiting {
        /// How it ended.
        end: End,
    },
    /// Off as wished.
    Stopped {
        /// In words.
        reason: String,
    },
    /// Off against its will.
    Failed {
        /// In words.
        reason: String,
    },
    /// Being removed.
    Removing {
        /// With its data.
        purge: bool,
    },
    /// No more; never stored.
    Gone,
}

/// How a monitor ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Whose doing.
    pub kind: EndKind,
    /// In words.
    pub reason: String,
}

/// Whose doing an end was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndKind {
    /// The guest powered itself off.
    PowerOff,
    /// `lathe stop`, or the host's shutdown.
    Asked,
    /// Something broke.
    Failure,
    /// The host went down under it.
    HostReboot,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Folder and disks are there.
    Prepared,
    /// They are not.
    PrepareFailed,
    /// `Go` was acknowledged.
    Launched,
    /// It was not; the reason in words.
    LaunchFailed(String),
    /// The monitor is over.
    MonitorEnded(End),
    /// The guest's kernel has panicked; what it said last.
    Panicked(String),
    /// The guest has reset and boots again.
    Rebooted,
    /// Somebody wants it to stand still.
    PauseAsked,
    /// Its vCPUs stand still, whoever wanted that.
    Paused,
    /// They do not.
    PauseFailed,
    /// Somebody wants it to go on.
    ResumeAsked,
    /// Its vCPUs run again, whoever wanted that.
    Resumed,
    /// They do not.
    ResumeFailed,
    /// Somebody wants it off after at most this long; zero cuts the power.
    StopAsked(Duration),
    /// The time is up: of a stop, of a pause, of a repeated removal.
    TimeIsUp,
    /// Unit, tap and sockets are gone.
    Cleared,
    /// Somebody wants it on.
    StartAsked,
    /// Somebody wants it gone.
    RemoveAsked {
        /// With its data.
        purge: bool,
        /// Even when it runs.
        force: bool,
    },
    /// Folder and record are gone.
    Erased,
    /// They are not.
    EraseFailed,
}

/// What to do about it, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Makes folder and disks. Ends in `Prepared` or `PrepareFailed`.
    Prepare,
    /// Starts the monitor up to `Go`. Ends in `Launched` or `LaunchFailed`.
    Launch,
    /// Watches the running monitor and looks for the guest agent.
    Watch,
    /// Stops the vCPUs. Ends in `Paused` or `PauseFailed`.
    Pause,
    /// Lets them go again. Ends in `Resumed` or `ResumeFailed`.
    Resume,
    /// Asks the guest to power off.
    PressPower,
    /// Ends the monitor at once. Its end is seen by the watch, or by `Clear`.
    CutPower,
    /// Removes unit, tap and sockets, whatever is there. Ends in `Cleared`.
    Clear,
    /// Removes folder and record. Ends in `Erased` or `EraseFailed`.
    Erase,
    /// `TimeIsUp` after this long; replaces an earlier timer.
    Timer(Duration),
    /// Forgets the timer.
    NoTimer,
}

/// Why an event is not for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// It is on its way somewhere else.
    Busy,
    /// It runs, and force was not asked for.
    Running,
    /// It is paused.
    Paused,
    /// It is off.
    Off,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The state from now on.
    pub life: Life,
    /// What to do.
    pub effects: Vec<Effect>,
}

/// What [`decide`] may know besides the state.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// What to do when it ends by itself.
    pub restart: RestartPolicy,
    /// Restarts in a row without a minute of peace.
    pub attempts: u32,
}

fn to(life: Life, effects: Vec<Effect>) -> Result<Decision, Refused> {
    Ok(Decision { life, effects })
}

/// What follows from `event` in state `life`. Events that are late or make no sense in a state change nothing.
///
/// # Errors
/// [`Refused`] when somebody asks for what is not possible now; nothing changed.
pub fn decide(life: &Life, event: Event, rules: Rules) -> Result<Decision, Refused> {
    let stay = || to(life.clone(), Vec::new());
    match (life, event) {
        (Life::Gone, _) => stay(),
        (_, Event::RemoveAsked { purge, force }) => remove(life, purge, force),
        (Life::Creating, event) => match event {
            Event::Prepared => to(Life::Starting { first: true }, vec![Effect::Launch]),
            Event::PrepareFailed => to(Life::Removing { purge: true }, vec![Effect::Clear]),
            Event::StartAsked | Event::StopAsked(_) | Event::PauseAsked | Event::ResumeAsked => {
                Err(Refused::Busy)
            }
            _ => stay(),
        },
        (Life::Starting { first }, event) => starting(life, *first, event),
        (Life::Running | Life::Pausing | Life::Paused | Life::Resuming, event) => up(life, event),
        (Life::Panicked { message }, event) => panicked(message, event),
        (Life::Stopping, event) => match event {
            Event::StopAsked(timeout) => to(Life::Stopping, off(timeout)),
            Event::PauseAsked | Event::ResumeAsked => Err(Refused::Busy),
            Event::TimeIsUp => to(Life::Stopping, off(Duration::ZERO)),
            Event::MonitorEnded(end) => {
                let end = End { kind: EndKind::Asked, reason: asked_reason(&end) };
                to(Life::Clearing { end }, vec![Effect::NoTimer, Effect::Clear])
            }
            Event::StartAsked => Err(Refused::Busy),
            _ => stay(),
        },
        (Life::Clearing { end }, event) => match event {
            Event::Cleared => rest_or_restart(end, rules),
            Event::StartAsked | Event::PauseAsked | Event::ResumeAsked => Err(Refused::Busy),
            // Somebody wants it off, so the restart policy must not bring it back.
            Event::StopAsked(_) => {
                let end = End { kind: EndKind::Asked, reason: end.reason.clone() };
                to(Life::Clearing { end }, Vec::new())
            }
            _ => stay(),
        },
        (Life::Waiting { end }, event) => match event {
            Event::TimeIsUp | Event::StartAsked => {
                to(Life::Starting { first: false }, vec![Effect::NoTimer, Effect::Launch])
            }
            Event::StopAsked(_) => to(Life::Stopped { reason: end.reason.clone() }, vec![Effect::NoTimer]),
            Event::PauseAsked | Event::ResumeAsked => Err(Refused::Busy),
            _ => stay(),
        },
        (Life::Stopped { .. } | Life::Failed { .. }, Event::StartAsked) => {
            to(Life::Starting { first: false }, vec![Effect::Launch])
        }
        (Life::Stopped { .. } | Life::Failed { .. }, Event::PauseAsked | Event::ResumeAsked) => {
            Err(Refused::Off)
        }
        (Life::Stopped { .. } | Life::Failed { .. }, _) => stay(),
        (Life::Removing { .. }, event) => match event {
            Event::Cleared => to(life.clone(), vec![Effect::Erase]),
            Event::Erased => to(Life::Gone, vec![Effect::NoTimer]),
            Event::EraseFailed => to(life.clone(), vec![Effect::Timer(REMOVE_RETRY)]),
            Event::TimeIsUp => to(life.clone(), vec![Effect::Clear]),
            Event::StartAsked | Event::StopAsked(_) | Event::PauseAsked | Event::ResumeAsked => {
                Err(Refused::Busy)
            }
            _ => stay(),
        },
    }
}

/// A machine whose monitor has got to `Go`, whether its vCPUs run or not.
fn up(life: &Life, event: Event) -> Result<Decision, Refused> {
    let stay = || to(life.clone(), Vec::new());
    match (life, event) {
        (_, Event::MonitorEnded(end)) => to(Life::Clearing { end }, vec![Effect::Clear]),
        (Life::Running, Event::Panicked(message)) => {
            to(Life::Panicked { message }, vec![Effect::Timer(PANIC_TIMEOUT)])
        }
        (Life::Running, Event::StopAsked(timeout)) => to(Life::Stopping, off(timeout)),
        (_, Event::StopAsked(timeout)) => to(Life::Stopping, off_from_pause(timeout)),
        (Life::Running, Event::PauseAsked) => to(Life::Pausing, vec![Effect::Pause]),
        (Life::Paused, Event::ResumeAsked) => to(Life::Resuming, vec![Effect::Resume]),
        (Life::Pausing, Event::ResumeAsked | Event::StartAsked) => Err(Refused::Busy),
        (Life::Resuming, Event::PauseAsked) => Err(Refused::Busy),
        // "Start" means off and on; a guest that stands still has not been off.
        (Life::Paused, Event::StartAsked) => Err(Refused::Paused),
        (Life::Running | Life::Pausing, Event::Paused) | (Life::Resuming, Event::ResumeFailed) => {
            to(Life::Paused, Vec::new())
        }
        (Life::Paused | Life::Resuming, Event::Resumed) | (Life::Pausing, Event::PauseFailed) => {
            to(Life::Running, Vec::new())
        }
        _ => stay(),
    }
}

/// A guest whose kernel has panicked: it resets, stands still, or is ended when its time is up.
fn panicked(message: &str, event: Event) -> Result<Decision, Refused> {
    let life = Life::Panicked { message: message.to_owned() };
    match event {
        Event::Rebooted => to(Life::Running, vec![Effect::NoTimer]),
        Event::Paused => to(Life::Paused, vec![Effect::NoTimer]),
        // The button needs a kernel that works.
        Event::StopAsked(_) => to(Life::Stopping, off(Duration::ZERO)),
        Event::TimeIsUp => to(life, off(Duration::ZERO)),
        Event::MonitorEnded(_) => {
            let end = End { kind: EndKind::Failure, reason: panic_reason(message) };
            to(Life::Clearing { end }, vec![Effect::NoTimer, Effect::Clear])
        }
        Event::PauseAsked | Event::ResumeAsked => Err(Refused::Busy),
        _ => to(life, Vec::new()),
    }
}

/// What is said of a machine whose guest has not fed its watchdog.
pub const WATCHDOG_REASON: &str = "the guest's watchdog expired";

/// Why a machine ended whose kernel panicked.
pub fn panic_reason(message: &str) -> String {
    match message {
        "" => "the guest's kernel panicked".to_owned(),
        message => format!("the guest's kernel panicked: {message}"),
    }
}

fn starting(life: &Life, first: bool, event: Event) -> Result<Decision, Refused> {
    match event {
        Event::Launched => to(Life::Running, vec![Effect::Watch]),
        Event::LaunchFailed(_) if first => to(Life::Removing { purge: true }, vec![Effect::Clear]),
        Event::LaunchFailed(reason) => {
            to(Life::Clearing { end: End { kind: EndKind::Failure, reason } }, vec![Effect::Clear])
        }
        Event::StartAsked | Event::StopAsked(_) | Event::PauseAsked | Event::ResumeAsked => {
            Err(Refused::Busy)
        }
        // The launch itself sees that its monitor is gone and reports it.
        _ => to(life.clone(), Vec::new()),
    }
}

fn remove(life: &Life, purge: bool, force: bool) -> Result<Decision, Refused> {
    match life {
        Life::Running
        | Life::Panicked { .. }
        | Life::Pausing
        | Life::Paused
        | Life::Resuming
        | Life::Stopping
            if !force =>
        {
            Err(Refused::Running)
        }
        Life::Creating | Life::Starting { .. } => Err(Refused::Busy),
        Life::Removing { .. } => to(life.clone(), Vec::new()),
        _ => to(Life::Removing { purge }, vec![Effect::NoTimer, Effect::Clear]),
    }
}

/// Power button with a time-out, or the plug.
fn off(timeout: Duration) -> Vec<Effect> {
    if timeout.is_zero() {
        // The timer stands behind a monitor that does not even answer to the plug.
        vec![Effect::CutPower, Effect::Timer(REMOVE_RETRY)]
    } else {
        vec![Effect::PressPower, Effect::Timer(timeout)]
    }
}

/// The same for a guest that cannot notice the button yet.
fn off_from_pause(timeout: Duration) -> Vec<Effect> {
    let resume = (!timeout.is_zero()).then_some(Effect::Resume);
    resume.into_iter().chain(off(timeout)).collect()
}

fn asked_reason(end: &End) -> String {
    match end.kind {
        EndKind::PowerOff => "stopped on request".to_owned(),
        EndKind::Asked => "power cut on request".to_owned(),
        EndKind::Failure | EndKind::HostReboot => end.reason.clone(),
    }
}

fn rest_or_restart(end: &End, rules: Rules) -> Result<Decision, Refused> {
    let again = match (rules.restart, end.kind) {
        (_, EndKind::Asked | EndKind::HostReboot) | (RestartPolicy::No, _) => false,
        (RestartPolicy::OnFailure, kind) => kind == EndKind::Failure,
        (RestartPolicy::Always, _) => true,
    };
    if again {
        return to(Life::Waiting { end: end.clone() }, vec![Effect::Timer(backoff(rules.attempts))]);
    }
    let reason = end.reason.clone();
    match end.kind {
        EndKind::Failure => to(Life::Failed { reason }, Vec::new()),
        _ => to(Life::Stopped { reason }, Vec::new()),
    }
}

/// 1 s, 2 s, 4 s … 60 s.
fn backoff(attempts: u32) -> Duration {
    FIRST_BACKOFF.saturating_mul(1 << attempts.min(6)).min(LONGEST_BACKOFF)
}

/// What is found of a machine when lathed starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its monitor answers and runs guest code.
    Alive,
    /// Its monitor answers, and its vCPUs stand still.
    Still,
    /// Its monitor answers, and the guest's kernel has panicked; what it said last.
    Panicked(String),
    /// Its monitor answers, but never got to `Go`.
    HalfMade,
    /// There is no monitor; how it ended, as far as anybody knows.
    Nothing(End),
}

/// Goes on after a restart of lathed, from what was stored and what is found. `reboot`: the host has booted since.
pub fn resume(life: &Life, found: Found, reboot: bool, autostart: bool) -> Decision {
    let decision = |life: Life, effects| Decision { life, effects };
    match (life, found) {
        (Life::Creating, _) => decision(Life::Removing { purge: true }, vec![Effect::Clear]),
        (Life::Removing { .. } | Life::Gone, _) => decision(life.clone(), vec![Effect::Clear]),
        (
            Life::Running
            | Life::Panicked { .. }
            | Life::Pausing
            | Life::Paused
            | Life::Resuming
            | Life::Stopping
            | Life::Clearing { .. }
            | Life::Waiting { .. }
            | Life::Stopped { .. }
            | Life::Failed { .. },
            _,
        ) if reboot && autostart => {
            decision(Life::Starting { first: false }, vec![Effect::Clear, Effect::Launch])
        }
        // What was asked for and is not so yet is done again; otherwise what is found counts.
        (Life::Pausing, Found::Alive) => decision(Life::Pausing, vec![Effect::Watch, Effect::Pause]),
        (Life::Resuming, Found::Still) => decision(Life::Resuming, vec![Effect::Watch, Effect::Resume]),
        (
            Life::Starting { .. } | Life::Running | Life::Panicked { .. } | Life::Paused | Life::Resuming,
            Found::Alive,
        ) => decision(Life::Running, vec![Effect::Watch]),
        (
            Life::Starting { .. } | Life::Running | Life::Panicked { .. } | Life::Paused | Life::Pausing,
            Found::Still,
        ) => decision(Life::Paused, vec![Effect::Watch]),
        (
            Life::Starting { .. }
            | Life::Running
            | Life::Panicked { .. }
            | Life::Pausing
            | Life::Paused
            | Life::Resuming,
            Found::Panicked(message),
        ) => decision(Life::Panicked { message }, vec![Effect::Watch, Effect::Timer(PANIC_TIMEOUT)]),
        (Life::Stopping, found @ (Found::Alive | Found::Still | Found::Panicked(_))) => {
            decision(Life::Stopping, [Effect::Watch].into_iter().chain(off_again(&found)).collect())
        }
        // A monitor where there should be none, or one that was never told all: away with it, then as if it had not been.
        (Life::Starting { .. }, _) => decision(life.clone(), vec![Effect::Clear, Effect::Launch]),
        (Life::Panicked { message }, Found::Nothing(_)) if !reboot => {
            let end = End { kind: EndKind::Failure, reason: panic_reason(message) };
            decision(Life::Clearing { end }, vec![Effect::Clear])
        }
        (Life::Running | Life::Panicked { .. } | Life::Pausing | Life::Paused | Life::Resuming, found) => {
            let end = ended(found, reboot);
            decision(Life::Clearing { end }, vec![Effect::Clear])
        }
        (Life::Stopping, found) => {
            let end = End { kind: EndKind::Asked, reason: asked_reason(&ended(found, reboot)) };
            decision(Life::Clearing { end }, vec![Effect::Clear])
        }
        (Life::Clearing { .. }, _) => decision(life.clone(), vec![Effect::Clear]),
        (Life::Waiting { .. }, _) if reboot => {
            let end = End { kind: EndKind::HostReboot, reason: HOST_REBOOTED.to_owned() };
            decision(Life::Clearing { end }, vec![Effect::Clear])
        }
        (Life::Waiting { .. }, _) => decision(life.clone(), vec![Effect::Timer(FIRST_BACKOFF)]),
        (Life::Stopped { .. } | Life::Failed { .. }, Found::Nothing(_)) => decision(life.clone(), Vec::new()),
        (Life::Stopped { .. } | Life::Failed { .. }, _) => {
            let reason = "a monitor ran although the machine was stopped".to_owned();
            decision(Life::Clearing { end: End { kind: EndKind::Asked, reason } }, vec![Effect::Clear])
        }
    }
}

/// The stop of a machine that was being stopped, once more.
fn off_again(found: &Found) -> Vec<Effect> {
    match found {
        Found::Still => off_from_pause(RESUMED_STOP_TIMEOUT),
        Found::Panicked(_) => off(Duration::ZERO),
        _ => off(RESUMED_STOP_TIMEOUT),
    }
}

/// Reason of a machine that was running when its host went down.
pub const HOST_REBOOTED: &str = "the host rebooted";

fn ended(found: Found, reboot: bool) -> End {
    match found {
        _ if reboot => End { kind: EndKind::HostReboot, reason: HOST_REBOOTED.to_owned() },
        Found::Nothing(end) => end,
        Found::Alive | Found::Still | Found::Panicked(_) | Found::HalfMade => {
            End { kind: EndKind::Failure, reason: "its monitor never got to run".to_owned() }
        }
    }
}

impl Life {
    /// As it is shown.
    pub fn state(&self) -> MachineState {
        match self {
            Self::Creating => MachineState::Creating,
            Self::Starting { .. } | Self::Waiting { .. } => MachineState::Starting,
            Self::Running | Self::Panicked { .. } | Self::Pausing => MachineState::Running,
            Self::Paused | Self::Resuming => MachineState::Paused,
            Self::Stopping | Self::Clearing { .. } => MachineState::Stopping,
            Self::Stopped { .. } => MachineState::Stopped,
            Self::Failed { .. } => MachineState::Failed,
            Self::Removing { .. } | Self::Gone => MachineState::Removing,
        }
    }

    /// Why it is so, in words; empty when there is nothing to say.
    pub fn reason(&self) -> &str {
        match self {
            Self::Panicked { message } => message,
            Self::Stopped { reason } | Self::Failed { reason } => reason,
            Self::Clearing { end } | Self::Waiting { end } => &end.reason,
            _ => "",
        }
    }

    /// What it is doing, to go on after "is".
    pub fn word(&self) -> &'static str {
        match self {
            Self::Creating => "being made",
            Self::Starting { .. } | Self::Waiting { .. } => "starting",
            Self::Running => "running",
            Self::Panicked { .. } => "panicking",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Resuming => "being resumed",
            Self::Stopping | Self::Clearing { .. } => "stopping",
            Self::Stopped { .. } | Self::Failed { .. } => "off",
            Self::Removing { .. } | Self::Gone => "being removed",
        }
    }

    /// Whether it holds CPU and memory of the host.
    pub fn holds_shards(&self) -> bool {
        !matches!(self, Self::Stopped { .. } | Self::Failed { .. } | Self::Gone)
    }

    /// Whether it has a monitor that is watched.
    pub fn has_monitor(&self) -> bool {
        matches!(
            self,
            Self::Running
                | Self::Panicked { .. }
                | Self::Pausing
                | Self::Paused
                | Self::Resuming
                | Self::Stopping
        )
    }

    /// Whether nothing is under way.
    pub fn is_settled(&self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::Stopped { .. } | Self::Failed { .. } | Self::Gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rules(restart: RestartPolicy) -> Rules {
        Rules { restart, attempts: 0 }
    }

    fn end(kind: EndKind) -> End {
        End { kind, reason: "because".to_owned() }
    }

    fn policies() -> impl Strategy<Value = RestartPolicy> {
        prop_oneof![Just(RestartPolicy::No), Just(RestartPolicy::OnFailure), Just(RestartPolicy::Always)]
    }

    fn ends() -> impl Strategy<Value = End> {
        prop_oneof![
            Just(end(EndKind::PowerOff)),
            Just(end(EndKind::Asked)),
            Just(end(EndKind::Failure)),
            Just(end(EndKind::HostReboot))
        ]
    }

    /// What somebody outside may do at any time.
    fn outside() -> impl Strategy<Value = Event> {
        prop_oneof![
            ends().prop_map(Event::MonitorEnded),
            (0_u64..3).prop_map(|secs| Event::StopAsked(Duration::from_secs(secs))),
            Just(Event::StartAsked),
            Just(Event::PauseAsked),
            Just(Event::ResumeAsked),
            Just(Event::Paused),
            Just(Event::Resumed),
            Just(Event::Panicked("no init".to_owned())),
            Just(Event::Rebooted),
            (any::<bool>(), any::<bool>()).prop_map(|(purge, force)| Event::RemoveAsked { purge, force }),
            Just(Event::TimeIsUp),
        ]
    }

    /// What is under way besides the state: what the actor would hold.
    #[derive(Default, Debug)]
    struct World {
        queue: Vec<Effect>,
        timer: bool,
        watched: bool,
    }

    impl World {
        fn take(&mut self, decision: &Decision) {
            for effect in &decision.effects {
                match effect {
                    Effect::Timer(_) => self.timer = true,
                    Effect::NoTimer => self.timer = false,
                    Effect::Watch => self.watched = true,
                    other => self.queue.push(other.clone()),
                }
            }
        }

        /// The first pending effect ends, well or badly.
        fn finish(&mut self, well: bool) -> Option<Event> {
            if self.queue.is_empty() {
                return None;
            }
            Some(match self.queue.remove(0) {
                Effect::Prepare if well => Event::Prepared,
                Effect::Prepare => Event::PrepareFailed,
                Effect::Launch if well => Event::Launched,
                Effect::Launch => Event::LaunchFailed("no".to_owned()),
                Effect::Clear => {
                    self.watched = false;
                    Event::Cleared
                }
                Effect::Erase if well => Event::Erased,
                Effect::Erase => Event::EraseFailed,
                Effect::Pause if self.watched && well => Event::Paused,
                Effect::Pause => Event::PauseFailed,
                Effect::Resume if self.watched && well => Event::Resumed,
                Effect::Resume => Event::ResumeFailed,
                Effect::CutPower if self.watched && well => Event::MonitorEnded(end(EndKind::Asked)),
                Effect::PressPower if self.watched && well => Event::MonitorEnded(end(EndKind::PowerOff)),
                _ => return None,
            })
        }

        /// No state waits for something that will never come.
        fn check(&self, life: &Life) {
            let pending = |wanted: &[Effect]| self.queue.iter().any(|effect| wanted.contains(effect));
            let fine = match life {
                Life::Creating => pending(&[Effect::Prepare]),
                Life::Starting { .. } => pending(&[Effect::Launch]),
                Life::Running | Life::Paused => self.watched,
                Life::Panicked { .. } => self.watched && self.timer,
                Life::Pausing => self.watched && pending(&[Effect::Pause]),
                Life::Resuming => self.watched && pending(&[Effect::Resume]),
                Life::Stopping => self.watched && self.timer,
                Life::Clearing { .. } => pending(&[Effect::Clear]),
                Life::Waiting { .. } => self.timer,
                Life::Removing { .. } => pending(&[Effect::Clear, Effect::Erase]) || self.timer,
                Life::Stopped { .. } | Life::Failed { .. } | Life::Gone => true,
            };
            assert!(fine, "{life:?} has nothing under way: {self:?}");
        }
    }

    proptest! {
        #[test]
        fn no_machine_is_ever_stuck(
            restart in policies(),
            steps in prop::collection::vec((prop::option::of(outside()), any::<bool>()), 0..80),
        ) {
            let mut world = World { queue: vec![Effect::Prepare], ..World::default() };
            let mut life = Life::Creating;
            for (event, well) in steps {
                let event = match event {
                    Some(Event::MonitorEnded(_)) if !world.watched => continue,
                    Some(Event::TimeIsUp) if !world.timer => continue,
                    Some(event) => Some(event),
                    None => world.finish(well),
                };
                let Some(event) = event else { continue };
                match event {
                    Event::TimeIsUp => world.timer = false,
                    Event::MonitorEnded(_) => world.watched = false,
                    _ => {}
                }
                if let Ok(decision) = decide(&life, event, rules(restart)) {
                    world.take(&decision);
                    life = decision.life;
                }
                world.check(&life);
            }
            // Left alone, it comes to rest (an unwatched end is what `Clear` would find).
            for _ in 0..20 {
                if let Some(event) = world.finish(true)
                    && let Ok(decision) = decide(&life, event, rules(RestartPolicy::No))
                {
                    world.take(&decision);
                    life = decision.life;
                }
            }
            prop_assert!(life.is_settled() || world.timer, "{:?} {:?}", life, world);
        }

        #[test]
        fn whatever_is_found_after_a_crash_has_a_way_on(
            restart in policies(),
            steps in prop::collection::vec((prop::option::of(outside()), any::<bool>()), 0..30),
            what in 0_u8..5,
            reboot in any::<bool>(),
            autostart in any::<bool>(),
        ) {
            let mut world = World { queue: vec![Effect::Prepare], ..World::default() };
            let mut life = Life::Creating;
            for (event, well) in steps {
                let Some(event) = event.or_else(|| world.finish(well)) else { continue };
                if let Ok(decision) = decide(&life, event, rules(restart)) {
                    world.take(&decision);
                    life = decision.life;
                }
            }
            prop_assume!(life != Life::Gone);
            let found = match what {
                0 if !reboot => Found::Alive,
                1 if !reboot => Found::HalfMade,
                2 if !reboot => Found::Still,
                3 if !reboot => Found::Panicked("no init".to_owned()),
                _ => Found::Nothing(end(EndKind::Failure)),
            };
            let decision = resume(&life, found.clone(), reboot, autostart);
            let mut after = World::default();
            after.take(&decision);
            after.check(&decision.life);
            // A running guest is never thrown away unless its machine was to go or not to be.
            if life == Life::Running && found == Found::Alive {
                prop_assert_eq!(&decision.life, &Life::Running);
            }
            if life == Life::Paused && found == Found::Still {
                prop_assert_eq!(&decision.life, &Life::Paused);
            }
        }
    }

    #[test]
    fn the_restart_policy_decides_what_comes_after_an_end() {
        let after = |policy, kind| {
            let life = Life::Clearing { end: end(kind) };
            decide(&life, Event::Cleared, rules(policy)).unwrap().life.state()
        };
        use MachineState::{Failed, Starting, Stopped};
        assert_eq!(after(RestartPolicy::No, EndKind::Failure), Failed);
        assert_eq!(after(RestartPolicy::No, EndKind::PowerOff), Stopped);
        assert_eq!(after(RestartPolicy::OnFailure, EndKind::Failure), Starting);
        assert_eq!(after(RestartPolicy::OnFailure, EndKind::PowerOff), Stopped);
        assert_eq!(after(RestartPolicy::Always, EndKind::PowerOff), Starting);
        assert_eq!(after(RestartPolicy::Always, EndKind::Asked), Stopped, "lathe stop means stop");
    }

    #[test]
    fn a_first_run_that_fails_is_taken_back_and_a_later_start_is_not() {
        let failed = || Event::LaunchFailed("no kernel".to_owned());
        let first = decide(&Life::Starting { first: true }, failed(), rules(RestartPolicy::Always));
        assert_eq!(first.unwrap().life, Life::Removing { purge: true });
        let later = decide(&Life::Starting { first: false }, failed(), rules(RestartPolicy::No));
        assert_eq!(later.unwrap().life.reason(), "no kernel");
    }

    #[test]
    fn a_paused_machine_goes_on_when_asked_and_can_be_stopped() {
        let next = |life: &Life, event| decide(life, event, rules(RestartPolicy::No));
        let pausing = next(&Life::Running, Event::PauseAsked).unwrap();
        assert_eq!((pausing.life, pausing.effects), (Life::Pausing, vec![Effect::Pause]));
        assert_eq!(next(&Life::Pausing, Event::PauseFailed).unwrap().life, Life::Running);
        assert_eq!(next(&Life::Pausing, Event::Paused).unwrap().life, Life::Paused);
        assert_eq!(next(&Life::Paused, Event::PauseAsked).unwrap().life, Life::Paused, "twice is once");
        assert_eq!(next(&Life::Paused, Event::StartAsked), Err(Refused::Paused));
        let remove = Event::RemoveAsked { purge: false, force: false };
        assert_eq!(next(&Life::Paused, remove), Err(Refused::Running));
        let resuming = next(&Life::Paused, Event::ResumeAsked).unwrap();
        assert_eq!((resuming.life, resuming.effects), (Life::Resuming, vec![Effect::Resume]));
        assert_eq!(next(&Life::Resuming, Event::Resumed).unwrap().life, Life::Running);
        let timeout = Duration::from_secs(5);
        let stopping = next(&Life::Paused, Event::StopAsked(timeout)).unwrap();
        assert_eq!(stopping.effects, [Effect::Resume, Effect::PressPower, Effect::Timer(timeout)]);
        let cut = next(&Life::Paused, Event::StopAsked(Duration::ZERO)).unwrap();
        assert_eq!(cut.effects[0], Effect::CutPower);
        let off = Life::Stopped { reason: String::new() };
        assert_eq!(next(&off, Event::PauseAsked), Err(Refused::Off));
    }

    #[test]
    fn a_guest_that_panics_has_time_to_reset_and_is_then_ended_as_failed() {
        let next = |life: &Life, event| decide(life, event, rules(RestartPolicy::OnFailure)).unwrap();
        let panicked = next(&Life::Running, Event::Panicked("no init".to_owned()));
        assert_eq!(panicked.effects, [Effect::Timer(PANIC_TIMEOUT)]);
        assert_eq!(panicked.life.state(), MachineState::Running);
        assert_eq!(next(&panicked.life, Event::Rebooted).life, Life::Running);
        assert_eq!(next(&panicked.life, Event::Paused).life, Life::Paused);
        let cut = next(&panicked.life, Event::TimeIsUp);
        assert_eq!((&cut.life, &cut.effects[0]), (&panicked.life, &Effect::CutPower));
        let ended = next(&cut.life, Event::MonitorEnded(end(EndKind::Asked)));
        assert_eq!(ended.life.reason(), "the guest's kernel panicked: no init");
        assert_eq!(
            next(&ended.life, Event::Cleared).life.state(),
            MachineState::Starting,
            "the policy applies"
        );
        let stopping = next(&panicked.life, Event::StopAsked(Duration::from_secs(30)));
        assert_eq!(stopping.effects[0], Effect::CutPower, "nobody is there to hear the button");
        let found = resume(&Life::Running, Found::Panicked("x".to_owned()), false, false);
        assert_eq!(found.effects, [Effect::Watch, Effect::Timer(PANIC_TIMEOUT)]);
        assert_eq!(resume(&panicked.life, Found::Alive, false, false).life, Life::Running);
    }

    #[test]
    fn after_a_restart_of_lathed_what_was_asked_is_finished_and_what_is_found_counts() {
        let next = |life: Life, found| resume(&life, found, false, false);
        assert_eq!(next(Life::Paused, Found::Still).life, Life::Paused);
        assert_eq!(next(Life::Running, Found::Still).life, Life::Paused);
        assert_eq!(next(Life::Paused, Found::Alive).life, Life::Running);
        assert_eq!(next(Life::Pausing, Found::Alive).effects, [Effect::Watch, Effect::Pause]);
        assert_eq!(next(Life::Resuming, Found::Still).effects, [Effect::Watch, Effect::Resume]);
        assert_eq!(next(Life::Stopping, Found::Still).effects[..2], [Effect::Watch, Effect::Resume]);
    }

    #[test]
    fn autostart_brings_machines_back_after_a_reboot_and_others_rest() {
        let nothing = || Found::Nothing(end(EndKind::Failure));
        let stopped = Life::Stopped { reason: "the host was shut down".to_owned() };
        let back = resume(&stopped, nothing(), true, true);
        assert_eq!(back.life, Life::Starting { first: false });
        assert_eq!(resume(&stopped, nothing(), true, false).life, stopped);
        assert_eq!(resume(&stopped, nothing(), false, true).life, stopped, "no reboot, no start");
        assert_eq!(resume(&Life::Running, nothing(), true, true).life, Life::Starting { first: false });
        let running = resume(&Life::Running, nothing(), true, false);
        assert_eq!(running.life.reason(), HOST_REBOOTED);
    }

    #[test]
    fn pauses_between_restarts_grow_to_a_minute() {
        assert_eq!(backoff(0), Duration::from_secs(1));
        assert_eq!(backoff(3), Duration::from_secs(8));
        assert_eq!(backoff(u32::MAX), Duration::from_secs(60));
    }
}
