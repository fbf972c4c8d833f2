//! What is ahead of a resource, as amounts: quantiles per step, and what they say of one amount.
//!
//! Integers from here on: what is no number, negative or too large for the resource was cut where the forecast was taken over.

use lathe_forecast::LEVELS;

use crate::foresight::Resource;
use crate::foresight::forecaster::Outlook as Forecast;

/// Most steps that are looked at: a day of minutes.
pub const MAX_STEPS: usize = 1440;
/// Largest amount: no sum of costs of a day overflows.
pub const MAX_AMOUNT: u64 = 1 << 52;
/// Probability between one level and the next, thousandths; before the first, and after the last. Sums up to 1000.
const PARTS: [u64; LEVELS.len() + 1] = [500, 250, 150, 50, 25, 15, 5, 5];
/// Of these levels, 0.95.
const P95: usize = 3;

/// Quantiles of the demand in the steps ahead, in the unit of the resource.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outlook {
    /// Length of a step, seconds; at least 1.
    pub step_sec: u64,
    /// Ascending over [`LEVELS`], one row per step, the first of which is now.
    pub steps: Vec<[u64; LEVELS.len()]>,
    /// How far it has earned trust, thousandths.
    pub confidence_permille: u32,
}

impl Outlook {
    /// Takes a forecast over as it stands at `now_sec` since the epoch: steps that are over are left out. `None` when nothing is left of it.
    pub fn of(forecast: &Forecast, resource: Resource, now_sec: u64) -> Option<Self> {
        let blueprint = &forecast.blueprint;
        let step_sec = u64::from(blueprint.step_secs).max(1);
        let over =
            usize::try_from(now_sec.saturating_sub(forecast.from_sec) / step_sec).unwrap_or(usize::MAX);
        let rows = blueprint.quantiles.iter().skip(over);
        let steps = rows.map(|row| row.map(|amount| taken(amount, resource.grain()))).collect();
        Self::new(step_sec, steps, blueprint.confidence)
    }

    /// From amounts and a confidence of 0..1. `None` where there are no steps.
    pub fn new(step_sec: u64, mut steps: Vec<[u64; LEVELS.len()]>, confidence: f32) -> Option<Self> {
        steps.truncate(MAX_STEPS);
        for row in &mut steps {
            *row = row.map(|amount| amount.min(MAX_AMOUNT));
            row.sort_unstable();
        }
        // What is no number becomes 0.
        let confidence_permille = (confidence.clamp(0.0, 1.0) * 1000.0) as u32;
        (!steps.is_empty()).then_some(Self { step_sec: step_sec.max(1), steps, confidence_permille })
    }

    /// How far it reaches, milliseconds.
    pub fn reach_msec(&self) -> u64 {
        self.step_sec.saturating_mul(1000).saturating_mul(self.steps.len() as u64)
    }

    /// The largest 95 % quantile.
    pub fn peak(&self) -> u64 {
        self.level(P95)
    }

    /// The largest quantile number `level` of [`LEVELS`].
    pub fn level(&self, level: usize) -> u64 {
        self.steps.iter().map(|row| row[level.min(LEVELS.len() - 1)]).max().unwrap_or(0)
    }

    /// How much more than `amount` is wanted in the mean of its steps: the area of the distribution beyond it.
    pub fn unserved(&self, amount: u64) -> u64 {
        let sum: u64 = self.steps.iter().map(|row| beyond(row, amount).min(MAX_AMOUNT)).sum();
        sum.div_ceil((self.steps.len() as u64).max(1))
    }

    /// How much of `amount` is idle in the mean of its steps.
    pub fn idle(&self, amount: u64) -> u64 {
        let mean = |row: &[u64; LEVELS.len()]| beyond(row, 0);
        let idle = |row| amount.saturating_add(beyond(row, amount)).saturating_sub(mean(row)).min(MAX_AMOUNT);
        self.steps.iter().map(idle).sum::<u64>() / (self.steps.len() as u64).max(1)
    }

    /// How probable it is that more than `amount` is wanted in the step where that is most probable, thousandths.
    pub fn over_permille(&self, amount: u64) -> u64 {
        self.steps.iter().map(|row| above(row, amount)).max().unwrap_or(0)
    }
}

/// A quantile of a forecast in grains, as an amount; what is no number or negative becomes 0.
fn taken(amount: f32, grain: u64) -> u64 {
    (amount.ceil() as u64).saturating_mul(grain).min(MAX_AMOUNT)
}

/// Corners of the distribution, from the lowest to the highest: below the median it is taken to reach down to nothing by half, above the last
/// level as far again as the last two are apart.
fn corners(row: &[u64; LEVELS.len()]) -> [u64; LEVELS.len() + 2] {
    let [median, .., before, last] = *row;
    let mut corners = [0; LEVELS.len() + 2];
    corners[0] = median / 2;
    corners[1..=LEVELS.len()].copy_from_slice(row);
    corners[LEVELS.len() + 1] = last + (last - before);
    corners
}

/// Expectation of what lies beyond `amount`, by trapezoids between the corners.
fn beyond(row: &[u64; LEVELS.len()], amount: u64) -> u64 {
    let corners = corners(row);
    let areas = corners.windows(2).zip(PARTS).map(|(pair, part)| {
        let (low, high) = (pair[0].max(amount), pair[1].max(amount));
        let (low, high) = (u128::from(low - amount), u128::from(high - amount));
        // Where only a piece of the part lies beyond, that piece is all that counts.
        let whole = u128::from(pair[1] - pair[0]);
        if low == 0 && whole > 0 {
            high * high * u128::from(part) / whole
        } else {
            (low + high) * u128::from(part)
        }
    });
    u64::try_from(areas.sum::<u128>() / 2000).unwrap_or(u64::MAX)
}

/// Probability of more than `amount`, thousandths.
fn above(row: &[u64; LEVELS.len()], amount: u64) -> u64 {
    let corners = corners(row);
    let parts =
        corners.windows(2).zip(PARTS).map(|(pair, part)| match (pair[0] > amount, pair[1] > amount) {
            (true, _) => part,
            (false, true) => part * (pair[1] - amount) / (pair[1] - pair[0]),
            (false, false) => 0,
        });
    parts.sum()
}

#[cfg(test)]
mod tests {
    use lathe_forecast::{Blueprint, HORIZONS};

    use super::*;

    const ROW: [u64; LEVELS.len()] = [100, 150, 200, 250, 300, 350, 400];

    #[test]
    fn parts_are_what_lies_between_the_levels() {
        assert_eq!(PARTS.iter().sum::<u64>(), 1000);
        let levels = LEVELS.map(|level| (f64::from(level) * 1000.0).round() as u64);
        assert_eq!(PARTS[0], levels[0]);
        for (at, pair) in levels.windows(2).enumerate() {
            assert_eq!(PARTS[at + 1], pair[1] - pair[0]);
        }
    }

    #[test]
    fn what_is_unserved_and_idle_adds_up_and_falls_with_the_amount() {
        let outlook = Outlook::new(60, vec![ROW; 3], 0.5).unwrap();
        let mean = outlook.unserved(0);
        assert_eq!(
            mean,
            (75 * 500 + 125 * 250 + 175 * 150 + 225 * 50 + 275 * 25 + 325 * 15 + 375 * 5 + 425 * 5) / 1000
        );
        let amounts = [0, 60, 100, 130, 250, 400, 449, 450, 1000];
        let unserved = amounts.map(|amount| outlook.unserved(amount));
        assert!(unserved.is_sorted_by(|a, b| a >= b), "{unserved:?}");
        assert_eq!([outlook.unserved(450), outlook.idle(1000)], [0, 1000 - mean]);
        assert_eq!(
            amounts.map(|amount| outlook.over_permille(amount)),
            [1000, 900, 500, 350, 50, 5, 0, 0, 0]
        );
    }

    #[test]
    fn nonsense_becomes_something_bounded() {
        let mut quantiles = [[0.0; LEVELS.len()]; HORIZONS];
        quantiles[0] = [f32::NAN, f32::INFINITY, -5.0, 1e30, f32::NEG_INFINITY, 3.0, f32::MAX];
        let blueprint = Blueprint { step_secs: 0, quantiles, confidence: f32::NAN };
        let forecast = Forecast { from_sec: 100, blueprint };
        let outlook = Outlook::of(&forecast, Resource::Net, 0).unwrap();
        assert_eq!((outlook.step_sec, outlook.confidence_permille), (1, 0));
        assert!(outlook.steps.iter().flatten().all(|amount| *amount <= MAX_AMOUNT));
        assert!(outlook.steps.iter().all(|row| row.is_sorted()));
        assert!(outlook.unserved(0) <= MAX_AMOUNT && outlook.idle(MAX_AMOUNT) <= 3 * MAX_AMOUNT);
        assert_eq!(Outlook::new(60, Vec::new(), 1.0), None);
    }

    #[test]
    fn steps_that_are_over_are_left_out() {
        let quantiles = std::array::from_fn(|step| [step as f32 + 1.0; LEVELS.len()]);
        let blueprint = Blueprint { step_secs: 60, quantiles, confidence: 1.5 };
        let forecast = Forecast { from_sec: 6000, blueprint };
        let at = |now| Outlook::of(&forecast, Resource::Memory, now);
        let outlook = at(6125).unwrap();
        assert_eq!(
            (outlook.steps.len(), outlook.steps[0][0], outlook.confidence_permille),
            (4, 3 * 4096, 1000)
        );
        assert_eq!(outlook.reach_msec(), 240_000);
        assert_eq!((at(5000).unwrap().steps.len(), at(6360)), (6, None));
    }
}
