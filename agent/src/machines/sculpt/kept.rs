//! What is remembered of one machine: decisions and what became of them, how grants met demand, what failed a moment ago. What a lathed before
//! this one has decided is remembered as it was shown.

use std::collections::VecDeque;

use crate::api::wire::foresight::DecisionView;
use crate::foresight::Resource;
use crate::foresight::account::Account;
use crate::foresight::kept::Accounts;
use crate::sculptor::{Decision, RESOURCES, Weighing};

/// Decisions that are remembered.
pub const MAX_KEPT: usize = 32;
/// How long a resource rests after a change of it has not come about; each one in a row doubles it.
const REST_MSEC: u64 = 60_000;
/// What would be done is the same as long as the amount differs by less than one in so many parts: demand is never twice the same.
const NEAR_PART: u64 = 4;
/// The longest rest.
const MAX_REST_MSEC: u64 = 900_000;

/// What the sculptor was shown of a resource, for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Asked for in the last second, in the resource's unit.
    pub demand: Option<u64>,
    /// The most of a second of the last 10.
    pub recent: Option<u64>,
    /// The median of what is ahead, at its highest.
    pub p50: Option<u64>,
    /// The 95 % quantile, likewise.
    pub p95: Option<u64>,
    /// The 99 % quantile, likewise.
    pub p99: Option<u64>,
    /// How much time that covers, seconds.
    pub ahead_sec: u64,
    /// How far it has earned trust, thousandths.
    pub confidence_permille: Option<u64>,
}

/// What became of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Came {
    /// Nothing was done.
    Observed,
    /// It is being carried out.
    UnderWay,
    /// All of it is in force.
    Applied,
    /// Some of it is; why not all.
    Partial(String),
    /// It was undone; why.
    Failed(String),
    /// It was not begun; why.
    Refused(String),
}

impl Came {
    /// Words of what has ended, in the order of [`Counts`].
    pub const WORDS: [&'static str; 5] = ["observed", "applied", "partial", "failed", "refused"];

    /// As the API writes it.
    pub fn word(&self) -> &'static str {
        self.place().map_or("under-way", |place| Self::WORDS[place])
    }

    fn place(&self) -> Option<usize> {
        match self {
            Self::UnderWay => None,
            Self::Observed => Some(0),
            Self::Applied => Some(1),
            Self::Partial(_) => Some(2),
            Self::Failed(_) => Some(3),
            Self::Refused(_) => Some(4),
        }
    }

    /// In words, why not all of it is in force.
    pub fn reason(&self) -> &str {
        match self {
            Self::Partial(reason) | Self::Failed(reason) | Self::Refused(reason) => reason,
            Self::Observed | Self::UnderWay | Self::Applied => "",
        }
    }
}

/// Decisions by resource and what became of them ([`Came::WORDS`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts([[u64; Came::WORDS.len()]; RESOURCES]);

impl Counts {
    /// One more; what is under way is counted when it ends.
    pub fn add(&mut self, resource: Resource, came: &Came) {
        if let Some(place) = came.place() {
            self.0[resource as usize][place] += 1;
        }
    }

    /// Resource, what became of it, how often; all there are.
    pub fn all(&self) -> impl Iterator<Item = (Resource, &'static str, u64)> + '_ {
        Resource::ALL.into_iter().flat_map(move |resource| {
            Came::WORDS
                .into_iter()
                .zip(self.0[resource as usize])
                .map(move |(word, count)| (resource, word, count))
        })
    }
}

/// A decision, and what became of it.
#[derive(Clone, Debug)]
pub struct Kept {
    id: u64,
    /// When it was first made, milliseconds since the epoch.
    pub at_msec: u64,
    /// When it was made last.
    pub until_msec: u64,
    /// How often.
    pub times: u64,
    /// What it says.
    pub decision: Decision,
    /// What it was made of.
    pub numbers: Numbers,
    /// In a sentence.
    pub why: String,
    /// What became of it.
    pub came: Came,
    /// The operation that carried it out.
    pub operation: Option<String>,
}

/// A resource of which changes did not come about.
#[derive(Clone, Copy, Debug, Default)]
struct Rest {
    until_msec: u64,
    in_a_row: u32,
}

/// What is remembered of one machine.
#[derive(Default)]
pub struct Sculpted {
    /// The newest first.
    decisions: VecDeque<Kept>,
    /// What a lathed before this one decided, likewise.
    before: Vec<DecisionView>,
    /// Since when anything is remembered, seconds since the epoch, where a lathed before this one began it.
    pub since_sec: Option<u64>,
    /// How often what is remembered has become something else, and how often when it was stored.
    changes: u64,
    stored: u64,
    next_id: u64,
    rests: [Rest; RESOURCES],
    /// How grants met demand.
    pub accounts: Accounts,
    /// What was weighed at the last look.
    pub weighings: [Option<Weighing>; RESOURCES],
    /// Whether it would be given more at once, as it was looked at last.
    pub may_grow: [bool; RESOURCES],
    /// Seconds in a row in which it asked for all that it has, and would have been given more.
    pub pressed_sec: u32,
    /// A change of it is being carried out.
    pub doing: bool,
}

impl Sculpted {
    /// The newest first.
    pub fn decisions(&self) -> impl Iterator<Item = &Kept> {
        self.decisions.iter()
    }

    /// Remembers a decision; by the answer it is found again.
    pub fn keep(
        &mut self,
        now_msec: u64,
        decision: Decision,
        numbers: Numbers,
        why: String,
        came: Came,
    ) -> u64 {
        self.next_id += 1;
        let (id, at_msec) = (self.next_id, now_msec);
        let kept = Kept {
            id,
            at_msec,
            until_msec: now_msec,
            times: 1,
            decision,
            numbers,
            why,
            came,
            operation: None,
        };
        self.decisions.push_front(kept);
        self.decisions.truncate(MAX_KEPT);
        self.before.truncate(MAX_KEPT - self.decisions.len());
        self.changes += 1;
        id
    }

    /// What a lathed before this one decided, the newest first.
    pub fn before(&self) -> &[DecisionView] {
        &self.before
    }

    /// Takes over what a lathed before this one decided and accounted for.
    pub fn recall(&mut self, accounts: Option<Accounts>, mut before: Vec<DecisionView>) {
        before.truncate(MAX_KEPT);
        let accounted = accounts.iter().flatten().filter_map(Account::since);
        self.since_sec = accounted.chain(before.iter().map(|decision| decision.at_unix_msec / 1000)).min();
        self.before = before;
        if let Some(accounts) = accounts {
            self.accounts = accounts;
        }
    }

    /// A number for all decisions as they are now, where that is not what was stored.
    pub fn to_store(&self) -> Option<u64> {
        (self.changes != self.stored).then_some(self.changes)
    }

    /// They are stored as they were at that number.
    pub fn stored(&mut self, changes: u64) {
        self.stored = changes;
    }

    /// Remembers what would be done. `None`: it is what was to be done before, too, or nearly so.
    pub fn observe(
        &mut self,
        now_msec: u64,
        decision: Decision,
        numbers: Numbers,
        why: String,
    ) -> Option<u64> {
        let resource = decision.resource;
        let same = |kept: &Kept| {
            let (was, is) = (&kept.decision, &decision);
            let near =
                was.to.abs_diff(is.to) <= was.to / NEAR_PART && (was.to > was.from) == (is.to > is.from);
            kept.came == Came::Observed && (was.from, was.cause) == (is.from, is.cause) && near
        };
        match self.decisions.iter_mut().find(|kept| kept.decision.resource == resource) {
            Some(kept) if same(kept) => {
                kept.until_msec = now_msec;
                kept.times = kept.times.saturating_add(1);
                None
            }
            _ => Some(self.keep(now_msec, decision, numbers, why, Came::Observed)),
        }
    }

    /// Remembers what became of a decision; what did not come about lets its resource rest.
    pub fn ended(
        &mut self,
        now_msec: u64,
        id: u64,
        resource: Resource,
        came: Came,
        operation: Option<String>,
    ) {
        let rest = &mut self.rests[resource as usize];
        *rest = match came {
            Came::Applied | Came::Observed | Came::UnderWay => Rest::default(),
            Came::Partial(_) | Came::Failed(_) | Came::Refused(_) => {
                let msec = REST_MSEC.saturating_mul(1 << rest.in_a_row.min(10)).min(MAX_REST_MSEC);
                Rest { until_msec: now_msec.saturating_add(msec), in_a_row: rest.in_a_row.saturating_add(1) }
            }
        };
        if let Some(kept) = self.decisions.iter_mut().find(|kept| kept.id == id) {
            (kept.until_msec, kept.came, kept.operation) = (now_msec, came, operation);
            self.changes += 1;
        }
    }

    /// Until when a resource rests, if it does.
    pub fn rests_until(&self, resource: Resource, now_msec: u64) -> Option<u64> {
        Some(self.rests[resource as usize].until_msec).filter(|until| *until > now_msec)
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::sculptor::Cause;

    /// From 300 to so much.
    pub fn decision(resource: Resource, to: u64) -> Decision {
        let weighing = Weighing {
            granted: 300,
            amount: to,
            cause: Cause::Reached,
            need: to,
            trusted: false,
            recurrence: None,
            changes: 0,
            options: Vec::new(),
        };
        let (machine, cause) = ("demo".to_owned(), Cause::Reached);
        Decision { machine, resource, from: 300, to, cause, weighing, again: false }
    }

    fn observe(sculpted: &mut Sculpted, at: u64, resource: Resource, to: u64) -> Option<u64> {
        sculpted.observe(at, decision(resource, to), Numbers::default(), String::new())
    }

    #[test]
    fn what_is_only_observed_is_kept_once_for_as_long_as_it_stays_the_same() {
        let mut sculpted = Sculpted::default();
        assert!(observe(&mut sculpted, 0, Resource::Cpu, 500).is_some());
        assert!(observe(&mut sculpted, 1, Resource::Memory, 500).is_some());
        assert_eq!(observe(&mut sculpted, 5000, Resource::Cpu, 500), None);
        assert_eq!(observe(&mut sculpted, 5500, Resource::Cpu, 620), None, "hardly another amount");
        assert!(observe(&mut sculpted, 6000, Resource::Cpu, 700).is_some());
        let kept: Vec<_> = sculpted
            .decisions()
            .map(|kept| (kept.decision.to, kept.at_msec, kept.until_msec, kept.times))
            .collect();
        assert_eq!(kept, [(700, 6000, 6000, 1), (500, 1, 1, 1), (500, 0, 5500, 3)]);
        for turn in 0..100 {
            observe(&mut sculpted, 7000 + turn, Resource::Cpu, 400 + turn % 2 * 400);
        }
        assert_eq!(sculpted.decisions().count(), MAX_KEPT);
        assert_eq!(sculpted.decisions().next().map(|kept| kept.decision.to), Some(800));
    }

    #[test]
    fn what_does_not_come_about_rests_longer_each_time_and_what_does_forgets_it() {
        let mut sculpted = Sculpted::default();
        let mut now = 0;
        let mut end = |came: Came| {
            let id = sculpted.keep(
                now,
                decision(Resource::Memory, 9),
                Numbers::default(),
                String::new(),
                Came::UnderWay,
            );
            sculpted.ended(now, id, Resource::Memory, came.clone(), Some("demo-1".to_owned()));
            let kept = sculpted.decisions().next().unwrap();
            assert_eq!((&kept.came, kept.operation.as_deref()), (&came, Some("demo-1")));
            let rest = sculpted.rests_until(Resource::Memory, now).map(|until| until - now);
            assert_eq!(sculpted.rests_until(Resource::Cpu, now), None, "the other one is free");
            now += 1_000_000;
            rest
        };
        let failed = || Came::Partial("not movable".to_owned());
        assert_eq!([(); 3].map(|()| end(failed())), [60_000, 120_000, 240_000].map(Some));
        assert_eq!(end(Came::Applied), None);
        let rests: Vec<_> = (0..20).map(|_| end(Came::Refused(String::new()))).collect();
        assert_eq!((rests[0], rests[19]), (Some(60_000), Some(900_000)));
    }

    #[test]
    fn counts_are_of_what_has_ended() {
        let mut counts = Counts::default();
        counts.add(Resource::Cpu, &Came::UnderWay);
        counts.add(Resource::Cpu, &Came::Applied);
        counts.add(Resource::Cpu, &Came::Applied);
        counts.add(Resource::Memory, &Came::Failed(String::new()));
        let counted: Vec<_> = counts.all().filter(|(.., count)| *count > 0).collect();
        assert_eq!(counted, [(Resource::Cpu, "applied", 2), (Resource::Memory, "failed", 1)]);
        assert_eq!(counts.all().count(), 20);
    }
}
