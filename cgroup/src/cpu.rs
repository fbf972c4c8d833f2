//! The cpu controller: `cpu.max`, `cpu.max.burst`, `cpu.weight`, `cpu.stat`.
//!
//! A share becomes a quota in a period. The period is short, because a busy guest with n vCPUs and a share of q CPUs
//! stands still for `period × (1 − q/n)`; and long enough for the kernel's smallest quota of 1 ms:
//!
//! | share | period | quota |
//! |---|---|---|
//! | 0.01–0.1 CPU | 100 ms down to 10 ms, the shortest in whole milliseconds with a quota of 1 ms | ≥ 1 ms |
//! | 0.1–1 CPU | 10 ms | 1–10 ms |
//! | above | 20 ms | > 20 ms |
//!
//! All periods are whole milliseconds, so a thousandth of a CPU is always a whole number of microseconds: the limit
//! is exact. The wall of the whole machine, and what its vCPUs and its monitor are held to below it, are converted alike.
//! **Every write to `cpu.max` refills the quota** (`Documentation/scheduler/sched-bwc.rst`), so an unchanged
//! value is not written; how often a changed one may be is the caller's policy.
//!
//! Kernel: cgroup-v2.rst "CPU"; `cpu.max.burst` since 5.14, at most the quota.

use std::path::Path;
use std::time::Duration;

use cgroups_rs::fs::cpu::CpuController;

use crate::error::Error;
use crate::file;
use crate::hierarchy;
use crate::units::{MilliCpu, Patch};

/// The least share: 1 ms in 100 ms.
pub const CPU_MIN: MilliCpu = MilliCpu(10);
/// The largest share that is converted; no host has a million CPUs.
pub const CPU_MAX: MilliCpu = MilliCpu(1_000_000_000);
/// `cpu.weight` where nobody wrote one.
pub const WEIGHT_DEFAULT: u32 = 100;

const QUOTA_MIN_USEC: u64 = 1_000;
const PERIOD_USEC: u64 = 10_000;
const PERIOD_ABOVE_ONE_CPU_USEC: u64 = 20_000;
const PERIOD_DEFAULT_USEC: u64 = 100_000;

/// A change of a machine's CPU. What is `None` or [`Patch::Keep`] stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuPatch {
    /// What all threads of the machine together may use: the wall.
    pub max: Patch<MilliCpu>,
    /// `cpu.max.burst` of the wall in percent of its quota, 0 to 100: unused time that may be caught up on later.
    /// A kept percentage follows a changed quota.
    pub burst_percent: Option<u8>,
    /// What is held below the wall.
    pub division: CpuDivision,
    /// `cpu.weight` of the vCPU threads against the monitor's other threads, 1 to 10000.
    pub vcpu_weight: Option<u32>,
    /// `cpu.weight` of the monitor's other threads, 1 to 10000.
    pub vmm_weight: Option<u32>,
}

/// How what the wall lets through is divided. No part can be more than the wall, whatever stands here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuDivision {
    /// What the vCPU threads together may use; a limit comes with a burst of a whole quota, because only the wall is there to be exact.
    pub vcpu: Patch<MilliCpu>,
    /// What the monitor's other threads together may use, likewise.
    pub vmm: Patch<MilliCpu>,
}

/// What the kernel enforces now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuLimits {
    /// All threads of the machine together: the wall. Its weight has no sibling to act against.
    pub machine: CpuGroup,
    /// The vCPU threads.
    pub vcpu: CpuGroup,
    /// All other threads of the monitor.
    pub vmm: CpuGroup,
}

/// One group's limits, as read from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuGroup {
    /// The share, rounded to the nearest thousandth; `None` is unlimited.
    pub max: Option<MilliCpu>,
    /// CPU time in each period, microseconds; `None` is unlimited.
    pub quota_usec: Option<u64>,
    /// Period in microseconds.
    pub period_usec: u64,
    /// `cpu.weight`, 1 to 10000.
    pub weight: u32,
    /// `cpu.max.burst` in microseconds; 0 also where the kernel has none.
    pub burst_usec: u64,
}

/// What one group has used since it was made (`cpu.stat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuUsage {
    /// CPU time in microseconds.
    pub usage_usec: u64,
    /// Time during which the group stood still because of its quota, summed over CPUs, microseconds.
    pub throttled_usec: u64,
    /// Periods in which the group was stopped.
    pub nr_throttled: u64,
    /// Periods that were enforced.
    pub nr_periods: u64,
}

/// Quota and period of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bandwidth {
    quota_usec: Option<u64>,
    period_usec: u64,
}

impl Bandwidth {
    /// # Errors
    /// [`Error::CpuTooSmall`], [`Error::OutOfRange`].
    fn of_share(share: MilliCpu) -> Result<Bandwidth, Error> {
        if share < CPU_MIN {
            return Err(Error::CpuTooSmall { asked: share, smallest: CPU_MIN });
        }
        if share > CPU_MAX {
            return Err(Error::OutOfRange {
                field: "CPU in thousandths",
                asked: share.0,
                range: "10 to 1000000000",
            });
        }
        let period_usec = match share.0 {
            0..100 => (QUOTA_MIN_USEC * 1000).div_ceil(share.0).next_multiple_of(1000),
            100..=1000 => PERIOD_USEC,
            _ => PERIOD_ABOVE_ONE_CPU_USEC,
        };
        Ok(Bandwidth { quota_usec: Some(share.0 * period_usec / 1000), period_usec })
    }

    fn unlimited() -> Bandwidth {
        Bandwidth { quota_usec: None, period_usec: PERIOD_DEFAULT_USEC }
    }

    fn read(group: &Path) -> Result<Bandwidth, Error> {
        let path = group.join("cpu.max");
        let content = file::read(&path)?;
        let expected = || file::unexpected(&path, &content, "`QUOTA PERIOD` or `max PERIOD`");
        let (quota, period) = content.trim().split_once(' ').ok_or_else(expected)?;
        let quota_usec = file::parse_max(quota).ok_or_else(expected)?;
        let period_usec = period.parse().ok().filter(|p| *p > 0).ok_or_else(expected)?;
        Ok(Bandwidth { quota_usec, period_usec })
    }

    fn share(self) -> Option<MilliCpu> {
        let quota = u128::from(self.quota_usec?) * 1000;
        let period = u128::from(self.period_usec);
        Some(MilliCpu(u64::try_from((quota + period / 2) / period).unwrap_or(u64::MAX)))
    }
}

/// A change of one group, all fields in the kernel's order.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupPatch {
    pub(crate) max: Patch<MilliCpu>,
    pub(crate) weight: Option<u32>,
    pub(crate) burst_percent: Option<u8>,
}

impl GroupPatch {
    /// Refuses what the kernel would refuse, before anything is written.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if let Patch::Set(share) = self.max {
            Bandwidth::of_share(share)?;
        }
        if let Some(weight) = self.weight.filter(|w| !(1..=10_000).contains(w)) {
            return Err(Error::OutOfRange { field: "cpu.weight", asked: weight.into(), range: "1 to 10000" });
        }
        if let Some(percent) = self.burst_percent.filter(|p| *p > 100) {
            return Err(Error::OutOfRange {
                field: "burst in percent of the quota",
                asked: percent.into(),
                range: "0 to 100",
            });
        }
        Ok(())
    }
}

impl CpuPatch {
    /// The patches of the wall, of the vCPU threads and of the monitor's others.
    pub(crate) fn groups(&self) -> [GroupPatch; 3] {
        let wall = GroupPatch { max: self.max, weight: None, burst_percent: self.burst_percent };
        let [vcpu, vmm] = self.division.groups();
        [wall, GroupPatch { weight: self.vcpu_weight, ..vcpu }, GroupPatch { weight: self.vmm_weight, ..vmm }]
    }
}

impl CpuDivision {
    /// The patches of the vCPU threads and of the monitor's others.
    pub(crate) fn groups(&self) -> [GroupPatch; 2] {
        let burst_percent = |max| matches!(max, Patch::Set(_)).then_some(100);
        [self.vcpu, self.vmm].map(|max| GroupPatch { max, weight: None, burst_percent: burst_percent(max) })
    }
}

/// Applies a checked patch to the group `root`/`name` and reads everything back.
pub(crate) fn set_group(root: &Path, name: &'static str, patch: &GroupPatch) -> Result<CpuGroup, Error> {
    let group = root.join(name);
    if let Some(weight) = patch.weight {
        write_changed(&group.join("cpu.weight"), u64::from(weight))?;
    }
    set_max(root, name, patch)?;
    read_group(&group)
}

/// Applies the limit of one part of a machine, with its burst where this kernel has such a thing.
pub(crate) fn set_part(
    root: &Path,
    name: &'static str,
    patch: &GroupPatch,
) -> Result<Option<MilliCpu>, Error> {
    let burst = root.join(name).join("cpu.max.burst").exists();
    set_max(root, name, &GroupPatch { burst_percent: patch.burst_percent.filter(|_| burst), ..*patch })
}

/// Applies the limit of a checked patch, and its burst; a limit that is in force already is not written. Returns what is in force.
pub(crate) fn set_max(
    root: &Path,
    name: &'static str,
    patch: &GroupPatch,
) -> Result<Option<MilliCpu>, Error> {
    let group = root.join(name);
    let old = Bandwidth::read(&group)?;
    let new = match patch.max {
        Patch::Keep => old,
        Patch::Set(share) => Bandwidth::of_share(share)?,
        Patch::Unlimited if old.quota_usec.is_none() => old,
        Patch::Unlimited => Bandwidth::unlimited(),
    };
    if new == old && patch.burst_percent.is_none() {
        return Ok(new.share());
    }
    let burst_old = read_burst(&group)?.unwrap_or(0);
    let burst_new = match (patch.burst_percent, new.quota_usec, old.quota_usec) {
        (_, None, _) => 0,
        (Some(percent), Some(quota), _) => quota * u64::from(percent) / 100,
        (None, Some(quota), Some(before)) => proportion(quota, burst_old, before),
        (None, Some(quota), None) => burst_old.min(quota),
    };
    // A burst above the new quota is refused, so a smaller one goes first, and a larger one after.
    if burst_new < burst_old {
        write_burst(&group, burst_new)?;
    }
    if new != old {
        write_bandwidth(root, name, new)?;
    }
    if burst_new > burst_old {
        write_burst(&group, burst_new)?;
    }
    Ok(new.share())
}

/// `burst` stays the same part of the quota.
fn proportion(quota: u64, burst: u64, quota_before: u64) -> u64 {
    let scaled = u128::from(quota) * u128::from(burst) / u128::from(quota_before.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX).min(quota)
}

fn write_bandwidth(root: &Path, name: &'static str, wanted: Bandwidth) -> Result<(), Error> {
    let group = root.join(name);
    let path = group.join("cpu.max");
    let value = match wanted.quota_usec {
        Some(quota) => format!("{quota} {}", wanted.period_usec),
        None => format!("max {}", wanted.period_usec),
    };
    let quota = match wanted.quota_usec {
        // cgroups-rs takes a negative number for `max`.
        None => -1,
        Some(quota) => i64::try_from(quota).map_err(|_| Error::OutOfRange {
            field: "quota in microseconds",
            asked: quota,
            range: "1000 to 2^63-1",
        })?,
    };
    let loaded = hierarchy::load(root, name);
    let cpu: &CpuController =
        loaded.controller_of().ok_or(Error::Lacks { file: path.clone(), check: "the cpu controller" })?;
    if !path.exists() {
        return Err(Error::Lacks {
            file: path,
            check: "the cpu controller in cgroup.subtree_control of the parent",
        });
    }
    cpu.set_cfs_quota_and_period(Some(quota), Some(wanted.period_usec))
        .map_err(|error| hierarchy::refused(&path, &value, &error))?;
    let shows = Bandwidth::read(&group)?;
    if shows != wanted {
        return Err(Error::ReadBack { file: path, wrote: value, shows: format!("{shows:?}") });
    }
    Ok(())
}

pub(crate) fn write_changed(path: &Path, value: u64) -> Result<(), Error> {
    if file::read_u64(path)? == value {
        return Ok(());
    }
    file::write(path, &value.to_string())?;
    let shows = file::read_u64(path)?;
    if shows != value {
        return Err(Error::ReadBack {
            file: path.into(),
            wrote: value.to_string(),
            shows: shows.to_string(),
        });
    }
    Ok(())
}

fn read_burst(group: &Path) -> Result<Option<u64>, Error> {
    let path = group.join("cpu.max.burst");
    match file::read_if_there(&path)? {
        None => Ok(None),
        Some(content) => {
            content.trim().parse().map(Some).map_err(|_| file::unexpected(&path, &content, "microseconds"))
        }
    }
}

fn write_burst(group: &Path, usec: u64) -> Result<(), Error> {
    let path = group.join("cpu.max.burst");
    if !path.exists() {
        return Err(Error::Lacks { file: path, check: "Linux 5.14 or newer" });
    }
    write_changed(&path, usec)
}

/// Reads one group's limits.
pub(crate) fn read_group(group: &Path) -> Result<CpuGroup, Error> {
    let bandwidth = Bandwidth::read(group)?;
    let path = group.join("cpu.weight");
    let weight = file::read_u64(&path)?;
    Ok(CpuGroup {
        max: bandwidth.share(),
        quota_usec: bandwidth.quota_usec,
        period_usec: bandwidth.period_usec,
        weight: u32::try_from(weight)
            .map_err(|_| file::unexpected(&path, &weight.to_string(), "1 to 10000"))?,
        burst_usec: read_burst(group)?.unwrap_or(0),
    })
}

/// Reads the period in which one group's quota is enforced.
pub(crate) fn read_period(group: &Path) -> Result<Duration, Error> {
    Bandwidth::read(group).map(|bandwidth| Duration::from_micros(bandwidth.period_usec))
}

/// Reads one group's `cpu.stat`.
pub(crate) fn read_usage(group: &Path) -> Result<CpuUsage, Error> {
    let content = file::read(&group.join("cpu.stat"))?;
    Ok(CpuUsage {
        usage_usec: file::keyed(&content, "usage_usec"),
        throttled_usec: file::keyed(&content, "throttled_usec"),
        nr_throttled: file::keyed(&content, "nr_throttled"),
        nr_periods: file::keyed(&content, "nr_periods"),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Fixture, content};

    fn max(share: u64) -> GroupPatch {
        GroupPatch { max: Patch::Set(MilliCpu(share)), ..GroupPatch::default() }
    }

    #[test]
    fn periods_follow_the_table() {
        for (share, quota, period) in [
            (10, 1_000, 100_000),
            (50, 1_000, 20_000),
            (70, 1_050, 15_000),
            (99, 1_089, 11_000),
            (100, 1_000, 10_000),
            (370, 3_700, 10_000),
            (1000, 10_000, 10_000),
            (1001, 20_020, 20_000),
            (64_000, 1_280_000, 20_000),
        ] {
            let got = Bandwidth::of_share(MilliCpu(share)).expect("in range");
            assert_eq!((got.quota_usec, got.period_usec), (Some(quota), period), "{share} milliCPU");
        }
        assert!(matches!(Bandwidth::of_share(MilliCpu(9)), Err(Error::CpuTooSmall { .. })));
        assert!(matches!(Bandwidth::of_share(MilliCpu(u64::MAX)), Err(Error::OutOfRange { .. })));
    }

    proptest! {
        #[test]
        fn every_share_is_exact_and_legal(share in CPU_MIN.0..=2_000_000) {
            let got = Bandwidth::of_share(MilliCpu(share)).expect("in range");
            let quota = got.quota_usec.expect("limited");
            prop_assert!(quota >= QUOTA_MIN_USEC);
            prop_assert!((1_000..=100_000).contains(&got.period_usec));
            prop_assert_eq!(quota * 1000, share * got.period_usec);
            prop_assert_eq!(got.share(), Some(MilliCpu(share)));
        }
    }

    #[test]
    fn limits_are_written_and_read_back() {
        let fixture = Fixture::new();
        let got = set_group(
            &fixture.unit(),
            "machine/vcpu",
            &GroupPatch { weight: Some(300), burst_percent: Some(50), ..max(250) },
        )
        .expect("written");
        assert_eq!(content(&fixture.vcpu().join("cpu.max")), "2500 10000");
        assert_eq!(
            got,
            CpuGroup {
                max: Some(MilliCpu(250)),
                quota_usec: Some(2500),
                period_usec: 10_000,
                weight: 300,
                burst_usec: 1250
            }
        );
        let kept = set_group(&fixture.unit(), "machine/vcpu", &GroupPatch::default()).expect("kept");
        assert_eq!(kept, got);
    }

    #[test]
    fn a_kept_burst_follows_the_quota_and_leaves_with_it() {
        let fixture = Fixture::new();
        let unit = fixture.unit();
        set_group(&unit, "machine/vcpu", &GroupPatch { burst_percent: Some(100), ..max(1000) })
            .expect("written");
        assert_eq!(set_group(&unit, "machine/vcpu", &max(500)).expect("shrunk").burst_usec, 5_000);
        let free = GroupPatch { max: Patch::Unlimited, ..GroupPatch::default() };
        let got = set_group(&unit, "machine/vcpu", &free).expect("unlimited");
        assert_eq!((got.max, got.burst_usec), (None, 0));
        assert_eq!(content(&fixture.vcpu().join("cpu.max")), "max 100000");
    }

    #[test]
    fn an_unchanged_limit_is_not_written_again() {
        let fixture = Fixture::new();
        let unit = fixture.unit();
        set_group(&unit, "machine/vcpu", &max(250)).expect("written");
        let path = fixture.vcpu().join("cpu.max");
        let before = std::fs::metadata(&path).and_then(|m| m.modified()).expect("a time");
        std::fs::File::open(&path)
            .and_then(|f| {
                f.set_times(std::fs::FileTimes::new().set_modified(before - Duration::from_secs(9)))
            })
            .expect("set back");
        set_group(&unit, "machine/vcpu", &max(250)).expect("unchanged");
        let after = std::fs::metadata(&path).and_then(|m| m.modified()).expect("a time");
        assert_eq!(after, before - Duration::from_secs(9));
    }

    #[test]
    fn an_old_kernel_without_burst_is_named() {
        let fixture = Fixture::new();
        std::fs::remove_file(fixture.vcpu().join("cpu.max.burst")).expect("removed");
        set_group(&fixture.unit(), "machine/vcpu", &max(250)).expect("no burst asked");
        let error =
            set_group(&fixture.unit(), "machine/vcpu", &GroupPatch { burst_percent: Some(10), ..max(250) })
                .expect_err("burst asked");
        assert!(error.to_string().contains("cpu.max.burst") && error.to_string().contains("5.14"), "{error}");
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_written() {
        for patch in [
            max(0),
            GroupPatch { weight: Some(0), ..GroupPatch::default() },
            GroupPatch { weight: Some(10_001), ..GroupPatch::default() },
            GroupPatch { burst_percent: Some(101), ..GroupPatch::default() },
        ] {
            assert!(patch.check().is_err(), "{patch:?}");
        }
    }

    #[test]
    fn a_garbled_cpu_max_is_quoted() {
        let fixture = Fixture::new();
        for garbage in ["", "max", "1000", "1000 0", "x y", "1000 10000 3"] {
            std::fs::write(fixture.vcpu().join("cpu.max"), garbage).expect("written");
            assert!(matches!(read_group(&fixture.vcpu()), Err(Error::Content { .. })), "{garbage:?}");
        }
    }
}
