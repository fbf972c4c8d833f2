//! Demand made up by kind: what fleets show, without any fleet's data. Each kind is a function of a seed.

use std::f32::consts::TAU;

/// Names of the kinds, in the order of their numbers.
pub const KINDS: [&str; 16] = [
    "flat",
    "noise",
    "steps",
    "ramps",
    "daily",
    "daily+weekly",
    "cron",
    "bursts",
    "heavy-tail",
    "on-off",
    "death",
    "missing",
    "short-cycle",
    "saturated",
    "memory",
    "idle-spikes",
];

/// A small generator (SplitMix64): the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// Starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }
    /// Uniform in 0..1.
    pub fn unit(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1_u64 << 24) as f32
    }
    /// Roughly normal, mean 0, variance 1.
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }
    /// Pareto with index `a`, at least 1, cut at 1e4.
    pub fn pareto(&mut self, a: f32) -> f32 {
        (1.0 - self.unit()).max(1e-7).powf(-1.0 / a).min(1e4)
    }
    fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }
}

/// `len` steps of 5 minutes of kind `KINDS[kind]`, at least 0.
pub fn make(kind: usize, seed: u64, len: usize) -> Vec<f32> {
    let mut d = Dice::new(seed.wrapping_mul(1000).wrapping_add(kind as u64));
    let y = match kind {
        0 => vec![d.range(0.1, 50.0); len],
        1 => ar(&mut d, len, 0.7, 4.0).iter().map(|e| 30.0 + e).collect(),
        2 => steps(&mut d, len),
        3 => ramps(&mut d, len),
        4 => daily(&mut d, len, 1.0),
        5 => daily(&mut d, len, 0.3),
        6 => cron(&mut d, len),
        7 => bursts(&mut d, len),
        8 => ar(&mut d, len, 0.9, 0.5).iter().map(|e| 5.0 * e.exp()).collect(),
        9 => on_off(&mut d, len),
        10 => death(&mut d, len),
        11 => missing(&mut d, len),
        12 => short_cycle(&mut d, len),
        13 => daily(&mut d, len, 0.6).iter().map(|v| (v * 1.8).min(100.0)).collect(),
        14 => memory(&mut d, len),
        _ => idle_spikes(&mut d, len),
    };
    y.into_iter().map(|v: f32| v.max(0.0)).collect()
}

fn ar(d: &mut Dice, len: usize, phi: f32, sd: f32) -> Vec<f32> {
    let mut x = 0.0;
    (0..len)
        .map(|_| {
            x = phi * x + sd * d.normal();
            x
        })
        .collect()
}

fn steps(d: &mut Dice, len: usize) -> Vec<f32> {
    let mut level = 20.0;
    (0..len)
        .map(|_| {
            if d.unit() < 0.006 {
                level = d.range(2.0, 90.0);
            }
            level + d.normal() * (0.5 + 0.03 * level)
        })
        .collect()
}

fn ramps(d: &mut Dice, len: usize) -> Vec<f32> {
    let (mut level, mut slope) = (30.0_f32, 0.0_f32);
    (0..len)
        .map(|_| {
            if d.unit() < 0.01 {
                slope = d.normal() * 0.4;
            }
            level += slope;
            if !(3.0..=95.0).contains(&level) {
                slope = -slope;
            }
            level + d.normal()
        })
        .collect()
}

fn daily(d: &mut Dice, len: usize, weekend: f32) -> Vec<f32> {
    let (phase, sharp, base, noise) = (d.unit(), d.range(1.0, 4.0), d.range(2.0, 20.0), d.range(0.05, 0.3));
    let e = ar(d, len, 0.8, noise * 0.6);
    (0..len)
        .map(|t| {
            let day = t as f32 / 288.0;
            let wave = (0.5 + 0.5 * (TAU * (day + phase)).sin()).powf(sharp);
            let week = if (t / 288) % 7 >= 5 { weekend } else { 1.0 };
            (base + 40.0 * wave * week) * e[t].exp()
        })
        .collect()
}

fn cron(d: &mut Dice, len: usize) -> Vec<f32> {
    let jobs: Vec<(usize, usize, usize, f32)> = (0..4)
        .map(|i| {
            let period = [288, 12, 36, 72][i];
            ((d.unit() * period as f32) as usize, period, 1 + (d.unit() * 4.0) as usize, d.range(5.0, 60.0))
        })
        .collect();
    (0..len)
        .map(|t| {
            let run: f32 = jobs
                .iter()
                .filter(|j| (t + j.1 - j.0 % j.1) % j.1 < j.2)
                .map(|j| j.3 * (1.0 + 0.1 * d.normal()))
                .sum();
            (3.0 + run + 0.4 * d.normal()).min(100.0)
        })
        .collect()
}

fn bursts(d: &mut Dice, len: usize) -> Vec<f32> {
    let (mut left, mut height) = (0_u32, 0.0);
    (0..len)
        .map(|_| {
            if left == 0 && d.unit() < 0.02 {
                left = 1 + (d.pareto(1.3).min(40.0)) as u32;
                height = 5.0 * d.pareto(1.5).min(15.0);
            }
            left = left.saturating_sub(1);
            let burst = if left > 0 { height * d.range(0.7, 1.0) } else { 0.0 };
            2.0 * (0.2 * d.normal()).exp() + burst
        })
        .collect()
}

fn on_off(d: &mut Dice, len: usize) -> Vec<f32> {
    let mut on = false;
    (0..len)
        .map(|_| {
            if d.unit() < if on { 0.05 } else { 0.02 } {
                on = !on;
            }
            if on { 70.0 + 5.0 * d.normal() } else { 1.0 + 0.1 * d.normal() }
        })
        .collect()
}

fn death(d: &mut Dice, len: usize) -> Vec<f32> {
    let mut y = daily(d, len, 0.7);
    let from = len * 6 / 10;
    let back = len * 8 / 10;
    y[from..back].iter_mut().for_each(|v| *v = 0.0);
    y
}

fn missing(d: &mut Dice, len: usize) -> Vec<f32> {
    let mut y = daily(d, len, 0.8);
    let mut t = 300;
    while t < len {
        let gap = (d.pareto(1.0) * 3.0).min(200.0) as usize;
        let hold = y[t - 1];
        let end = (t + gap).min(len);
        y[t..end].iter_mut().for_each(|v| *v = hold);
        t += gap + (d.pareto(1.2) * 60.0) as usize;
    }
    y
}

fn short_cycle(d: &mut Dice, len: usize) -> Vec<f32> {
    let (period, high) = (7.0 + (d.unit() * 40.0).floor(), d.range(20.0, 80.0));
    (0..len)
        .map(|t| {
            let phase = (t as f32 % period) / period;
            5.0 + if phase < 0.3 { high } else { 0.0 } * (1.0 + 0.05 * d.normal()) + 0.5 * d.normal()
        })
        .collect()
}

fn memory(d: &mut Dice, len: usize) -> Vec<f32> {
    let mut used = 4e9_f32;
    (0..len)
        .map(|_| {
            used += 4e6 * d.unit();
            if used > 8e9 || d.unit() < 0.002 {
                used = 3e9 + 1e9 * d.unit();
            }
            used * (1.0 + 0.002 * d.normal())
        })
        .collect()
}

fn idle_spikes(d: &mut Dice, len: usize) -> Vec<f32> {
    (0..len)
        .map(|_| {
            let spike = if d.unit() < 0.015 { d.pareto(1.1).min(300.0) } else { 0.0 };
            ((0.12 + 0.01 * d.normal()) * 500.0).round() / 500.0 + spike * 0.1
        })
        .collect()
}
