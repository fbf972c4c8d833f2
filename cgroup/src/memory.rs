//! The memory controller: `memory.{min,low,high,max}`, `memory.current`, `memory.stat`, `memory.events`.
//!
//! Values are bytes and are kept by the kernel in whole pages, rounded down; what is read back is returned. Lowering
//! `memory.max` below what is charged makes the kernel reclaim and then kill: whether and when to do so is the caller's
//! decision, this file only writes. Grow order and shrink order matter to a caller who lowers several at once: `high` is
//! written before `max` when falling, after it when rising.
//!
//! Kernel: cgroup-v2.rst "Memory Interface Files".

use std::path::Path;

use cgroups_rs::fs::MaxValue;
use cgroups_rs::fs::memory::{MemController, SetMemory};

use crate::error::Error;
use crate::file;
use crate::hierarchy;
use crate::units::{Bytes, Patch};

/// The largest page size of x86_64 and arm64 kernels by which the kernel may round a value down.
const ROUNDING_MAX_BYTES: u64 = 64 * 1024;

/// A change of a machine's memory limits. For `low` and `min`, `Set(Bytes(0))` is no protection and `Unlimited` is
/// protection of everything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryPatch {
    /// The wall: above it the kernel reclaims, then kills.
    pub max: Patch<Bytes>,
    /// The brake: above it the kernel reclaims and slows down.
    pub high: Patch<Bytes>,
    /// Protected as long as others have something to give.
    pub low: Patch<Bytes>,
    /// Protected always.
    pub min: Patch<Bytes>,
}

/// What the kernel enforces now; `None` is `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLimits {
    /// `memory.max`.
    pub max: Option<Bytes>,
    /// `memory.high`.
    pub high: Option<Bytes>,
    /// `memory.low`.
    pub low: Option<Bytes>,
    /// `memory.min`.
    pub min: Option<Bytes>,
}

/// What a machine's memory consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUsage {
    /// Everything charged (`memory.current`).
    pub current: Bytes,
    /// Anonymous memory, a private guest memory among it.
    pub anon: Bytes,
    /// Page cache, shmem among it.
    pub file: Bytes,
    /// Page cache of files that was not used for long; shared memory is never in here.
    pub inactive_file: Bytes,
    /// Shared memory, a memfd guest memory among it.
    pub shmem: Bytes,
    /// Kernel memory: page tables, sockets, KVM's own; 0 before Linux 5.18.
    pub kernel: Bytes,
    /// Swapped out; 0 where swap accounting is off.
    pub swap_current: Bytes,
    /// How often limits were met since the group was made.
    pub events: MemoryEvents,
}

/// `memory.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEvents {
    /// Reclaimed though below `memory.low`.
    pub low: u64,
    /// Slowed down at `memory.high`.
    pub high: u64,
    /// Met `memory.max`.
    pub max: u64,
    /// Allocation was about to fail at `memory.max`.
    pub oom: u64,
    /// Processes killed.
    pub oom_kill: u64,
}

/// Applies a patch to `root`/`name` and reads everything back.
pub(crate) fn set(root: &Path, name: &'static str, patch: &MemoryPatch) -> Result<MemoryLimits, Error> {
    let group = root.join(name);
    let before = read_limits(&group)?;
    let falling = match patch.max.wanted() {
        Some(Some(max)) => before.max.is_none_or(|old| max < old),
        _ => false,
    };
    let ceiling = if falling {
        [("memory.high", patch.high), ("memory.max", patch.max)]
    } else {
        [("memory.max", patch.max), ("memory.high", patch.high)]
    };
    for (name_of_file, wanted) in
        ceiling.into_iter().chain([("memory.low", patch.low), ("memory.min", patch.min)])
    {
        if let Some(value) = wanted.wanted() {
            write(root, name, name_of_file, value)?;
        }
    }
    read_limits(&group)
}

fn write(
    root: &Path,
    name: &'static str,
    name_of_file: &'static str,
    value: Option<Bytes>,
) -> Result<(), Error> {
    let path = root.join(name).join(name_of_file);
    let max_value = match value {
        None => MaxValue::Max,
        Some(Bytes(bytes)) => MaxValue::Value(i64::try_from(bytes).map_err(|_| Error::OutOfRange {
            field: name_of_file,
            asked: bytes,
            range: "0 to 2^63-1 bytes",
        })?),
    };
    if file::read_max(&path)? == value.map(|b| b.0) {
        return Ok(());
    }
    let text = max_value.to_string();
    let mut fields = SetMemory { low: None, high: None, min: None, max: None };
    match name_of_file {
        "memory.max" => fields.max = Some(max_value),
        "memory.high" => fields.high = Some(max_value),
        "memory.low" => fields.low = Some(max_value),
        _ => fields.min = Some(max_value),
    }
    let loaded = hierarchy::load(root, name);
    let memory: &MemController =
        loaded.controller_of().ok_or(Error::Lacks { file: path.clone(), check: "the memory controller" })?;
    memory.set_mem(fields).map_err(|error| hierarchy::refused(&path, &text, &error))?;
    let shows = file::read_max(&path)?;
    let good = match (value, shows) {
        (None, None) => true,
        (Some(wrote), Some(shows)) => shows <= wrote.0 && wrote.0 - shows < ROUNDING_MAX_BYTES,
        // The kernel's counter ends below 2^63 bytes and shows its end as `max`.
        (Some(wrote), None) => wrote.0 > i64::MAX as u64 - ROUNDING_MAX_BYTES,
        (None, Some(_)) => false,
    };
    if good { Ok(()) } else { Err(Error::ReadBack { file: path, wrote: text, shows: format!("{shows:?}") }) }
}

/// Makes the kernel take `bytes` of what is charged and can be dropped or swapped; answers whether it got all of that. Linux 5.19 or newer.
/// Takes as long as the kernel needs to look for it: not for a thread that others wait for.
pub(crate) fn reclaim(group: &Path, bytes: Bytes) -> Result<bool, Error> {
    let path = group.join("memory.reclaim");
    if !path.exists() {
        return Err(Error::Lacks { file: path, check: "Linux 5.19 or newer" });
    }
    match file::write(&path, &bytes.0.to_string()) {
        Ok(()) => Ok(true),
        Err(Error::Write { source, .. }) if source.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads the limits of one group.
pub(crate) fn read_limits(group: &Path) -> Result<MemoryLimits, Error> {
    let read = |name| file::read_max(&group.join(name)).map(|value| value.map(Bytes));
    Ok(MemoryLimits {
        max: read("memory.max")?,
        high: read("memory.high")?,
        low: read("memory.low")?,
        min: read("memory.min")?,
    })
}

/// Reads what one group uses.
pub(crate) fn read_usage(group: &Path) -> Result<MemoryUsage, Error> {
    let stat = file::read(&group.join("memory.stat"))?;
    let events = file::read(&group.join("memory.events"))?;
    let swap = file::read_if_there(&group.join("memory.swap.current"))?;
    Ok(MemoryUsage {
        current: Bytes(file::read_u64(&group.join("memory.current"))?),
        anon: Bytes(file::keyed(&stat, "anon")),
        file: Bytes(file::keyed(&stat, "file")),
        inactive_file: Bytes(file::keyed(&stat, "inactive_file")),
        shmem: Bytes(file::keyed(&stat, "shmem")),
        kernel: Bytes(file::keyed(&stat, "kernel")),
        swap_current: Bytes(swap.and_then(|text| text.trim().parse().ok()).unwrap_or(0)),
        events: MemoryEvents {
            low: file::keyed(&events, "low"),
            high: file::keyed(&events, "high"),
            max: file::keyed(&events, "max"),
            oom: file::keyed(&events, "oom"),
            oom_kill: file::keyed(&events, "oom_kill"),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Fixture, content};

    #[test]
    fn a_patch_changes_only_what_it_names() {
        let fixture = Fixture::new();
        let patch = MemoryPatch {
            max: Patch::Set(Bytes(512 << 20)),
            low: Patch::Set(Bytes(1 << 20)),
            ..MemoryPatch::default()
        };
        let got = set(&fixture.unit(), "machine", &patch).expect("written");
        assert_eq!(
            got,
            MemoryLimits {
                max: Some(Bytes(512 << 20)),
                high: None,
                low: Some(Bytes(1 << 20)),
                min: Some(Bytes(0))
            }
        );
        assert_eq!(set(&fixture.unit(), "machine", &patch).expect("twice is once"), got);
        let free = MemoryPatch { max: Patch::Unlimited, ..MemoryPatch::default() };
        assert_eq!(set(&fixture.unit(), "machine", &free).expect("unlimited").max, None);
        assert_eq!(content(&fixture.machine().join("memory.max")), "max");
    }

    #[test]
    fn absurd_amounts_are_refused_with_the_range() {
        let fixture = Fixture::new();
        let patch = MemoryPatch { max: Patch::Set(Bytes(u64::MAX)), ..MemoryPatch::default() };
        let error = set(&fixture.unit(), "machine", &patch).expect_err("too much");
        assert!(error.to_string().contains("memory.max"), "{error}");
    }

    #[test]
    fn reclaim_is_asked_in_bytes_and_named_where_it_is_missing() {
        let fixture = Fixture::new();
        assert!(reclaim(&fixture.machine(), Bytes(4096)).expect("asked"));
        assert_eq!(content(&fixture.machine().join("memory.reclaim")), "4096");
        let error = reclaim(&fixture.vcpu(), Bytes(4096)).expect_err("no such file");
        assert!(error.to_string().contains("5.19"), "{error}");
    }

    #[test]
    fn usage_is_read_from_the_right_lines() {
        let fixture = Fixture::new();
        let got = read_usage(&fixture.machine()).expect("read");
        assert_eq!(got.current, Bytes(300_000_000));
        assert_eq!(
            (got.anon, got.file, got.shmem),
            (Bytes(1_000_000), Bytes(290_000_000), Bytes(280_000_000))
        );
        assert_eq!(got.inactive_file, Bytes(7_000_000));
        assert_eq!(got.events, MemoryEvents { low: 1, high: 2, max: 3, oom: 4, oom_kill: 5 });
        assert_eq!(got.swap_current, Bytes(0));
    }
}
