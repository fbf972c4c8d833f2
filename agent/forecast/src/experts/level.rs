//! Experts without a season: last value, exponential damped trend.

use crate::quantile::{HORIZONS, OPEN, Points, Quantiles, Spread, open_at};
use serde::{Deserialize, Serialize};

/// A point forecaster's forecasts still open, and the quantiles of its residuals.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Pointed {
    open: Vec<f32>,
    spread: Spread,
}

impl Pointed {
    pub(crate) fn new() -> Self {
        Self { open: vec![0.0; OPEN], spread: Spread::new() }
    }

    /// Learns from the sample of step `now` what the open forecasts missed.
    pub(crate) fn resolve(&mut self, now: u64, y: f32) {
        for h in 0..HORIZONS {
            self.spread.learn(h, y - self.open[open_at(now, h)]);
        }
    }

    /// Takes new point forecasts and turns them into quantiles.
    pub(crate) fn issue(&mut self, now: u64, points: &Points, out: &mut Quantiles) {
        for (h, p) in points.iter().enumerate() {
            self.open[open_at(now, h)] = *p;
        }
        self.spread.around(points, out);
    }

    pub(crate) fn sound(&self) -> bool {
        self.open.len() == OPEN && self.open.iter().all(|v| v.is_finite()) && self.spread.sound()
    }
}
