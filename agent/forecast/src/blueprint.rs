//! What a forecast is: quantiles of demand over time, with a confidence.

use crate::quantile::{HORIZONS, LEVELS, Quantiles};
use serde::{Deserialize, Serialize};

/// Quantiles of the demand over the next [`HORIZONS`] steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Blueprint {
    /// Length of a step in seconds.
    pub step_secs: u32,
    /// `[step ahead - 1][level]`, in the unit of the series; ascending over [`LEVELS`], finite, at least 0.
    pub quantiles: Quantiles,
    /// 0..1: how far these quantiles have earned trust.
    pub confidence: f32,
}

impl Blueprint {
    /// The largest forecast of level number `level` (see [`LEVELS`]) over all steps.
    pub fn peak(&self, level: usize) -> f32 {
        let level = level.min(LEVELS.len() - 1);
        (0..HORIZONS).map(|h| self.quantiles[h][level]).fold(0.0, f32::max)
    }
}
