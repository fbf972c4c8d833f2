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
    /// How long before a rise that comes back it grows, milliseconds: a turn and a reaction. What comes early by a
    /// step is in the cycle already.
    pub lead_msec: u64,
    /// Above the demand that a grant is to cover, thousandths of it. Memory has more: what is short there is swapped or kills.
    pub headroom_permille: [Knob; Resource::ALL.len()],
    /// A demand of this much of the grant has reached it, thousandths, where more cannot be seen, and of memory: a quota is used up to the last
    /// percent before it holds anybody back, a guest begins to swap before its memory is full.
    pub reached_permille: [u64; Resource::ALL.len()],
    /// A demand beyond this much of the grant has reached it at once, thousandths. Less waits until it has cost as much as a change, which is
    /// longer the fewer changes a day may have.
    pub beyond_permille: Knob,
    /// Least growth where it cannot be seen how much is wanted, thousandths of the grant; the second time at once, and after that.
    pub hidden_permille: [u64; 2],
    /// What one change costs: as much as if what the machine usually needs were kept idle for so long, milliseconds.
    pub change_msec: Knob,
    /// Shortest past that is taken for what will be, milliseconds. Nothing shrinks before.
    pub patience_msec: Knob,
    /// Most changes of one resource of a machine in a day, against flapping: what they cost keeps them far fewer, and few machines need as many
    /// as others. Three quarters of them may be used to make it smaller, or larger ahead of need; after the last but one a growth goes as far as
    /// the day's largest demand. What is needed at once is not bound by it.
    pub changes_a_day: Knob,
    /// What one unit that is wanted and not there costs beside one that is there and idle, by tier: harvest, standard, guaranteed.
    pub unserved: [u64; 3],
    /// A change by less than this is none, thousandths of the grant.
    pub least_permille: u64,
    /// Confidence from which an outlook counts, thousandths.
    pub trusted_permille: u32,
    /// Share of 95 % quantiles that must have held lately for an outlook to count, thousandths.
    pub held_permille: u32,
    /// How probable it must be that demand goes well beyond the grant for it to grow ahead of need, thousandths. Less is cheaper waited for: most
    /// of what is merely possible does not come.
    pub ahead_permille: u64,
    /// Forecasts that must have been judged before their share says anything.
    pub judged: u32,
}

impl Default for Settings {
    fn default() -> Self {
        let rate = Knob { careful: 200, middle: 30, tight: 20 };
        let memory = Knob { careful: 300, middle: 200, tight: 100 };
        Self {
            reaction_msec: 10_000,
            lead_msec: 15_000,
            headroom_permille: [rate, memory, rate, rate],
            reached_permille: [980, 930, 980, 980],
            beyond_permille: Knob { careful: 1050, middle: 1250, tight: 1050 },
            hidden_permille: [1500, 2000],
            change_msec: Knob { careful: 5_400_000, middle: 2_000_000, tight: 15_000 },
            patience_msec: Knob { careful: 3_600_000, middle: 600_000, tight: 60_000 },
            changes_a_day: Knob { careful: 48, middle: 96, tight: 1440 },
            unserved: [10, 50, 200],
            least_permille: 50,
            trusted_permille: 300,
            held_permille: 850,
            ahead_permille: 750,
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
