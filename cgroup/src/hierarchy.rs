//! cgroups-rs, rooted at a delegated cgroup.
//!
//! Its own `V2` hierarchy starts at `/sys/fs/cgroup` and, when it creates a group, enables every controller on the way
//! down, in cgroups that are systemd's. [`Delegated`] starts where we may write; groups are only *loaded*, never created.
//! Used for what cgroups-rs 0.5.1 does right: writing `cpu.max`, `memory.{min,low,high,max}` and `pids.max`. Its
//! getters of memory hide errors behind defaults, so reading is ours.

use std::path::{Path, PathBuf};

use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::error::Error as CgroupsError;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::pid::PidController;
use cgroups_rs::fs::{Cgroup, Hierarchy, Subsystem};

use crate::error::Error;
use crate::file;

/// Everything at and below one delegated cgroup.
#[derive(Clone, Debug)]
struct Delegated {
    root: PathBuf,
}

impl Hierarchy for Delegated {
    fn subsystems(&self) -> Vec<Subsystem> {
        let here = || (self.root.clone(), PathBuf::new());
        let (cpu, memory, pids) = (here(), here(), here());
        vec![
            Subsystem::Cpu(CpuController::new(cpu.0, cpu.1, true)),
            Subsystem::Mem(MemController::new(memory.0, memory.1, true)),
            Subsystem::Pid(PidController::new(pids.0, pids.1, true)),
        ]
    }

    fn root(&self) -> PathBuf {
        self.root.clone()
    }

    fn root_control_group(&self) -> Cgroup {
        Cgroup::load(Box::new(self.clone()), "")
    }

    fn parent_control_group(&self, path: &str) -> Cgroup {
        let parent = Path::new(path).parent().map(Path::to_path_buf).unwrap_or_default();
        Cgroup::load(Box::new(self.clone()), parent)
    }

    fn v2(&self) -> bool {
        true
    }
}

/// The existing group `root`/`relative`; `relative` is one of our own constant names, in UTF-8.
pub(crate) fn load(root: &Path, relative: &'static str) -> Cgroup {
    Cgroup::load(Box::new(Delegated { root: root.into() }), relative)
}

/// A refusal through cgroups-rs as our error, with the kernel's own answer.
pub(crate) fn refused(path: &Path, value: &str, error: &CgroupsError) -> Error {
    use std::error::Error as _;
    let source = error
        .source()
        .and_then(|cause| cause.downcast_ref::<std::io::Error>())
        .and_then(std::io::Error::raw_os_error)
        .map_or_else(|| std::io::Error::other(error.to_string()), std::io::Error::from_raw_os_error);
    file::write_error(path, value, source)
}
