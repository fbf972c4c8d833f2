//! The filesystems of a guest without a distribution, and its standard streams.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

struct Mount {
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
}

const fn entry(
    kind: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&'static str>,
) -> Mount {
    Mount { kind, target, flags, data }
}

const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC).union(MsFlags::MS_NODEV);

const MOUNTS: &[Mount] = &[
    entry("proc", "/proc", QUIET, None),
    entry("sysfs", "/sys", QUIET, None),
    entry("devtmpfs", "/dev", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), Some("mode=0755")),
    entry(
        "devpts",
        "/dev/pts",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        Some("ptmxmode=0666,mode=0620,gid=5"),
    ),
    entry("tmpfs", "/dev/shm", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
    entry("tmpfs", "/run", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), Some("mode=0755")),
    entry("tmpfs", "/tmp", MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV), Some("mode=1777")),
    entry("cgroup2", "/sys/fs/cgroup", QUIET, None),
];

/// Mounts everything and opens the console; gives what did not work, in words.
pub fn mount_all() -> Vec<String> {
    let mut problems = Vec::new();
    for entry in MOUNTS {
        // Those inside sysfs exist; the error of the mount says more than that of the folder.
        let _ = fs::create_dir_all(entry.target);
        let mounted = mount(Some(entry.kind), entry.target, Some(entry.kind), entry.flags, entry.data);
        // The kernel may have mounted it itself (CONFIG_DEVTMPFS_MOUNT).
        if let Err(error) = mounted
            && error != nix::errno::Errno::EBUSY
        {
            problems.push(format!("cannot mount {} on {}: {error}", entry.kind, entry.target));
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
        ("/dev/ptmx", "pts/ptmx"),
    ] {
        if link == "/dev/ptmx" && Path::new("/dev/pts/ptmx").exists() {
            // devtmpfs brings a node that leads to the same terminals.
            continue;
        }
        let _ = std::os::unix::fs::symlink(target, link);
    }
    problems
}
