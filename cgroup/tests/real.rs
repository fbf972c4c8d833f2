//! The machine's tree on a real kernel. Needs root and `LATHE_TEST_CGROUP`, a delegated, empty cgroup v2 folder in which
//! nothing runs (for example made by `systemd-run -p Delegate=yes sleep inf`, then its cgroup with the process moved
//! to a child). Prints why it is skipped otherwise.

use std::error::Error;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lathe_cgroup::{Bytes, CpuPatch, MachineTree, MemoryPatch, MilliCpu, Owner, Patch, Removal};

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

/// The share of a CPU that the vCPU group used over `time`, in thousandths.
fn delivered(tree: &MachineTree, time: Duration) -> Result<u64, Box<dyn Error>> {
    let (before, start) = (tree.usage()?.vcpu.usage_usec, Instant::now());
    // The measured quantity is CPU time per wall time: waiting is the measurement, not synchronisation.
    std::thread::sleep(time);
    let used = tree.usage()?.vcpu.usage_usec - before;
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
        assert_eq!(set.vcpu.max, Some(MilliCpu(share)));
        let got = delivered(tree, Duration::from_secs(4))?;
        println!("asked {share} milliCPU, delivered {got}");
        // An emulated host may lack the CPU time itself, so only too much is wrong here; how exact it is, a benchmark shows.
        assert!(got * 100 <= share * 110 && got * 100 >= share * 40, "asked {share}, delivered {got}");
    }
    let usage = tree.usage()?;
    // What the process touched before it was moved stays charged where it was, so its memory may count as none.
    assert!(usage.vcpu.nr_throttled > 0 && usage.pids_current == 1, "{usage:?}");
    Ok(())
}

const OWNER: Owner = Owner { uid: 0, gid: 0 };

#[test]
fn a_machine_has_its_share_on_a_real_kernel() -> Tested {
    let Some(root) = root_of_work() else { return Ok(()) };
    let unit = root.join("lathe-test-unit");
    fs::write(root.join("cgroup.subtree_control"), "+cpu +memory +io +pids")?;
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
