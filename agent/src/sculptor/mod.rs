//! What shape machines are to have: demand, outlook, tier, price and the cost of changing in, changes of grants out.
//!
//! ```text
//! Machine: Sight of each resource ─► past ─► weigh ─► share ─► Decision: from → to, why, what was rejected
//!   granted, bounds, demand, outlook  (a day)  │        │          │
//!                                              │        └─ host short: tiers decide who yields
//!                                              └─ costs of each amount that comes into question
//! ```
//! | file | what |
//! |---|---|
//! | [`settings`] | what it goes by, with units and reasons |
//! | [`outlook`] | quantiles ahead, and what they say of an amount |
//! | [`cycle`] | what comes back, as amounts |
//! | `past` | what was wanted in the last day |
//! | `weigh` | one resource of one machine: which amount costs least |
//! | `recur` | the same where its demand comes back |
//! | `share` | all machines: what the host has left, and who yields |
//! | `turn` | state, clock, and the turn of all of it |
//!
//! **What an amount costs** is one number in the unit of the resource, the mean of a time ahead: what is expected to be unserved, weighed by
//! tier; what is expected to be idle, times its price; and the change, spread over that time.
//!
//! **It grows at once** when a demand is well beyond the grant: it is covered in this turn, and as far as such jumps of the last day went where
//! that is cheaper than growing again. A small lack waits until it has cost as much as a change. No forecast is needed for that, and none
//! prevents it. Ahead of need it grows where the outlook is trusted, well more is probable and growing later costs more.
//!
//! **What comes back is met**: where a cycle is known it grows a turn and a reaction before the next rise, as far as that went, and is small in
//! between where that spares more than going down and up costs. Memory is not: a rise that came early would kill. Then no patience is needed, and none but the cycle's own is believed.
//!
//! **It shrinks with patience**: what has not been needed for a while will not be for as long again, so that an amount is given up once keeping
//! it for that while would have cost more than the change. Much that is idle goes soon, little goes late. What is often risen above is dearer,
//! as it would grow again. Nothing but what a change costs keeps changes few, so that a machine that needs many has many and its neighbour none:
//! a budget of a dozen for each reserved a third more for as many in the mean. Against flapping there is a most for a day, up to which changes
//! become dearer, and whose last are kept for growing.
//!
//! Pure: no clock, no I/O; equal input gives equal output. It changes nothing itself, and believes what it is told is granted: whoever carries
//! decisions out may fail, or only observe.

pub mod cycle;
pub mod outlook;
mod past;
mod recur;
pub mod settings;
mod share;
mod turn;
mod weigh;

#[cfg(test)]
mod tests;

use crate::api::wire::Tier;
use crate::foresight::Resource;

pub use self::cycle::Cycle;
pub use self::outlook::Outlook;
pub use self::settings::Settings;
pub use self::turn::Sculptor;

/// How many resources a machine has.
pub const RESOURCES: usize = Resource::ALL.len();

/// One resource of a machine now, in its unit: milliCPU, bytes, bit/s, operations per second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// What it has; beyond [`outlook::MAX_AMOUNT`] it has no limit, and is left alone.
    pub granted: u64,
    /// Never less.
    pub min: u64,
    /// Never more; `u64::MAX` without a bound.
    pub max: u64,
    /// Grants are multiples of this; 0 counts as 1.
    pub step: u64,
    /// What was wanted since the last look: the mean of these seconds; of memory the largest. May be more than was granted, where that can be
    /// seen.
    pub demand: u64,
    /// What is wanted beyond the grant cannot be seen, so that a demand of all that was granted may be any.
    pub hidden: bool,
    /// The largest of the last ten seconds or so. It keeps a grant from being made smaller than that, and makes none larger by itself.
    pub recent: u64,
    /// What it cannot do without, whatever it was seen to want: of memory the working set and some room. 0 where there is no such thing.
    pub floor: u64,
    /// At least this was asked for, from inside or by an event.
    pub wanted: Option<u64>,
    /// What is ahead.
    pub outlook: Option<Outlook>,
    /// What comes back.
    pub cycle: Option<Cycle>,
    /// Of so many (second) forecasts of late, how many held at the 95 % quantile (first).
    pub held: (u32, u32),
}

/// A machine that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name, by which its past is known.
    pub name: String,
    /// What it is promised.
    pub tier: Tier,
    /// 0 keeps more and changes seldom, 1000 is close to demand.
    pub aggressiveness_permille: u32,
    /// An operation runs, or a person has changed it a moment ago: it is looked at, and left as it is.
    pub busy: bool,
    /// By [`Resource`]; `None` for what it does not have, or what cannot be seen now.
    pub sights: [Option<Sight>; RESOURCES],
}

/// What the host has, by [`Resource`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// What is granted to nobody. `u64::MAX` where there is no limit.
    pub free: [u64; RESOURCES],
    /// What must become free beside what machines want: for one that is to start, or for the reserve.
    pub missing: [u64; RESOURCES],
    /// What a unit that is idle costs, thousandths of the ordinary.
    pub price_permille: [u64; RESOURCES],
}

impl Default for Host {
    /// Without limits, at the ordinary price.
    fn default() -> Self {
        Self { free: [u64::MAX; RESOURCES], missing: [0; RESOURCES], price_permille: [1000; RESOURCES] }
    }
}

/// Why a grant is to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Demand has reached the grant.
    Reached,
    /// It will, as the outlook says.
    Ahead,
    /// It was asked for.
    Wanted,
    /// It cannot do with less, or must not have more: working set and bounds.
    Bounds,
    /// It was not needed for so long that keeping it costs more than changing.
    Idle,
    /// The host is short, and its tier yields.
    Short,
}

impl Cause {
    /// As JSON and the journal write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Reached => "reached",
            Self::Ahead => "ahead",
            Self::Wanted => "wanted",
            Self::Bounds => "bounds",
            Self::Idle => "idle",
            Self::Short => "short",
        }
    }
}

/// Why an amount was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Another one costs less.
    Dearer,
    /// More than that was wanted so short a time ago.
    Needed,
    /// More than that is expected.
    Expected,
    /// There were so many changes in the last day that the rest is kept for growing.
    Changes,
    /// It is hardly another amount.
    Small,
}

impl Why {
    /// As JSON writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Dearer => "dearer",
            Self::Needed => "needed",
            Self::Expected => "expected",
            Self::Changes => "changes",
            Self::Small => "small",
        }
    }
}

/// An amount that came into question. Costs are in the unit of the resource, means over the time that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weighed {
    /// The amount.
    pub amount: u64,
    /// Over how much time, milliseconds.
    pub look_msec: u64,
    /// Expected to be wanted and not there, weighed by tier.
    pub unserved: u64,
    /// Expected to be there and idle, times its price.
    pub slack: u64,
    /// The change, and those that it is expected to entail.
    pub change: u64,
    /// Sum of the three.
    pub total: u64,
    /// Why not; `None` for the one that was taken.
    pub rejected: Option<Why>,
}

/// A cycle by which something was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recurrence {
    /// Its length, milliseconds.
    pub period_msec: u64,
    /// How many in a row were alike.
    pub cycles: u32,
}

/// What was weighed for one resource of a machine when it was last looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weighing {
    /// What it had.
    pub granted: u64,
    /// What it is to have; as granted, when it is to stay as it is.
    pub amount: u64,
    /// Why; meaningless when it stays as it is.
    pub cause: Cause,
    /// Least that covers its demand, and what it must have.
    pub need: u64,
    /// Whether the outlook counted.
    pub trusted: bool,
    /// It is decided by what comes back.
    pub recurrence: Option<Recurrence>,
    /// Changes in the last day.
    pub changes: u32,
    /// What came into question, the grant as it is first.
    pub options: Vec<Weighed>,
}

/// A grant that is to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whose.
    pub machine: String,
    /// Which.
    pub resource: Resource,
    /// From what it has.
    pub from: u64,
    /// To what it is to have.
    pub to: u64,
    /// Why.
    pub cause: Cause,
    /// The numbers.
    pub weighing: Weighing,
    /// The same was decided before, and nothing has come of it yet: there is no news in it.
    pub again: bool,
}
