//! The host itself: what it has (procfs, sysfs, statvfs), what it uses, the books of what is promised, and who has which cores to itself.
//!
//! It only reads the host; limits are written by `lathe-cgroup` and `lathe-netshape`. Sources: proc(5) `/proc/stat`,
//! `/proc/meminfo`, `/proc/pressure/*` (Linux 4.20, may be absent), `/proc/TID/schedstat` (sched-stats.rst, may be absent), `/proc/sys/kernel/random/boot_id`; statvfs(3);
//! what [`topology`] names of sysfs.

pub mod books;
pub mod placement;
pub mod topology;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lathe_cgroup::CpuList;

use self::topology::Topology;
use crate::problem::Problem;

/// What a host has in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// milliCPU: 1,000 for each online CPU.
    pub cpu_milli: u64,
    /// Bytes of memory (`MemTotal`).
    pub memory_bytes: u64,
    /// Bytes of the file system that holds the state directory.
    pub disk_bytes: u64,
}

/// The host's memory at a moment.
#[derive(Clone, Copy, Debug)]
pub struct MemoryNow {
    /// What new programs could get without swapping, bytes (`MemAvailable` of proc_meminfo(5)).
    pub available_bytes: u64,
    /// How long some task has waited for memory since the host booted, microseconds (psi.rst); 0 where the kernel does not measure it.
    pub stalled_usec: u64,
    /// When it was read.
    pub at: Instant,
}

impl MemoryNow {
    /// Thousandths of the time since `before` in which some task waited for memory.
    pub fn stalled_permille_since(&self, before: &Self) -> u64 {
        let elapsed = u64::try_from((self.at - before.at).as_micros()).unwrap_or(u64::MAX).max(1);
        (self.stalled_usec.saturating_sub(before.stalled_usec).saturating_mul(1000) / elapsed).min(1000)
    }
}

/// Cumulative and present consumption of the whole host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Consumption {
    /// Busy CPU time since boot, all CPUs, in clock ticks of 10 ms.
    pub cpu_busy_ticks: u64,
    /// `MemTotal - MemAvailable`, bytes.
    pub memory_bytes: u64,
    /// Occupied bytes of the state directory's file system.
    pub disk_bytes: u64,
}

/// Where to look: `/` except in tests.
#[derive(Clone, Debug)]
pub struct Probe {
    root: PathBuf,
    state_dir: PathBuf,
}

impl Probe {
    /// Looks at the host below `root`, and at the file system of `state_dir`.
    pub fn new(root: impl Into<PathBuf>, state_dir: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), state_dir: state_dir.into() }
    }

    fn read(&self, path: &str) -> Result<String, Problem> {
        let path = self.root.join(path);
        fs::read_to_string(&path)
            .map_err(|cause| Problem::internal(format!("cannot read {}", path.display()), cause))
    }

    /// What the host has.
    ///
    /// # Errors
    /// When procfs or the state directory cannot be read.
    pub fn capacity(&self) -> Result<Capacity, Problem> {
        let cpus = self.read("proc/stat")?.lines().filter(|line| is_cpu_line(line)).count() as u64;
        let memory_bytes = meminfo(&self.read("proc/meminfo")?, "MemTotal:");
        let (disk_bytes, _) = self.disk()?;
        Ok(Capacity { cpu_milli: cpus * 1000, memory_bytes, disk_bytes })
    }

    /// How much memory is left, and how long tasks have waited for some.
    ///
    /// # Errors
    /// When `/proc/meminfo` cannot be read.
    pub fn memory(&self) -> Result<MemoryNow, Problem> {
        let available_bytes = meminfo(&self.read("proc/meminfo")?, "MemAvailable:");
        let stalled = fs::read_to_string(self.root.join("proc/pressure/memory")).unwrap_or_default();
        let total = stalled.lines().next().and_then(|line| line.split_once("total="));
        let stalled_usec = total.and_then(|(_, usec)| usec.trim().parse().ok()).unwrap_or(0);
        Ok(MemoryNow { available_bytes, stalled_usec, at: Instant::now() })
    }

    /// CPUs that are online.
    ///
    /// # Errors
    /// When neither sysfs nor procfs can be read.
    pub fn online(&self) -> Result<CpuList, Problem> {
        topology::online(&self.root)
    }

    /// What the CPUs `online` share; machines may use `allowed` of them, or all.
    pub fn topology(&self, online: &CpuList, allowed: Option<&CpuList>) -> Topology {
        Topology::read(&self.root, online, allowed)
    }

    /// What it uses.
    ///
    /// # Errors
    /// When procfs or the state directory cannot be read.
    pub fn consumption(&self) -> Result<Consumption, Problem> {
        let memory = self.read("proc/meminfo")?;
        let memory_bytes = meminfo(&memory, "MemTotal:").saturating_sub(meminfo(&memory, "MemAvailable:"));
        let (total, available) = self.disk()?;
        let cpu_busy_ticks = busy_ticks(&self.read("proc/stat")?);
        Ok(Consumption { cpu_busy_ticks, memory_bytes, disk_bytes: total.saturating_sub(available) })
    }

    fn disk(&self) -> Result<(u64, u64), Problem> {
        let failed = |cause| Problem::internal(format!("cannot look at {}", self.state_dir.display()), cause);
        let stat = nix::sys::statvfs::statvfs(&self.state_dir).map_err(failed)?;
        let unit = stat.fragment_size();
        Ok((stat.blocks().saturating_mul(unit), stat.blocks_available().saturating_mul(unit)))
    }

    /// Share of time in which some task waited for `cpu`, `memory` or `io`, over 10 s, hundredths of a percent; `None`
    /// where the kernel does not measure it.
    pub fn pressure(&self, resource: &str) -> Option<u32> {
        let text = fs::read_to_string(self.root.join("proc/pressure").join(resource)).ok()?;
        let average = text.lines().find_map(|line| line.strip_prefix("some avg10="))?;
        let (whole, rest) = average.split_once('.')?;
        let hundredths = rest.get(..2)?;
        whole.parse::<u32>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
    }

    /// What threads have waited for a CPU together, and how often they got one; `None` where the kernel does not tell. A thread that
    /// has gone counts no more.
    pub fn waiting(&self, tids: &[u32]) -> Option<(Duration, u64)> {
        let of_thread =
            |tid: &u32| schedstat(&fs::read_to_string(self.root.join(format!("proc/{tid}/schedstat"))).ok()?);
        tids.iter().filter_map(of_thread).reduce(|(waited, turns), (more, times)| {
            (waited.saturating_add(more), turns.saturating_add(times))
        })
    }

    /// Random id of this boot of the host; tells a restart of lathed from a reboot.
    ///
    /// # Errors
    /// When procfs cannot be read.
    pub fn boot_id(&self) -> Result<String, Problem> {
        Ok(self.read("proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }

    /// `uname -r`.
    ///
    /// # Errors
    /// When procfs cannot be read.
    pub fn kernel_release(&self) -> Result<String, Problem> {
        Ok(self.read("proc/sys/kernel/osrelease")?.trim().to_owned())
    }

    /// Name servers of `resolv.conf` that a machine can reach, at most 3 (resolv.conf(5)); loopback ones are left out.
    pub fn name_servers(&self) -> Vec<String> {
        let own = fs::read_to_string(self.root.join("etc/resolv.conf")).unwrap_or_default();
        let stub = fs::read_to_string(self.root.join("run/systemd/resolve/resolv.conf")).unwrap_or_default();
        [own, stub]
            .iter()
            .map(|text| reachable_servers(text))
            .find(|found| !found.is_empty())
            .unwrap_or_default()
    }
}

fn reachable_servers(text: &str) -> Vec<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse::<std::net::IpAddr>().ok())
        .filter(|address| !address.is_loopback())
        .take(3)
        .map(|address| address.to_string())
        .collect()
}

/// `cpu0 …` but not the sum line `cpu  …`.
fn is_cpu_line(line: &str) -> bool {
    line.strip_prefix("cpu").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

/// user + nice + system + irq + softirq + steal of the sum line; guest time is within user.
fn busy_ticks(stat: &str) -> u64 {
    let Some(line) = stat.lines().find(|line| line.starts_with("cpu ")) else { return 0 };
    let fields: Vec<u64> = line.split_whitespace().skip(1).filter_map(|field| field.parse().ok()).collect();
    [0, 1, 2, 5, 6, 7].iter().filter_map(|index| fields.get(*index)).sum()
}

/// Time that a thread was ready and did not run, and how often it was given a CPU: `RUN_NSEC WAIT_NSEC TIMES`.
fn schedstat(text: &str) -> Option<(Duration, u64)> {
    let mut fields = text.split_whitespace().skip(1);
    let waited = Duration::from_nanos(fields.next()?.parse().ok()?);
    Some((waited, fields.next()?.parse().ok()?))
}

fn meminfo(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let kib =
        line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

/// Whether `path` is inside one of `allowed`, or is one of them; both are expected to be canonical.
pub fn is_allowed(path: &Path, allowed: &[PathBuf]) -> bool {
    allowed.iter().any(|root| path.starts_with(root))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> (tempfile::TempDir, Probe) {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("proc/stat", "cpu  10 1 5 900 7 2 3 4 50 0\ncpu0 5 0 0 0\ncpu1 5 0 0 0\nintr 5\n");
        write("proc/meminfo", "MemTotal:  4096 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\n");
        write("proc/pressure/cpu", "some avg10=12.34 avg60=0.00 avg300=0.00 total=5\n");
        write("etc/resolv.conf", "search x\nnameserver 127.0.0.53\n");
        write("run/systemd/resolve/resolv.conf", "nameserver 192.0.2.1\nnameserver 2001:db8::1\n");
        let probe = Probe::new(root.path(), root.path());
        (root, probe)
    }

    #[test]
    fn capacity_and_consumption_come_from_procfs() {
        let (_root, probe) = fixture();
        let capacity = probe.capacity().unwrap();
        assert_eq!(capacity.cpu_milli, 2000);
        assert_eq!(capacity.memory_bytes, 4 << 20);
        assert!(capacity.disk_bytes > 0);
        let used = probe.consumption().unwrap();
        assert_eq!(used.cpu_busy_ticks, 10 + 1 + 5 + 2 + 3 + 4);
        assert_eq!(used.memory_bytes, 3 << 20);
    }

    #[test]
    fn threads_wait_together() {
        let (root, probe) = fixture();
        for (tid, text) in [(7, "5 1500 3\n"), (8, "0 500 1\n"), (9, "garbage\n")] {
            fs::create_dir_all(root.path().join(format!("proc/{tid}"))).unwrap();
            fs::write(root.path().join(format!("proc/{tid}/schedstat")), text).unwrap();
        }
        assert_eq!(probe.waiting(&[7, 8, 9, 10]), Some((Duration::from_nanos(2000), 4)));
        assert_eq!(probe.waiting(&[9, 10]), None);
    }

    #[test]
    fn pressure_is_hundredths_of_a_percent_or_absent() {
        let (_root, probe) = fixture();
        assert_eq!(probe.pressure("cpu"), Some(1234));
        assert_eq!(probe.pressure("io"), None);
    }

    #[test]
    fn a_machine_gets_name_servers_that_it_can_reach() {
        let (_root, probe) = fixture();
        assert_eq!(probe.name_servers(), ["192.0.2.1", "2001:db8::1"]);
    }
}
