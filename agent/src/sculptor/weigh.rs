//! One resource of one machine: which amount costs least.

use super::cycle::Cycle;
use super::outlook::MAX_AMOUNT;
use super::past::{DAY_MSEC, Past};
use super::recur::recur;
use super::{Cause, Machine, Settings, Sight, Weighed, Weighing, Why};
use crate::foresight::Resource;

/// Of `lathe_forecast::LEVELS`, 0.5.
const MEDIAN: usize = 0;
/// Times ahead for which a growth is weighed, milliseconds.
const AHEAD_MSEC: [u64; 5] = [1_800_000, 3_600_000, 7_200_000, 14_400_000, 28_800_000];

/// What it is weighed to grow to, thousandths of what just covers its demand, beside what the past suggests.
const GROW_PERMILLE: [u64; 4] = [1000, 1250, 1600, 2000];
/// What it is weighed to shrink to, thousandths of what would have covered all of the time looked at.
const SHRINK_PERMILLE: [u64; 7] = [600, 750, 850, 950, 1000, 1150, 1350];

/// `amount × by ÷ parts` rounded up, cut at what an amount may be; 0 parts count as 1.
pub(super) fn scaled(amount: u64, by: u64, parts: u64) -> u64 {
    let product = u128::from(amount) * u128::from(by);
    u64::try_from(product.div_ceil(u128::from(parts.max(1)))).unwrap_or(u64::MAX).min(MAX_AMOUNT)
}

/// What must hold for a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) lower: u64,
    pub(super) upper: u64,
    step: u64,
}

impl Bounds {
    pub(super) fn of(sight: &Sight) -> Self {
        let step = sight.step.max(1);
        let upper = sight.max.min(MAX_AMOUNT) / step * step;
        // A bound that somebody set counts more than what a machine is seen to need.
        let lower = sight.min.max(sight.floor).min(upper);
        Self { lower: (lower.div_ceil(step) * step).min(upper), upper, step }
    }

    /// The next grant that covers an amount, as far as bounds allow.
    pub(super) fn fit(&self, amount: u64) -> u64 {
        let amount = amount.clamp(self.lower, self.upper);
        (amount.div_ceil(self.step) * self.step).min(self.upper)
    }
}

/// All that is looked at for one resource.
pub(super) struct Case<'a> {
    pub(super) settings: &'a Settings,
    pub(super) machine: &'a Machine,
    pub(super) resource: Resource,
    pub(super) sight: &'a Sight,
    pub(super) past: &'a Past,
    pub(super) price_permille: u64,
    /// Changes of the last day.
    pub(super) changes: u64,
    /// It has grown a moment ago because it was reached.
    pub(super) again: bool,
    /// How much dearer changes are than at first, thousandths.
    pub(super) dearer_permille: u64,
    pub(super) now_msec: u64,
}

impl Case<'_> {
    pub(super) fn knob(&self, knob: super::settings::Knob) -> u64 {
        knob.at(self.machine.aggressiveness_permille)
    }

    pub(super) fn with_headroom(&self, amount: u64) -> u64 {
        let more = self.knob(self.settings.headroom_permille[self.resource as usize]);
        scaled(amount, 1000 + more, 1000)
    }

    /// Whether the outlook counts.
    fn trusted(&self) -> bool {
        let (held, judged) = self.sight.held;
        let enough = judged < self.settings.judged
            || u64::from(held) * 1000 >= u64::from(judged) * u64::from(self.settings.held_permille);
        let confident =
            |outlook: &super::Outlook| outlook.confidence_permille >= self.settings.trusted_permille;
        enough && self.sight.outlook.as_ref().is_some_and(confident)
    }

    /// Whether demand is well beyond the grant.
    fn is_beyond(&self) -> bool {
        let beyond = self.knob(self.settings.beyond_permille);
        self.sight.demand >= scaled(self.sight.granted, beyond, 1000)
    }

    /// Whether demand has reached the grant.
    fn reached(&self) -> bool {
        let Sight { granted, demand, hidden, .. } = *self.sight;
        let full = demand >= scaled(granted, self.settings.reached_permille[self.resource as usize], 1000);
        let full = full && (hidden || self.resource == Resource::Memory);
        // What it has cost so far is more than the change that would have spared it.
        let weight = u128::from(self.settings.unserved_of(self.machine.tier));
        let dear = self.past.debt().saturating_mul(weight) >= u128::from(self.change(1000)) * 1000;
        demand > 0 && (self.is_beyond() || full || (demand > granted && dear))
    }

    /// Whether there are changes left that need not be kept for growing.
    pub(super) fn may_spend(&self) -> bool {
        self.changes.saturating_mul(4) < self.budget().saturating_mul(3)
    }

    fn budget(&self) -> u64 {
        self.knob(self.settings.changes_a_day)
    }

    /// What a change costs when spread over a time: the more of the day's changes are used up, the more.
    pub(super) fn change(&self, look_msec: u64) -> u64 {
        let left = self.budget().saturating_sub(self.changes).max(1);
        let dearer = scaled(self.dearer_permille, self.budget().max(1), left);
        let scale = self
            .past
            .usual()
            .max(self.sight.demand.min(MAX_AMOUNT))
            .max(Bounds::of(self.sight).lower)
            .max(self.sight.step);
        scaled(scaled(scale, self.knob(self.settings.change_msec), look_msec), dearer, 1000)
    }

    pub(super) fn slack(&self, idle: u64) -> u64 {
        scaled(idle, self.price_permille, 1000)
    }

    /// What is unserved when `short` is missing once, until somebody has reacted.
    pub(super) fn unserved(&self, short: u64, look_msec: u64) -> u64 {
        let weight = self.settings.unserved_of(self.machine.tier);
        scaled(scaled(short, weight, 1), self.settings.reaction_msec.min(look_msec), look_msec)
    }
}

pub(super) fn weighed(amount: u64, look_msec: u64, unserved: u64, slack: u64, change: u64) -> Weighed {
    let total = unserved.saturating_add(slack).saturating_add(change);
    Weighed { amount, look_msec, unserved, slack, change, total, rejected: None }
}

/// Weighs what one resource of a machine is to have.
pub(super) fn weigh(case: &Case<'_>) -> Weighing {
    let sight = case.sight;
    let bounds = Bounds::of(sight);
    let demand = sight.demand.min(MAX_AMOUNT);
    let wanted = sight.wanted.map_or(0, |wanted| bounds.fit(wanted));
    let reached = case.reached() && sight.granted < bounds.upper;
    let covers = bounds.fit(case.with_headroom(demand));
    let need = covers.max(wanted);
    let trusted = case.trusted();
    let mut weighing = Weighing {
        granted: sight.granted,
        amount: sight.granted,
        cause: Cause::Idle,
        need,
        trusted,
        recurrence: None,
        changes: u32::try_from(case.changes).unwrap_or(u32::MAX),
        options: Vec::new(),
    };
    if reached {
        grow(case, &bounds, need, &mut weighing);
    } else if sight.granted < wanted || sight.granted < bounds.lower || sight.granted > bounds.upper {
        weighing.amount = bounds.fit(sight.granted.max(wanted));
        weighing.cause = if sight.granted < wanted { Cause::Wanted } else { Cause::Bounds };
    } else {
        stay_or_change(case, &bounds, wanted, &mut weighing);
    }
    weighing
}

/// Marks the cheapest of the options that were not rejected for another reason as the one that is taken.
pub(super) fn choose(weighing: &mut Weighing) {
    let open = weighing.options.iter().enumerate().filter(|(_, option)| option.rejected.is_none());
    // The first of equals: staying as it is.
    let Some((best, _)) = open.min_by_key(|(at, option)| (option.total, *at)) else { return };
    for (at, option) in weighing.options.iter_mut().enumerate() {
        if at != best {
            option.rejected.get_or_insert(Why::Dearer);
        }
    }
    weighing.amount = weighing.options[best].amount;
}

/// Demand has reached the grant: how far does it go?
fn grow(case: &Case<'_>, bounds: &Bounds, need: u64, weighing: &mut Weighing) {
    let sight = case.sight;
    let [first, then] = case.settings.hidden_permille;
    let least = match (sight.hidden, case.again) {
        (false, _) => need.max(sight.granted.saturating_add(1)),
        (true, false) => need.max(scaled(sight.granted, first, 1000)),
        (true, true) => need.max(scaled(sight.granted, then, 1000)),
    };
    // The last but one change of the day is to be the last.
    let last = case.changes + 2 >= case.budget();
    let day = if last { case.with_headroom(case.past.top(DAY_MSEC)) } else { 0 };
    // Of what comes back it is known how far it goes.
    let back = sight.cycle.as_ref().filter(|cycle| cycle.top(case.settings.lead_msec) > sight.granted);
    let back = back.map_or(0, |cycle| case.with_headroom(cycle.burst(sight.granted)));
    let least = bounds.fit(least.max(day).max(back));
    weighing.cause = Cause::Reached;
    for look in AHEAD_MSEC {
        let jumps = case.past.jumps(sight.granted, look);
        let count = jumps.len() as u64;
        let mean = jumps.iter().map(|jump| jump.mean).sum::<u64>().checked_div(count).unwrap_or(sight.demand);
        let peak = |part: usize| jumps.get((jumps.len() * part / 4).min(jumps.len().saturating_sub(1)));
        // A small lack of what has long been the same says nothing of more.
        let steady = jumps.is_empty() && !case.is_beyond() && !sight.hidden;
        let parts = if steady { &GROW_PERMILLE[..1] } else { &GROW_PERMILLE[..] };
        let further = parts.iter().map(|part| bounds.fit(scaled(least, *part, 1000)));
        let peaks = [1, 2, 3, 4].into_iter().filter_map(peak);
        let peaks = peaks.map(|jump| bounds.fit(case.with_headroom(jump.peak)).max(least));
        let mut amounts: Vec<u64> = further.chain(peaks).collect();
        amounts.sort_unstable();
        amounts.dedup();
        for amount in amounts {
            // Where nothing is known of such jumps, twice as much is wanted half as often; each that is known counts as much as that.
            let further = jumps.len() - jumps.partition_point(|jump| jump.peak <= amount);
            let unknown = scaled(1000, least, amount);
            let chance = (1000 * further as u64 + unknown) / (count + 1);
            let beyond = jumps.last().map_or(0, |jump| jump.peak.saturating_sub(amount));
            let unserved = scaled(case.unserved(beyond, look), chance, 1000);
            let change = scaled(case.change(look), 1000 + chance, 1000);
            weighing.options.push(weighed(
                amount,
                look,
                unserved,
                case.slack(amount.saturating_sub(mean)),
                change,
            ));
        }
        if jumps.is_empty() {
            break;
        }
    }
    choose(weighing);
}

/// Nothing presses: is another amount worth a change?
fn stay_or_change(case: &Case<'_>, bounds: &Bounds, wanted: u64, weighing: &mut Weighing) {
    let patience = case.knob(case.settings.patience_msec).max(1);
    let granted = case.sight.granted;
    let known = case.past.known_msec(case.now_msec);
    let outlook = case.sight.outlook.as_ref().filter(|_| weighing.trusted);
    // Not below what is wanted now, or was a moment ago.
    let least = weighing.need.max(wanted).max(case.sight.recent.min(MAX_AMOUNT));
    let cycle = case.sight.cycle.as_ref();
    if cycle.is_some_and(|cycle| recur(case, bounds, cycle, least, weighing)) {
        return;
    }
    weighing.options.clear();
    if cycle.is_none() {
        ahead(case, bounds, weighing);
        if weighing.amount != granted {
            weighing.cause = Cause::Ahead;
            return;
        }
        weighing.options.clear();
    }
    weighing.options.push(weighed(
        granted,
        patience,
        0,
        case.slack(granted.saturating_sub(case.sight.demand)),
        0,
    ));
    // Nor below what is expected, as is more probable than not: what is only possible is no reason to keep a grant.
    let least = least.max(outlook.map_or(0, |outlook| outlook.level(MEDIAN)));
    // What comes back within a cycle is not idle in between, and what it rises to is known better than by the minute.
    let least = least.max(cycle.map_or(0, |cycle| case.with_headroom(cycle.top(cycle.period_msec()))));
    let mut look = patience.max(cycle.map_or(0, Cycle::period_msec)).min(DAY_MSEC);
    loop {
        let top = case.with_headroom(case.past.top(look));
        let amounts = SHRINK_PERMILLE.map(|part| bounds.fit(scaled(top, part, 1000).max(least)));
        if known < look || amounts[0] >= granted {
            break;
        }
        let mut before = 0;
        for amount in amounts {
            if amount < granted && amount != before {
                weighing.options.push(shrunk(case, granted, amount, look));
            }
            before = amount;
        }
        if look >= DAY_MSEC {
            break;
        }
        look = look.saturating_mul(2).min(DAY_MSEC);
    }
    choose(weighing);
    weighing.cause = Cause::Idle;
}

/// What it costs to have less.
fn shrunk(case: &Case<'_>, granted: u64, amount: u64, look: u64) -> Weighed {
    // Each time that demand rises above it, it grows and shrinks again.
    let again = 2 * case.past.rises_permille(amount, look);
    let slack = case.slack(amount.saturating_sub(case.sight.demand));
    let unserved = scaled(case.past.beyond(look, amount), case.settings.unserved_of(case.machine.tier), 1);
    let mut option = weighed(amount, look, unserved, slack, scaled(case.change(look), 1000 + again, 1000));
    if granted - amount < scaled(granted, case.settings.least_permille, 1000) {
        option.rejected = Some(Why::Small);
    } else if !case.may_spend() {
        option.rejected = Some(Why::Changes);
    }
    option
}

/// Is it cheaper to grow now than when it is reached?
fn ahead(case: &Case<'_>, bounds: &Bounds, weighing: &mut Weighing) {
    let Some(outlook) = case.sight.outlook.as_ref().filter(|_| weighing.trusted) else { return };
    let granted = case.sight.granted;
    let well_beyond = scaled(granted, case.knob(case.settings.beyond_permille), 1000);
    if outlook.over_permille(well_beyond) < case.settings.ahead_permille {
        return;
    }
    let look = outlook.reach_msec().max(1);
    let change = case.change(look);
    let of = |amount: u64, now: u64| {
        let over = outlook.over_permille(amount);
        let short = outlook.level(0).max(outlook.peak()).saturating_sub(amount);
        let unserved = scaled(case.unserved(short, look), over, 1000);
        weighed(
            amount,
            look,
            unserved,
            case.slack(outlook.idle(amount)),
            now.saturating_add(scaled(change, over, 1000)),
        )
    };
    weighing.options.push(of(granted, 0));
    for level in 0..lathe_forecast::LEVELS.len() {
        let amount = bounds.fit(outlook.level(level));
        if amount < granted.saturating_add(scaled(granted, case.settings.least_permille, 1000)) {
            continue;
        }
        let mut option = of(amount, change);
        if !case.may_spend() {
            option.rejected = Some(Why::Changes);
        }
        weighing.options.push(option);
    }
    choose(weighing);
}
