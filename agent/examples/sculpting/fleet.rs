//! Machines as series of demand: generated regimes or CSV files, cut into turns of the loop.

use std::path::Path;

use anyhow::{Context, Result, anyhow};

use crate::support::{csv, regimes};

/// A turn of the loop, seconds.
pub const TURN_SEC: u64 = 5;
/// Turns in a minute.
pub const MINUTE: usize = 60 / TURN_SEC as usize;
/// Turns in a day.
pub const DAY: usize = 24 * 60 * MINUTE;
/// Turns in a sample of a series: five minutes.
const SAMPLE: usize = 5 * MINUTE;
/// What the 99th percentile of every machine becomes, milliCPU: they weigh alike.
const P99_MILLI: f64 = 2000.0;
/// Samples of two weeks.
const LENGTH: usize = 4032;

/// A machine.
pub struct Load {
    pub name: String,
    /// Demand of each turn, milliCPU.
    pub demand: Vec<u64>,
    /// The 99th percentile of its samples, known in hindsight, milliCPU.
    pub p99: u64,
}

/// Every regime so many times; `half` takes those of even or odd number.
pub fn generated(half: Option<usize>, seed: u64, times: u64, jitter: f32) -> Vec<Load> {
    let kinds = (0..regimes::KINDS.len()).filter(|kind| half.is_none_or(|half| kind % 2 == half));
    kinds
        .flat_map(|kind| (0..times).map(move |nth| (kind, seed.wrapping_mul(times) + nth)))
        .map(|(kind, seed)| {
            load(regimes::KINDS[kind].to_owned(), &regimes::make(kind, seed, LENGTH), seed, jitter)
        })
        .collect()
}

/// One machine per file.
pub fn read(files: &[impl AsRef<Path>], jitter: f32) -> Result<Vec<Load>> {
    let one = |file: &Path| {
        let series = csv::load(file, 300).map_err(|cause| anyhow!(cause))?;
        let name = file.file_stem().context("a file has a name")?.to_string_lossy().into_owned();
        Ok(load(name, &series, 1, jitter))
    };
    files.iter().map(|file| one(file.as_ref())).collect()
}

/// Samples are held for their five minutes; each turn deviates from them by so much in the mean, as much as the turn before or less.
fn load(name: String, samples: &[f32], seed: u64, jitter: f32) -> Load {
    let mut sorted: Vec<f32> = samples.iter().map(|value| value.max(0.0)).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    let p99 = f64::from(sorted[(sorted.len() * 99 / 100).min(sorted.len() - 1)]).max(1e-9);
    let scale = P99_MILLI / p99;
    let (mut dice, mut off) = (regimes::Dice::new(seed ^ 0x5eed), 0.0_f32);
    let turn = |at: usize| {
        if jitter > 0.0 {
            off = 0.7 * off + 0.714 * jitter * dice.normal();
        }
        (f64::from(samples[at / SAMPLE].max(0.0)) * scale * f64::from(1.0 + off).max(0.0)).round() as u64
    };
    Load { name, demand: (0..samples.len() * SAMPLE).map(turn).collect(), p99: P99_MILLI as u64 }
}
