//! One resource of one machine: which amount costs least.

use super::outlook::MAX_AMOUNT;
use super::past::{DAY_MSEC, Past};
use super::{Cause, Machine, Settings, Sight, Weighed, Weighing, Why};
use crate::foresight::Resource;

/// Most growths that are looked at, of those that the past suggests.
const MOST_JUMPS: usize = 8;

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
    /// Grew and was reached again at once: what it wants cannot be seen.
    pub(super) blind: bool,
    pub(super) now_msec: u64,
}

impl Case<'_> {
    fn knob(&self, knob: super::settings::Knob) -> u64 {
        knob.at(self.machine.aggressiveness_permille)
    }

    fn with_headroom(&self, amount: u64) -> u64 {
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

    fn budget(&self) -> u64 {
        self.knob(self.settings.changes_a_day)
    }

    /// What a change costs when spread over a time: the more of the day's changes are used up, the more.
    fn change(&self, look_msec: u64) -> u64 {
        let left = self.budget().saturating_sub(self.changes).max(1);
        let dearer = scaled(1000, self.budget().max(1), left);
        let scale = self.past.top(DAY_MSEC).max(Bounds::of(self.sight).lower).max(self.sight.step);
        scaled(scaled(scale, self.knob(self.settings.change_msec), look_msec), dearer, 1000)
    }

    fn slack(&self, idle: u64) -> u64 {
        scaled(idle, self.price_permille, 1000)
    }

    /// What is unserved when `short` is missing once, until somebody has reacted.
    fn unserved(&self, short: u64, look_msec: u64) -> u64 {
        let weight = self.settings.unserved_of(self.machine.tier);
        scaled(scaled(short, weight, 1), self.settings.reaction_msec.min(look_msec), look_msec)
    }
}

fn weighed(amount: u64, look_msec: u64, unserved: u64, slack: u64, change: u64) -> Weighed {
    let total = unserved.saturating_add(slack).saturating_add(change);
    Weighed { amount, look_msec, unserved, slack, change, total, rejected: None }
}

/// Weighs what one resource of a machine is to have.
pub(super) fn weigh(case: &Case<'_>) -> Weighing {
    let sight = case.sight;
    let bounds = Bounds::of(sight);
    let demand = sight.demand.min(MAX_AMOUNT);
    let wanted = sight.wanted.map_or(0, |wanted| bounds.fit(wanted));
    let reached = case.settings.reached_permille[case.resource as usize];
    let reached =
        demand >= scaled(sight.granted, reached, 1000) && demand > 0 && sight.granted < bounds.upper;
    let covers = bounds.fit(case.with_headroom(demand));
    let need = covers.max(wanted);
    let trusted = case.trusted();
    let mut weighing = Weighing {
        granted: sight.granted,
        amount: sight.granted,
        cause: Cause::Idle,
        need,
        trusted,
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
fn choose(weighing: &mut Weighing) {
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
    let look = case.settings.ahead_msec.max(1);
    let jump = if case.blind { 2000 } else { case.settings.jump_permille };
    let least = bounds.fit(need.max(scaled(case.sight.granted, jump, 1000)));
    let jumps = case.past.jumps(case.sight.granted, look);
    let mut amounts = vec![least];
    let spread = jumps.len().div_ceil(MOST_JUMPS).max(1);
    amounts.extend(jumps.iter().rev().step_by(spread).map(|peak| bounds.fit(case.with_headroom(*peak))));
    if weighing.trusted
        && let Some(outlook) = &case.sight.outlook
    {
        amounts.push(bounds.fit(outlook.peak()));
    }
    amounts.retain(|amount| *amount >= least);
    amounts.sort_unstable();
    amounts.dedup();
    weighing.cause = Cause::Reached;
    for amount in amounts {
        // Where nothing is known of such jumps, one that goes further counts half.
        let further = jumps.len() - jumps.partition_point(|peak| *peak <= amount);
        let chance = scaled(1000, 2 * further as u64 + 1, 2 * jumps.len() as u64 + 2);
        let beyond: u64 = jumps.iter().map(|peak| peak.saturating_sub(amount)).max().unwrap_or(0);
        let unserved = scaled(case.unserved(beyond, look), chance, 1000);
        let slack = case.slack(amount.saturating_sub(case.sight.demand));
        let change = scaled(case.change(look), 1000 + chance, 1000);
        weighing.options.push(weighed(amount, look, unserved, slack, change));
    }
    choose(weighing);
}

/// Nothing presses: is another amount worth a change?
fn stay_or_change(case: &Case<'_>, bounds: &Bounds, wanted: u64, weighing: &mut Weighing) {
    let patience = case.knob(case.settings.patience_msec).max(1);
    let granted = case.sight.granted;
    let known = case.past.known_msec(case.now_msec);
    let outlook = case.sight.outlook.as_ref().filter(|_| weighing.trusted);
    ahead(case, bounds, weighing);
    if weighing.amount != granted {
        weighing.cause = Cause::Ahead;
        return;
    }
    weighing.options.clear();
    weighing.options.push(weighed(
        granted,
        patience,
        0,
        case.slack(granted.saturating_sub(case.sight.demand)),
        0,
    ));
    let mut look = patience;
    loop {
        let top = case.past.top(look).max(case.sight.recent.min(MAX_AMOUNT));
        let expected = outlook.map_or(0, super::Outlook::peak);
        let amount = bounds.fit(case.with_headroom(top).max(expected).max(wanted));
        if known < look || amount >= granted {
            break;
        }
        let slack = case.slack(amount.saturating_sub(case.sight.demand));
        let mut option = weighed(amount, look, 0, slack, case.change(look));
        if granted - amount < scaled(granted, case.settings.least_permille, 1000) {
            option.rejected = Some(Why::Small);
        } else if case.changes + 2 > case.budget() {
            option.rejected = Some(Why::Changes);
        }
        weighing.options.push(option);
        if look >= DAY_MSEC {
            break;
        }
        look = look.saturating_mul(2).min(DAY_MSEC);
    }
    choose(weighing);
    weighing.cause = Cause::Idle;
}

/// Is it cheaper to grow now than when it is reached?
fn ahead(case: &Case<'_>, bounds: &Bounds, weighing: &mut Weighing) {
    let Some(outlook) = case.sight.outlook.as_ref().filter(|_| weighing.trusted) else { return };
    let granted = case.sight.granted;
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
        if case.changes + 2 > case.budget() {
            option.rejected = Some(Why::Changes);
        }
        weighing.options.push(option);
    }
    choose(weighing);
}
