//! Pressure stall information of one group: `cpu.pressure`, `memory.pressure`, `io.pressure`, and triggers on them.
//!
//! A trigger is a pressure file that was opened for writing and told a threshold: it becomes readable out of band (POLLPRI) when the
//! group stalled for longer than that within the window, at most once a window, and lives as long as the descriptor. Without
//! CAP_SYS_RESOURCE the kernel takes windows of whole 2 s only, and none before Linux 6.5: then `watch` answers `None`, and the caller
//! polls the totals.
//!
//! Kernel: `Documentation/accounting/psi.rst`. Files are missing, or answer EOPNOTSUPP, where the kernel was started
//! with PSI off (Debian: `psi=1` on the command line turns it on).

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::file;

/// Stalls of one resource since the group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// Time in which at least one thread waited, microseconds.
    pub some_usec: u64,
    /// Time in which all threads waited, microseconds.
    pub full_usec: u64,
}

/// Stalls of a machine; `None` where the kernel does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PressureUsage {
    /// Waiting for a CPU, its own quota included.
    pub cpu: Option<Pressure>,
    /// Waiting for memory.
    pub memory: Option<Pressure>,
    /// Waiting for a block device.
    pub io: Option<Pressure>,
}

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    /// A CPU, the group's own quota included.
    Cpu,
    /// Memory.
    Memory,
    /// A block device.
    Io,
}

impl Resource {
    fn file_name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu.pressure",
            Self::Memory => "memory.pressure",
            Self::Io => "io.pressure",
        }
    }
}

/// How much waiting is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stall {
    /// All threads waited at once, instead of at least one.
    pub full: bool,
    /// Time waited, more than 0 and at most the window.
    pub threshold: Duration,
    /// Within this time, 500 ms to 10 s.
    pub window: Duration,
}

/// Ready for POLLPRI whenever the threshold has been passed; POLLERR when the group is gone.
#[derive(Debug)]
pub struct Trigger {
    file: File,
}

impl AsFd for Trigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// `WINDOW_MIN_US` and `WINDOW_MAX_US` of kernel/sched/psi.c.
const WINDOWS: std::ops::RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(10);
/// What a user without CAP_SYS_RESOURCE may ask for is a multiple of this.
const COARSE: Duration = Duration::from_secs(2);

/// Sets a trigger on one group; `None` where this kernel or this user cannot have one.
pub(crate) fn watch(group: &Path, resource: Resource, stall: Stall) -> Result<Option<Trigger>, Error> {
    let usec = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let range = "more than 0, at most the window of 500 ms to 10 s";
    if stall.threshold.is_zero() || stall.threshold > stall.window || !WINDOWS.contains(&stall.window) {
        return Err(Error::OutOfRange {
            field: "threshold in microseconds",
            asked: usec(stall.threshold),
            range,
        });
    }
    let path = group.join(resource.file_name());
    let kind = if stall.full { "full" } else { "some" };
    let mut value = format!("{kind} {} {}", usec(stall.threshold), usec(stall.window));
    let open = || OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(&path);
    let set = |value: &str| open().and_then(|mut file| file.write_all(value.as_bytes()).map(|()| file));
    let mut done = set(&value);
    // EINVAL is what a user without privilege gets for a window that is not coarse.
    if done.as_ref().is_err_and(|cause| cause.kind() == ErrorKind::InvalidInput) {
        let windows = stall.window.as_millis().div_ceil(COARSE.as_millis());
        let window = COARSE.saturating_mul(u32::try_from(windows).unwrap_or(u32::MAX));
        let threshold = stall.threshold.mul_f64(window.as_secs_f64() / stall.window.as_secs_f64());
        value = format!("{kind} {} {}", usec(threshold), usec(window));
        done = set(&value);
    }
    match done {
        Ok(file) => Ok(Some(Trigger { file })),
        Err(cause) if cannot(&cause) => Ok(None),
        Err(source) => Err(file::write_error(&path, &value, source)),
    }
}

/// No such file, PSI off, not for this user.
fn cannot(cause: &std::io::Error) -> bool {
    matches!(cause.kind(), ErrorKind::NotFound | ErrorKind::Unsupported | ErrorKind::PermissionDenied)
}

/// `O_NONBLOCK` of asm-generic/fcntl.h, x86_64 and arm64.
const O_NONBLOCK: i32 = 0o4000;

/// Reads all three of one group.
pub(crate) fn read_usage(group: &Path) -> Result<PressureUsage, Error> {
    let read = |name| file::read_if_there(&group.join(name)).map(|content| content.map(|text| parse(&text)));
    Ok(PressureUsage {
        cpu: read("cpu.pressure")?,
        memory: read("memory.pressure")?,
        io: read("io.pressure")?,
    })
}

fn parse(content: &str) -> Pressure {
    let total = |kind: &str| {
        content
            .lines()
            .filter(|line| line.split(' ').next() == Some(kind))
            .find_map(|line| line.split(' ').find_map(|word| word.strip_prefix("total=")))
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    Pressure { some_usec: total("some"), full_usec: total("full") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, content};

    #[test]
    fn a_trigger_is_written_as_the_kernel_wants_it() {
        let fixture = Fixture::new();
        let stall =
            Stall { full: false, threshold: Duration::from_millis(150), window: Duration::from_secs(1) };
        let group = fixture.machine();
        assert!(watch(&group, Resource::Memory, stall).expect("no PSI here").is_none());
        std::fs::write(group.join("memory.pressure"), "").expect("written");
        assert!(watch(&group, Resource::Memory, stall).expect("set").is_some());
        assert_eq!(content(&group.join("memory.pressure")), "some 150000 1000000");
        for (threshold, window) in [(0, 1000), (2000, 1000), (100, 400), (100, 11_000)] {
            let (threshold, window) = (Duration::from_millis(threshold), Duration::from_millis(window));
            let error =
                watch(&group, Resource::Io, Stall { full: true, threshold, window }).expect_err("nonsense");
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
        }
    }

    #[test]
    fn totals_are_read() {
        let got = parse(
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=45\n",
        );
        assert_eq!(got, Pressure { some_usec: 123, full_usec: 45 });
        assert_eq!(parse("garbage"), Pressure::default());
    }
}
