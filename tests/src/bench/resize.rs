//! Benchmark `resize`: what changing a running machine takes, beside QEMU, with the fastest possible hand in both guests (`hand`).
//!
//! Rounds are interleaved and take turns; Lathe runs twice in each round, and the ratio of the two is the noise. Where that exceeds
//! half of what the target leaves, the figure says so. Each operation is timed from the call to its effect: a line of the guest (a
//! task has run on the CPU, the memory is in MemTotal) or the host's own accounts (resident memory has fallen).

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::elastic::{Kind, LIMIT, Machine, Setup, wait};
use super::stats::{Series, verdict};
use super::{initramfs, monitors};

/// What the kernels of Debian have as modules, in loading order.
const MODULES: [&str; 2] = ["drivers/virtio/virtio_mem.ko", "drivers/virtio/virtio_balloon.ko"];

/// Memory moved by virtio-mem, MiB.
const PLUG_MIB: u64 = 256;
/// Memory moved by the balloon, MiB.
const BALLOON_MIB: u64 = 128;
/// Machines that hang or die in the emulated host before the benchmark is given up.
const MAX_FAILURES: usize = 4;

/// What is measured, and the most that the median may be as a share of the reference's.
const OPERATIONS: [(&str, f64); 5] = [
    ("vCPU added, a task has run on it", 0.5),
    ("offline vCPU online, a task has run (÷ added)", 0.25),
    ("+256 MiB in the guest's MemTotal", 0.7),
    ("-256 MiB gone from the host", 0.7),
    ("balloon +128 MiB, gone from the host", 0.33),
];
/// Compared with our own addition, not with QEMU's.
const ONLINE: usize = 1;

/// Makes the initial RAM disk with `hand` and the modules of the kernel, which must be the one that this host runs.
///
/// # Errors
/// A module is missing.
pub fn setup(common: &monitors::Setup, hand: &Path, directory: &Path) -> Result<Setup> {
    let release = nix::sys::utsname::uname()?.release().to_string_lossy().into_owned();
    let modules = MODULES.iter().map(|module| read_module(&release, module)).collect::<Result<Vec<_>>>()?;
    let initrd = directory.join("hand.cpio");
    let init = fs::read(hand).with_context(|| hand.display().to_string())?;
    initramfs::write_with(&mut File::create(&initrd)?, &init, &modules)?;
    Ok(Setup {
        vmm: common.vmm.clone(),
        kernel: common.kernel.clone(),
        initrd,
        directory: directory.to_owned(),
    })
}

fn read_module(release: &str, module: &str) -> Result<Vec<u8>> {
    let plain = format!("/lib/modules/{release}/kernel/{module}");
    if Path::new(&plain).exists() {
        return Ok(fs::read(plain)?);
    }
    let output =
        Command::new("xz").args(["-dc", &format!("{plain}.xz")]).output().context("cannot run xz")?;
    if !output.status.success() {
        bail!("{plain}.xz: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<f64> {
    let begun = Instant::now();
    act()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn cpus(machine: &mut Machine) -> Result<[f64; 2]> {
    let added = timed(|| {
        machine.plug_cpu(1)?;
        machine.expect("cpu 1", LIMIT).map(drop)
    })?;
    machine.tell("offline 1")?;
    machine.expect("offline 1", LIMIT)?;
    let online = timed(|| {
        machine.tell("online 1")?;
        machine.expect("cpu 1", LIMIT).map(drop)
    })?;
    machine.unplug_cpu(1)?;
    Ok([added, online])
}

fn memory(machine: &mut Machine) -> Result<[f64; 3]> {
    let plugged = timed(|| {
        machine.request_memory(PLUG_MIB)?;
        loop {
            machine.expect("memory ", LIMIT)?;
            if machine.plugged_mib()? >= PLUG_MIB {
                return Ok(());
            }
        }
    })?;
    // All that is movable has been used once: the host holds it.
    machine.tell("touch 400")?;
    machine.expect("touched", LIMIT)?;
    machine.tell("drop")?;
    machine.expect("dropped", LIMIT)?;
    let before = machine.resident_mib()?;
    let unplugged = timed(|| {
        machine.request_memory(0)?;
        wait(|| Ok(machine.plugged_mib()? == 0), "the guest gives plugged memory back")
    })?;
    if machine.resident_mib()? >= before {
        bail!("{before} MiB resident before memory was unplugged, {} after", machine.resident_mib()?);
    }
    let inflated = timed(|| {
        machine.inflate(BALLOON_MIB)?;
        wait(|| Ok(machine.balloon_mib()? >= BALLOON_MIB), "the balloon fills")
    })?;
    Ok([plugged, unplugged, inflated])
}

fn round(setup: &Setup, kind: Kind) -> Result<[f64; 5]> {
    let mut machine = setup.start(kind)?;
    std::thread::sleep(Duration::from_millis(500));
    let [added, online] = cpus(&mut machine)?;
    let [plugged, unplugged, inflated] = memory(&mut machine)?;
    Ok([added, online, plugged, unplugged, inflated])
}

fn patiently(setup: &Setup, kind: Kind, failures: &mut usize) -> Result<[f64; 5]> {
    loop {
        match round(setup, kind) {
            Ok(took) => return Ok(took),
            Err(error) if *failures < MAX_FAILURES => {
                *failures += 1;
                println!("  FAILED ({}, counted, again): {error:#}", kind.name());
            }
            Err(error) => bail!("{}: {error:#}", kind.name()),
        }
    }
}

/// Measures `rounds` rounds and prints the result. Returns whether every target that can be measured here is met.
///
/// # Errors
/// Too many machines failed.
pub fn run(setup: &Setup, rounds: usize) -> Result<bool> {
    println!("resize: {}, {rounds} rounds, milliseconds", setup.kernel.display());
    let turns = [Kind::Qemu, Kind::Lathe, Kind::Lathe];
    let mut series: [[Series; 3]; 5] = Default::default();
    let mut failures = 0;
    for number in 0..rounds {
        for turn in 0..turns.len() {
            let index = (number + turn) % turns.len();
            let took = patiently(setup, turns[index], &mut failures)?;
            println!(
                "  round {number} {:9}: {}",
                turns[index].name(),
                took.map(|t| format!("{t:.0}")).join("  ")
            );
            for (operation, value) in took.into_iter().enumerate() {
                series[operation][index].push(value);
            }
        }
    }
    println!("  machines that failed: {failures}");
    let added = series[0][1].joined(&series[0][2]).median();
    let mut met = true;
    for (operation, [qemu, first, second]) in series.iter().enumerate() {
        let (name, target) = OPERATIONS[operation];
        let lathe = first.joined(second);
        let (noise, ratio) = (
            second.median() / first.median(),
            match operation {
                ONLINE => lathe.median() / added,
                _ => lathe.median() / qemu.median(),
            },
        );
        println!("  {name}");
        println!("    {:10} {lathe}", "lathe-vmm");
        println!("    {:10} {qemu}", "qemu q35");
        let (fine, word) = verdict(ratio, target, noise - 1.0, target);
        met &= fine;
        println!("    RESULT ratio {ratio:.3}, target ≤ {target}, against itself {noise:.3}: {word}");
    }
    Ok(met)
}
