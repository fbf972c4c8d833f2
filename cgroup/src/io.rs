//! The io controller: `io.max` and `io.weight`, and the sums of `io.stat`.
//!
//! `io.max` counts what reaches a block device, so it is a wall behind the exact limiter of the device model and never exact itself: what
//! the page cache answers is not counted, what a file system adds is. A file system without a block device of its own (tmpfs, overlayfs,
//! btrfs, ZFS) has no wall. `io.weight` is there only where the kernel has a scheduler for it (iocost or BFQ).
//!
//! Kernel: cgroup-v2.rst "IO Interface Files". A line that has other keys, or only a device number, is no error.

use std::fmt;
use std::path::Path;

use crate::error::Error;
use crate::file;
use crate::units::{Bytes, Patch};

/// A block device by its numbers; of a partition, the whole disk is meant: the kernel has no limits of partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A change of one device's wall, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoPatch {
    /// Bytes read, at least 1.
    pub read: Patch<Bytes>,
    /// Bytes written, at least 1.
    pub written: Patch<Bytes>,
    /// Reads, 1 to 2^32-1.
    pub reads: Patch<u64>,
    /// Writes, 1 to 2^32-1.
    pub writes: Patch<u64>,
}

/// One device's wall as the kernel has it, per second; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoLimits {
    /// Bytes read.
    pub read: Option<Bytes>,
    /// Bytes written.
    pub written: Option<Bytes>,
    /// Reads.
    pub reads: Option<u64>,
    /// Writes.
    pub writes: Option<u64>,
}

impl IoLimits {
    fn fields(self) -> [(&'static str, Option<u64>, u64); 4] {
        let bytes = |bytes: Option<Bytes>| bytes.map(|bytes| bytes.0);
        let operations = u64::from(u32::MAX);
        [
            ("rbps", bytes(self.read), u64::MAX),
            ("wbps", bytes(self.written), u64::MAX),
            ("riops", self.reads, operations),
            ("wiops", self.writes, operations),
        ]
    }

    fn parse(line: &str) -> Option<Self> {
        let mut limits = Self::default();
        for (key, value) in line.split_whitespace().skip(1).filter_map(|word| word.split_once('=')) {
            let value = file::parse_max(value)?;
            match key {
                "rbps" => limits.read = value.map(Bytes),
                "wbps" => limits.written = value.map(Bytes),
                "riops" => limits.reads = value,
                "wiops" => limits.writes = value,
                _ => {}
            }
        }
        Some(limits)
    }
}

/// Applies a patch of one device's wall and reads it back; what is in force already is not written, because each write forgets what has
/// been used of the present slice.
pub(crate) fn set(group: &Path, device: Device, patch: &IoPatch) -> Result<IoLimits, Error> {
    let old = read(group, device)?;
    let new = IoLimits {
        read: patch.read.wanted().unwrap_or(old.read),
        written: patch.written.wanted().unwrap_or(old.written),
        reads: patch.reads.wanted().unwrap_or(old.reads),
        writes: patch.writes.wanted().unwrap_or(old.writes),
    };
    if new == old {
        return Ok(old);
    }
    let mut line = device.to_string();
    for (field, value, most) in new.fields() {
        match value {
            None => line.push_str(&format!(" {field}=max")),
            Some(value) if (1..=most).contains(&value) => line.push_str(&format!(" {field}={value}")),
            Some(asked) => {
                let range =
                    if most == u64::MAX { "1 to 2^64-1 a second" } else { "1 to 4294967295 a second" };
                return Err(Error::OutOfRange { field, asked, range });
            }
        }
    }
    let path = group.join("io.max");
    file::write(&path, &line)?;
    let shows = read(group, device)?;
    if shows == new {
        Ok(shows)
    } else {
        Err(Error::ReadBack { file: path, wrote: line, shows: format!("{shows:?}") })
    }
}

/// The wall of one device; unlimited where the kernel has no line for it.
pub(crate) fn read(group: &Path, device: Device) -> Result<IoLimits, Error> {
    let path = group.join("io.max");
    let Some(content) = file::read_if_there(&path)? else {
        let check = "the io controller in cgroup.subtree_control of the parent, and a kernel with CONFIG_BLK_DEV_THROTTLING";
        return Err(Error::Lacks { file: path, check });
    };
    let name = device.to_string();
    let line = content.lines().find(|line| line.split_whitespace().next() == Some(name.as_str()));
    line.map_or(Some(IoLimits::default()), IoLimits::parse)
        .ok_or_else(|| file::unexpected(&path, &content, "numbers or `max` after each ="))
}

/// Sets the weight of one group, 1 to 10000, for all devices without one of their own; returns what the kernel shows.
pub(crate) fn set_weight(group: &Path, weight: u32) -> Result<u32, Error> {
    let path = group.join("io.weight");
    if !(1..=10_000).contains(&weight) {
        return Err(Error::OutOfRange { field: "io.weight", asked: weight.into(), range: "1 to 10000" });
    }
    if read_weight(group)? != Some(weight) {
        let check = "an I/O scheduler with weights: iocost (io.cost.qos of the root cgroup) or BFQ";
        if !path.exists() {
            return Err(Error::Lacks { file: path, check });
        }
        file::write(&path, &format!("default {weight}"))?;
    }
    match read_weight(group)? {
        Some(shows) if shows == weight => Ok(shows),
        shows => Err(Error::ReadBack { file: path, wrote: weight.to_string(), shows: format!("{shows:?}") }),
    }
}

/// The weight of one group, `None` where the kernel has none.
pub(crate) fn read_weight(group: &Path) -> Result<Option<u32>, Error> {
    let path = group.join("io.weight");
    let Some(content) = file::read_if_there(&path)? else { return Ok(None) };
    let weight = content
        .lines()
        .find_map(|line| line.strip_prefix("default "))
        .and_then(|text| text.trim().parse().ok());
    weight.map(Some).ok_or_else(|| file::unexpected(&path, &content, "a line `default WEIGHT`"))
}

/// What a machine did to all block devices together since its group was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoUsage {
    /// Bytes read.
    pub read: Bytes,
    /// Bytes written.
    pub written: Bytes,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Reads one group; zero where the io controller is not enabled.
pub(crate) fn read_usage(group: &Path) -> Result<IoUsage, Error> {
    Ok(file::read_if_there(&group.join("io.stat"))?.map_or_else(IoUsage::default, |content| parse(&content)))
}

fn parse(content: &str) -> IoUsage {
    let mut sum = IoUsage::default();
    for (key, value) in
        content.lines().flat_map(str::split_whitespace).filter_map(|word| word.split_once('='))
    {
        let value = value.parse().unwrap_or(0);
        match key {
            "rbytes" => sum.read.0 = sum.read.0.saturating_add(value),
            "wbytes" => sum.written.0 = sum.written.0.saturating_add(value),
            "rios" => sum.reads = sum.reads.saturating_add(value),
            "wios" => sum.writes = sum.writes.saturating_add(value),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, content};

    const DISK: Device = Device { major: 259, minor: 0 };

    #[test]
    fn a_wall_is_set_kept_and_taken_away() {
        let fixture = Fixture::new();
        let group = fixture.machine();
        let patch =
            IoPatch { read: Patch::Set(Bytes(1 << 20)), writes: Patch::Set(50), ..IoPatch::default() };
        let got = set(&group, DISK, &patch).expect("set");
        assert_eq!(got, IoLimits { read: Some(Bytes(1 << 20)), writes: Some(50), ..IoLimits::default() });
        assert_eq!(content(&group.join("io.max")), "259:0 rbps=1048576 wbps=max riops=max wiops=50");
        let more = IoPatch { reads: Patch::Set(7), writes: Patch::Unlimited, ..IoPatch::default() };
        let got = set(&group, DISK, &more).expect("changed");
        assert_eq!((got.read, got.reads, got.writes), (Some(Bytes(1 << 20)), Some(7), None));
        assert_eq!(read(&group, Device { minor: 16, ..DISK }).expect("another"), IoLimits::default());
    }

    #[test]
    fn a_wall_that_lets_nothing_through_is_refused() {
        let fixture = Fixture::new();
        for patch in [
            IoPatch { reads: Patch::Set(0), ..IoPatch::default() },
            IoPatch { writes: Patch::Set(1 << 32), ..IoPatch::default() },
            IoPatch { written: Patch::Set(Bytes(0)), ..IoPatch::default() },
        ] {
            let error = set(&fixture.machine(), DISK, &patch).expect_err("nonsense");
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
        }
        assert_eq!(content(&fixture.machine().join("io.max")), "");
        std::fs::write(fixture.machine().join("io.max"), "259:0 rbps=x").expect("written");
        assert!(matches!(read(&fixture.machine(), DISK), Err(Error::Content { .. })));
    }

    #[test]
    fn a_weight_is_the_default_line() {
        let fixture = Fixture::new();
        let path = fixture.machine().join("io.weight");
        assert_eq!(set_weight(&fixture.machine(), 100).expect("as it is"), 100);
        assert!(matches!(set_weight(&fixture.machine(), 0), Err(Error::OutOfRange { .. })));
        std::fs::write(&path, "default 200\n8:16 300\n").expect("written");
        assert_eq!(read_weight(&fixture.machine()).expect("read"), Some(200));
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(read_weight(&fixture.machine()).expect("none"), None);
        let error = set_weight(&fixture.machine(), 100).expect_err("no such file");
        assert!(error.to_string().contains("iocost"), "{error}");
    }

    #[test]
    fn devices_are_summed_and_odd_lines_survive() {
        let got = parse(
            "259:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n8:1048575 rbytes=1 wbytes=2 rios=3 wios=4 cost.usage=9\n7:0 \n",
        );
        assert_eq!(got, IoUsage { read: Bytes(4097), written: Bytes(8194), reads: 4, writes: 6 });
    }
}
