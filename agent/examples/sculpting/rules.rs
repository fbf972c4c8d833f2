//! What others do with the same series, each as published.

use crate::fleet::{Load, MINUTE};

/// Turns until a decision is in force: it is made of the turn that is over, and carried out in the next.
pub const LAG: usize = 2;
/// Grants are multiples of this, milliCPU.
pub const STEP: u64 = 10;
/// No grant is smaller, milliCPU.
pub const LEAST: u64 = 20;

/// As much as 99 % of the samples need, known in hindsight.
pub fn fixed(load: &Load) -> Vec<u64> {
    vec![load.p99; load.demand.len()]
}

/// Neon's rule for CPU: load ÷ 0.9, every 5 s, in units of `unit` milliCPU.
pub fn reactive(load: &Load, unit: u64) -> Vec<u64> {
    let goal = |demand: &u64| (demand * 10).div_ceil(9).max(LEAST).div_ceil(unit) * unit;
    let seen = load.demand.iter().map(goal);
    std::iter::repeat_n(load.p99, LAG).chain(seen).take(load.demand.len()).collect()
}

/// The vertical pod autoscaler's: a histogram of the minutes whose weights halve in a day, its 90th percentile and 15 %, looked at once a
/// minute, followed when more than 10 % off.
pub fn autoscaler(load: &Load) -> Vec<u64> {
    const FIRST: f64 = 10.0;
    const GROWTH: f64 = 1.05;
    const SHARE: f64 = 0.9;
    const HALF_LIFE_MIN: f64 = 1440.0;
    // Bucket n begins where n buckets, each 5 % longer than the one before it, end.
    let bucket = |amount: f64| ((1.0 + amount * (GROWTH - 1.0) / FIRST).ln() / GROWTH.ln()) as usize;
    let end = |bucket: usize| FIRST * (GROWTH.powi(bucket as i32 + 1) - 1.0) / (GROWTH - 1.0);
    let mut weights = vec![0.0_f64; 512];
    let mut granted = load.p99;
    let mut grants = vec![granted; LAG];
    for (minute, turns) in load.demand.chunks(MINUTE).enumerate() {
        grants.extend(std::iter::repeat_n(granted, turns.len()));
        let mean = turns.iter().sum::<u64>() as f64 / turns.len() as f64;
        // Later samples weigh more instead of earlier ones less, as there.
        weights[bucket(mean).min(511)] += (minute as f64 / HALF_LIFE_MIN).exp2();
        let target: f64 = weights.iter().sum::<f64>() * SHARE;
        let mut sum = 0.0;
        let at = weights.iter().position(|weight| {
            sum += weight;
            sum >= target
        });
        let goal = (end(at.unwrap_or(0)) * 1.15).max(25.0) as u64;
        if goal.abs_diff(granted) * 10 > granted {
            granted = goal;
        }
    }
    grants.truncate(load.demand.len());
    grants
}
