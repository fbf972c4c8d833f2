//! The machine's tree on a real kernel. Needs root and `LATHE_TEST_CGROUP`, a delegated, empty cgroup v2 folder in which
//! nothing runs (for example made by `systemd-run -p Delegate=yes sleep inf`, then its cgroup with the process moved
//! to a child). Prints why it is skipped otherwise.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lathe_cgroup::{
    Bytes, CpuPatch, Device, IoPatch, MachineTree, MemoryPatch, MilliCpu, Owner, Patch, Removal, Resource,
    Stall,
};

type Tested = Result<(), Box<dyn Error>>;

fn root_of_work() -> Option<PathBuf> {
    let Some(path) = std::env::var_os("LATHE_TEST_CGROUP").map(PathBuf::from) else {
        println!("skipped: LATHE_TEST_CGROUP names no delegated cgroup");
        return None;
    };
    if !path.join("cgroup.controllers").exists() {
        println!("skipped: {} is no cgroup v2 folder", path.display());
        return None;
    }
    Some(path)
}

/// A process that spins, started and stopped by its standard input.
fn spinner(script: &str) -> Result<Child, Box<dyn Error>> {
    Ok(Command::new("/bin/sh").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
}

fn cgroup_of(pid: u32) -> Result<String, Box<dyn Error>> {
    Ok(fs::read_to_string(format!("/proc/{pid}/cgroup"))?)
}

/// The share of a CPU that the machine used over `time`, in thousandths.
fn delivered(tree: &MachineTree, time: Duration) -> Result<u64, Box<dyn Error>> {
    let (before, start) = (tree.usage()?.machine.usage_usec, Instant::now());
    // The measured quantity is CPU time per wall time: waiting is the measurement, not synchronisation.
    std::thread::sleep(time);
    let used = tree.usage()?.machine.usage_usec - before;
    Ok(used * 1000 / u64::try_from(start.elapsed().as_micros())?)
}

fn exercise(tree: &MachineTree, unit: &Path, child: &mut Child) -> Tested {
    let pid = child.id();
    assert!(cgroup_of(pid)?.trim().ends_with("/machine/vmm"), "{}", cgroup_of(pid)?);
    assert_eq!(fs::read_to_string(tree.machine().join("cgroup.type"))?.trim(), "domain threaded");
    assert_eq!(tree.processes()?, [pid]);

    let limits = tree.set_memory(&MemoryPatch {
        max: Patch::Set(Bytes(64 << 20)),
        high: Patch::Set(Bytes(48 << 20)),
        ..MemoryPatch::default()
    })?;
    assert_eq!((limits.max, limits.high), (Some(Bytes(64 << 20)), Some(Bytes(48 << 20))));
    assert_eq!(tree.set_pids(Patch::Set(16))?, Some(16));

    tree.place_vcpu(pid)?;
    assert_eq!(tree.vcpu_threads()?, [pid]);
    let again = MachineTree::prepare(unit, pid, OWNER)?;
    assert_eq!(again.vcpu_threads()?, [pid], "preparing again moves nobody");

    child.stdin.take().ok_or("a pipe")?.write_all(b"go\n")?;
    for share in [250, 500, 100] {
        let set = tree.set_cpu(&CpuPatch { max: Patch::Set(MilliCpu(share)), ..CpuPatch::default() })?;
        assert_eq!(set.machine.max, Some(MilliCpu(share)));
        let got = delivered(tree, Duration::from_secs(4))?;
        println!("asked {share} milliCPU, delivered {got}");
        // An emulated host may lack the CPU time itself, so only too much is wrong here; how exact it is, a benchmark shows.
        assert!(got * 100 <= share * 110 && got * 100 >= share * 40, "asked {share}, delivered {got}");
    }
    stands_still_and_goes_on(tree)?;
    walls_and_places(tree)?;
    let usage = tree.usage()?;
    // What the process touched before it was moved stays charged where it was, so its memory may count as none.
    assert!(usage.machine.nr_throttled > 0 && usage.pids_current == 1, "{usage:?}");
    Ok(())
}

/// Waits for something that the kernel does in a moment.
fn until(what: &str, mut there: impl FnMut() -> Result<bool, lathe_cgroup::Error>) -> Tested {
    let begun = Instant::now();
    while !there()? {
        assert!(begun.elapsed() < Duration::from_secs(10), "not {what} within 10 s");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn stands_still_and_goes_on(tree: &MachineTree) -> Tested {
    tree.freeze(true)?;
    until("frozen", || tree.is_frozen())?;
    let before = tree.usage()?.vcpu.usage_usec;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(tree.usage()?.vcpu.usage_usec, before, "a frozen spinner spins");
    tree.freeze(false)?;
    until("running", || tree.usage().map(|usage| usage.vcpu.usage_usec > before))
}

/// A whole disk of this host.
fn disk() -> Option<Device> {
    let folders = fs::read_dir("/sys/block").ok()?.flatten();
    let numbers = folders.filter_map(|folder| fs::read_to_string(folder.path().join("dev")).ok());
    numbers
        .filter_map(|text| {
            let (major, minor) = text.trim().split_once(':')?;
            // 7: loop devices, 1: RAM disks.
            let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
            (!matches!(device.major, 1 | 7)).then_some(device)
        })
        .next()
}

fn walls_and_places(tree: &MachineTree) -> Tested {
    match disk() {
        Some(disk) => {
            let wall =
                IoPatch { reads: Patch::Set(50), written: Patch::Set(Bytes(1 << 20)), ..IoPatch::default() };
            let set = tree.set_io(disk, &wall)?;
            assert_eq!((set.reads, set.written, set.read), (Some(50), Some(Bytes(1 << 20)), None));
            let none = IoPatch { reads: Patch::Unlimited, written: Patch::Unlimited, ..IoPatch::default() };
            assert_eq!(tree.set_io(disk, &none)?, tree.io(Device { major: 0, minor: 0 })?);
        }
        None => println!("no wall was tried: this host has no disk"),
    }
    if tree.machine().join("cpuset.cpus").exists() {
        let set = tree.set_cpus(&Patch::Set([0].into_iter().collect()))?;
        assert_eq!(set.effective.to_string(), "0");
        let all = tree.set_cpus(&Patch::Unlimited)?.effective;
        assert!(all.0.contains(&0) && all.0.len() == std::thread::available_parallelism()?.get(), "{all}");
    } else {
        println!("no CPU was chosen: this delegation has no cpuset");
    }
    println!("all of 1 MiB reclaimed: {}", tree.reclaim(Bytes(1 << 20))?);
    let stall = Stall { full: false, threshold: Duration::from_millis(100), window: Duration::from_secs(1) };
    println!("told of stalls: {}", tree.watch(Resource::Memory, stall)?.is_some());
    Ok(())
}

const OWNER: Owner = Owner { uid: 0, gid: 0 };

#[test]
fn a_machine_has_its_share_on_a_real_kernel() -> Tested {
    let Some(root) = root_of_work() else { return Ok(()) };
    let unit = root.join("lathe-test-unit");
    fs::write(root.join("cgroup.subtree_control"), "+cpu +memory +io +pids")?;
    if fs::read_to_string(root.join("cgroup.controllers"))?.contains("cpuset") {
        fs::write(root.join("cgroup.subtree_control"), "+cpuset")?;
    }
    fs::create_dir_all(&unit)?;
    let mut child = spinner("read go; while :; do :; done")?;
    fs::write(unit.join("cgroup.procs"), child.id().to_string())?;
    let tree = MachineTree::prepare(&unit, child.id(), OWNER)?;
    let result = exercise(&tree, &unit, &mut child);
    tree.kill()?;
    child.wait()?;
    let mut rest = String::new();
    child.stdout.take().ok_or("a pipe")?.read_to_string(&mut rest)?;
    assert_eq!(rest, "");
    assert_eq!(tree.remove()?, Removal::Removed);
    fs::remove_dir(&unit)?;
    result
}
