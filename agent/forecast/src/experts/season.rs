//! Experts with a season: Holt-Winters, quantiles of the same time on other days, a period found in the series itself.

use crate::math::sum;
use crate::past::Past;
use crate::quantile::{HORIZONS, LEVELS, Points, Quantiles, quantile_of};
use serde::{Deserialize, Serialize};

/// Additive Holt-Winters with damped trend (Gardner and McKenzie 1985).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct HoltWinters {
    season: Vec<f32>,
    period: usize,
    level: f32,
    trend: f32,
}

/// Share of the trend that is left a step later.
const PHI: f32 = 0.9;
const ALPHA: f32 = 0.2;
const BETA: f32 = 0.01;
const GAMMA: f32 = 0.25;

impl HoltWinters {
    pub(crate) fn new(period: usize) -> Self {
        Self { season: Vec::with_capacity(period), period, level: 0.0, trend: 0.0 }
    }

    pub(crate) fn sound(&self, period: usize) -> bool {
        self.period == period
            && self.season.len() <= period
            && self.season.iter().chain([&self.level, &self.trend]).all(|v| v.is_finite())
    }

    pub(crate) fn step(&mut self, now: u64, y: f32) -> Points {
        if self.season.len() < self.period {
            self.season.push(y);
            if self.season.len() == self.period {
                self.level = self.season.iter().sum::<f32>() / self.period as f32;
                let mean = self.level;
                self.season.iter_mut().for_each(|s| *s -= mean);
            }
            return [y; HORIZONS];
        }
        let slot = |ahead: usize| ((now + ahead as u64) % self.period as u64) as usize;
        let here = slot(0);
        let old = self.level;
        let s = self.season[here];
        let level = ALPHA * (y - s) + (1.0 - ALPHA) * (old + PHI * self.trend);
        let trend = BETA * (level - old) + (1.0 - BETA) * PHI * self.trend;
        let (mut far, mut damp) = (0.0, 1.0);
        let points = std::array::from_fn(|h| {
            damp *= PHI;
            far += damp;
            level + far * trend + self.season[slot(h + 1)]
        });
        self.season[here] = GAMMA * (y - level) + (1.0 - GAMMA) * s;
        (self.level, self.trend) = (level, trend);
        points
    }
}

/// Quantiles of the samples of the same time in earlier periods. A step's row is made once, when the step comes into sight,
/// and then moves nearer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Profile {
    rows: Quantiles,
    /// The step at which `rows` were made, and for which period; 0 for none.
    made: u64,
    period: u16,
}

impl Profile {
    pub(crate) fn new() -> Self {
        Self { rows: [[0.0; LEVELS.len()]; HORIZONS], made: 0, period: 0 }
    }

    pub(crate) fn sound(&self) -> bool {
        self.rows.iter().flatten().all(|v| v.is_finite())
    }

    /// Takes the samples up to `around` steps from the same time of the last `periods` periods. False where too few are kept.
    pub(crate) fn step(
        &mut self,
        past: &Past,
        period: usize,
        periods: usize,
        around: usize,
        out: &mut Quantiles,
    ) -> bool {
        // Where a period is so short that a row would still gain samples, all are made anew.
        let follows = usize::from(self.period) == period
            && past.now() == self.made + 1
            && period > HORIZONS + around
            && past.run() > HORIZONS as u64;
        self.period = 0;
        let from = if follows { HORIZONS - 1 } else { 0 };
        if follows {
            self.rows.copy_within(1.., 0);
        }
        for h in from..HORIZONS {
            if !row(past, period, periods, around, h, &mut self.rows[h]) {
                return false;
            }
        }
        (self.made, self.period) = (past.now(), u16::try_from(period).unwrap_or(0));
        *out = self.rows;
        true
    }
}

fn row(
    past: &Past,
    period: usize,
    periods: usize,
    around: usize,
    h: usize,
    out: &mut [f32; LEVELS.len()],
) -> bool {
    let mut near = [0.0_f32; MOST];
    let mut n = 0;
    for k in 1..=periods {
        let Some(first) = (period * k).checked_sub(h + 1 + around) else { continue };
        for age in first..=first + 2 * around {
            if let Some(v) = past.ago(age).filter(|_| n < MOST) {
                near[n] = v;
                n += 1;
            }
        }
    }
    if n < 5 {
        return false;
    }
    let near = &mut near[..n];
    near.sort_unstable_by(f32::total_cmp);
    *out = LEVELS.map(|q| quantile_of(near, q));
    true
}

/// Samples that a profile takes at most.
const MOST: usize = 40;

/// Finds the period, if any, at which a series repeats itself: by the mean distance between samples that far apart, a few
/// lags each step, all of them in some hundred steps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Finder {
    period: u16,
    best: (f32, u16),
    total: f32,
    next: u16,
}

const FIRST: u16 = 4;
const LAST: u16 = 400;
const A_STEP: u16 = 4;
/// Pairs compared per lag.
const PAIRS: usize = 800;
/// A period counts where its distance is at most this share of the mean over all lags.
const CLEAR: f32 = 0.8;

impl Finder {
    pub(crate) fn new() -> Self {
        Self { period: 0, best: (f32::MAX, 0), total: 0.0, next: FIRST }
    }

    pub(crate) fn sound(&self) -> bool {
        self.period <= LAST
            && (FIRST..=LAST).contains(&self.next)
            && self.best.1 <= LAST + A_STEP
            && self.best.0.is_finite()
            && self.total.is_finite()
    }

    /// The period in steps; `unit` is the usual distance of the series from its centre.
    pub(crate) fn step(&mut self, past: &Past, unit: f32) -> Option<usize> {
        let all = past.all();
        for lag in self.next..self.next + A_STEP {
            let Some(pairs) = all
                .len()
                .checked_sub(usize::from(lag))
                .map(|n| n.min(PAIRS))
                .filter(|n| *n > 2 * usize::from(lag))
            else {
                continue;
            };
            let new = &all[all.len() - pairs..];
            let old = &all[all.len() - pairs - usize::from(lag)..];
            let cap = 4.0 * unit;
            let lanes = new.as_chunks::<8>().0.iter().zip(old.as_chunks::<8>().0);
            let sum = sum(lanes.map(|(a, b)| std::array::from_fn(|i| (a[i] - b[i]).abs().min(cap))));
            let pairs = pairs - pairs % 8;
            // A hair for the shorter of two that are as good: the others are its multiples.
            let mean = sum / pairs as f32 * (1.0 + 2e-4 * f32::from(lag));
            self.total += mean;
            if mean < self.best.0 {
                self.best = (mean, lag);
            }
        }
        self.next += A_STEP;
        if self.next > LAST {
            let mean = self.total / f32::from(LAST - FIRST);
            self.period = if self.best.1 > FIRST && self.best.0 < CLEAR * mean { self.best.1 } else { 0 };
            *self = Self { period: self.period, ..Self::new() };
        }
        (self.period > 0).then_some(usize::from(self.period))
    }
}
