//! What others do with the same series, each as published.

use crate::fleet::{DAY, Load, MINUTE};

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

/// The best that can be done with so many changes of a day, known in hindsight: reserved and unserved in sum are least where one that is unserved
/// costs `price` times one that is reserved. Decided for whole minutes in steps of 4 %; a day begins with whatever suits it.
pub fn best(load: &Load, changes: usize, price: f64) -> Vec<u64> {
    let top = load.demand.iter().copied().max().unwrap_or(0).max(LEAST);
    let mut levels = vec![LEAST];
    while let Some(last) = levels.last().copied().filter(|last| *last < top) {
        levels.push((last * 26 / 25).max(last + STEP).min(top));
    }
    load.demand.chunks(DAY).flat_map(|day| best_day(day, &levels, changes, price)).collect()
}

/// Dynamic programming over minutes, levels and changes left.
fn best_day(day: &[u64], levels: &[u64], changes: usize, price: f64) -> Vec<u64> {
    let minutes: Vec<&[u64]> = day.chunks(MINUTE).collect();
    let cost = |turns: &[u64], level: u64| -> f64 {
        let short: u64 = turns.iter().map(|wanted| wanted.saturating_sub(level)).sum();
        (level * turns.len() as u64) as f64 + price * short as f64
    };
    // What the rest of the day costs from here, at each level with so many changes left, and to which level one goes for that.
    let width = levels.len();
    let mut rest = vec![0.0; (changes + 1) * width];
    let mut ways: Vec<Vec<u16>> = Vec::with_capacity(minutes.len());
    for turns in minutes.iter().rev() {
        let own: Vec<f64> = levels.iter().map(|level| cost(turns, *level)).collect();
        let mut way = vec![0_u16; rest.len()];
        let mut next = vec![0.0; rest.len()];
        for left in 0..=changes {
            let of = |level: usize, left: usize| own[level] + rest[left * width + level];
            let change = left.checked_sub(1).map(|left| {
                let to = (0..width).min_by(|a, b| of(*a, left).total_cmp(&of(*b, left))).unwrap_or(0);
                (of(to, left), to)
            });
            for level in 0..width {
                let stay = (of(level, left), level);
                let (cost, to) = change.filter(|change| change.0 < stay.0).unwrap_or(stay);
                next[left * width + level] = cost;
                way[left * width + level] = to as u16;
            }
        }
        rest = next;
        ways.push(way);
    }
    let (mut left, first) = (changes, &rest[changes * width..]);
    let mut level = (0..width).min_by(|a, b| first[*a].total_cmp(&first[*b])).unwrap_or(0);
    let mut grants = Vec::with_capacity(day.len());
    for (minute, way) in minutes.iter().zip(ways.iter().rev()) {
        let to = usize::from(way[left * width + level]);
        left -= usize::from(to != level);
        level = to;
        grants.extend(std::iter::repeat_n(levels[level], minute.len()));
    }
    grants
}
