//! Benchmark `resizes`: how many changes of shape a second one core of the host carries, beside QEMU by QMP: one block of memory, a present
//! CPU on and off, a CPU plugged in and out. Each is awaited before the next begins, and the time of the host's cores that were not idle
//! is what counts: guest, monitor and whoever asks together.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::counters::Counters;
use super::elastic::{Kind, LIMIT, Machine, Setup, wait};
use super::stats::{Series, verdict};

/// Plugged while one block comes and goes: half of a memory block of the guest, MiB.
const BASE_MIB: u64 = 64;
const BLOCK_MIB: u64 = 2;
/// Lathe ÷ QEMU.
const TARGET: f64 = 1.0;
/// Machines that hang or die in the emulated host before the benchmark is given up.
const MAX_FAILURES: usize = 4;
/// What `/proc/stat` counts in.
const TICK_SEC: f64 = 0.01;

/// What is measured, and how many changes of it.
const OPERATIONS: [(&str, usize); 3] =
    [("memory, one block of 2 MiB", 60), ("CPU, online and offline", 40), ("CPU, plugged in and out", 16)];

/// Seconds of all cores of this host that were not idle since it was booted.
///
/// # Errors
/// `/proc/stat` is none.
pub fn busy_sec() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> =
        line.split_ascii_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal; a guest's time is in user.
    let busy: u64 =
        ticks.iter().take(8).enumerate().filter(|(at, _)| *at != 3 && *at != 4).map(|(_, ticks)| ticks).sum();
    Ok(busy as f64 * TICK_SEC)
}

/// What some changes took.
#[derive(Clone, Copy, Debug)]
struct Took {
    /// Changes per second of one busy core.
    per_core_sec: f64,
    per_sec: f64,
    counters: Counters,
}

fn timed(
    machine: &mut Machine,
    count: usize,
    mut one: impl FnMut(&mut Machine, bool) -> Result<()>,
) -> Result<Took> {
    let (before, busy, begun) = (machine.counters()?, busy_sec()?, Instant::now());
    for number in 0..count {
        one(machine, number % 2 == 0)?;
    }
    let (elapsed, busy) = (begun.elapsed().as_secs_f64(), busy_sec()? - busy);
    let counters = machine.counters()?.since(&before);
    Ok(Took { per_core_sec: count as f64 / busy, per_sec: count as f64 / elapsed, counters })
}

fn move_block(machine: &mut Machine, more: bool) -> Result<()> {
    let mib = BASE_MIB + if more { BLOCK_MIB } else { 0 };
    machine.request_memory(mib)?;
    wait(|| Ok(machine.plugged_mib()? == mib), "a block comes or goes")
}

fn switch_cpu(machine: &mut Machine, more: bool) -> Result<()> {
    machine.tell(if more { "online 1" } else { "offline 1" })?;
    machine.expect(if more { "cpu 1" } else { "offline 1" }, LIMIT).map(drop)
}

fn plug_cpu(machine: &mut Machine, more: bool) -> Result<()> {
    if !more {
        return machine.unplug_cpu(1);
    }
    machine.plug_cpu(1)?;
    machine.expect("cpu 1", LIMIT).map(drop)
}

fn round(setup: &Setup, kind: Kind) -> Result<[Took; 3]> {
    let mut machine = setup.start(kind)?;
    machine.request_memory(BASE_MIB)?;
    wait(|| Ok(machine.plugged_mib()? == BASE_MIB), "memory is plugged")?;
    let memory = timed(&mut machine, OPERATIONS[0].1, move_block)?;
    let plug = timed(&mut machine, OPERATIONS[2].1, plug_cpu)?;
    plug_cpu(&mut machine, true)?;
    switch_cpu(&mut machine, false)?;
    let switch = timed(&mut machine, OPERATIONS[1].1, switch_cpu)?;
    Ok([memory, switch, plug])
}

/// Measures `rounds` rounds and prints the result. Returns whether Lathe carries as many as QEMU wherever that can be measured here.
///
/// # Errors
/// Too many machines failed.
pub fn run(setup: &Setup, rounds: usize) -> Result<bool> {
    println!("resizes: {}, {rounds} rounds, changes a second of a busy core", setup.kernel.display());
    let turns = [Kind::Qemu, Kind::Lathe, Kind::Lathe];
    let mut series: [[Series; 3]; 3] = Default::default();
    let mut last: [Option<[Took; 3]>; 3] = [None; 3];
    let mut failures = 0;
    for number in 0..rounds {
        for turn in 0..turns.len() {
            let index = (number + turn) % turns.len();
            let took = loop {
                match round(setup, turns[index]) {
                    Ok(took) => break took,
                    Err(error) if failures < MAX_FAILURES => {
                        failures += 1;
                        println!("  FAILED ({}, counted, again): {error:#}", turns[index].name());
                    }
                    Err(error) => bail!("{}: {error:#}", turns[index].name()),
                }
            };
            let line =
                took.map(|took| format!("{:.1} ({:.1}/s)", took.per_core_sec, took.per_sec)).join("  ");
            println!("  round {number} {:9}: {line}", turns[index].name());
            took.iter().enumerate().for_each(|(of, took)| series[of][index].push(took.per_core_sec));
            last[index] = Some(took);
        }
    }
    println!("  machines that failed: {failures}");
    let met = series.iter().enumerate().map(|(operation, series)| report(operation, series, &last));
    Ok(met.fold(true, |all, met| all & met))
}

fn report(operation: usize, [qemu, first, second]: &[Series; 3], last: &[Option<[Took; 3]>; 3]) -> bool {
    let (name, count) = OPERATIONS[operation];
    let lathe = first.joined(second);
    println!("  {name}");
    println!("    {:10} {lathe}", "lathe-vmm");
    println!("    {:10} {qemu}", "qemu q35");
    for (who, took) in [("qemu q35", &last[0]), ("lathe-vmm", &last[1])] {
        if let Some(took) = took {
            println!("    {count} changes, {who:9}: {}", took[operation].counters);
        }
    }
    // Above QEMU is better: the inverse has the target's sense.
    let (ratio, noise) = (lathe.median() / qemu.median(), second.median() / first.median());
    let (met, word) = verdict(1.0 / ratio, TARGET, noise - 1.0, 1.0);
    println!(
        "    RESULT {:.1} a second of a core, {ratio:.2} × QEMU's {:.1}, target ≥ {TARGET}, against itself {noise:.3}: {word}",
        lathe.median(),
        qemu.median()
    );
    met
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_that_works_is_busy() {
        assert!(busy_sec().unwrap() > 0.0);
    }
}
