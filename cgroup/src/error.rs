//! What can go wrong with a cgroup file: which file, which value, what the kernel said, and what to check.

use std::io;
use std::path::PathBuf;

use crate::units::MilliCpu;

/// An operation on a machine's cgroups that did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a value.
    #[error("cannot write {value:?} to {}; check: {check}", file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// The value as written.
        value: String,
        /// What to look at.
        check: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {}; check: {check}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What to look at.
        check: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file says something that this version does not understand.
    #[error("{} contains {content:?}, expected {expected}", file.display())]
    Content {
        /// The file.
        file: PathBuf,
        /// What is in it, shortened.
        content: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A value was accepted but is not what the kernel shows afterwards.
    #[error("wrote {wrote:?} to {}, the kernel shows {shows:?}; check: an older kernel or another writer of this file", file.display())]
    ReadBack {
        /// The file.
        file: PathBuf,
        /// What was written.
        wrote: String,
        /// What is there.
        shows: String,
    },
    /// The kernel, or the delegation, lacks something by name.
    #[error("{} is missing; check: {check}", file.display())]
    Lacks {
        /// The file or folder that is not there.
        file: PathBuf,
        /// What to look at.
        check: &'static str,
    },
    /// The machine's tree is not below this unit: not prepared, or already gone.
    #[error("no machine cgroup below {}; check: `systemctl status` of the unit, its ExecStartPost= helper prepares it", unit.display())]
    NoTree {
        /// The unit's cgroup.
        unit: PathBuf,
    },
    /// A delegated cgroup lacks controllers.
    #[error("{} offers only {offers:?}, {lacks:?} is missing; check: Delegate=yes of the unit and cgroup.subtree_control above it", unit.display())]
    Controllers {
        /// The unit's cgroup.
        unit: PathBuf,
        /// Controllers in `cgroup.controllers`.
        offers: String,
        /// The first that is missing.
        lacks: &'static str,
    },
    /// Less CPU than the kernel can enforce.
    #[error(
        "{asked} is less than the smallest CPU limit of {smallest}: the kernel's quota is at least 1 ms in a period of at most 100 ms"
    )]
    CpuTooSmall {
        /// Asked.
        asked: MilliCpu,
        /// The least.
        smallest: MilliCpu,
    },
    /// More than the kernel's number range, or outside the range of a field.
    #[error("{field} of {asked} is outside {range}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// Asked.
        asked: u64,
        /// Allowed, inclusive.
        range: &'static str,
    },
    /// A folder could not be made, removed or given away.
    #[error("cannot {action} {}; check: {check}", path.display())]
    Folder {
        /// What was tried.
        action: &'static str,
        /// The folder or file.
        path: PathBuf,
        /// What to look at.
        check: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path that this crate cannot work with.
    #[error("{} is not an absolute path of a cgroup in UTF-8", path.display())]
    Path {
        /// The path.
        path: PathBuf,
    },
}

/// What to check when the kernel refuses, by its answer. cgroup-v2.rst, and `kernel/cgroup/cgroup.c` of Linux 6.1.
pub(crate) fn check_for(error: &io::Error) -> &'static str {
    use io::ErrorKind;
    match error.kind() {
        ErrorKind::NotFound => {
            "the unit still runs, and the controller is enabled in cgroup.subtree_control of the parent"
        }
        ErrorKind::PermissionDenied => {
            "the file belongs to this user (the root helper gives it away), and cgroupfs is writable for this service"
        }
        ErrorKind::ResourceBusy => {
            "processes in the parent (no internal processes), or a controller enabled below"
        }
        ErrorKind::InvalidInput => {
            "the value's range: quota at least 1 ms, burst at most the quota, weight 1 to 10000"
        }
        ErrorKind::Unsupported => {
            "cgroup.type of this cgroup and its parent: threaded cgroups take only cpu, cpuset, perf_event and pids"
        }
        ErrorKind::ReadOnlyFilesystem => "ProtectControlGroups= of the service",
        _ if error.raw_os_error() == Some(NO_SUCH_PROCESS) => "the thread or process has ended",
        _ if error.raw_os_error() == Some(NO_DEVICE) => "the cgroup has been removed: its unit has stopped",
        _ => "the kernel log",
    }
}

/// ESRCH.
const NO_SUCH_PROCESS: i32 = 3;
/// ENODEV: what the kernel says to a write into a removed cgroup.
const NO_DEVICE: i32 = 19;
