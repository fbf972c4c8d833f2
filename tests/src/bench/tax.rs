//! Benchmark `elastic-tax`: what a machine pays for everything that it could become while it stays as it is. The same guest, 1 vCPU and
//! 256 MiB, as a fixed machine and as one of up to 32 vCPUs and 16 GiB with a balloon and slots for devices.
//!
//! Rounds are interleaved and take turns. The fixed machine runs twice in each: the ratio of the two is the noise of the boot. Where that
//! exceeds half of what the target leaves, KVM's exits and the monitor's system calls up to the guest's init are what is compared.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use super::boot::{MAX_FAILURES, millis};
use super::counters::Counters;
use super::memory::{Footprint, settled};
use super::monitors::{MEMORY_MIB, Monitor, Setup};
use super::stats::{Series, verdict};

/// Most that the boot may take, as a share of the fixed machine's.
const TARGET_BOOT: f64 = 1.03;
/// Private dirty memory that the elastic monitor may have more, KiB.
const TARGET_MORE_KIB: f64 = 1024.0;
/// Private dirty memory and PSS beside the guest's, everything elastic dormant, KiB.
const TARGET_DIRTY_KIB: f64 = 0.6 * 1024.0;
const TARGET_PSS_KIB: f64 = 4.0 * 1024.0;
/// Private dirty memory for each possible vCPU, KiB.
const TARGET_VCPU_KIB: f64 = 4.0;
/// Rounds in which memory is measured as well: it hardly differs between them, and takes seconds to stand still.
const MEMORY_ROUNDS: usize = 3;

const MOST_VCPUS: f64 = 32.0;
const MOST_MEMORY_KIB: u64 = 16 << 20;

/// One of the machines compared.
struct Shape {
    name: &'static str,
    options: &'static [&'static str],
    guest_kib: u64,
}

const FIXED: usize = 0;
const AGAIN: usize = 1;
const ELASTIC: usize = 2;
const ONE_VCPU: usize = 3;
const SHAPES: [Shape; 4] = [
    Shape { name: "fixed", options: &[], guest_kib: MEMORY_MIB << 10 },
    Shape { name: "fixed (again)", options: &[], guest_kib: MEMORY_MIB << 10 },
    Shape {
        name: "elastic",
        options: &["--cpus-max", "32", "--memory-max", "16G", "--balloon", "--hotplug-slots", "4"],
        guest_kib: MOST_MEMORY_KIB,
    },
    Shape {
        name: "elastic, 1 vCPU at most",
        options: &["--cpus-max", "1", "--memory-max", "16G", "--balloon", "--hotplug-slots", "4"],
        guest_kib: MOST_MEMORY_KIB,
    },
];

/// What is known of one shape.
#[derive(Default)]
struct Found {
    boot: Series,
    counters: Counters,
    exits: Series,
    device_exits: Series,
    calls: Series,
    dirty: Series,
    pss: Series,
    guest: Series,
    tables: Series,
}

/// Page tables of a process, KiB (`VmPTE` of proc_pid_status(5)): the kernel's, not in smaps.
fn tables_kib(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmPTE:")).context("no VmPTE")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

fn once(setup: &Setup, shape: &Shape, found: &mut Found, counts: bool, memory: bool) -> Result<f64> {
    let setup = Setup { extra: shape.options, ..setup.clone() };
    let log = PathBuf::from(format!("{}.log", setup.initrd.display()));
    let mut machine = setup.start(Monitor::Lathe, &log)?;
    let took = millis(machine.wait_for_init()?);
    let counters = Counters::of(machine.pid())?;
    let memory = memory.then(|| settled(machine.pid(), shape.guest_kib)).transpose()?;
    if counts {
        found.boot.push(took);
        found.counters = counters;
        found.exits.push(counters.exits as f64);
        found.device_exits.push(counters.device_exits as f64);
        found.calls.push(counters.calls as f64);
    }
    if let Some(Footprint { guest_kib, .. }) = memory.as_ref() {
        let (dirty, pss) = memory.as_ref().map(Footprint::totals).unwrap_or_default();
        found.dirty.push(dirty as f64);
        found.pss.push(pss as f64);
        found.guest.push(*guest_kib as f64);
        found.tables.push(tables_kib(machine.pid())?);
    }
    Ok(took)
}

/// Measures `rounds` rounds and prints the result. Returns whether every target that can be measured here is met.
///
/// # Errors
/// More than a few machines did not boot, or guest memory cannot be told from the rest.
pub fn run(setup: &Setup, rounds: usize) -> Result<bool> {
    println!("elastic-tax: {}, 1 vCPU, {MEMORY_MIB} MiB, {rounds} rounds", setup.kernel.display());
    let mut found: [Found; 4] = Default::default();
    let mut failures = 0;
    // Round 0 warms the page cache and does not count.
    for round in 0..=rounds {
        let mut line = format!("  round {round:2}:");
        for turn in 0..SHAPES.len() {
            let index = (round + turn) % SHAPES.len();
            let memory = (1..=MEMORY_ROUNDS).contains(&round);
            let took = loop {
                match once(setup, &SHAPES[index], &mut found[index], round > 0, memory) {
                    Ok(took) => break took,
                    Err(error) if failures < MAX_FAILURES => {
                        failures += 1;
                        println!("  FAILED ({}, counted, again): {error:#}", SHAPES[index].name);
                    }
                    Err(error) => bail!("{}: {error:#}", SHAPES[index].name),
                }
            };
            line += &format!("  {} {took:.0}", SHAPES[index].name);
        }
        println!("{line}");
    }
    println!("  machines that failed: {failures}");
    let boot = report_boot(&found);
    Ok(report_memory(&found) && boot)
}

fn table(found: &[Found; 4], what: &str, of: impl Fn(&Found) -> &Series) {
    println!("  {what:23} {:>9} {:>8} {:>8} {:>8} {:>8}", "median", "min", "q1", "q3", "max");
    for (shape, found) in SHAPES.iter().zip(found) {
        println!("  {:23}  {}", shape.name, of(found));
    }
}

fn report_boot(found: &[Found; 4]) -> bool {
    table(found, "milliseconds to init", |found| &found.boot);
    let fixed = found[FIXED].boot.joined(&found[AGAIN].boot);
    let ratio = found[ELASTIC].boot.median() / fixed.median();
    let noise = found[AGAIN].boot.median() / found[FIXED].boot.median();
    let rounds = found[ELASTIC]
        .boot
        .ratios(&found[FIXED].boot)
        .joined(&found[ELASTIC].boot.ratios(&found[AGAIN].boot));
    println!(
        "  round by round: {:.3}, quartiles {:.3}..{:.3}",
        rounds.median(),
        rounds.quantile(0.25),
        rounds.quantile(0.75)
    );
    let (met, word) = verdict(ratio, TARGET_BOOT, noise - 1.0, TARGET_BOOT - 1.0);
    println!(
        "  RESULT boot, elastic ÷ fixed {ratio:.3}, target ≤ {TARGET_BOOT}, against itself {noise:.3}: {word}"
    );
    println!("  up to the guest's init:");
    for (shape, found) in SHAPES.iter().zip(found) {
        println!("  {:23} {}", shape.name, found.counters);
    }
    let share = |of: fn(&Found) -> &Series| {
        let fixed = of(&found[FIXED]).joined(of(&found[AGAIN]));
        (
            of(&found[ELASTIC]).median() / fixed.median(),
            of(&found[AGAIN]).median() / of(&found[FIXED]).median(),
        )
    };
    let ((exits, exits_noise), (calls, calls_noise)) =
        (share(|found| &found.exits), share(|found| &found.calls));
    let more = found[ELASTIC].device_exits.median() - found[FIXED].device_exits.median();
    println!(
        "  RESULT instead of time: {more:+.0} exits to devices, exits to init ÷ fixed {exits:.3} (against itself {exits_noise:.3}), system calls {calls:.3} ({calls_noise:.3})"
    );
    met
}

fn report_memory(found: &[Found; 4]) -> bool {
    table(found, "private dirty, KiB", |found| &found.dirty);
    table(found, "PSS, KiB", |found| &found.pss);
    table(found, "the guest's own, KiB", |found| &found.guest);
    table(found, "page tables, KiB", |found| &found.tables);
    let fixed = |of: fn(&Found) -> &Series| of(&found[FIXED]).joined(of(&found[AGAIN])).median();
    let more = |of: fn(&Found) -> &Series| of(&found[ELASTIC]).median() - fixed(of);
    let noise = |of: fn(&Found) -> &Series| of(&found[AGAIN]).median() - of(&found[FIXED]).median();
    let dirty_noise = noise(|found| &found.dirty);
    let mut all = true;
    let mut result = |what: &str, kib: f64, target: f64, noise: f64| {
        let (met, word) = verdict(kib, target, noise, target);
        println!("  RESULT {what} {kib:.1} KiB, target ≤ {target:.1}, against itself {noise:+.1}: {word}");
        all &= met;
    };
    result("private dirty more than fixed", more(|found| &found.dirty), TARGET_MORE_KIB, dirty_noise);
    result("private dirty beside the guest's", found[ELASTIC].dirty.median(), TARGET_DIRTY_KIB, dirty_noise);
    result("PSS beside the guest's", found[ELASTIC].pss.median(), TARGET_PSS_KIB, noise(|found| &found.pss));
    let for_one = (found[ELASTIC].dirty.median() - found[ONE_VCPU].dirty.median()) / (MOST_VCPUS - 1.0);
    result(
        "private dirty for each possible vCPU",
        for_one,
        TARGET_VCPU_KIB,
        dirty_noise / (MOST_VCPUS - 1.0),
    );
    println!(
        "  RESULT not judged: the guest has {:+.0} KiB more in memory (against itself {:+.0}), the monitor's page tables {:+.0} KiB",
        more(|found| &found.guest),
        noise(|found| &found.guest),
        more(|found| &found.tables)
    );
    all
}
