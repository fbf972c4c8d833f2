//! The orderly end of the built-in guest: everybody is asked, then killed; disks are synced and unmounted.

use std::convert::Infallible;
use std::fs;
use std::io;
use std::time::{Duration, Instant};

use lathe_guest::protocol::ShutdownMode;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};

use super::say;
use crate::{children, sys};

/// Between the polite and the other signal.
const TERM_GRACE: Duration = Duration::from_secs(5);
/// For killed processes to be gone.
const KILL_GRACE: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);
/// Filesystems that hold nothing; unmounting them would only cost time.
const VOLATILE: &[&str] =
    &["rootfs", "proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "ramfs", "cgroup2", "securityfs", "bpf"];

/// Stops everything and the machine.
pub fn stop(mode: ShutdownMode) -> io::Result<()> {
    say(match mode {
        ShutdownMode::PowerOff => "powering off",
        ShutdownMode::Reboot => "rebooting",
    });
    for (signal, grace) in [(libc::SIGTERM, TERM_GRACE), (libc::SIGKILL, KILL_GRACE)] {
        // -1: everybody but PID 1 itself. No error matters: there may be nobody.
        let _ = sys::kill(-1, signal);
        let _ = sys::kill(-1, libc::SIGCONT);
        if all_gone_within(grace) {
            break;
        }
    }
    nix::unistd::sync();
    unmount_all(&fs::read_to_string("/proc/self/mounts").unwrap_or_default());
    nix::unistd::sync();
    let stopped: Result<Infallible, _> = reboot(match mode {
        ShutdownMode::PowerOff => RebootMode::RB_POWER_OFF,
        ShutdownMode::Reboot => RebootMode::RB_AUTOBOOT,
    });
    match stopped {
        Err(error) => Err(error.into()),
        Ok(never) => match never {},
    }
}

fn all_gone_within(grace: Duration) -> bool {
    let deadline = Instant::now() + grace;
    while Instant::now() < deadline {
        if children::reap() {
            return true;
        }
        std::thread::sleep(POLL);
    }
    children::reap()
}

/// Last mounted first; what is busy is at least made read-only, so that it is clean.
fn unmount_all(mounts: &str) {
    for target in persistent(mounts).iter().rev() {
        if umount2(target.as_str(), MntFlags::empty()).is_ok() {
            continue;
        }
        let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        if let Err(error) = mount(None::<&str>, target.as_str(), None::<&str>, read_only, None::<&str>) {
            say(&format!("{target} could not be unmounted: {error}"));
        }
    }
}

/// Targets of the filesystems that outlive the machine, in the order of /proc/self/mounts.
fn persistent(mounts: &str) -> Vec<String> {
    let target = |line: &str| {
        let mut words = line.split_whitespace();
        let (target, kind) = (words.nth(1)?, words.next()?);
        (!VOLATILE.contains(&kind)).then(|| unescape(target))
    };
    mounts.lines().filter_map(target).collect()
}

/// Space, tab, newline and backslash stand as octal numbers in proc's list of mounts.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lasts_is_unmounted() {
        let mounts = "rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n/dev/vda /mnt ext4 rw 0 0\n/dev/vdb /mnt/my\\040disk ext4 rw 0 0\nodd\n";
        assert_eq!(persistent(mounts), ["/mnt", "/mnt/my disk"]);
    }
}
