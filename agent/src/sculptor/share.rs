//! What the host has left goes to those who want more, in the order of what they are promised; where it is short, others yield.
//!
//! What is given back in one turn is free in the next: shrinking takes its time, and nothing is given twice.

use super::weigh::Bounds;
use super::{Cause, Machine, Weighing};
use crate::api::wire::Tier;

/// One resource of one machine, and what it would have if the host had enough.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// Place among the machines.
    pub(super) machine: usize,
    pub(super) tier: Tier,
    pub(super) busy: bool,
    pub(super) bounds: Bounds,
    pub(super) step: u64,
    pub(super) weighing: Weighing,
}

impl Ask {
    fn growth(&self) -> u64 {
        self.weighing.amount.saturating_sub(self.weighing.granted)
    }

    /// Of its growth, what covers its demand.
    fn pressing(&self) -> u64 {
        self.growth().min(self.weighing.need.saturating_sub(self.weighing.granted))
    }

    /// What it could give down to `least`, beyond what it gives anyhow.
    fn spare(&self, least: u64) -> u64 {
        if self.busy {
            return 0;
        }
        let now = self.weighing.amount.min(self.weighing.granted);
        (now.saturating_sub(least.max(self.bounds.lower))) / self.step * self.step
    }
}

/// Shares one resource among all who have it; `free` and `missing` as in [`super::Host`].
pub(super) fn share(asks: &mut [Ask], free: u64, missing: u64) {
    let mut left = free;
    // Who presses hardest for what is not there, and how much of it.
    let (mut short, mut neediest) = (missing.saturating_sub(free), Tier::Guaranteed);
    if missing > 0 {
        left = left.saturating_sub(missing);
    } else {
        neediest = Tier::Harvest;
    }
    for tier in [Tier::Guaranteed, Tier::Standard, Tier::Harvest] {
        let pressing: Vec<u64> = of_tier(asks, tier, Ask::pressing);
        let first = split(&pressing, left);
        left -= first.iter().sum::<u64>().min(left);
        let more: Vec<u64> = of_tier(asks, tier, |ask| ask.growth() - ask.pressing());
        let second = split(&more, left);
        left -= second.iter().sum::<u64>().min(left);
        let unmet: u64 =
            pressing.iter().zip(&first).map(|(want, got)| want - got).fold(0, u64::saturating_add);
        if unmet > 0 {
            neediest = neediest.max(tier);
            short = short.saturating_add(unmet);
        }
        for (at, ask) in asks.iter_mut().enumerate().filter(|(_, ask)| ask.tier == tier) {
            if ask.growth() > 0 {
                // Not beyond what it asked for, which is a multiple.
                let grown = ask.weighing.granted + first[at] + second[at];
                ask.weighing.amount = (grown / ask.step * ask.step).max(ask.weighing.granted);
            }
        }
    }
    yielded(asks, short, neediest);
}

fn of_tier(asks: &[Ask], tier: Tier, part: impl Fn(&Ask) -> u64) -> Vec<u64> {
    asks.iter().map(|ask| if ask.tier == tier { part(ask) } else { 0 }).collect()
}

/// Splits what is left in proportion to what is wanted.
fn split(wants: &[u64], left: u64) -> Vec<u64> {
    let sum: u128 = wants.iter().map(|want| u128::from(*want)).sum();
    if sum <= u128::from(left) {
        return wants.to_vec();
    }
    // Rounded down, each no more than it wants: what is left over is too little to matter.
    wants.iter().map(|want| (u128::from(*want) * u128::from(left) / sum) as u64).collect()
}

/// Takes what is short from those of whom less was promised: first what they do not need, then what they do.
fn yielded(asks: &mut [Ask], mut short: u64, neediest: Tier) {
    // What was given up anyhow counts.
    let given = asks.iter().map(|ask| ask.weighing.granted.saturating_sub(ask.weighing.amount));
    short = short.saturating_sub(given.fold(0, u64::saturating_add));
    let stages = [
        (Tier::Harvest, true, Tier::Harvest),
        (Tier::Harvest, false, Tier::Standard),
        (Tier::Standard, true, Tier::Standard),
        (Tier::Standard, false, Tier::Guaranteed),
    ];
    for (tier, keeps_need, for_whom) in stages {
        if short == 0 || neediest < for_whom {
            return;
        }
        let spare = of_tier(asks, tier, |ask| ask.spare(if keeps_need { ask.weighing.need } else { 0 }));
        let taken = split(&spare, short);
        for (ask, taken) in asks.iter_mut().zip(taken) {
            let less = (taken.div_ceil(ask.step) * ask.step).min(ask.spare(0));
            if taken > 0 && less > 0 {
                ask.weighing.amount = ask.weighing.amount.min(ask.weighing.granted) - less;
                ask.weighing.cause = Cause::Short;
                short = short.saturating_sub(less);
            }
        }
    }
}

/// What of a machine is shared.
pub(super) fn ask(at: usize, machine: &Machine, sight: &super::Sight, weighing: Weighing) -> Ask {
    let mut ask = Ask {
        machine: at,
        tier: machine.tier,
        busy: machine.busy,
        bounds: Bounds::of(sight),
        step: sight.step.max(1),
        weighing,
    };
    if ask.busy {
        ask.weighing.amount = ask.weighing.granted;
    }
    ask
}
