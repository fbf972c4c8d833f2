//! Benchmark `memory`: what one idle machine costs the host beside its guest's memory, beside QEMU.
//!
//! `/proc/PID/smaps` of the monitor (proc_pid_smaps(5)), without the mappings that are the guest's memory: those that begin with at
//! least half of it. Private dirty is what nobody else has and cannot be dropped; PSS divides shared pages among their users.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::monitors::{MEMORY_MIB, Monitor, Setup};
use super::stats::Series;

/// Private dirty memory allowed, KiB.
pub const TARGET_DIRTY_KIB: f64 = 0.8 * 1024.0;
/// PSS allowed, KiB.
pub const TARGET_PSS_KIB: f64 = 5.0 * 1024.0;
/// Equal samples in a row that make a machine idle, and the time between two.
const STEADY_SAMPLES: usize = 4;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// Samples after which a machine that is never steady is measured anyhow.
const MAX_SAMPLES: usize = 40;

/// One mapping of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Address range, permissions and the rest of the first line.
    pub head: String,
    /// Address space, KiB.
    pub size_kib: u64,
    /// Proportional share, KiB.
    pub pss_kib: u64,
    /// Private dirty, KiB.
    pub dirty_kib: u64,
    /// In memory, KiB.
    pub resident_kib: u64,
}

/// What a monitor has in memory.
#[derive(Clone, Debug, Default)]
pub struct Footprint {
    /// What is not the guest's memory.
    pub beside: Vec<Mapping>,
    /// The guest's memory, KiB.
    pub guest_kib: u64,
}

impl Footprint {
    /// Private dirty memory and PSS beside the guest's, KiB.
    pub fn totals(&self) -> (u64, u64) {
        totals(&self.beside)
    }
}

/// Reads the text of an smaps file. Fields of smaps lines end with a colon; the first line of a mapping does not.
fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(name) = words.next() else { continue };
        let value = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        match (name, mappings.last_mut()) {
            ("Size:", Some(mapping)) => mapping.size_kib = value,
            ("Pss:", Some(mapping)) => mapping.pss_kib = value,
            ("Rss:", Some(mapping)) => mapping.resident_kib = value,
            ("Private_Dirty:", Some(mapping)) => mapping.dirty_kib = value,
            (name, _) if !name.ends_with(':') => {
                mappings.push(Mapping { head: line.to_owned(), ..Mapping::default() });
            }
            _ => {}
        }
    }
    mappings
}

/// The memory of a monitor whose guest has `guest_kib` of address space in mappings of at least half of its memory at boot.
fn look(pid: u32, guest_kib: u64) -> Result<Footprint> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps")).context("the monitor is gone")?;
    let (guest, beside): (Vec<_>, Vec<_>) =
        parse(&text).into_iter().partition(|mapping| mapping.size_kib >= MEMORY_MIB * 1024 / 2);
    let found: u64 = guest.iter().map(|mapping| mapping.size_kib).sum();
    if found != guest_kib {
        bail!("the guest's {guest_kib} KiB are not to be told from the rest: {found} KiB in {guest:?}");
    }
    Ok(Footprint { beside, guest_kib: guest.iter().map(|mapping| mapping.resident_kib).sum() })
}

fn totals(mappings: &[Mapping]) -> (u64, u64) {
    (mappings.iter().map(|m| m.dirty_kib).sum(), mappings.iter().map(|m| m.pss_kib).sum())
}

/// Waits until the private dirty memory stands still. `guest_kib` is the address space of the guest's memory.
///
/// # Errors
/// The monitor is gone, or the guest's memory cannot be told from the rest.
pub fn settled(pid: u32, guest_kib: u64) -> Result<Footprint> {
    let mut last = look(pid, guest_kib)?;
    let mut equal = 0;
    for _ in 0..MAX_SAMPLES {
        thread::sleep(SAMPLE_INTERVAL);
        let next = look(pid, guest_kib)?;
        equal = if next.totals().0 == last.totals().0 { equal + 1 } else { 0 };
        last = next;
        if equal == STEADY_SAMPLES {
            break;
        }
    }
    Ok(last)
}

fn print_detail(mappings: &[Mapping]) {
    let mut sorted: Vec<&Mapping> = mappings.iter().filter(|m| m.dirty_kib + m.pss_kib > 0).collect();
    sorted.sort_by_key(|mapping| std::cmp::Reverse((mapping.dirty_kib, mapping.pss_kib)));
    println!("    dirty      pss     size  KiB");
    for mapping in sorted {
        println!("  {:7} {:8} {:8}  {}", mapping.dirty_kib, mapping.pss_kib, mapping.size_kib, mapping.head);
    }
}

/// Measures each monitor `rounds` times and prints medians. Returns whether the targets are met.
///
/// # Errors
/// A machine does not boot, or its guest memory cannot be told from the rest.
pub fn run(setup: &Setup, rounds: usize, detail: bool) -> Result<bool> {
    println!("memory: {}, 1 vCPU, 256 MiB, idle, KiB beside the guest's memory", setup.kernel.display());
    println!("  {:18} {:>8} {:>8} {:>8} {:>8} {:>8}", "", "median", "min", "q1", "q3", "max");
    let mut met = true;
    for monitor in [Monitor::Lathe, Monitor::QemuMicrovm, Monitor::QemuQ35] {
        let (mut dirty, mut pss) = (Series::default(), Series::default());
        let mut last = Footprint::default();
        for _ in 0..rounds {
            let log = PathBuf::from(format!("{}.log", setup.initrd.display()));
            let mut machine = setup.start(monitor, &log)?;
            machine.wait_for_init()?;
            last = settled(machine.pid(), MEMORY_MIB * 1024)?;
            let (private, proportional) = last.totals();
            dirty.push(private as f64);
            pss.push(proportional as f64);
        }
        println!("  {:18} {dirty}  private dirty", monitor.name());
        println!("  {:18} {pss}  PSS", "");
        if detail && monitor == Monitor::Lathe {
            print_detail(&last.beside);
        }
        if monitor == Monitor::Lathe {
            met = dirty.median() <= TARGET_DIRTY_KIB && pss.median() <= TARGET_PSS_KIB;
            println!(
                "  RESULT private dirty {:.2} MiB, PSS {:.2} MiB, targets ≤ 0.8 and ≤ 5 MiB: {}",
                dirty.median() / 1024.0,
                pss.median() / 1024.0,
                if met { "met" } else { "MISSED" }
            );
        }
    }
    Ok(met)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let mappings = parse(&fs::read_to_string("/proc/self/smaps").unwrap());
        assert!(mappings.len() > 5);
        assert!(mappings.iter().all(|mapping| mapping.size_kib >= 4));
        assert!(totals(&mappings).0 > 0);
        assert!(mappings.iter().any(|mapping| mapping.head.ends_with("[stack]")));
    }
}
