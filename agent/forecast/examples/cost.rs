//! What a step costs, without any scoring: nanoseconds per observe and forecast, and bytes of a saved state.
//!
//! ```text
//! cargo run --release --example cost
//! ```

#[path = "../tests/support/mod.rs"]
mod support;

use lathe_forecast::{Config, NAMES, Series};
use std::hint::black_box;
use std::time::Instant;
use support::regimes;

/// Steps that warm up: the past is full after five days.
const WARM: usize = 1600;
const TIMED: usize = 1440;

fn main() {
    let classical = (1 << (NAMES.len() - 1)) - 1;
    println!("{:13}{:^34}{:^34}", "", "classical, ns", "with LSTM, ns");
    println!(
        "{:13} {:>10} {:>10} {:>10}  {:>10} {:>10} {:>10} {:>8}",
        "", "CPU mean", "median", "p99", "CPU mean", "median", "p99", "bytes"
    );
    let mut sums = [0, 0];
    for (kind, name) in regimes::KINDS.iter().enumerate() {
        let y = regimes::make(kind, 5, WARM + TIMED);
        let (a, _) = time(&y, classical);
        let (b, bytes) = time(&y, u32::MAX);
        sums = [sums[0] + a[0], sums[1] + b[0]];
        println!(
            "{name:13} {:>10} {:>10} {:>10}  {:>10} {:>10} {:>10} {bytes:>8}",
            a[0], a[1], a[2], b[0], b[1], b[2]
        );
    }
    println!(
        "{:13} {:>10} {:>21}  {:>10}",
        "mean",
        sums[0] / regimes::KINDS.len() as u64,
        "",
        sums[1] / regimes::KINDS.len() as u64
    );
}

/// Mean by the time on the processor, median and 99th percentile by the clock on the wall; the size of the state at the end.
fn time(y: &[f32], experts: u32) -> ([u64; 3], usize) {
    let mut series = Series::new(Config { experts, ..Config::default() });
    let mut steps = Vec::with_capacity(TIMED);
    let mut before = 0;
    for (t, v) in y.iter().enumerate() {
        if t == WARM {
            before = on_cpu();
        }
        let start = Instant::now();
        series.observe(t as u64 * 300, *v);
        black_box(series.forecast());
        if t >= WARM {
            steps.push(start.elapsed().as_nanos() as u64);
        }
    }
    let mean = (on_cpu() - before) / TIMED as u64;
    steps.sort_unstable();
    ([mean, steps[TIMED / 2], steps[TIMED * 99 / 100]], series.save().len())
}

/// Nanoseconds that this thread has run (Linux, `Documentation/scheduler/sched-stats.rst`), exact to a tick.
fn on_cpu() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstats");
    stat.split(' ').next().and_then(|n| n.parse().ok()).expect("a number")
}
