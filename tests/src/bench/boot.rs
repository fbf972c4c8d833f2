//! Benchmark `boot`: from the start of the monitor to the first line of the guest's init, beside QEMU.
//!
//! Rounds are interleaved and their order turns, so that a host that gets slower or faster meets all monitors alike. `lathe-vmm` runs
//! twice in each round: the ratio of those two series is the noise, printed first. Only ratios of one run mean something on an emulated
//! host.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};

use super::monitors::{Monitor, Setup};
use super::stats::Series;

/// What the median may be, as a share of the faster QEMU's.
pub const TARGET: f64 = 0.68;
/// Machines that hang or die in the emulated host, over a whole run, before it is given up.
pub const MAX_FAILURES: usize = 4;

/// Measures `rounds` rounds and prints the result. Returns whether the target is met.
///
/// # Errors
/// More than `MAX_FAILURES` machines did not boot.
pub fn run(setup: &Setup, rounds: usize) -> Result<bool> {
    println!("boot: {}, 1 vCPU, 256 MiB, {rounds} rounds, milliseconds to init", setup.kernel.display());
    let mut series: Vec<Series> = Monitor::ALL.iter().map(|_| Series::default()).collect();
    let mut failures = 0;
    // Round 0 warms the page cache and does not count.
    for round in 0..=rounds {
        let mut line = format!("  round {round:2}:");
        for turn in 0..Monitor::ALL.len() {
            let index = (round + turn) % Monitor::ALL.len();
            let took = patiently(setup, Monitor::ALL[index], &mut failures)?;
            line += &format!("  {} {:.0}", Monitor::ALL[index].name(), millis(took));
            if round > 0 {
                series[index].push(millis(took));
            }
        }
        println!("{line}");
    }
    report(&series, failures)
}

/// A time in milliseconds.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn patiently(setup: &Setup, monitor: Monitor, failures: &mut usize) -> Result<Duration> {
    let log = PathBuf::from(format!("{}.log", setup.initrd.display()));
    loop {
        let result = setup.start(monitor, &log).and_then(|mut machine| machine.wait_for_init());
        match result {
            Ok(took) => return Ok(took),
            Err(error) if *failures < MAX_FAILURES => {
                *failures += 1;
                println!("  FAILED ({}, counted, again): {error:#}", monitor.name());
            }
            Err(error) => bail!("{}: {error:#}", monitor.name()),
        }
    }
}

fn of(series: &[Series], monitor: Monitor) -> &Series {
    let index = Monitor::ALL.iter().position(|&m| m == monitor).unwrap_or(0);
    &series[index]
}

fn report(series: &[Series], failures: usize) -> Result<bool> {
    println!("  {:18} {:>8} {:>8} {:>8} {:>8} {:>8}", "", "median", "min", "q1", "q3", "max");
    for (monitor, values) in Monitor::ALL.iter().zip(series) {
        println!("  {:18} {values}", monitor.name());
    }
    let (first, second) = (of(series, Monitor::Lathe), of(series, Monitor::LatheAgain));
    println!(
        "  noise: lathe-vmm against itself {:.3}, pair by pair {:.3}..{:.3}",
        second.median() / first.median(),
        second.ratios(first).quantile(0.25),
        second.ratios(first).quantile(0.75)
    );
    let lathe = first.joined(second);
    let (microvm, q35) = (of(series, Monitor::QemuMicrovm), of(series, Monitor::QemuQ35));
    let ratio = lathe.median() / microvm.median().min(q35.median());
    println!(
        "  lathe-vmm ÷ microvm {:.3}, ÷ q35 {:.3}; machines that failed: {failures}",
        lathe.median() / microvm.median(),
        lathe.median() / q35.median()
    );
    let faster = if microvm.median() < q35.median() { microvm } else { q35 };
    let rounds = first.ratios(faster).joined(&second.ratios(faster));
    println!(
        "  round by round, which a host that changes its speed disturbs less: {:.3}, quartiles {:.3}..{:.3}",
        rounds.median(),
        rounds.quantile(0.25),
        rounds.quantile(0.75)
    );
    let met = ratio <= TARGET;
    println!("  RESULT boot ratio {ratio:.3}, target ≤ {TARGET}: {}", if met { "met" } else { "MISSED" });
    Ok(met)
}
