//! How far a forecast may be trusted: little after the start, after a break and while the series is unlike what it was.

use crate::quantile::{LEVELS, pinball};
use serde::{Deserialize, Serialize};

/// Where 0.95 stands in [`LEVELS`].
const P95: usize = 3;
/// Steps after which half of what there is to learn is taken as learnt.
const HALF_LEARNT: f32 = 96.0;

/// Evidence on the one-step forecasts of late.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Trust {
    /// Real samples seen.
    seen: u32,
    /// Share of steps, of late, that had a sample.
    known: f32,
    /// Share of samples above their p95 over some 20 steps.
    over: f32,
    /// Loss at 0.95 over some 12 steps, and over some 500.
    now: f32,
    usual: f32,
}

impl Trust {
    pub(crate) fn new() -> Self {
        Self { seen: 0, known: 1.0, over: 0.05, now: 0.0, usual: 0.0 }
    }

    /// A sample came where `made` had been forecast.
    pub(crate) fn learn(&mut self, y: f32, made: f32) {
        self.seen = self.seen.saturating_add(1);
        self.known += (1.0 - self.known) / 48.0;
        self.over += ((if y > made { 1.0 } else { 0.0 }) - self.over) / 20.0;
        let loss = pinball(LEVELS[P95], y, made);
        let n = self.seen as f32;
        // What is unusual is judged before it becomes usual.
        self.now += (1.0 / n).max(1.0 / 12.0) * (loss - self.now);
        self.usual += (1.0 / n).max(1.0 / 500.0) * (loss - self.usual);
    }

    /// A step passed without a sample.
    pub(crate) fn miss(&mut self, steps: u64) {
        self.known *= (-(steps.min(1000) as f32) / 24.0).exp();
    }

    /// 0..1.
    pub(crate) fn confidence(&self) -> f32 {
        let n = self.seen as f32;
        let learnt = n / (n + HALF_LEARNT);
        let held = (1.0 - 2.5 * (self.over - 0.15).max(0.0)).max(0.1);
        let usual = if self.now <= 3.0 * self.usual { 1.0 } else { (3.0 * self.usual / self.now).max(0.1) };
        (learnt * held * usual * self.known).clamp(0.0, 1.0)
    }

    pub(crate) fn sound(&self) -> bool {
        [self.known, self.over, self.now, self.usual].iter().all(|v| v.is_finite() && *v >= 0.0)
    }
}
