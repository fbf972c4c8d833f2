//! Benchmark `requests`: what a request server in the guest notices while its machine's shape changes once a second: a vCPU added, 128 MiB
//! plugged, the vCPU taken out, the memory unplugged, and so on. Beside QEMU, with the same hand in both guests.
//!
//! The server gets a hundred requests a second of the same work each, at fixed times, so that one which stands still pays for all that
//! come meanwhile; idle work takes what it leaves of its CPU. Steady and changing time take turns within each machine, each twice: the two
//! steady ones differ by noise. Work lost is what both did less in the same time.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::counters::Counters;
use super::elastic::{Kind, LIMIT, Machine, Setup};
use super::stats::{Series, verdict};

/// How long the server runs for one figure, seconds; a multiple of [`PHASES`].
const SECONDS: u64 = 20;
/// After so many changes the shape is as it was.
const PHASES: u64 = 4;
const CHANGE: Duration = Duration::from_secs(1);
/// How often it is looked whether a change is through.
const LOOK: Duration = Duration::from_millis(20);
/// Memory that comes and goes, MiB.
const MOVED_MIB: u64 = 128;
/// Rounds of work in one request; about a millisecond in an emulated host.
const WORK: u64 = 100_000;
/// Machines that hang or die in the emulated host before the benchmark is given up.
const MAX_FAILURES: usize = 4;

/// Most work that may be lost, and the most that p99 may grow by.
const TARGET_LOST: f64 = 0.02;
const TARGET_TAIL: f64 = 0.05;

/// What the server says of one run.
#[derive(Clone, Copy, Debug)]
struct Served {
    p50_usec: f64,
    p99_usec: f64,
    /// Rounds of work, requests and idle work together.
    work: f64,
}

/// What is known of one monitor.
#[derive(Default)]
struct Found {
    /// Twice each: the figures of the first steady time of all machines, then of the second.
    steady: [[Series; 3]; 2],
    changing: [[Series; 3]; 2],
    counters: [Counters; 2],
    changes: u64,
    late: u64,
}

fn served(
    machine: &mut Machine,
    during: impl FnOnce(&mut Machine) -> Result<()>,
) -> Result<(Served, Counters)> {
    let before = machine.counters()?;
    machine.tell(&format!("serve {SECONDS} {WORK}"))?;
    during(machine)?;
    let text = machine.expect("served ", LIMIT)?;
    let after = machine.counters()?;
    let words: Vec<f64> = text.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [count, p50_usec, p99_usec, idle] = words[..] else { bail!("the guest: served {text}") };
    Ok((Served { p50_usec, p99_usec, work: count * WORK as f64 + idle }, after.since(&before)))
}

/// Asks for one change; returns whether it is through before the next is due.
fn change(machine: &mut Machine, phase: u64, due: Instant) -> Result<bool> {
    let cpus = if phase % PHASES < 2 { 2 } else { 1 };
    let mib = if matches!(phase % PHASES, 1 | 2) { MOVED_MIB } else { 0 };
    match phase % PHASES {
        0 => machine.plug_cpu(1)?,
        2 => machine.begin_unplug_cpu(1)?,
        _ => machine.request_memory(mib)?,
    }
    while Instant::now() < due {
        if machine.present_cpus()? == cpus && machine.plugged_mib()? == mib {
            return Ok(true);
        }
        thread::sleep(LOOK);
    }
    Ok(false)
}

fn keep_changing(machine: &mut Machine, found: &mut Found) -> Result<()> {
    let begun = Instant::now();
    for phase in 0..SECONDS {
        let due = begun + CHANGE * u32::try_from(phase + 1).context("more than a lifetime")?;
        found.changes += 1;
        found.late += u64::from(!change(machine, phase, due)?);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn round(setup: &Setup, kind: Kind, found: &mut Found) -> Result<()> {
    let mut machine = setup.start(kind)?;
    thread::sleep(CHANGE);
    for half in 0..2 {
        let (steady, still) = served(&mut machine, |_| Ok(()))?;
        let (changing, moved) = served(&mut machine, |machine| keep_changing(machine, found))?;
        for (series, served) in [(&mut found.steady[half], steady), (&mut found.changing[half], changing)] {
            let figures = [served.p50_usec, served.p99_usec, served.work];
            series.iter_mut().zip(figures).for_each(|(series, figure)| series.push(figure));
        }
        found.counters = [still, moved];
        println!(
            "  {:9} steady: p50 {:5.0} µs, p99 {:6.0} µs, work {:6.1} M; changing: p50 {:5.0}, p99 {:6.0}, work {:6.1}",
            kind.name(),
            steady.p50_usec,
            steady.p99_usec,
            steady.work / 1e6,
            changing.p50_usec,
            changing.p99_usec,
            changing.work / 1e6
        );
    }
    Ok(())
}

/// Measures `rounds` machines of each and prints the result. Returns whether every target that can be measured here is met.
///
/// # Errors
/// Too many machines failed.
pub fn run(setup: &Setup, rounds: usize) -> Result<bool> {
    println!(
        "requests: {}, {rounds} rounds, {SECONDS} s of 100 requests a second for each figure",
        setup.kernel.display()
    );
    let mut found = [(Kind::Lathe, Found::default()), (Kind::Qemu, Found::default())];
    let mut failures = 0;
    for number in 0..rounds {
        for turn in 0..found.len() {
            let (kind, found) = &mut found[(number + turn) % 2];
            while let Err(error) = round(setup, *kind, found) {
                failures += 1;
                println!("  FAILED ({}, counted, again): {error:#}", kind.name());
                if failures > MAX_FAILURES {
                    bail!("{}: {error:#}", kind.name());
                }
            }
        }
    }
    println!("  machines that failed: {failures}");
    let judged = found.map(|(kind, found)| report(kind, &found));
    Ok(judged[0])
}

/// Returns whether the targets are met.
fn report(kind: Kind, found: &Found) -> bool {
    let both =
        |halves: &[[Series; 3]; 2], figure: usize| halves[0][figure].joined(&halves[1][figure]).median();
    let ratio = |figure| both(&found.changing, figure) / both(&found.steady, figure);
    let noise = |figure: usize| found.steady[1][figure].median() / found.steady[0][figure].median() - 1.0;
    let (lost, longer) = (1.0 - ratio(2), ratio(1) - 1.0);
    let (lost_met, lost_word) = verdict(lost, TARGET_LOST, noise(2), TARGET_LOST);
    let (tail_met, tail_word) = verdict(longer, TARGET_TAIL, noise(1), TARGET_TAIL);
    println!(
        "  {}: {} of {} changes were not through within their second",
        kind.name(),
        found.late,
        found.changes
    );
    println!(
        "    RESULT work lost {:+.2} %, target ≤ 2 %, against itself {:+.2} %: {lost_word}",
        lost * 100.0,
        noise(2) * 100.0
    );
    println!(
        "    RESULT p99 {:+.1} %, target ≤ +5 %, against itself {:+.1} %: {tail_word}; p50 {:+.1} %",
        longer * 100.0,
        noise(1) * 100.0,
        (ratio(0) - 1.0) * 100.0
    );
    println!("    the host, steady   {}", found.counters[0]);
    println!("    the host, changing {}", found.counters[1]);
    lost_met && tail_met
}
