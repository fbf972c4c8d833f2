//! Conformal calibration: where the mixture's coverage has drifted from its level, its own residuals move it back.
//!
//! Per level and step ahead the wanted quantile of the mixture's residuals is tracked (a stochastic conformal
//! correction in the sense of Gibbs and Candès 2021 and of the quantile tracking of Angelopoulos et al. 2023). It is added only as
//! far as the coverage, over some days, is out of a dead band: a correction that is not needed costs accuracy.

use crate::quantile::{HORIZONS, LEVELS, OPEN, Quantiles, Spread, open_at};
use serde::{Deserialize, Serialize};

/// Steps over which coverage is measured.
const MEMORY: f32 = 800.0;
/// Width of the dead band, as a share of the distance of the level from 1.
const DEAD: f32 = 0.3;

/// The corrections, and how often the mixture was right.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Calibration {
    open: Vec<[f32; LEVELS.len()]>,
    spread: Spread,
    coverage: [f32; LEVELS.len()],
    seen: u32,
}

impl Calibration {
    pub(crate) fn new() -> Self {
        Self { open: vec![[0.0; LEVELS.len()]; OPEN], spread: Spread::new(), coverage: LEVELS, seen: 0 }
    }

    /// Learns from the sample `y` of step `now`.
    pub(crate) fn resolve(&mut self, now: u64, y: f32) {
        self.seen = self.seen.saturating_add(1);
        let rate = (1.0 / (self.seen as f32 + 50.0)).max(1.0 / MEMORY) / HORIZONS as f32;
        for h in 0..HORIZONS {
            let made = self.open[open_at(now, h)];
            for (c, m) in self.coverage.iter_mut().zip(made) {
                let under = if y <= m { 1.0 } else { 0.0 };
                *c += rate * (under - *c);
            }
            self.spread.learn_each(h, made.map(|m| y - m));
        }
    }

    /// Keeps the mixture's forecast and corrects it.
    pub(crate) fn issue(&mut self, now: u64, made: &mut Quantiles) {
        for (h, row) in made.iter_mut().enumerate() {
            self.open[open_at(now, h)] = *row;
            for (l, v) in row.iter_mut().enumerate() {
                let dead = DEAD * (1.0 - LEVELS[l]);
                let out = (self.coverage[l] - LEVELS[l]).abs();
                let share = ((out - dead) / dead).clamp(0.0, 1.0);
                *v += share * self.spread.at(h, l);
            }
        }
    }

    pub(crate) fn sound(&self) -> bool {
        self.open.len() == OPEN && self.spread.sound() && self.coverage.iter().all(|c| c.is_finite())
    }
}
