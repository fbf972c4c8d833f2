//! The recent past of a series: one contiguous run of samples, oldest first.

use crate::quantile::HUGE;
use serde::{Deserialize, Serialize};

/// Samples kept: five days of 5-minute steps.
pub(crate) const KEPT: usize = 1440;
/// Room beyond that, so that samples move down only once in so many steps.
const SLACK: usize = 16;

/// Samples by age.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Past {
    values: Vec<f32>,
    /// Steps since the start, including those no longer kept.
    steps: u64,
    /// Steps since the last one that was passed over.
    run: u64,
}

impl Past {
    pub(crate) fn new() -> Self {
        Self { values: Vec::with_capacity(KEPT + SLACK), steps: 0, run: 0 }
    }

    pub(crate) fn push(&mut self, y: f32) {
        if self.values.len() >= KEPT + SLACK {
            let excess = self.values.len() + 1 - KEPT;
            self.values.drain(..excess);
        }
        self.values.push(y);
        self.skip(1);
        self.run += 1;
    }

    /// Lets `steps` go by of which nothing is kept.
    pub(crate) fn skip(&mut self, steps: u64) {
        self.steps = self.steps.saturating_add(steps).min(u64::MAX / 2);
    }

    /// From here on forecasts made before do not count.
    pub(crate) fn broke(&mut self) {
        self.run = 0;
    }

    /// The sample `age` steps ago; 0 is the newest.
    pub(crate) fn ago(&self, age: usize) -> Option<f32> {
        self.values.len().checked_sub(age + 1).map(|i| self.values[i])
    }

    /// The sample `age` steps ago, or the oldest kept, or 0.
    pub(crate) fn near(&self, age: usize) -> f32 {
        self.ago(age).or(self.values.first().copied()).unwrap_or(0.0)
    }

    /// Oldest first.
    pub(crate) fn all(&self) -> &[f32] {
        &self.values
    }

    /// The newest, at most `n`, oldest first.
    pub(crate) fn newest(&self, n: usize) -> &[f32] {
        &self.values[self.values.len().saturating_sub(n)..]
    }

    /// Number of the newest step, from 0.
    pub(crate) fn now(&self) -> u64 {
        self.steps.saturating_sub(1)
    }

    /// Steps without a break, the newest included.
    pub(crate) fn run(&self) -> u64 {
        self.run
    }

    pub(crate) fn sound(&self) -> bool {
        self.values.len() <= KEPT + SLACK
            && self.run <= self.steps
            && self.steps <= u64::MAX / 2
            && (self.run == 0 || !self.values.is_empty())
            && self.values.iter().all(|v| (0.0..=HUGE).contains(v))
    }
}
