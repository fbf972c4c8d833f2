//! Prequential scores: at each step the forecaster has seen `y[..=t]` and answers for the next six.
//!
//! The first half of a series warms up, the second half counts. Weighted quantile loss as in GluonTS; `rel` is its ratio to
//! "last value + quantiles of a rolling day of residuals"; the allocation view holds the largest p95 of the six steps.

use lathe_forecast::{Blueprint, HORIZONS, LEVELS, Quantiles};

const H: usize = HORIZONS;
/// Where in `LEVELS` the levels stand that are scored: 0.5, 0.9, 0.95.
const SCORED: [usize; 3] = [0, 2, 3];
/// Multipliers of the highest quantile that extend the knob of confidence past 0.995.
const BEYOND: [f64; 5] = [1.1, 1.25, 1.5, 2.0, 3.0];

/// What one method reached on one series.
#[derive(Clone, Debug, Default)]
pub struct Score {
    /// Weighted quantile loss at 0.5, 0.9, 0.95.
    pub wql: [f64; 3],
    /// Share of steps at or below the forecast at 0.5, 0.9, 0.95.
    pub coverage: [f64; 3],
    /// Per knob of confidence: slack, share more than 5 % short, unserved share of demand.
    pub curve: Vec<[f64; 3]>,
    /// Changes of the p95 allocation by more than 10 % per 288 steps.
    pub changes: f64,
}

/// A forecast per step.
pub type Forecasts = Vec<Quantiles>;

/// Runs `forecaster` over a series.
pub fn run(y: &[f32], mut forecaster: impl FnMut(usize, f32) -> Blueprint) -> Forecasts {
    y.iter().enumerate().map(|(t, v)| forecaster(t, *v).quantiles).collect()
}

/// The reference: last value plus quantiles of the residuals known of the last 288 steps.
pub fn reference(y: &[f32]) -> Forecasts {
    let mut known: Vec<Vec<f32>> = vec![Vec::new(); H]; // sorted
    (0..y.len())
        .map(|t| {
            let mut out = [[0.0; LEVELS.len()]; H];
            for h in 1..=H {
                let sorted = &mut known[h - 1];
                if t >= h {
                    let r = y[t] - y[t - h];
                    sorted.insert(sorted.partition_point(|v| *v < r), r);
                }
                if t >= h + 288 {
                    let r = y[t - 288] - y[t - 288 - h];
                    sorted.remove(sorted.partition_point(|v| *v < r));
                }
                for (q, level) in LEVELS.iter().enumerate() {
                    let r = if sorted.len() < 24 { 0.0 } else { interpolated(sorted, *level) };
                    out[h - 1][q] = (y[t] + r).max(0.0);
                }
            }
            out
        })
        .collect()
}

fn interpolated(sorted: &[f32], level: f32) -> f32 {
    let at = level * (sorted.len() - 1) as f32;
    let (low, part) = (at.floor() as usize, at.fract());
    sorted[low] + part * (sorted[(low + 1).min(sorted.len() - 1)] - sorted[low])
}

/// Scores the second half.
pub fn score(y: &[f32], made: &Forecasts) -> Score {
    let range = y.len() / 2..y.len() - H;
    let steps = (range.len() * H) as f64;
    let demand: f64 = range.clone().flat_map(|t| &y[t + 1..=t + H]).map(|v| f64::from(v.abs())).sum();
    let mut out = Score::default();
    for (i, &q) in SCORED.iter().enumerate() {
        let level = f64::from(LEVELS[q]);
        let (mut loss, mut under) = (0.0, 0.0);
        for (t, h) in range.clone().flat_map(|t| (0..H).map(move |h| (t, h))) {
            let e = f64::from(y[t + 1 + h]) - f64::from(made[t][h][q]);
            loss += (level * e).max((level - 1.0) * e);
            under += f64::from(u8::from(e <= 0.0));
        }
        out.wql[i] = 2.0 * loss / demand.max(1e-9);
        out.coverage[i] = under / steps;
    }
    let top = |t: usize, q: usize| made[t].iter().map(|s| f64::from(s[q])).fold(0.0, f64::max);
    let knobs = (0..LEVELS.len()).map(|q| (q, 1.0)).chain(BEYOND.map(|m| (LEVELS.len() - 1, m)));
    out.curve = knobs
        .map(|(q, m)| {
            let (mut short, mut unserved, mut served, mut held) = (0.0, 0.0, 0.0, 0.0);
            for t in range.clone() {
                let cap = (top(t, q) * m).max(1e-9);
                for v in &y[t + 1..=t + H] {
                    let v = f64::from(*v);
                    short += f64::from(u8::from(v > 1.05 * cap + 1e-9));
                    unserved += (v - cap).max(0.0);
                    served += v.min(cap);
                    held += cap;
                }
            }
            [100.0 * (1.0 - served / held), 100.0 * short / steps, 100.0 * unserved / demand.max(1e-9)]
        })
        .collect();
    let mut current = top(range.start, 3);
    for t in range.clone() {
        let cap = top(t, 3);
        if (cap - current).abs() > 0.1 * current {
            out.changes += 288.0 / range.len() as f64;
            current = cap;
        }
    }
    out
}

/// Several series of one fleet together, against the reference.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// Geometric mean of the ratio of losses at 0.5, 0.9, 0.95.
    pub rel: [f64; 3],
    /// Mean coverage in per cent at 0.5, 0.9, 0.95.
    pub coverage: [f64; 3],
    /// Per cent of steps more than 5 % short where the one knob of confidence gives 30 % slack; NaN outside the curve.
    pub f30: f64,
    /// Slack of the p95 allocation, per cent.
    pub slack: f64,
    /// Per cent of steps more than 5 % short of the p95 allocation.
    pub short: f64,
    /// Changes of the allocation a day.
    pub changes: f64,
}

/// Folds per-series scores into the fleet's.
pub fn fleet(scores: &[Score], references: &[Score]) -> Fleet {
    let n = scores.len() as f64;
    let rel = std::array::from_fn(|i| {
        let logs = scores.iter().zip(references).map(|(s, r)| (s.wql[i].max(1e-9) / r.wql[i].max(1e-9)).ln());
        (logs.sum::<f64>() / n).exp()
    });
    let coverage = std::array::from_fn(|i| 100.0 * scores.iter().map(|s| s.coverage[i]).sum::<f64>() / n);
    let mut points: Vec<[f64; 2]> = (0..scores.first().map_or(0, |s| s.curve.len()))
        .map(|k| [0, 1].map(|c| scores.iter().map(|s| s.curve[k][c]).sum::<f64>() / n))
        .collect();
    let (slack, short) = (points[3][0], points[3][1]);
    points.sort_by(|a, b| a[0].total_cmp(&b[0]));
    let f30 = points.windows(2).find(|w| w[0][0] <= 30.0 && w[1][0] >= 30.0).map_or(f64::NAN, |w| {
        w[0][1] + (w[1][1] - w[0][1]) * (30.0 - w[0][0]) / (w[1][0] - w[0][0]).max(1e-9)
    });
    let changes = scores.iter().map(|s| s.changes).sum::<f64>() / n;
    Fleet { rel, coverage, f30, slack, short, changes }
}
