//! Quantiles: the levels of every forecast, trackers that learn them one sample at a time, windows that hold them exactly.

use serde::{Deserialize, Serialize};

/// Steps ahead of every forecast.
pub const HORIZONS: usize = 6;

/// Levels of every forecast, ascending: the shares of outcomes that should lie at or below.
pub const LEVELS: [f32; 7] = [0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995];

/// `[step ahead - 1][level]`, in the unit of the series.
pub type Quantiles = [[f32; LEVELS.len()]; HORIZONS];

/// Point forecasts, one per step ahead.
pub(crate) type Points = [f32; HORIZONS];

/// Largest magnitude that a sample may have; what is larger is cut. Its square still fits an `f32`.
pub(crate) const HUGE: f32 = 1e15;

/// Cells of a triangle that holds, for each step ahead, the forecasts still open.
pub(crate) const OPEN: usize = HORIZONS * (HORIZONS + 1) / 2;

/// Where the forecast for step `now`, made `h + 1` steps before, lies; the one made at `now` for as far ahead takes its place.
pub(crate) fn open_at(now: u64, h: usize) -> usize {
    h * (h + 1) / 2 + (now % (h as u64 + 1)) as usize
}

/// What the pinball loss of level `q` charges for forecasting `made` where `y` came.
pub(crate) fn pinball(q: f32, y: f32, made: f32) -> f32 {
    let e = y - made;
    (q * e).max((q - 1.0) * e)
}

/// Quantiles of the residuals of a point forecast, tracked by stochastic subgradient steps.
///
/// Each step moves a quantile by its learning rate times the size of the residuals, so it forgets like a window of some
/// hundreds of samples and needs one number where a window needs all of them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Spread {
    at: Quantiles,
    size: Points,
    seen: u16,
}

/// Learning rate of a tracked quantile once it has settled.
const RATE: f32 = 0.03;
/// Steps over which the size of residuals is averaged.
const SIZED: f32 = 144.0;

impl Spread {
    pub(crate) fn new() -> Self {
        Self { at: [[0.0; LEVELS.len()]; HORIZONS], size: [0.0; HORIZONS], seen: 0 }
    }

    /// Learns the residual `r` of the forecast `h + 1` steps ahead; `h` goes up from 0 each step.
    pub(crate) fn learn(&mut self, h: usize, r: f32) {
        self.learn_each(h, [r; LEVELS.len()]);
    }

    /// The same with a residual per level.
    pub(crate) fn learn_each(&mut self, h: usize, r: [f32; LEVELS.len()]) {
        if h == 0 {
            self.seen = self.seen.saturating_add(1);
        }
        let n = f32::from(self.seen);
        self.size[h] += (1.0 / (n + 1.0)).max(1.0 / SIZED) * (r[0].abs() - self.size[h]);
        let rate = (2.0 / (n + 2.0)).max(RATE);
        for ((at, q), r) in self.at[h].iter_mut().zip(LEVELS).zip(r) {
            let step = rate * (self.size[h] + at.abs());
            *at += step * if r > *at { q } else { q - 1.0 };
        }
    }

    pub(crate) fn at(&self, h: usize, level: usize) -> f32 {
        self.at[h][level]
    }

    /// Adds the tracked quantiles to point forecasts.
    pub(crate) fn around(&self, points: &Points, out: &mut Quantiles) {
        for h in 0..HORIZONS {
            for (o, at) in out[h].iter_mut().zip(self.at[h]) {
                *o = points[h] + at;
            }
        }
    }

    pub(crate) fn sound(&self) -> bool {
        self.at.iter().flatten().chain(&self.size).all(|v| v.is_finite())
    }
}

/// The last `len` samples in order of size, for exact quantiles; the oldest is named by the caller, who keeps the past.
#[derive(Clone, Debug, Default)]
pub(crate) struct Window {
    sorted: Vec<f32>,
    len: usize,
}

impl Window {
    pub(crate) fn new(len: usize) -> Self {
        Self { sorted: Vec::with_capacity(len + 1), len }
    }

    /// Takes `y` in and, once full, `oldest` (the sample `len` steps before) out.
    pub(crate) fn push(&mut self, y: f32, oldest: Option<f32>) {
        let at = self.sorted.partition_point(|v| *v < y);
        self.sorted.insert(at, y);
        if self.sorted.len() > self.len {
            let gone = oldest.unwrap_or(y);
            let at = self.sorted.partition_point(|v| *v < gone).min(self.sorted.len() - 1);
            self.sorted.remove(at);
        }
    }

    /// The window of what is kept: `newest` are its samples.
    pub(crate) fn of(len: usize, newest: &[f32]) -> Self {
        let mut window = Self::new(len);
        window.sorted.extend_from_slice(newest);
        window.sorted.sort_unstable_by(f32::total_cmp);
        window
    }

    pub(crate) fn quantile(&self, level: f32) -> f32 {
        quantile_of(&self.sorted, level)
    }
}

/// Quantile of an ascending slice by linear interpolation (type 7); 0 of nothing.
pub(crate) fn quantile_of(sorted: &[f32], level: f32) -> f32 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = level.clamp(0.0, 1.0) * last as f32;
    let low = (at as usize).min(last);
    let high = (low + 1).min(last);
    sorted[low] + (at - low as f32) * (sorted[high] - sorted[low])
}
