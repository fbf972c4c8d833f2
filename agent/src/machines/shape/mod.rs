//! The shape of one machine: what is desired, what is in force, and the operation that leads from one to the other.
//!
//! [`decide`] is pure: what is known, the time and an event in; what is known now and what to do out. It compares what is desired with what
//! is in force each time anything happens and takes the next step of each lane, so that answers that are late, lost or untrue, reboots
//! and failures all end in the same place: another look, another step.
//!
//! ```text
//! Asked ─► host: wall of memory, quota, rates, tier (at once)  ┐
//!          disks: rate in the monitor                          │
//!          CPU:  prepare ─► place ─► plug ─► guest onlines      ├─► all in force: applied
//!          memory: deflate, plug ─► online │ unplug ─► balloon  ┘   deadline: partial (goes on) or back; a failure of the host: back
//! ```
//! | file | what |
//! |---|---|
//! | this | states, events, effects, the operation's begin and end |
//! | `steps` | which step comes next in each lane |
//! | `short` | what is not in force, in words |
//!
//! CPU has three gears. The quota always comes first, upwards and downwards: it is the wall. A vCPU that is there is brought online or taken
//! offline by the guest agent; one that is missing is plugged in. A vCPU that the guest agent has taken offline stays plugged in, because it
//! costs a sleeping thread and the way back takes a tenth of the time; it is ejected only where no guest agent answers, or where that refuses.
//!
//! Memory grows by deflating and plugging, and shrinks by unplugging; then what lies below its size at boot goes into the balloon, and what the
//! guest does not give back for [`UNPLUG_PATIENCE_MSEC`]. The limit of the cgroup and the books rise before the guest may have more, and
//! follow what the monitor reports as held downwards.
//!
//! A guest that is told another size while it changes may pass it on its way to the earlier one: its drivers end what they are at before they
//! look. So a size is in force when the guest has it, was told nothing else, and the monitor has seen its drivers read that (`plug_unread`,
//! `balloon_unread`).
//!
//! Time is in milliseconds of one clock that never goes backwards. Nothing here waits: [`State::wake`] says when to look again.

mod short;
mod steps;

#[cfg(test)]
mod model;

use lathe_vmm::control::wire::{CpuStatus, MemoryStatus};
use serde::{Deserialize, Serialize};

pub use self::short::words;
pub use self::steps::memory_limit;

use super::record::{Desired, vcpus_for};
use crate::api::wire::Tier;
use crate::api::wire::foresight::AskedBy;

/// Milliseconds of a clock that never goes backwards.
pub type Msec = u64;

/// How long unplugging may stand still before the balloon takes the remainder.
pub const UNPLUG_PATIENCE_MSEC: Msec = 3000;
/// A guest that gave memory back so short a time ago is at it; afterwards it cannot.
const GIVING_MSEC: Msec = 1500;
/// Between two attempts at the same step: a guest that refuses is asked again, a limit that cannot be written is written again.
const RETRY_MSEC: Msec = 5000;
/// Between two corrections of the balloon's target, which follows what is unplugged meanwhile.
const PACE_MSEC: Msec = 250;
/// Between two reports of progress.
const PROGRESS_MSEC: Msec = 1000;
/// Hot-added memory is movable; its page descriptors (64 bytes for each 4 KiB) and everything unmovable that it leads to come out of the
/// memory that the guest booted with. Guests that grow beyond three to four times of that die of it.
pub const HOT_RATIO: u64 = 4;

/// A change that somebody asked for, until it ends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Number of the machine's operation, from 1.
    pub number: u64,
    /// Where it leads to.
    pub target: Desired,
    /// What was desired before.
    pub before: Desired,
    /// Revision that it was asked for at.
    pub base_revision: u64,
    /// Who asked for it.
    #[serde(default)]
    pub by: AskedBy,
    /// Milliseconds since the epoch.
    pub began: Msec,
    /// When it ends whatever is in force; `None` for what goes on in the background after a deadline.
    pub deadline: Option<Msec>,
    /// What the deadline does.
    pub at_deadline: AtDeadline,
}

/// What happens to what is not in force at the deadline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AtDeadline {
    /// It stays desired and goes on in the background.
    #[default]
    Keep,
    /// What was desired before is desired again.
    Revert,
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// All of it is in force.
    Applied,
    /// Some of it is.
    Partial,
    /// What was desired before is desired again.
    Failed,
}

/// An operation that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// It.
    pub operation: Operation,
    /// How.
    pub outcome: Outcome,
    /// Why, in words; empty when applied.
    pub reason: String,
    /// When.
    pub at: Msec,
}

/// Amounts that the books must hold at least.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holds {
    /// milliCPU.
    pub cpu_milli: u64,
    /// Bytes.
    pub memory_bytes: u64,
}

/// One kind of steps: at most one is under way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Lane {
    /// Number of the step under way.
    busy: Option<u64>,
    /// The last step, and when it was taken.
    last: Option<(Step, Msec)>,
    /// No earlier than this unless something else is wanted.
    not_before: Msec,
}

/// How a machine stands among others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// As this.
    pub tier: Tier,
    /// With this much memory that its tier protects, or does not.
    pub memory_bytes: u64,
    /// Its weight is ours to write; otherwise it stands like every unit of systemd's.
    pub among_others: bool,
}

impl Standing {
    /// The tier that it really has; `None`: the one that is in force inside of it is not among others.
    pub fn tier_in_force(&self) -> Option<Tier> {
        (self.among_others || self.tier == Tier::Standard).then_some(self.tier)
    }
}

/// What is in force of a machine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Force {
    /// vCPUs and bytes that it was started with.
    pub boot_cpus: u32,
    /// Bytes that it was started with.
    pub boot_bytes: u64,
    /// milliCPU of the quota, and the vCPUs that it was written for; `None`: not known.
    pub quota: Option<(u64, u32)>,
    /// bit/s; `None`: not known. A machine without network has 0.
    pub net_bit_per_sec: Option<u64>,
    /// I/O operations per second of all its disks, 0 is unlimited; `None`: its monitor cannot limit them.
    pub iops: Option<u64>,
    /// How it stands among others; `None`: not known.
    pub standing: Option<Standing>,
    /// Bytes of guest memory that the limit of its cgroup leaves room for; `None`: not known.
    pub wall_bytes: Option<u64>,
    /// Its vCPUs, if its monitor can change them.
    pub cpus: Option<CpuStatus>,
    /// Threads of vCPUs that are where they are limited.
    pub placed: usize,
    /// CPUs that the guest has online, by its own word; `None`: not known.
    pub online: Option<u32>,
    /// Its memory, if its monitor can change it.
    pub memory: Option<MemoryStatus>,
    /// The guest agent answers.
    pub agent: bool,
    /// Its vCPUs stand still.
    pub paused: bool,
}

impl Force {
    /// Bytes of guest memory that the host holds for it.
    pub fn held_bytes(&self) -> u64 {
        self.memory.as_ref().map_or(self.boot_bytes, held_bytes)
    }

    /// vCPUs that can take CPU time.
    pub fn present(&self) -> u32 {
        self.cpus.as_ref().map_or(self.boot_cpus, |cpus| cpus.present)
    }
}

/// Bytes of guest memory that the host holds.
pub fn held_bytes(memory: &MemoryStatus) -> u64 {
    memory.boot_bytes.saturating_add(memory.plugged_bytes).saturating_sub(memory.balloon_bytes)
}

/// A machine's shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// What was asked for last.
    pub desired: Desired,
    /// vCPUs that it shall have at least.
    pub vcpus_least: u32,
    /// What is in force; `None` while it is off.
    pub force: Option<Force>,
    /// What is under way.
    pub operation: Option<Operation>,
    /// What the books hold for it while it runs.
    pub books: Holds,
    /// Number of the last operation.
    pub operations: u64,
    steps: u64,
    host: Lane,
    disks: Lane,
    cpu: Lane,
    memory: Lane,
    /// The guest agent cannot or will not take CPUs offline.
    agent_refuses: Option<String>,
    /// What the host said when a step failed last.
    trouble: Option<String>,
    /// Since when unplugging has stood still.
    standing_since: Msec,
    /// When the guest gave memory back last, since the present size was asked for.
    gave_at: Option<Msec>,
    /// Plugged bytes that the guest was last asked to bring online.
    onlined_bytes: u64,
    /// It has reset, and the monitor has not said yet what memory it has now.
    untold: bool,
    told_at: Msec,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Somebody wants another shape. The books hold it, and the intent is stored.
    Asked(Operation),
    /// A step is done.
    Done(u64, Report),
    /// A step is not: its host or monitor says why. Nothing is known to have changed.
    Failed(u64, String),
    /// The guest agent did not do what it was asked: why, in words.
    GuestRefused(u64, String),
    /// The monitor reports its vCPUs.
    Cpus(CpuStatus),
    /// The monitor reports its memory.
    Memory(MemoryStatus),
    /// The guest agent was found or lost.
    Agent(bool),
    /// Time has passed.
    Tick,
    /// Somebody does not want the operation any more.
    Cancel,
    /// It runs, with this in force.
    Up(Box<Force>),
    /// Its monitor is over.
    Down,
    /// The guest has reset; the monitor keeps the shape.
    Rebooted,
    /// Its vCPUs stand still, or no longer.
    Paused(bool),
}

/// What came of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// It is as was asked.
    Done,
    /// The limit of its cgroup leaves this much room for guest memory: not less than was asked for.
    Wall(u64),
    /// I/O operations per second that are in force.
    Iops(u64),
    /// How it stands among others.
    Standing(Standing),
    /// To steps about vCPUs.
    Cpus(CpuStatus),
    /// To steps about memory.
    Memory(MemoryStatus),
}

/// One step: its number comes back with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The quota of the vCPUs' cgroup. Host, at once.
    SetQuota {
        /// milliCPU.
        cpu_milli: u64,
        /// vCPUs that share it.
        vcpus: u32,
    },
    /// Rates of its port, bit/s each way, 0 is unlimited. Host, at once.
    SetRates(u64),
    /// Its weight among others and what memory it keeps. Host, at once.
    SetTier {
        /// As this.
        tier: Tier,
        /// Bytes that it shall have.
        memory_bytes: u64,
    },
    /// Rate of its disks, I/O operations per second, 0 is unlimited. Monitor.
    SetIops(u64),
    /// The limit of its cgroup, in bytes of guest memory. Host, at once; may stay higher than asked, never lower.
    SetWall(u64),
    /// Puts new vCPU threads where they are limited. Host, at once.
    Place(Vec<i32>),
    /// Threads of this many vCPUs. Monitor.
    PrepareCpus(u32),
    /// Plugs vCPUs in, or asks for their ejection. Monitor.
    SetCpus(u32),
    /// CPUs online. Guest agent.
    GuestCpus(u32),
    /// Bytes plugged. Monitor.
    SetPlugged(u64),
    /// Bytes in the balloon. Monitor.
    SetBalloon(u64),
    /// Brings plugged memory online. Guest agent.
    GuestMemory,
}

/// What to do, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Takes a step, and reports it with its number.
    Step(u64, Step),
    /// The books hold this from now on; never less than is held.
    Books(Holds),
    /// Something else is desired than was asked for.
    Desire(Desired),
    /// Goes on in the background.
    Begun(Operation),
    /// An operation is over.
    Ended(Box<Ended>),
    /// Something has moved.
    Progress,
}

/// What follows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What is known from now on.
    pub state: State,
    /// What to do.
    pub effects: Vec<Effect>,
}

/// What follows from `event` at `now`.
pub fn decide(state: &State, now: Msec, event: Event) -> Decision {
    let mut next = state.clone();
    let mut effects = Vec::new();
    next.take(now, event, &mut effects);
    next.go_on(now, &mut effects);
    Decision { state: next, effects }
}

impl State {
    /// A machine that is off.
    pub fn new(desired: Desired, vcpus_least: u32, operation: Option<Operation>, operations: u64) -> Self {
        Self {
            desired,
            vcpus_least,
            force: None,
            operation,
            books: Holds::default(),
            operations,
            steps: 0,
            host: Lane::default(),
            disks: Lane::default(),
            cpu: Lane::default(),
            memory: Lane::default(),
            agent_refuses: None,
            trouble: None,
            standing_since: 0,
            gave_at: None,
            onlined_bytes: 0,
            untold: false,
            told_at: 0,
        }
    }

    /// vCPUs that carry what is desired.
    pub fn vcpus_wanted(&self) -> u32 {
        let wanted = vcpus_for(self.desired.cpu_milli).max(self.vcpus_least);
        match self.force.as_ref().and_then(|force| force.cpus.as_ref()) {
            Some(cpus) => wanted.min(cpus.possible.max(1)),
            None => wanted,
        }
    }

    fn take(&mut self, now: Msec, event: Event, effects: &mut Vec<Effect>) {
        match event {
            Event::Asked(operation) => self.begin(now, operation, effects),
            Event::Done(step, report) => self.done(now, step, report, effects),
            Event::Failed(step, reason) => self.step_failed(now, step, reason, effects),
            Event::GuestRefused(step, reason) => {
                if let Some(Step::GuestCpus(_)) = self.end_step(step) {
                    self.agent_refuses = Some(reason);
                }
            }
            Event::Cpus(status) => self.see_cpus(now, status, effects),
            Event::Memory(status) => self.see_memory(now, status, effects),
            Event::Agent(there) => {
                if let Some(force) = &mut self.force {
                    force.agent = there;
                    self.agent_refuses = None;
                    self.cpu.last = None;
                    // It may be another boot's: memory that is plugged may be offline.
                    self.onlined_bytes = 0;
                }
            }
            Event::Tick => {}
            Event::Cancel => self.give_up(now, "cancelled on request".to_owned(), effects),
            Event::Up(force) => {
                self.start_lanes(now);
                self.force = Some(*force);
            }
            Event::Down => {
                self.force = None;
                self.start_lanes(now);
                let reason = "it went off meanwhile; the rest follows at its next start".to_owned();
                self.end(now, Outcome::Partial, reason, effects);
            }
            Event::Rebooted => {
                self.forget_guest(now);
                if let Some(force) = &mut self.force {
                    force.agent = false;
                    // A guest that boots brings every CPU online that is plugged in.
                    force.online = force.cpus.as_ref().map(|cpus| cpus.present);
                    // With the reset all that was plugged is gone, and comes again when its drivers are there.
                    self.untold = force.memory.is_some();
                }
            }
            Event::Paused(paused) => {
                if let Some(force) = &mut self.force {
                    force.paused = paused;
                    self.standing_since = now;
                }
            }
        }
    }

    /// What the guest was asked it has forgotten; what the monitor was told it will answer.
    fn forget_guest(&mut self, now: Msec) {
        for lane in [&mut self.cpu, &mut self.memory] {
            if matches!(lane.last, Some((Step::GuestCpus(_) | Step::GuestMemory, _))) {
                *lane = Lane::default();
            }
        }
        self.agent_refuses = None;
        self.standing_since = now;
        self.gave_at = None;
        self.onlined_bytes = 0;
    }

    /// Forgets steps under way: their answers will never come.
    fn start_lanes(&mut self, now: Msec) {
        self.lanes().into_iter().for_each(|lane| *lane = Lane::default());
        self.agent_refuses = None;
        self.trouble = None;
        self.standing_since = now;
        self.onlined_bytes = 0;
        self.untold = false;
    }

    fn begin(&mut self, now: Msec, operation: Operation, effects: &mut Vec<Effect>) {
        let reason = format!("replaced by operation {}", operation.number);
        self.end(now, Outcome::Partial, reason, effects);
        if operation.target.memory_bytes != self.desired.memory_bytes {
            self.standing_since = now;
            self.gave_at = None;
        }
        self.desired = operation.target;
        self.operations = self.operations.max(operation.number);
        self.trouble = None;
        self.agent_refuses = None;
        self.free_lanes();
        self.told_at = now;
        self.operation = Some(operation);
    }

    fn lanes(&mut self) -> [&mut Lane; 4] {
        [&mut self.host, &mut self.disks, &mut self.cpu, &mut self.memory]
    }

    /// Something else is wanted: no step waits because of what was wanted before.
    fn free_lanes(&mut self) {
        for lane in self.lanes() {
            lane.not_before = 0;
            lane.last = lane.last.take().filter(|_| lane.busy.is_some());
        }
    }

    /// Frees the lane of a step; `None` when nobody waits for it any more.
    fn end_step(&mut self, step: u64) -> Option<Step> {
        let lane = self.lanes().into_iter().find(|lane| lane.busy == Some(step))?;
        lane.busy = None;
        lane.last.as_ref().map(|(step, _)| step.clone())
    }

    fn done(&mut self, now: Msec, step: u64, report: Report, effects: &mut Vec<Effect>) {
        let Some(step) = self.end_step(step) else { return };
        match report {
            Report::Done => self.is_so(step),
            Report::Wall(bytes) => {
                if let Some(force) = &mut self.force {
                    force.wall_bytes = Some(bytes);
                }
            }
            Report::Iops(iops) => {
                if let Some(force) = &mut self.force {
                    force.iops = Some(iops);
                }
            }
            Report::Standing(standing) => {
                if let Some(force) = &mut self.force {
                    force.standing = Some(standing);
                }
            }
            Report::Cpus(status) => self.see_cpus(now, status, effects),
            Report::Memory(status) => self.see_memory(now, status, effects),
        }
    }

    /// A step without a report of its own is in force as it was asked for.
    fn is_so(&mut self, step: Step) {
        let Some(force) = &mut self.force else { return };
        match step {
            Step::SetQuota { cpu_milli, vcpus } => force.quota = Some((cpu_milli, vcpus)),
            Step::SetRates(rate) => force.net_bit_per_sec = Some(rate),
            Step::SetWall(bytes) => force.wall_bytes = Some(bytes),
            Step::Place(tids) => force.placed = force.placed.saturating_add(tids.len()),
            Step::GuestCpus(online) => {
                let present = force.present();
                force.online = Some(online.min(present));
                self.agent_refuses = None;
            }
            Step::GuestMemory => {
                self.onlined_bytes = force.memory.as_ref().map_or(0, |memory| memory.plugged_bytes);
            }
            // They report what came of them.
            Step::SetTier { .. }
            | Step::SetIops(_)
            | Step::PrepareCpus(_)
            | Step::SetCpus(_)
            | Step::SetPlugged(_)
            | Step::SetBalloon(_) => {}
        }
    }

    /// The host or the monitor could not: whoever asked is told, and what was desired before is desired again.
    fn step_failed(&mut self, now: Msec, step: u64, reason: String, effects: &mut Vec<Effect>) {
        let of_host = self.host.busy == Some(step);
        let lane = self.lanes().into_iter().position(|lane| lane.busy == Some(step));
        let of_wall = match self.end_step(step) {
            None => return,
            // What a balloon can hold changes while the guest unplugs; it is asked again with what is known then.
            Some(Step::SetBalloon(_)) => {
                self.memory.not_before = now.saturating_add(PACE_MSEC);
                return;
            }
            Some(step) => matches!(step, Step::SetWall(_)),
        };
        // Only what has failed waits: a guest that takes memory back meanwhile needs its wall raised at once.
        if let Some(lane) = lane.and_then(|at| self.lanes().into_iter().nth(at)) {
            lane.not_before = now.saturating_add(RETRY_MSEC);
        }
        self.trouble = Some(reason.clone());
        // Who fails to read a limit back may have written it all the same: the next look at the file says what is in force.
        if of_host && let Some(force) = &mut self.force {
            (force.quota, force.net_bit_per_sec, force.standing) = (None, None, None);
            force.wall_bytes = force.wall_bytes.filter(|_| !of_wall);
        }
        if self.operation.as_ref().is_some_and(|operation| operation.deadline.is_some()) {
            self.give_up(now, reason, effects);
        }
    }

    fn see_cpus(&mut self, now: Msec, status: CpuStatus, effects: &mut Vec<Effect>) {
        let Some(force) = &mut self.force else { return };
        let Some(earlier) = &mut force.cpus else { return };
        if let Some(online) = &mut force.online {
            // What is ejected is not online; what is new is not known to be.
            *online = (*online).min(status.present);
        }
        let moved = earlier.present != status.present;
        *earlier = status;
        if moved {
            self.moved(now, effects);
        }
    }

    fn see_memory(&mut self, now: Msec, status: MemoryStatus, effects: &mut Vec<Effect>) {
        let Some(force) = &mut self.force else { return };
        let Some(earlier) = &mut force.memory else { return };
        let (plugged, held) = (earlier.plugged_bytes, held_bytes(earlier));
        *earlier = status;
        self.untold = false;
        if status.plugged_bytes < plugged {
            self.standing_since = now;
        }
        if held_bytes(&status) < held {
            self.gave_at = Some(now);
        }
        self.onlined_bytes = self.onlined_bytes.min(status.plugged_bytes);
        if held != held_bytes(&status) {
            self.moved(now, effects);
        }
    }

    fn moved(&mut self, now: Msec, effects: &mut Vec<Effect>) {
        if self.operation.is_some() && now >= self.told_at.saturating_add(PROGRESS_MSEC) {
            self.told_at = now;
            effects.push(Effect::Progress);
        }
    }

    /// Takes steps, ends the operation if it can end, corrects the books.
    fn go_on(&mut self, now: Msec, effects: &mut Vec<Effect>) {
        self.judge(now, effects);
        self.next_steps(now, effects);
        self.keep_books(effects);
    }

    fn judge(&mut self, now: Msec, effects: &mut Vec<Effect>) {
        let Some(operation) = &self.operation else { return };
        let (deadline, at_deadline) = (operation.deadline, operation.at_deadline);
        let short = self.shortfalls(now);
        let expired = deadline.is_some_and(|deadline| now >= deadline);
        // It ends with the last limit written, so that what it says then is all there is; and not by what a guest had before its reset.
        if (self.host_is_behind(now) || self.untold) && !expired {
            return;
        }
        if short.is_empty() {
            self.end(now, Outcome::Applied, String::new(), effects);
            return;
        }
        let reason = words(&short);
        // What only a restart brings is not worth waiting for.
        if short.iter().all(|short| short.until_restart) {
            self.end(now, Outcome::Partial, reason, effects);
            return;
        }
        if !expired {
            return;
        }
        match at_deadline {
            AtDeadline::Keep => {
                let ended = self.operation.as_ref();
                let (before, by) =
                    ended.map_or((self.desired, AskedBy::default()), |ended| (ended.before, ended.by));
                self.end(now, Outcome::Partial, reason, effects);
                self.go_on_in_background(now, before, by, effects);
            }
            AtDeadline::Revert => self.give_up(now, reason, effects),
        }
    }

    /// Ends the operation; what was desired before is desired again, and on its way if it takes time.
    fn give_up(&mut self, now: Msec, reason: String, effects: &mut Vec<Effect>) {
        let Some(operation) = &self.operation else { return };
        let (before, target, by) = (operation.before, operation.target, operation.by);
        self.desired = before;
        self.end(now, Outcome::Failed, reason, effects);
        effects.push(Effect::Desire(before));
        self.agent_refuses = None;
        if before.memory_bytes != target.memory_bytes {
            self.standing_since = now;
        }
        self.free_lanes();
        if !self.shortfalls(now).is_empty() {
            self.go_on_in_background(now, target, by, effects);
        }
    }

    fn go_on_in_background(&mut self, now: Msec, before: Desired, by: AskedBy, effects: &mut Vec<Effect>) {
        self.operations += 1;
        let operation = Operation {
            number: self.operations,
            target: self.desired,
            before,
            base_revision: 0,
            by,
            began: now,
            deadline: None,
            at_deadline: AtDeadline::Keep,
        };
        effects.push(Effect::Begun(operation.clone()));
        self.operation = Some(operation);
    }

    fn end(&mut self, now: Msec, outcome: Outcome, reason: String, effects: &mut Vec<Effect>) {
        if let Some(operation) = self.operation.take() {
            effects.push(Effect::Ended(Box::new(Ended { operation, outcome, reason, at: now })));
        }
    }

    /// What the books must hold: the larger of what is desired and what the host holds. While an operation has a deadline that may lead back,
    /// what was desired before is held too.
    fn keep_books(&mut self, effects: &mut Vec<Effect>) {
        let Some(force) = &self.force else {
            self.books = Holds::default();
            return;
        };
        let mut holds = Holds {
            cpu_milli: self.desired.cpu_milli.max(force.quota.map_or(self.books.cpu_milli, |quota| quota.0)),
            memory_bytes: self
                .desired
                .memory_bytes
                .max(self.may_hold(force))
                .max(force.wall_bytes.unwrap_or(self.books.memory_bytes)),
        };
        if let Some(operation) = self.operation.as_ref().filter(|operation| operation.deadline.is_some()) {
            holds.cpu_milli = holds.cpu_milli.max(operation.before.cpu_milli);
            holds.memory_bytes = holds.memory_bytes.max(operation.before.memory_bytes);
        }
        if holds != self.books {
            self.books = holds;
            effects.push(Effect::Books(holds));
        }
    }
}
