//! Demand that comes back: how long its cycle is, and what the next one will ask for.
//!
//! A job of every few minutes or a batch of every hour is noise to whoever extends the last steps, and plain to whoever lays one cycle beside
//! the one before. [`Rhythm::find`] does that for each length of a cycle: how far the newest steps are from those a cycle before them
//! (`fit`), beside how far they are from those a quarter, a half and three quarters of it before (`apart`). A cycle is one where `fit` is
//! small beside `apart`. A ramp or a step fits no cycle, as what is nearer in time fits better; noise fits none, as all lags fit alike; and of
//! a cycle's multiples the shortest is meant.
//!
//! Two whole cycles are enough, so that the third is known before it comes. What deviates by a step in time counts as the same.

/// Shortest cycle, steps: with fewer, what is a step beside could be anything.
pub const SHORTEST: usize = 6;
/// Fewest steps that are laid beside each other: a few that happen to fit are no cycle.
const LEAST_SPAN: usize = 18;
/// Cycles beyond the first that are laid beside each other at most.
const MOST_SPANS: usize = 3;
/// A cycle is one where `fit` is at most so much of `apart`.
const FITS: f32 = 0.3;
/// Of several lengths the shortest that fits the best but for so much of `apart`.
const AS_GOOD: f32 = 0.1;
/// Cycles of which the next one is made.
const REMEMBERED: usize = 3;
/// Steps that are taken at once where all were measured.
const LANES: usize = 8;
/// Least difference between the largest and the smallest of a cycle, parts of the largest.
const LEAST_SWING: f32 = 0.1;

/// What comes back.
#[derive(Clone, Debug, PartialEq)]
pub struct Rhythm {
    /// Length of a cycle, steps; at least [`SHORTEST`].
    pub period: f32,
    /// Cycles in a row that were alike, from 2.
    pub cycles: u32,
    /// What the next steps ask for, as long as one cycle, the first after the newest first: the largest of the last cycles at that place, or a
    /// step beside it.
    pub ahead: Vec<f32>,
}

impl Rhythm {
    /// Looks for a cycle in steps of equal length, the newest last. What was not measured is no number.
    ///
    /// Takes time with the square of the number of steps: 0.1 ms for 360.
    pub fn find(past: &[f32]) -> Option<Self> {
        let swing = |of: fn(f32, f32) -> f32| past.iter().copied().fold(f32::NAN, of);
        // As most series are that do not come back, and the rest takes its time.
        if !swings(swing(f32::min), swing(f32::max)) {
            return None;
        }
        let steps = Steps::new(past);
        let fits = |period: usize| Some((period, steps.ratio(period)?));
        let all: Vec<(usize, f32)> = (SHORTEST..past.len() / 2).filter_map(fits).collect();
        let best = all.iter().map(|(_, ratio)| *ratio).min_by(f32::total_cmp).filter(|best| *best <= FITS)?;
        let good = |ratio: f32| ratio <= (best + AS_GOOD).min(FITS);
        let first = all.iter().position(|(_, ratio)| good(*ratio))?;
        let run = all[first..].iter().take_while(|(_, ratio)| good(*ratio));
        // Of neighbours, which are the same but for a step, the one that fits step by step.
        let (period, _) = run
            .filter_map(|(period, _)| Some((*period, steps.exact(*period, *period)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1))?;
        let found = Self { period: steps.refined(period), cycles: steps.cycles(period), ahead: Vec::new() };
        found.with_ahead(&steps)
    }

    fn with_ahead(mut self, steps: &Steps<'_>) -> Option<Self> {
        let remembered = (self.cycles as usize).clamp(1, REMEMBERED);
        let known = steps.past.len();
        // Between 6 and half of a slice's length.
        let length = self.period.round() as usize;
        let of = |step: usize| {
            let before = |cycle: usize| (cycle as f32 * self.period).round() as usize;
            let places = (1..=remembered).filter_map(|cycle| (known + step).checked_sub(before(cycle)));
            places.filter(|place| *place < known).map(|place| steps.most[place]).fold(f32::NAN, f32::max)
        };
        self.ahead = (0..length).map(of).collect();
        let most = self.ahead.iter().copied().fold(f32::NAN, f32::max);
        let least = self.ahead.iter().copied().fold(f32::NAN, f32::min);
        // Where a step was never measured nobody knows what it asks for.
        let whole = self.ahead.iter().all(|amount| amount.is_finite());
        (whole && swings(least, most)).then_some(self)
    }
}

/// Whether it is worth the name. Not for what is no number.
fn swings(least: f32, most: f32) -> bool {
    most - least > LEAST_SWING * most
}

/// The past, and of each step the least and the most of it and those beside it.
struct Steps<'a> {
    past: &'a [f32],
    least: Vec<f32>,
    most: Vec<f32>,
    /// All of it was measured.
    whole: bool,
}

impl<'a> Steps<'a> {
    fn new(past: &'a [f32]) -> Self {
        let beside = |at: usize| &past[at.saturating_sub(1)..(at + 2).min(past.len())];
        // What is no number is passed over by both.
        let fold = |by: fn(f32, f32) -> f32| {
            (0..past.len()).map(|at| beside(at).iter().copied().fold(f32::NAN, by)).collect()
        };
        let whole = past.iter().all(|amount| amount.is_finite());
        Self { past, least: fold(f32::min), most: fold(f32::max), whole }
    }

    /// Mean over the newest `span` steps of `distance(step, place lag before it)`; `None` where too little of it was measured.
    fn mean(&self, lag: usize, span: usize, distance: impl Fn(f32, usize) -> f32) -> Option<f32> {
        let from = self.past.len().checked_sub(span).filter(|from| *from >= lag)?;
        let (mut sum, mut count) = (0.0, 0_u32);
        for at in from..self.past.len() {
            let away = distance(self.past[at], at - lag);
            if away.is_finite() {
                sum += away;
                count += 1;
            }
        }
        (count as usize * 2 > span).then(|| sum / count as f32)
    }

    /// How far the newest `span` steps are from what was asked for `lag` steps before, or a step beside that.
    fn near(&self, lag: usize, span: usize) -> Option<f32> {
        if self.whole {
            return self.near_of_whole(lag, span);
        }
        self.mean(lag, span, |amount, place| {
            let (least, most) = (self.least[place], self.most[place]);
            if amount > most {
                amount - most
            } else if amount < least {
                least - amount
            } else {
                // 0, and no number where one of them is none.
                0.0 * (amount + least)
            }
        })
    }

    /// The same where nothing is missing, several steps at once.
    fn near_of_whole(&self, lag: usize, span: usize) -> Option<f32> {
        let from = self.past.len().checked_sub(span).filter(|from| *from >= lag && span > 0)?;
        let before = from - lag..self.past.len() - lag;
        let (least, most) = (&self.least[before.clone()], &self.most[before]);
        let away = |amount: f32, least: f32, most: f32| (amount - most).max(least - amount).max(0.0);
        let mut sums = [0.0_f32; LANES];
        let mut chunks = [&self.past[from..], least, most].map(|steps| steps.chunks_exact(LANES));
        let [amounts, leasts, mosts] = &mut chunks;
        for ((amounts, leasts), mosts) in amounts.zip(leasts).zip(mosts) {
            for lane in 0..LANES {
                sums[lane] += away(amounts[lane], leasts[lane], mosts[lane]);
            }
        }
        let [amounts, leasts, mosts] = chunks.map(|chunks| chunks.remainder());
        let rest =
            amounts.iter().zip(leasts).zip(mosts).map(|((amount, least), most)| away(*amount, *least, *most));
        Some((sums.iter().sum::<f32>() + rest.sum::<f32>()) / span as f32)
    }

    /// The same, step by step.
    fn exact(&self, lag: usize, span: usize) -> Option<f32> {
        self.mean(lag, span, |amount, place| (amount - self.past[place]).abs())
    }

    /// How far the newest `span` steps are from those a cycle before, beside those a part of a cycle before.
    fn ratio_over(&self, period: usize, span: usize) -> Option<f32> {
        let fit = self.near(period, span)?;
        let parts = [period / 4, period / 2, period - period / 4];
        let apart = parts.into_iter().map(|lag| self.near(lag.max(2), span)).sum::<Option<f32>>()? / 3.0;
        (apart > 0.0).then(|| fit / apart)
    }

    /// The better of the last cycle alone, so that the third is known, and several, so that one that was left out is forgiven.
    fn ratio(&self, period: usize) -> Option<f32> {
        let short = period.max(LEAST_SPAN);
        let long = (period * MOST_SPANS).min(self.past.len().saturating_sub(period));
        let short_ratio = self.ratio_over(period, short)?;
        let long_ratio =
            Some(long).filter(|long| *long > short).and_then(|long| self.ratio_over(period, long));
        Some(long_ratio.map_or(short_ratio, |long| long.min(short_ratio)))
    }

    /// The length of a cycle by what lies several of them apart, parts of a step.
    fn refined(&self, period: usize) -> f32 {
        let mut refined = period as f32;
        for cycles in 2..=MOST_SPANS + 1 {
            let lag = (refined * cycles as f32).round() as usize;
            let lags = lag.saturating_sub(cycles / 2 + 1)..=lag + cycles / 2 + 1;
            let fits = lags.filter_map(|lag| Some((lag, self.exact(lag, period)?)));
            let Some((lag, away)) = fits.min_by(|a, b| a.1.total_cmp(&b.1)) else { break };
            let apart = self.exact(period / 2, period);
            if apart.is_none_or(|apart| away > FITS * apart) {
                break;
            }
            refined = lag as f32 / cycles as f32;
        }
        refined.max(SHORTEST as f32)
    }

    /// How many cycles in a row were like the newest.
    fn cycles(&self, period: usize) -> u32 {
        let Some(apart) = self.near(period / 2, period.max(LEAST_SPAN)) else { return 2 };
        let alike = |lag: usize| self.near(lag, period).is_some_and(|fit| fit <= 2.0 * FITS * apart);
        let count = (1..self.past.len() / period).take_while(|cycle| alike(cycle * period)).count();
        u32::try_from(count).unwrap_or(u32::MAX).saturating_add(1).max(2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Some numbers that are always the same, 0..1.
    fn noise(at: usize) -> f32 {
        // splitmix64
        let mut mixed = (at as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^= mixed >> 31;
        (mixed >> 40) as f32 / (1 << 24) as f32
    }

    /// Busy for `busy` steps of each `period`, a little noisy.
    fn wave(steps: usize, period: f32, busy: f32) -> Vec<f32> {
        let of = |at: usize| if at as f32 % period < busy { 900.0 } else { 100.0 } + 20.0 * noise(at);
        (0..steps).map(of).collect()
    }

    #[test]
    fn the_third_cycle_is_known_before_it_comes() {
        for (period, busy) in [(12.0, 6.0), (18.0, 3.0), (24.0, 12.0), (30.0, 1.0), (100.0, 20.0)] {
            let mut past = vec![100.0; 40];
            past.extend(wave(2 * period as usize, period, busy));
            let found = Rhythm::find(&past).unwrap_or_else(|| panic!("{period} {busy}"));
            assert!((found.period - period).abs() <= 1.0, "{} instead of {period}", found.period);
            assert_eq!(found.ahead.len(), found.period.round() as usize);
            // Busy at once, for as long as it was, and quiet later.
            assert!(found.ahead[0] >= 900.0 && found.ahead[busy as usize + 3] < 200.0, "{:?}", found.ahead);
        }
    }

    #[test]
    fn a_length_between_steps_does_not_drift_away() {
        let past = wave(300, 23.7, 8.0);
        let found = Rhythm::find(&past).expect("it is there");
        assert!((found.period - 23.7).abs() < 0.35, "{}", found.period);
        assert!(found.cycles >= 8, "{}", found.cycles);
        let next = wave(324, 23.7, 8.0)[300..].to_vec();
        assert!(
            next.iter().zip(&found.ahead).all(|(came, said)| *came <= said + 25.0),
            "{next:?} {:?}",
            found.ahead
        );
    }

    #[test]
    fn a_slow_wave_and_one_of_two_kinds_of_bursts_are_cycles() {
        let sine: Vec<f32> =
            (0..240).map(|at| 500.0 + 400.0 * (at as f32 / 40.0 * std::f32::consts::TAU).sin()).collect();
        assert!((Rhythm::find(&sine).expect("a sine").period - 40.0).abs() <= 1.0);
        let two = |at: usize| match at % 40 {
            0..5 => 900.0,
            20..25 => 400.0,
            _ => 50.0,
        };
        let found = Rhythm::find(&(0..200).map(two).collect::<Vec<_>>()).expect("large, small, large, small");
        assert!((found.period - 40.0).abs() <= 1.0, "{}", found.period);
        assert!(found.ahead[0] > 800.0 && (300.0..500.0).contains(&found.ahead[21]));
    }

    #[test]
    fn one_that_was_left_out_is_forgiven_and_two_are_not() {
        let quiet = |from: usize, to: usize| {
            let mut past = wave(240, 24.0, 10.0);
            past[from..to].fill(100.0);
            Rhythm::find(&past)
        };
        assert!(quiet(216, 240).is_some_and(|found| found.ahead[3] > 800.0));
        assert!(quiet(190, 240).is_none_or(|found| found.period > 40.0), "it goes on no longer");
    }

    #[test]
    fn what_does_not_come_back_is_no_cycle() {
        let none = |name: &str, past: Vec<f32>| assert_eq!(Rhythm::find(&past), None, "{name}");
        none("nothing", Vec::new());
        none("little", vec![1.0; 5]);
        none("constant", vec![300.0; 360]);
        none("zero", vec![0.0; 360]);
        none("noise", (0..360).map(|at| 300.0 + 100.0 * noise(at)).collect());
        none("ramp", (0..360).map(|at| at as f32).collect());
        none("step", (0..360).map(|at| if at < 200 { 100.0 } else { 900.0 }).collect());
        none("one burst", (0..360).map(|at| if (150..180).contains(&at) { 900.0 } else { 100.0 }).collect());
        none("two bursts, of which the second is over for long", {
            (0..360).map(|at| if [50, 51, 52, 110, 111, 112].contains(&at) { 900.0 } else { 100.0 }).collect()
        });
        none("no numbers", vec![f32::NAN; 360]);
        none("infinite", vec![f32::INFINITY; 360]);
        none("hardly any swing", (0..360).map(|at| if at % 20 < 10 { 1000.0 } else { 1050.0 }).collect());
    }

    #[test]
    fn bursts_at_random_are_seldom_taken_for_a_cycle() {
        let (mut past, mut of, mut looks) = (vec![100.0_f32; 40], [0; 9], 0);
        let (mut busy, mut left) = (false, 0_usize);
        for at in 0..6000 {
            if left == 0 {
                busy = !busy;
                // Exponential, ten steps in the mean.
                left = 1 + (-10.0 * noise(3 * at + 1).max(1e-6).ln()) as usize;
            }
            left -= 1;
            past.push(if busy { 900.0 } else { 100.0 });
            let from = past.len().saturating_sub(360);
            if at % 3 == 0 {
                looks += 1;
                let cycles = Rhythm::find(&past[from..]).map_or(0, |found| found.cycles as usize);
                (2..=cycles.min(8)).for_each(|cycles| of[cycles] += 1);
            }
        }
        // Two alike are soon found among many.
        println!("cycles: {of:?} of {looks} looks");
        assert!(of[4] * 20 < looks, "{of:?} of {looks}");
    }

    #[test]
    fn what_was_not_measured_is_passed_over() {
        let mut past = wave(200, 20.0, 8.0);
        for at in (0..200).step_by(9) {
            past[at] = f32::NAN;
        }
        assert!(Rhythm::find(&past).is_some_and(|found| (found.period - 20.0).abs() <= 1.0));
        past[120..].fill(f32::NAN);
        assert_eq!(Rhythm::find(&past), None);
    }
}
