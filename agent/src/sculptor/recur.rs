//! Demand that comes back: it grows just before the next rise, and is small in between where that is worth two changes a cycle.

use super::cycle::Cycle;
use super::weigh::{Bounds, Case, choose, scaled, weighed};
use super::{Cause, Recurrence, Weighing, Why};
use crate::foresight::Resource;

/// Weighs what a cycle suggests; whether that is a change. `least` is what must stay in any case.
///
/// All costs are means over one cycle, so that what is spared between two rises stands beside what it costs to go down and up again.
pub(super) fn recur(
    case: &Case<'_>,
    bounds: &Bounds,
    cycle: &Cycle,
    least: u64,
    weighing: &mut Weighing,
) -> bool {
    let granted = case.sight.granted;
    let period = cycle.period_msec();
    let lead = case.settings.lead_msec;
    let change = case.change(period);
    // Who has come so many times comes once more: as probable as the rule of succession has it, less one for what may be chance.
    let again = |amount: u64| scaled(amount, u64::from(cycle.cycles), u64::from(cycle.cycles) + 1);
    let soon = cycle.top(lead);
    if soon > scaled(granted, case.knob(case.settings.beyond_permille), 1000) {
        let short = soon.saturating_sub(granted);
        // It would grow then, if that comes: the change is the same, and what is missing until it is in force comes on top.
        let later = (again(case.unserved(short, period)), again(change));
        weighing.options.push(weighed(granted, period, later.0, 0, later.1));
        let amount = bounds.fit(case.with_headroom(cycle.burst(granted)));
        if amount > granted {
            let idle = scaled(amount - granted, lead.min(period), period);
            let mut grown = weighed(amount, period, 0, case.slack(idle), change);
            grown.rejected = (!case.may_spend()).then_some(Why::Changes);
            weighing.options.push(grown);
        }
        choose(weighing);
        weighing.cause = Cause::Ahead;
    } else if case.resource == Resource::Memory {
        // A rise that came a moment early would kill: memory is not taken between two times.
        return false;
    } else {
        // What each amount leaves idle is more by the same that is used of it.
        weighing.options.push(weighed(granted, period, 0, case.slack(granted), 0));
        for level in cycle.levels(granted) {
            let amount = bounds.fit(case.with_headroom(level).max(least));
            if amount >= granted || weighing.options.last().is_some_and(|last| last.amount == amount) {
                continue;
            }
            let (quiet, changes) = match cycle.quiet_msec(amount) {
                Some(until) => (until.saturating_sub(lead), 2),
                None => (period, 1),
            };
            let spared = again(scaled(granted - amount, quiet.min(period), period));
            let kept = granted.saturating_sub(spared);
            let mut less = weighed(amount, period, 0, case.slack(kept), change.saturating_mul(changes));
            if granted - amount < scaled(granted, case.settings.least_permille, 1000) {
                less.rejected = Some(Why::Small);
            } else if !case.may_spend() {
                less.rejected = Some(Why::Changes);
            }
            weighing.options.push(less);
        }
        choose(weighing);
        weighing.cause = Cause::Idle;
    }
    let is_change = weighing.amount != granted;
    if is_change {
        weighing.recurrence = Some(Recurrence { period_msec: period, cycles: cycle.cycles });
    }
    is_change
}
