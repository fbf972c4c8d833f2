//! Order statistics of a few measurements.

use std::fmt;

/// Measurements in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value below which `share` (0 to 1) of all lie, interpolated; not a number if there are none.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
        let place = share.clamp(0.0, 1.0) * last as f64;
        let below = place.floor() as usize;
        let above = (below + 1).min(last);
        sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
    }

    /// The middle value.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Each of these divided by the one of `other` taken in the same round.
    pub fn ratios(&self, other: &Self) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(ours, theirs)| ours / theirs).collect())
    }

    /// All of both.
    pub fn joined(&self, other: &Self) -> Self {
        Self(self.0.iter().chain(&other.0).copied().collect())
    }
}

/// Whether a figure that must not exceed `target` counts as met, and in words: where two equal measurements differ by more than half of
/// what the target `leaves`, nothing can be said.
pub fn verdict(figure: f64, target: f64, differ: f64, leaves: f64) -> (bool, &'static str) {
    match (differ.abs() <= leaves / 2.0, figure <= target) {
        (false, _) => (true, "not measurable here"),
        (true, true) => (true, "met"),
        (true, false) => (false, "MISSED"),
    }
}

/// The mean between two times of a figure that is changed in steps: times, in order, and what it is from then on.
pub fn mean_of_steps(steps: &[(f64, f64)], from: f64, to: f64) -> f64 {
    let ends = steps.iter().skip(1).map(|(at, _)| *at).chain([f64::INFINITY]);
    let parts = steps.iter().zip(ends).map(|((begin, figure), end)| {
        let time = end.min(to) - begin.max(from);
        figure * time.max(0.0)
    });
    parts.sum::<f64>() / (to - from)
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, min, q1, q3, max] = [0.5, 0.0, 0.25, 0.75, 1.0].map(|share| self.quantile(share));
        write!(f, "{median:8.1} {min:8.1} {q1:8.1} {q3:8.1} {max:8.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_that_changes_is_weighed_by_time() {
        assert!((mean_of_steps(&[(0.0, 0.5)], 3.0, 13.0) - 0.5).abs() < 1e-9);
        let steps = [(0.0, 1.0), (5.0, 0.5), (8.0, 0.8), (20.0, 9.0)];
        assert!((mean_of_steps(&steps, 3.0, 13.0) - (2.0 * 1.0 + 3.0 * 0.5 + 5.0 * 0.8) / 10.0).abs() < 1e-9);
    }

    #[test]
    fn quantiles_interpolate() {
        let series = Series(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(series.median(), 2.5);
        assert_eq!(series.quantile(0.0), 1.0);
        assert_eq!(series.quantile(1.0), 4.0);
        assert!(Series::default().median().is_nan());
    }

    #[test]
    fn noise_comes_before_the_verdict() {
        assert_eq!(verdict(1.02, 1.03, -0.01, 0.03), (true, "met"));
        assert_eq!(verdict(1.04, 1.03, 0.01, 0.03), (false, "MISSED"));
        assert_eq!(verdict(1.04, 1.03, -0.02, 0.03).1, "not measurable here");
        assert_eq!(verdict(1.04, 1.03, f64::NAN, 0.03).1, "not measurable here");
    }

    #[test]
    fn ratios_pair_rounds() {
        let ratios = Series(vec![2.0, 9.0]).ratios(&Series(vec![1.0, 3.0]));
        assert_eq!(ratios, Series(vec![2.0, 3.0]));
    }
}
