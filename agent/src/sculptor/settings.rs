//! What the sculptor goes by. All of it in one place, with units and reasons.

use crate::api::wire::Tier;
use crate::foresight::Resource;

/// A number that goes with aggressiveness: at 0, at 0.5 and at 1, straight lines in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Knob {
    /// At 0: keeps more, changes seldom.
    pub careful: u64,
    /// At 0.5.
    pub middle: u64,
    /// At 1: close to demand.
    pub tight: u64,
}

impl Knob {
    /// At an aggressiveness of so many thousandths; more than 1000 counts as 1000.
    pub fn at(self, aggressiveness_permille: u32) -> u64 {
        let permille = u64::from(aggressiveness_permille.min(1000));
        let (from, to, part) = match permille {
            0..500 => (self.careful, self.middle, permille),
            _ => (self.middle, self.tight, permille - 500),
        };
        // Both products are of bounded settings; the sum is between the two.
        (from.saturating_mul(500 - part).saturating_add(to.saturating_mul(part))) / 500
    }
}

/// What the sculptor goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// From a demand to the grant that covers it, milliseconds: a turn of the loop, and the resize. What is unserved until then is what a
    /// growth that comes too late costs.
    pub reaction_msec: u64,
    /// Above the demand that a grant is to cover, thousandths of it. Memory has more: what is short there is swapped or kills.
    pub headroom_permille: [Knob; Resource::ALL.len()],
    /// A demand of this much of the grant, thousandths, has reached it. A quota is used up to the last percent before it holds anybody back;
    /// a guest begins to swap before its memory is full.
    pub reached_permille: [u64; Resource::ALL.len()],
    /// Least growth of a grant that was reached, thousandths of it: how much more is wanted cannot always be seen.
    pub jump_permille: u64,
    /// What one change costs: as much as if all that the machine has needed in the last day were kept idle for so long, milliseconds.
    pub change_msec: Knob,
    /// Shortest past that is taken for what will be, milliseconds. Nothing shrinks before.
    pub patience_msec: Knob,
    /// How far ahead the size of a growth looks, milliseconds.
    pub ahead_msec: u64,
    /// Changes of one resource of a machine in a day up to which it is made smaller, or larger ahead of need. What is needed at once is not
    /// bound by it.
    pub changes_a_day: Knob,
    /// What one unit that is wanted and not there costs beside one that is there and idle, by tier: harvest, standard, guaranteed.
    pub unserved: [u64; 3],
    /// A change by less than this is none, thousandths of the grant.
    pub least_permille: u64,
    /// Confidence from which an outlook counts, thousandths.
    pub trusted_permille: u32,
    /// Share of 95 % quantiles that must have held lately for an outlook to count, thousandths.
    pub held_permille: u32,
    /// Forecasts that must have been judged before their share says anything.
    pub judged: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let rate = Knob { careful: 300, middle: 100, tight: 50 };
        let memory = Knob { careful: 300, middle: 200, tight: 100 };
        Self {
            reaction_msec: 10_000,
            headroom_permille: [rate, memory, rate, rate],
            reached_permille: [980, 930, 980, 980],
            jump_permille: 1250,
            change_msec: Knob { careful: 7_200_000, middle: 1_800_000, tight: 60_000 },
            patience_msec: Knob { careful: 3_600_000, middle: 600_000, tight: 60_000 },
            ahead_msec: 3_600_000,
            changes_a_day: Knob { careful: 4, middle: 12, tight: 288 },
            unserved: [20, 100, 400],
            least_permille: 50,
            trusted_permille: 300,
            held_permille: 850,
            judged: 60,
        }
    }
}

impl Settings {
    /// What a unit that is wanted and not there costs.
    pub fn unserved_of(&self, tier: Tier) -> u64 {
        self.unserved[tier as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_knob_goes_through_its_three_points_and_between_them() {
        let knob = Knob { careful: 4, middle: 12, tight: 288 };
        assert_eq!([0, 250, 500, 750, 1000, u32::MAX].map(|at| knob.at(at)), [4, 8, 12, 150, 288, 288]);
    }

    #[test]
    fn tiers_stand_in_the_order_of_their_promise() {
        let settings = Settings::default();
        let of = [Tier::Harvest, Tier::Standard, Tier::Guaranteed].map(|tier| settings.unserved_of(tier));
        assert!(of.is_sorted() && of[0] < of[2]);
    }
}
