//! Goals of applications: "95 % of requests under 20 ms", "as much as it can". Their own metrics are followed, and what the machine has to
//! have for their sake is found by trying.
//!
//! ```text
//! missed for 3 s ─► what is short? ─┬─ memory ─► a quarter more ──┐
//!                                   ├─ CPU ────► 10 to 50 % more ─┴─► granted ─► its metrics have had time: did it help? ─┬─► yes: on
//!                                   └─ neither: said, left alone                     twice no: taken back for ten minutes ◄─┘
//! easily met for minutes ─► an eighth less, but not where it was missed under such a load within the hour
//! ```
//! What comes out is a wish like any other, within the machine's bounds: a floor under the grant. How much an application needs to answer in
//! time is in no counter of the kernel, so that no demand is derived from it; and one that lies about itself gets no more than one that works.

use lathe_guest::protocol::inside::{Goal, Pursued};
use lathe_shard::MEMORY_SHARD;

use super::Resource;

/// What a goal can be served with, the index of what is kept for each.
pub const SERVED: [Resource; 2] = [Resource::Cpu, Resource::Memory];
const CPU: usize = 0;
const MEMORY: usize = 1;
const SEC: u64 = 1_000_000;
/// How long a goal has to be missed before something is done, microseconds.
const MISSED_USEC: u64 = 3 * SEC;
/// How long it has to be met easily before less is tried, microseconds, by [`SERVED`].
const EASY_USEC: [u64; 2] = [120 * SEC, 600 * SEC];
/// Time that metrics are taken to be of where they do not tell, and what is added before they are judged, microseconds.
const WINDOW_USEC: u64 = 10 * SEC;
const SETTLE_USEC: u64 = 2 * SEC;
/// Raises that did not help before they are taken back, and how long no more is tried then, microseconds.
const USELESS: u8 = 2;
const REST_USEC: u64 = 600 * SEC;
/// How long what was found counts while metrics tell nothing, microseconds.
const LOST_USEC: u64 = 300 * SEC;
/// How long an amount with which a goal was missed is avoided, microseconds.
const AVOID_USEC: u64 = 3600 * SEC;
/// CPU is short from this share of the grant asked for, of time in which tasks waited for one, and of periods that its quota ended;
/// memory from this share of time in which tasks waited for it. Parts per thousand.
const BUSY_PERMILLE: u64 = 800;
const CPU_WAITS_PERMILLE: u64 = 100;
const HELD_PERMILLE: u64 = 50;
const MEMORY_WAITS_PERMILLE: u64 = 50;
/// Least and most that CPU grows by at once, and what memory grows by, parts per thousand.
const GROWTH_PERMILLE: [u64; 2] = [100, 500];
const MEMORY_GROWTH_PERMILLE: u64 = 250;
/// Least growth: milliCPU, bytes.
const LEAST: [u64; 2] = [50, 32 << 20];

/// One resource of the machine, in its unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// What it is granted.
    pub granted: u64,
    /// The most that it may have.
    pub most: u64,
    /// What it asked for in the last second.
    pub demand: u64,
}

/// How the machine stands; shares are of the last second, parts per thousand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Having {
    /// By [`SERVED`].
    pub holdings: [Holding; 2],
    /// Time in which some task waited for a CPU.
    pub cpu_waits_permille: u64,
    /// Periods in which its quota ended before they did.
    pub held_permille: u64,
    /// Time in which some task waited for memory.
    pub memory_waits_permille: u64,
}

/// How a goal stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stands {
    /// Its metrics tell nothing.
    #[default]
    Unknown,
    /// It is met; of throughput: nothing that the host could give holds it back.
    Met,
    /// It was missed a moment ago.
    Missed,
    /// It is missed, and more is wanted than is granted.
    Wanting,
    /// It was missed, more is granted, and its metrics will tell whether that helps.
    Trying,
    /// It is missed, and neither CPU nor memory is short.
    Elsewhere,
    /// It is missed, and the machine has all that it may have.
    Bounded,
    /// It is missed, and more did not help.
    Futile,
}

impl Stands {
    /// As the API writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Met => "met",
            Self::Missed => "missed",
            Self::Wanting => "wanting",
            Self::Trying => "trying",
            Self::Elsewhere => "elsewhere",
            Self::Bounded => "bounded",
            Self::Futile => "futile",
        }
    }
}

/// Something that is tried.
#[derive(Clone, Copy, Debug)]
struct Attempt {
    which: usize,
    to: u64,
    /// The figure that is to become better.
    before: u64,
    /// Since when it is granted.
    since_usec: Option<u64>,
}

/// An amount with which it was missed.
#[derive(Clone, Copy, Debug)]
struct Failed {
    at_usec: u64,
    amount: u64,
    demand: u64,
}

/// One goal.
#[derive(Clone, Debug)]
pub struct Pursuit {
    /// What its guest tells of it.
    pub told: Pursued,
    /// How it stands.
    pub stands: Stands,
    /// What is wanted for its sake, by [`SERVED`].
    pub wants: [Option<u64>; 2],
    known_usec: u64,
    missed_usec: Option<u64>,
    easy_usec: Option<u64>,
    lowered_usec: [u64; 2],
    attempt: Option<Attempt>,
    useless: u8,
    /// What was wanted before the first raise that did not help.
    undo: [Option<u64>; 2],
    rests_until_usec: u64,
    failed: [Option<Failed>; 2],
}

/// All goals of a machine.
#[derive(Clone, Debug, Default)]
pub struct Goals {
    all: Vec<Pursuit>,
    /// Seconds are too short to tell whether something is short: means over some ten of them.
    smooth: Option<Having>,
}

impl Goals {
    /// Takes in what a guest tells at `at_usec` of goals that are fit to be used: names once each, figures bounded.
    pub fn take(&mut self, at_usec: u64, told: Vec<Pursued>, having: &Having) {
        let having = self.smoothed(having);
        let mut before = std::mem::take(&mut self.all);
        for pursued in told {
            let same = |known: &Pursuit| known.told.name == pursued.name && known.told.goal == pursued.goal;
            let known = before.iter().position(same).map(|place| before.swap_remove(place));
            let mut pursuit = known.unwrap_or_else(|| Pursuit::new(at_usec, pursued.clone()));
            pursuit.told = pursued;
            pursuit.follow(at_usec, &having);
            self.all.push(pursuit);
        }
        if self.all.is_empty() {
            self.smooth = None;
        }
    }

    /// Its guest has ended, and with it what it ran.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// All of them, as told.
    pub fn iter(&self) -> impl Iterator<Item = &Pursuit> {
        self.all.iter()
    }

    /// What is wanted of a resource at `at_usec` for the sake of one of them, in its unit.
    pub fn wanted(&self, resource: Resource, at_usec: u64) -> Option<u64> {
        let which = SERVED.iter().position(|served| *served == resource)?;
        let counts = |pursuit: &&Pursuit| at_usec.saturating_sub(pursuit.known_usec) <= LOST_USEC;
        self.all.iter().filter(counts).filter_map(|pursuit| pursuit.wants[which]).max()
    }

    fn smoothed(&mut self, now: &Having) -> Having {
        let before = self.smooth.unwrap_or(*now);
        let mean = |before: u64, now: u64| {
            u64::try_from((u128::from(before) * 7 + u128::from(now)).div_ceil(8)).unwrap_or(u64::MAX)
        };
        let mut smooth = *now;
        for (holding, before) in smooth.holdings.iter_mut().zip(before.holdings) {
            holding.demand = mean(before.demand, holding.demand);
        }
        smooth.cpu_waits_permille = mean(before.cpu_waits_permille, now.cpu_waits_permille);
        smooth.held_permille = mean(before.held_permille, now.held_permille);
        smooth.memory_waits_permille = mean(before.memory_waits_permille, now.memory_waits_permille);
        self.smooth = Some(smooth);
        smooth
    }
}

impl Having {
    /// What is short, by [`SERVED`]. Who waits for memory seems to lack CPU, too.
    fn short(&self) -> Option<usize> {
        let cpu = &self.holdings[CPU];
        let busy = u128::from(cpu.demand) * 1000 >= u128::from(cpu.granted) * u128::from(BUSY_PERMILLE);
        let waits = self.cpu_waits_permille >= CPU_WAITS_PERMILLE || self.held_permille >= HELD_PERMILLE;
        match self.memory_waits_permille >= MEMORY_WAITS_PERMILLE {
            true => Some(MEMORY),
            false => (busy || waits).then_some(CPU),
        }
    }
}

impl Pursuit {
    fn new(at_usec: u64, told: Pursued) -> Self {
        Self {
            told,
            stands: Stands::Unknown,
            wants: [None; 2],
            known_usec: at_usec,
            missed_usec: None,
            easy_usec: None,
            lowered_usec: [at_usec; 2],
            attempt: None,
            useless: 0,
            undo: [None; 2],
            rests_until_usec: 0,
            failed: [None; 2],
        }
    }

    /// The figure that the goal is about.
    fn figure(&self) -> Option<u64> {
        match self.told.goal {
            Goal::Latency { .. } => self.told.latency_usec,
            Goal::Throughput => self.told.rate_milli,
            Goal::Other => None,
        }
    }

    /// Whether `figure` misses the goal, and whether it meets it easily.
    fn judged(&self, figure: u64, having: &Having) -> (bool, bool) {
        match self.told.goal {
            Goal::Latency { under_usec, .. } => {
                (figure >= under_usec, u128::from(figure) * 10 < u128::from(under_usec) * 7)
            }
            // Whatever it gets through: it is held back while something is short.
            _ => {
                let cpu = &having.holdings[CPU];
                let easy = u128::from(cpu.demand) * 10 < u128::from(cpu.granted) * 6;
                let short = having.short().is_some();
                (short, easy && !short)
            }
        }
    }

    /// Whether the figure has become better by so much that it is no chance.
    fn helped(&self, before: u64, now: u64) -> bool {
        let (before, now) = (u128::from(before), u128::from(now));
        match self.told.goal {
            Goal::Latency { .. } => now * 100 <= before * 95,
            _ => now * 100 >= before * 103,
        }
    }

    fn follow(&mut self, at_usec: u64, having: &Having) {
        let Some(figure) = self.figure() else {
            (self.stands, self.missed_usec, self.easy_usec) = (Stands::Unknown, None, None);
            if at_usec.saturating_sub(self.known_usec) > LOST_USEC {
                (self.wants, self.attempt, self.useless) = ([None; 2], None, 0);
            }
            return;
        };
        self.known_usec = at_usec;
        let (missed, easy) = self.judged(figure, having);
        let since = |since: Option<u64>, now: bool| now.then(|| since.unwrap_or(at_usec));
        (self.missed_usec, self.easy_usec) = (since(self.missed_usec, missed), since(self.easy_usec, easy));
        if self.waits(at_usec, figure, missed, having) {
            return;
        }
        match self.missed_usec.map(|since| at_usec.saturating_sub(since) >= MISSED_USEC) {
            Some(true) => self.mend(at_usec, figure, having),
            Some(false) => self.stands = Stands::Missed,
            None => {
                (self.stands, self.useless) = (Stands::Met, 0);
                self.lower(at_usec, having);
            }
        }
    }

    /// Whether something is being tried that cannot be judged yet; judges it when it can.
    fn waits(&mut self, at_usec: u64, figure: u64, missed: bool, having: &Having) -> bool {
        let Some(attempt) = &mut self.attempt else { return false };
        if having.holdings[attempt.which].granted < attempt.to {
            attempt.since_usec = None;
            self.stands = Stands::Wanting;
            // It is met without: what is wanted stays, for it was missed a moment ago.
            if !missed {
                self.attempt = None;
            }
            return missed;
        }
        let since = *attempt.since_usec.get_or_insert(at_usec);
        let window = match u64::from(self.told.over_msec) * 1000 {
            0 => WINDOW_USEC,
            told => told.min(6 * WINDOW_USEC),
        };
        if at_usec.saturating_sub(since) < window + SETTLE_USEC {
            self.stands = Stands::Trying;
            return true;
        }
        let before = attempt.before;
        self.attempt = None;
        let useless = missed && !self.helped(before, figure);
        self.useless = if useless { self.useless + 1 } else { 0 };
        false
    }

    /// It is missed: wants more of what is short.
    fn mend(&mut self, at_usec: u64, figure: u64, having: &Having) {
        if at_usec < self.rests_until_usec {
            self.stands = Stands::Futile;
            return;
        }
        if self.useless >= USELESS {
            (self.wants, self.useless) = (self.undo, 0);
            (self.stands, self.rests_until_usec) = (Stands::Futile, at_usec.saturating_add(REST_USEC));
            return;
        }
        let Some(which) = having.short() else {
            self.stands = Stands::Elsewhere;
            return;
        };
        let Holding { granted, most, demand } = having.holdings[which];
        self.failed[which] = Some(Failed { at_usec, amount: granted, demand });
        if granted >= most {
            self.stands = Stands::Bounded;
            return;
        }
        if self.useless == 0 {
            self.undo = self.wants;
        }
        let to = self.raised(which, granted, figure).min(most);
        self.wants[which] = Some(to.max(self.wants[which].unwrap_or(0)).min(most));
        self.attempt = Some(Attempt { which, to, before: figure, since_usec: None });
        (self.stands, self.lowered_usec) = (Stands::Wanting, [at_usec; 2]);
    }

    fn raised(&self, which: usize, granted: u64, figure: u64) -> u64 {
        let [least, most] = GROWTH_PERMILLE;
        let permille = match (which, self.told.goal) {
            (MEMORY, _) => MEMORY_GROWTH_PERMILLE,
            // Whoever is held back by a quota takes as much longer as it is smaller.
            (_, Goal::Latency { under_usec, .. }) => {
                let over =
                    u128::from(figure.saturating_sub(under_usec)) * 1000 / u128::from(under_usec.max(1));
                u64::try_from(over).unwrap_or(u64::MAX).clamp(least, most)
            }
            _ => MEMORY_GROWTH_PERMILLE,
        };
        let by = u64::try_from(u128::from(granted) * u128::from(permille) / 1000).unwrap_or(u64::MAX);
        let to = granted.saturating_add(by.max(LEAST[which]));
        if which == MEMORY { to.checked_next_multiple_of(MEMORY_SHARD.0).unwrap_or(to) } else { to }
    }

    /// It is met: wants less of what it may not need any more.
    fn lower(&mut self, at_usec: u64, having: &Having) {
        let Some(easy_usec) = self.easy_usec else { return };
        for which in [CPU, MEMORY] {
            let since = easy_usec.max(self.lowered_usec[which]);
            let Some(wanted) = self.wants[which] else { continue };
            if at_usec.saturating_sub(since) < EASY_USEC[which] {
                continue;
            }
            let (to, demand) = (wanted - wanted / 8, having.holdings[which].demand);
            let avoided = self.failed[which].is_some_and(|failed| {
                let lately = at_usec.saturating_sub(failed.at_usec) < AVOID_USEC;
                let loaded = u128::from(demand) * 10 >= u128::from(failed.demand) * 8;
                lately && loaded && to <= failed.amount.saturating_add(failed.amount / 20)
            });
            self.lowered_usec[which] = at_usec;
            if !avoided {
                // What is asked for anyway need not be wanted.
                self.wants[which] = (to > demand).then_some(to);
            }
        }
    }
}

#[cfg(test)]
#[path = "goal_tests.rs"]
mod tests;
