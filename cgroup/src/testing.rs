//! A machine's cgroups as plain folders with the files that a kernel would show.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

pub(crate) struct Fixture {
    dir: TempDir,
}

const CPU: [(&str, &str); 7] = [
    ("cpuset.cpus", "\n"),
    ("cpuset.cpus.effective", "0-7\n"),
    ("cpu.max", "max 100000\n"),
    ("cpu.max.burst", "0\n"),
    ("cpu.weight", "100\n"),
    ("cpu.idle", "0\n"),
    (
        "cpu.stat",
        "usage_usec 2500\nuser_usec 2000\nsystem_usec 500\nnr_periods 40\nnr_throttled 7\nthrottled_usec 900\n",
    ),
];
const CORE: [(&str, &str); 5] = [
    ("cgroup.procs", ""),
    ("cgroup.threads", ""),
    ("cgroup.subtree_control", ""),
    ("cgroup.controllers", "cpuset cpu io memory pids\n"),
    ("cgroup.type", "domain\n"),
];
const MACHINE: [(&str, &str); 16] = [
    ("cgroup.freeze", "0\n"),
    ("memory.reclaim", ""),
    ("io.max", ""),
    ("io.weight", "default 100\n"),
    ("memory.max", "max\n"),
    ("memory.high", "max\n"),
    ("memory.low", "0\n"),
    ("memory.min", "0\n"),
    ("memory.current", "300000000\n"),
    (
        "memory.stat",
        "anon 1000000\nfile 290000000\nkernel 5000000\nshmem 280000000\nanon_thp 0\ninactive_file 7000000\n",
    ),
    ("memory.events", "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 0\n"),
    ("pids.max", "max\n"),
    ("pids.current", "9\n"),
    ("io.stat", "259:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0\n"),
    ("cgroup.events", "populated 1\nfrozen 0\n"),
    ("cgroup.kill", ""),
];

impl Fixture {
    /// A unit with the three folders of a machine below.
    pub(crate) fn new() -> Fixture {
        let fixture = Fixture { dir: tempfile::tempdir().expect("a temporary folder") };
        for path in [fixture.unit(), fixture.machine(), fixture.vcpu(), fixture.vmm()] {
            fs::create_dir_all(&path).expect("a folder");
            for (name, text) in CORE.iter().chain(&CPU) {
                fs::write(path.join(name), text).expect("a file");
            }
        }
        for (name, text) in MACHINE {
            fs::write(fixture.machine().join(name), text).expect("a file");
        }
        for name in ["memory.min", "memory.low"] {
            fs::write(fixture.unit().join(name), "0\n").expect("a file");
        }
        fixture
    }

    pub(crate) fn unit(&self) -> PathBuf {
        self.dir.path().join("lathe-vm@web.service")
    }

    pub(crate) fn machine(&self) -> PathBuf {
        self.unit().join("machine")
    }

    pub(crate) fn vcpu(&self) -> PathBuf {
        self.machine().join("vcpu")
    }

    pub(crate) fn vmm(&self) -> PathBuf {
        self.machine().join("vmm")
    }
}

pub(crate) fn content(path: &Path) -> String {
    fs::read_to_string(path).expect("readable").trim().to_string()
}
