//! The whole of [`super`] against a model of host, monitor and guest: one that refuses, answers late, lies, resets, and whose host fails.

use std::collections::VecDeque;

use lathe_vmm::control::wire::{CpuStatus, MemoryStatus};
use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const BOOT: u64 = 256 * MIB;
const POSSIBLE: u32 = 4;

/// Which steps of the host fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum HostFails {
    #[default]
    Never,
    Always,
    Quota,
    Rates,
    Tier,
    Wall,
    Place,
}

impl HostFails {
    const ALL: [Self; 7] =
        [Self::Never, Self::Always, Self::Quota, Self::Rates, Self::Tier, Self::Wall, Self::Place];

    /// Whether this is a step of the host, and fails.
    fn at(self, step: &Step) -> bool {
        let own = match step {
            Step::SetQuota { .. } => Self::Quota,
            Step::SetRates(_) => Self::Rates,
            Step::SetTier { .. } => Self::Tier,
            Step::SetWall(_) => Self::Wall,
            Step::Place(_) => Self::Place,
            _ => return false,
        };
        self == own || self == Self::Always
    }
}

/// How the world misbehaves.
#[derive(Clone, Copy, Debug, Default)]
struct Mood {
    /// The guest does nothing that it is asked to.
    deaf: bool,
    /// No driver serves the pluggable memory.
    no_plug_driver: bool,
    /// Plugged bytes that cannot be moved.
    pinned: u64,
    /// Bytes that can go into the balloon.
    balloon_most: u64,
    /// The guest agent refuses.
    agent_refuses: bool,
    /// Steps of the host fail.
    host_fails: HostFails,
    /// What fails has been done all the same.
    fails_late: bool,
    /// Commands to the monitor fail.
    monitor_fails: bool,
    /// The charge stays above the limit that is asked for.
    wall_stays: bool,
}

impl Mood {
    const GOOD: Self = Self {
        deaf: false,
        no_plug_driver: false,
        pinned: 0,
        balloon_most: u64::MAX,
        agent_refuses: false,
        host_fails: HostFails::Never,
        fails_late: false,
        monitor_fails: false,
        wall_stays: false,
    };
}

/// A message on its way from the monitor.
#[derive(Clone, Debug)]
enum Mail {
    Message(Event),
    /// What the guest has taken back by itself is known once this arrives.
    Taken(Event, u64),
}

/// A run of a driver in the guest: it looks at its target, does all that is to be done, and looks again only then. What it is told meanwhile
/// it does not know; that the monitor refuses what leads below a size that is not known yet is left out, so that nothing depends on it.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    up: bool,
    /// Bytes to go; nothing: it looks.
    left: u64,
}

impl Run {
    fn new(has: u64, target: u64) -> Self {
        Self { up: has < target, left: has.abs_diff(target) }
    }

    /// Goes on a little from `has`, within what is possible, beyond which the run is over; to where.
    fn go_on(&mut self, has: u64, much: u64, possible: std::ops::RangeInclusive<u64>) -> u64 {
        let much = much.min(self.left);
        self.left -= much;
        let to = if self.up { has + much } else { has.saturating_sub(much) };
        let to_possible = to.clamp(*possible.start(), *possible.end());
        if to != to_possible {
            self.left = 0;
        }
        to_possible
    }
}

struct World {
    state: State,
    now: Msec,
    mood: Mood,
    /// From the monitor; answers and events in the order in which they became true.
    mail: VecDeque<Mail>,
    /// To the monitor.
    commands: VecDeque<(u64, Step)>,
    /// To the guest agent.
    requests: VecDeque<u64>,
    // What really is.
    on: bool,
    quota: u64,
    rate: u64,
    iops: u64,
    wall: u64,
    tier: Tier,
    cpus: CpuStatus,
    placed: usize,
    memory: MemoryStatus,
    plugs: Run,
    balloons: Run,
    /// When the plugged size changed last.
    plugged_at: Msec,
    /// The size that it was said to have come to rest at, until somebody disturbs it.
    rests_at: Option<u64>,
    /// Bytes that the guest has taken back from the balloon and nobody knows of yet.
    taken: u64,
    number: u64,
    /// When the host failed last.
    failed_at: Msec,
    effects: u64,
    ended: Vec<Ended>,
}

impl World {
    fn new() -> Self {
        let desired = Desired {
            cpu_milli: 1000,
            memory_bytes: BOOT,
            net_bit_per_sec: 0,
            iops: 0,
            tier: Tier::Standard,
        };
        let mut world = Self {
            state: State::new(desired, 1, None, 0),
            now: 1_000_000,
            mood: Mood::GOOD,
            mail: VecDeque::new(),
            commands: VecDeque::new(),
            requests: VecDeque::new(),
            on: false,
            quota: 0,
            rate: 0,
            iops: 0,
            wall: 0,
            tier: Tier::Standard,
            cpus: CpuStatus::default(),
            placed: 0,
            memory: MemoryStatus::default(),
            plugs: Run::default(),
            balloons: Run::default(),
            plugged_at: 0,
            rests_at: None,
            taken: 0,
            number: 0,
            failed_at: 0,
            effects: 0,
            ended: Vec::new(),
        };
        world.start();
        world
    }

    fn start(&mut self) {
        let desired = self.state.desired;
        let vcpus = vcpus_for(desired.cpu_milli).min(POSSIBLE);
        let tids = (0..vcpus).map(|tid| tid as i32).collect();
        self.cpus =
            CpuStatus { possible: POSSIBLE, target: vcpus, present: vcpus, refused: 0, vcpu_tids: tids };
        self.placed = vcpus as usize;
        self.memory = MemoryStatus {
            boot_bytes: desired.memory_bytes,
            pluggable_bytes: 1024 * MIB,
            plug_driver: !self.mood.no_plug_driver,
            balloon_driver: true,
            ..MemoryStatus::default()
        };
        (self.plugs, self.balloons, self.plugged_at) = (Run::default(), Run::default(), self.now);
        (self.on, self.taken, self.rests_at) = (true, 0, None);
        (self.quota, self.wall, self.iops) = (desired.cpu_milli, desired.memory_bytes, desired.iops);
        self.tier = desired.tier;
        self.rate = desired.net_bit_per_sec;
        let force = Force {
            boot_cpus: vcpus,
            boot_bytes: desired.memory_bytes,
            quota: Some((desired.cpu_milli, vcpus)),
            net_bit_per_sec: Some(desired.net_bit_per_sec),
            iops: Some(desired.iops),
            standing: Some(Standing {
                tier: desired.tier,
                memory_bytes: desired.memory_bytes,
                among_others: true,
            }),
            wall_bytes: Some(desired.memory_bytes),
            cpus: Some(self.cpus.clone()),
            placed: self.placed,
            online: Some(vcpus),
            memory: Some(self.memory),
            agent: false,
            paused: false,
        };
        self.happen(Event::Up(Box::new(force)));
    }

    /// As the executor: what the host can do is done at once, the rest is on its way.
    fn happen(&mut self, event: Event) {
        let mut queue = VecDeque::from([event]);
        let mut turns = 0;
        while let Some(event) = queue.pop_front() {
            turns += 1;
            assert!(turns < 40, "it goes round in circles: {:?}", self.state);
            let Decision { state, effects } = decide(&self.state, self.now, event);
            self.state = state;
            let mut failed = None;
            for effect in effects {
                self.effects += 1;
                match effect {
                    Effect::Step(number, step) => match self.host_step(&step) {
                        Some(Ok(report)) => queue.push_back(Event::Done(number, report)),
                        Some(Err(reason)) => queue.push_back(Event::Failed(number, reason)),
                        None if matches!(step, Step::GuestCpus(_) | Step::GuestMemory) => {
                            self.requests.push_back(number);
                        }
                        None => self.commands.push_back((number, step)),
                    },
                    Effect::Ended(ended) => {
                        if ended.outcome == Outcome::Failed {
                            failed = Some(ended.operation.before);
                        }
                        if let Some(deadline) = ended.operation.deadline {
                            assert!(ended.at <= deadline, "{ended:?} ended too late");
                        }
                        if ended.outcome == Outcome::Applied {
                            self.comes_to_rest(ended.operation.target.memory_bytes);
                        }
                        self.ended.push(*ended);
                    }
                    Effect::Desire(desired) => {
                        assert_eq!(failed.take(), Some(desired), "what was before is desired again");
                    }
                    Effect::Books(_) | Effect::Begun(_) | Effect::Progress => {}
                }
            }
            assert_eq!(failed, None, "a failure restores what was desired");
            self.check();
        }
        if let Some(wake) = self.state.wake(self.now) {
            assert!(wake > self.now, "it would spin: {:?}", self.state);
        }
    }

    fn host_step(&mut self, step: &Step) -> Option<Result<Report, String>> {
        let fails = self.mood.host_fails.at(step);
        let report = if fails && !self.mood.fails_late { None } else { Some(self.host_does(step)?) };
        Some(report.filter(|_| !fails).ok_or_else(|| {
            self.failed_at = self.now;
            "no luck".to_owned()
        }))
    }

    /// `None`: the host has no part in it.
    fn host_does(&mut self, step: &Step) -> Option<Report> {
        match step {
            Step::SetQuota { cpu_milli, .. } => self.quota = *cpu_milli,
            Step::SetRates(rate) => self.rate = *rate,
            Step::SetTier { tier, memory_bytes } => {
                let (tier, memory_bytes) = (*tier, *memory_bytes);
                self.tier = tier;
                return Some(Report::Standing(Standing { tier, memory_bytes, among_others: true }));
            }
            Step::Place(tids) => {
                let last = tids.iter().copied().max().unwrap_or_default() as usize;
                self.placed = self.placed.max(last + 1);
            }
            Step::SetWall(bytes) => {
                if !self.mood.wall_stays || *bytes > self.wall {
                    self.wall = *bytes;
                }
                return Some(Report::Wall(self.wall));
            }
            _ => return None,
        }
        Some(Report::Done)
    }

    fn held(&self) -> u64 {
        held_bytes(&self.memory)
    }

    /// What must be true at every moment.
    fn check(&self) {
        if !self.on {
            return;
        }
        let held = self.held().saturating_sub(self.taken);
        assert!(self.state.books.memory_bytes >= held, "books {:?}, held {held}", self.state.books);
        assert!(
            self.state.books.cpu_milli >= self.quota,
            "books {:?}, quota {}",
            self.state.books,
            self.quota
        );
        assert!(self.wall >= held, "wall {}, held {held}", self.wall);
        assert!(self.cpus.present as usize <= self.placed, "a vCPU runs that is not limited");
        if let Some(deadline) = self.state.operation.as_ref().and_then(|operation| operation.deadline) {
            assert!(deadline > self.now, "an operation has not ended");
            assert!(self.state.wake(self.now).is_some_and(|wake| wake <= deadline));
        }
    }

    /// It was said that the guest has this, for good.
    fn comes_to_rest(&mut self, bytes: u64) {
        self.rests_at = None;
        // Of what the guest has done by itself it will soon know.
        if !self.on || self.mail.iter().any(|mail| matches!(mail, Mail::Taken(..))) {
            return;
        }
        let told =
            self.state.force.as_ref().and_then(|force| force.memory).map(|memory| memory.plugged_bytes);
        if told > Some(self.memory.plugged_bytes) {
            // Blocks that went so late that the balloon had made up for them, of which the news is on its way: less, never more.
            assert!(self.held() <= bytes, "more than applied: {:?}", self.memory);
        } else if self.memory.plugged_bytes == self.memory.requested_bytes {
            self.rests_at = Some(bytes);
        } else if self.mail.is_empty() && self.memory.plug_driver {
            // It may be able to unplug the rest one day, but not now.
            assert!(self.now >= self.plugged_at + UNPLUG_PATIENCE_MSEC, "it unplugs: {:?}", self.memory);
        }
        self.check_rest();
    }

    fn check_rest(&self) {
        if let Some(bytes) = self.rests_at {
            let (memory, plugs, balloons) = (self.memory, self.plugs, self.balloons);
            assert_eq!(self.held(), bytes, "applied, and then: {memory:?}, {plugs:?}, {balloons:?}");
        }
    }

    /// The monitor's oldest message arrives.
    fn deliver(&mut self) {
        match self.mail.pop_front() {
            None => {}
            Some(Mail::Message(event)) => self.happen(event),
            Some(Mail::Taken(event, bytes)) => {
                self.happen(event);
                // A host that could not write its limits lately cannot follow at once.
                if self.now > self.failed_at + RETRY_MSEC {
                    self.taken = self.taken.saturating_sub(bytes);
                    self.check();
                }
            }
        }
    }

    /// The guest agent answers.
    fn answer(&mut self) {
        let Some(number) = self.requests.pop_front() else { return };
        let there = self.state.force.as_ref().is_some_and(|force| force.agent);
        self.happen(if there && !self.mood.agent_refuses {
            Event::Done(number, Report::Done)
        } else {
            Event::GuestRefused(number, "it does not want to".to_owned())
        });
    }

    /// The monitor carries its oldest command out.
    fn command(&mut self) {
        let Some((number, step)) = self.commands.pop_front() else { return };
        if self.mood.monitor_fails {
            let event = Event::Failed(number, "the monitor refuses".to_owned());
            return self.mail.push_back(Mail::Message(event));
        }
        match step {
            Step::SetIops(iops) => self.iops = iops,
            Step::PrepareCpus(count) => {
                while self.cpus.vcpu_tids.len() < count as usize {
                    self.cpus.vcpu_tids.push(self.cpus.vcpu_tids.len() as i32);
                }
            }
            Step::SetCpus(count) => {
                self.cpus.target = count;
                self.cpus.present = self.cpus.present.max(count);
            }
            Step::SetPlugged(bytes) => {
                assert!(bytes <= self.memory.pluggable_bytes && bytes.is_multiple_of(2 * MIB));
                self.memory.plug_unread |= self.memory.plug_driver && self.memory.requested_bytes != bytes;
                self.memory.requested_bytes = bytes;
            }
            Step::SetBalloon(bytes) => {
                if bytes >= self.memory.boot_bytes + self.memory.plugged_bytes {
                    let event = Event::Failed(number, "more than there is".to_owned());
                    return self.mail.push_back(Mail::Message(event));
                }
                self.memory.balloon_unread |= self.memory.balloon_target_bytes != bytes;
                self.memory.balloon_target_bytes = bytes;
            }
            _ => unreachable!(),
        }
        let report = match step {
            Step::SetIops(_) => Report::Iops(self.iops),
            Step::PrepareCpus(_) | Step::SetCpus(_) => Report::Cpus(self.cpus.clone()),
            _ => Report::Memory(self.memory),
        };
        self.mail.push_back(Mail::Message(Event::Done(number, report)));
    }

    fn post(&mut self) {
        while !(self.mail.is_empty() && self.commands.is_empty() && self.requests.is_empty()) {
            self.command();
            self.deliver();
            self.answer();
        }
    }

    /// The guest does a little of what it was asked to.
    fn guest_acts(&mut self, much: u64) {
        if self.mood.deaf || !self.on || self.state.force.as_ref().is_some_and(|force| force.paused) {
            return;
        }
        let much = (1 + much % 128) * 2 * MIB;
        self.guest_plugs(much);
        let taken = self.guest_balloons(much);
        if self.cpus.target < self.cpus.present {
            self.cpus.present -= 1;
            self.mail.push_back(Mail::Message(Event::Cpus(self.cpus.clone())));
        }
        self.taken += taken;
        self.mail.push_back(match taken {
            0 => Mail::Message(Event::Memory(self.memory)),
            taken => Mail::Taken(Event::Memory(self.memory), taken),
        });
        self.check_rest();
    }

    fn guest_plugs(&mut self, much: u64) {
        let Self { memory, plugs, mood, .. } = self;
        if memory.plug_driver == mood.no_plug_driver {
            *plugs = Run::default();
            (memory.plug_driver, memory.plug_unread) = (!mood.no_plug_driver, false);
        }
        if !memory.plug_driver {
            return;
        }
        if plugs.left == 0 {
            memory.plug_unread = false;
            *plugs = Run::new(memory.plugged_bytes, memory.requested_bytes);
        }
        let before = memory.plugged_bytes;
        let (least, most) = (mood.pinned.min(before), memory.requested_bytes.max(before));
        memory.plugged_bytes = plugs.go_on(before, much, least..=most);
        if memory.plugged_bytes != before {
            self.plugged_at = self.now;
        }
    }

    /// What of it the guest has taken back from below the target, of which nobody knows yet.
    fn guest_balloons(&mut self, much: u64) -> u64 {
        let Self { memory, balloons, mood, .. } = self;
        if balloons.left == 0 {
            memory.balloon_unread = false;
            *balloons = Run::new(memory.balloon_bytes, memory.balloon_target_bytes);
        }
        let before = memory.balloon_bytes;
        // It holds no more than there is.
        let most = (memory.boot_bytes + memory.plugged_bytes - 64 * MIB).min(mood.balloon_most.max(before));
        memory.balloon_bytes = balloons.go_on(before, much, 0..=most);
        before.min(memory.balloon_target_bytes).saturating_sub(memory.balloon_bytes)
    }

    /// The guest takes back what it has put into the balloon.
    fn guest_takes(&mut self, much: u64) {
        let bytes = (much % 64 * MIB).min(self.memory.balloon_bytes);
        if !self.on || bytes == 0 {
            return;
        }
        self.memory.balloon_bytes -= bytes;
        self.taken += bytes;
        self.rests_at = None;
        self.mail.push_back(Mail::Taken(Event::Memory(self.memory), bytes));
    }

    fn reboot(&mut self) {
        if self.on {
            // The balloon's content comes back with the reset.
            let bytes = self.memory.balloon_bytes;
            self.taken += bytes;
            (self.memory.plugged_bytes, self.memory.balloon_bytes) = (0, 0);
            (self.memory.plug_unread, self.memory.balloon_unread) = (false, false);
            (self.plugs, self.balloons, self.plugged_at) = (Run::default(), Run::default(), self.now);
            self.cpus.present = self.cpus.target;
            self.rests_at = None;
            self.mail.push_back(Mail::Message(Event::Cpus(self.cpus.clone())));
            self.mail.push_back(Mail::Taken(Event::Memory(self.memory), bytes));
            let earlier = self.ended.len();
            self.happen(Event::Rebooted);
            for ended in &self.ended[earlier..] {
                let outcome = ended.outcome;
                assert!(
                    outcome != Outcome::Applied || self.held() == ended.operation.target.memory_bytes,
                    "by what it had"
                );
            }
        }
    }

    fn ask(&mut self, random: u64) {
        let memory_mib = [64, 128, 256, 300, 512, 700, 1024, 1280, 1600, 4096][(random >> 8) as usize % 10];
        let target = Desired {
            cpu_milli: [50, 500, 1000, 1001, 2350, 4000, 6000][(random >> 16) as usize % 7],
            memory_bytes: memory_mib * MIB,
            net_bit_per_sec: (random >> 24) % 3 * 1_000_000,
            iops: (random >> 28) % 3 * 50,
            tier: [Tier::Standard, Tier::Guaranteed, Tier::Harvest][(random >> 30) as usize % 3],
        };
        self.number = self.number.max(self.state.operations) + 1;
        let operation = Operation {
            number: self.number,
            target,
            before: self.state.desired,
            base_revision: 0,
            by: AskedBy::default(),
            began: self.now,
            deadline: Some(self.now + 1 + (random >> 32) % 40_000),
            at_deadline: if random >> 63 == 0 { AtDeadline::Keep } else { AtDeadline::Revert },
        };
        let before = self.state.desired;
        self.rests_at = None;
        self.happen(Event::Asked(operation));
        let last = self.ended.last().filter(|ended| ended.operation.number == self.number);
        match last.map(|ended| ended.outcome) {
            Some(Outcome::Failed) => assert_eq!(self.state.desired, before),
            _ => assert_eq!(self.state.desired, target),
        }
    }

    /// Time passes, never past a moment at which it wants to look.
    fn wait(&mut self, much: Msec) {
        let end = self.now + much;
        while let Some(wake) = self.state.wake(self.now).filter(|wake| *wake <= end) {
            self.now = wake;
            self.happen(Event::Tick);
        }
        self.now = end;
        self.happen(Event::Tick);
    }

    fn step(&mut self, random: u64) {
        let much = random >> 8;
        match random % 32 {
            0..=2 => self.ask(random),
            3 => self.happen(Event::Cancel),
            4..=9 => self.guest_acts(much),
            10 => self.guest_takes(much),
            11..=14 => self.deliver(),
            15..=17 => self.command(),
            18 => self.answer(),
            19..=21 => self.wait(much % 4000),
            22 => self.wait(much % 60_000),
            23 => {
                let there = !much.is_multiple_of(3);
                self.happen(Event::Agent(there && self.on));
            }
            24 => self.reboot(),
            25 if much.is_multiple_of(4) => self.turn(),
            26 => self.happen(Event::Paused(much.is_multiple_of(2))),
            27 => {
                let which = HostFails::ALL.get(much as usize % 16).copied();
                self.mood.host_fails = which.unwrap_or_default();
                self.mood.fails_late = (much >> 4).is_multiple_of(2);
            }
            28 => self.mood.monitor_fails = much.is_multiple_of(4),
            29 => self.mood.wall_stays = much.is_multiple_of(3),
            30 => {
                self.mood = Mood {
                    deaf: much.is_multiple_of(3),
                    no_plug_driver: (much >> 2).is_multiple_of(5),
                    pinned: (much >> 8) % 512 * MIB,
                    balloon_most: if (much >> 20).is_multiple_of(2) { u64::MAX } else { 32 * MIB },
                    agent_refuses: (much >> 22).is_multiple_of(3),
                    ..self.mood
                };
            }
            _ => {
                self.mood = Mood::GOOD;
                self.post();
            }
        }
    }

    fn turn(&mut self) {
        if self.on {
            self.on = false;
            self.happen(Event::Down);
            self.mail.clear();
            self.commands.clear();
            self.requests.clear();
        } else {
            self.start();
        }
    }

    /// Everything is well from now on: it must come to rest where it is wanted.
    fn come_to_rest(&mut self) {
        self.mood = Mood::GOOD;
        if !self.on {
            self.start();
        }
        self.happen(Event::Paused(false));
        self.happen(Event::Agent(true));
        for _ in 0..400 {
            self.post();
            self.guest_acts(255);
            self.wait(100);
        }
        let short = self.state.shortfalls(self.now);
        assert!(short.iter().all(|short| short.until_restart), "{short:?} {:?}", self.state);
        assert!(self.state.operation.is_none(), "{:?}", self.state.operation);
        let desired = self.state.desired;
        let holds =
            Holds { cpu_milli: desired.cpu_milli, memory_bytes: desired.memory_bytes.max(self.held()) };
        assert_eq!(self.state.books, holds);
        assert_eq!(self.wall, self.held());
        assert_eq!(self.tier, desired.tier);
        assert_eq!((self.quota, self.rate), (desired.cpu_milli, desired.net_bit_per_sec));
        assert_eq!(self.iops, desired.iops);
        let effects = self.effects;
        self.wait(600_000);
        assert_eq!(self.effects, effects, "at rest it does nothing");
    }
}

#[test]
fn what_a_guest_only_claims_to_have_given_back_is_partial_and_said() {
    let mut world = World::new();
    world.mood.wall_stays = true;
    let before = world.state.desired;
    let target = Desired { memory_bytes: 128 * MIB, ..before };
    let deadline = Some(world.now + 5000);
    let at_deadline = AtDeadline::Keep;
    world.happen(Event::Asked(Operation {
        number: 1,
        target,
        before,
        base_revision: 0,
        by: AskedBy::default(),
        began: world.now,
        deadline,
        at_deadline,
    }));
    for _ in 0..60 {
        world.post();
        world.guest_acts(255);
        world.wait(100);
    }
    assert_eq!(world.held(), 128 * MIB, "by its own word");
    let ended = world.ended.first().unwrap();
    assert_eq!(ended.outcome, Outcome::Partial);
    assert!(ended.reason.contains("the host still holds up to 128 MiB more"), "{}", ended.reason);
    assert_eq!(world.state.books.memory_bytes, 256 * MIB, "what is charged cannot be sold");
    world.come_to_rest();
}

/// A change of memory that ends, come what may, 30 s from now.
fn ask_memory(world: &mut World, mib: u64) {
    world.number += 1;
    let before = world.state.desired;
    let target = Desired { memory_bytes: mib * MIB, ..before };
    world.rests_at = None;
    world.happen(Event::Asked(Operation {
        number: world.number,
        target,
        before,
        base_revision: 0,
        by: AskedBy::default(),
        began: world.now,
        deadline: Some(world.now + 30_000),
        at_deadline: AtDeadline::Keep,
    }));
    world.post();
}

fn outcome(world: &World) -> Option<Outcome> {
    let last = world.ended.last().filter(|ended| ended.operation.number == world.number);
    last.map(|ended| ended.outcome)
}

/// The guest's drivers do this much.
fn act(world: &mut World, mib: u64) {
    world.guest_acts(mib / 2 - 1);
    world.post();
}

fn reach(world: &mut World, mib: u64) {
    ask_memory(world, mib);
    for _ in 0..40 {
        act(world, 256);
        world.wait(100);
    }
    assert_eq!((outcome(world), world.held()), (Some(Outcome::Applied), mib * MIB));
}

/// From one size to another, and when so much has moved to a third.
fn turn_round(from: u64, to: u64, moved: u64, instead: u64) {
    let mut world = World::new();
    reach(&mut world, from);
    ask_memory(&mut world, to);
    if moved == 0 {
        // It has looked, no more.
        let memory = &mut world.memory;
        (memory.plug_unread, memory.balloon_unread) = (false, false);
        world.plugs = Run::new(memory.plugged_bytes, memory.requested_bytes);
        world.balloons = Run::new(memory.balloon_bytes, memory.balloon_target_bytes);
        world.mail.push_back(Mail::Message(Event::Memory(world.memory)));
        world.post();
    } else {
        act(&mut world, moved);
    }
    assert_eq!(world.held(), instead * MIB, "it passes there");
    ask_memory(&mut world, instead);
    assert_eq!(outcome(&world), None, "{from} {to} {instead}");
    act(&mut world, 4);
    assert_ne!(world.held(), instead * MIB, "it goes on");
    for _ in 0..20 {
        act(&mut world, 256);
        world.wait(100);
    }
    assert_eq!((outcome(&world), world.held()), (Some(Outcome::Applied), instead * MIB));
}

#[test]
fn a_size_that_the_guest_passes_on_its_way_to_an_earlier_one_is_not_applied() {
    // It plugs at most what is requested, so that there is nothing to pass upwards.
    turn_round(800, 600, 100, 700);
    turn_round(256, 64, 64, 192);
    turn_round(64, 256, 64, 128);
}

#[test]
fn a_size_that_the_guest_is_about_to_leave_is_not_applied() {
    turn_round(800, 600, 0, 800);
    turn_round(256, 128, 0, 256);
    turn_round(64, 256, 0, 64);
}

#[test]
fn what_is_still_being_unplugged_is_not_applied_even_if_the_balloon_makes_up_for_it() {
    let mut world = World::new();
    reach(&mut world, 800);
    world.mood.pinned = 444 * MIB;
    ask_memory(&mut world, 600);
    act(&mut world, 256);
    while world.memory.balloon_target_bytes != 100 * MIB {
        world.wait(100);
        world.post();
    }
    // No sooner has the balloon been told than it goes on.
    for mib in [440, 436] {
        world.mood.pinned = mib * MIB;
        act(&mut world, 256);
        while world.held() != 600 * MIB {
            world.wait(100);
            act(&mut world, 256);
        }
        assert_eq!((world.memory.plugged_bytes, outcome(&world)), (mib * MIB, None));
    }
    world.wait(10_000);
    let ended = world.ended.last().unwrap();
    assert_eq!(ended.outcome, Outcome::Applied);
    assert_eq!(ended.at, world.plugged_at + UNPLUG_PATIENCE_MSEC);
}

#[test]
fn a_guest_that_never_looks_does_not_keep_an_operation_from_its_end() {
    let mut world = World::new();
    reach(&mut world, 800);
    world.mood.deaf = true;
    ask_memory(&mut world, 600);
    ask_memory(&mut world, 800);
    world.wait(29_000);
    assert_eq!((world.held(), outcome(&world)), (800 * MIB, None));
    world.wait(2000);
    let ended = world.ended.last().unwrap();
    assert_eq!((outcome(&world), ended.at), (Some(Outcome::Partial), ended.operation.began + 30_000));
    assert_eq!(ended.reason, "its guest has 800 MiB just now, but has not come to rest there");
    world.come_to_rest();
}

fn scale(default: u32) -> u32 {
    std::env::var("LATHE_MODEL_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

proptest! {
    // 256 cases of 200 steps on average; 10,000 cases are 2 x 10^6 steps.
    #![proptest_config(ProptestConfig { cases: scale(256), max_shrink_iters: 20_000, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_every_operation_ends_and_the_books_hold_what_is_held(
        steps in prop::collection::vec(any::<u64>(), 1..400)
    ) {
        let mut world = World::new();
        for step in steps {
            world.step(step);
        }
        world.come_to_rest();
    }
}
