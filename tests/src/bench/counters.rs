//! What a machine has cost its host, counted: where an emulated host's clock says little, exits, switches and bytes still do.
//!
//! KVM's counters: `/sys/kernel/debug/kvm/PID-FD` (Documentation/virt/kvm/api.rst has the same by `KVM_GET_STATS_FD`), root only.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const KVM: &str = "/sys/kernel/debug/kvm";

/// Sums since the monitor's start, or differences of two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Exits from the guest, all vCPUs.
    pub exits: u64,
    /// Of these, port and memory accesses that a device model answers.
    pub device_exits: u64,
    /// Context switches of the monitor's threads that live.
    pub switches: u64,
    /// Reading and writing system calls of the monitor.
    pub calls: u64,
    /// Bytes that these moved.
    pub bytes: u64,
}

impl Counters {
    /// Of the monitor with this process id.
    ///
    /// # Errors
    /// It is gone, has no machine, or debugfs is not there.
    pub fn of(pid: u32) -> Result<Self> {
        let folder = kvm_folder(pid)?;
        let kvm = |name: &str| -> Result<u64> {
            let path = folder.join(name);
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok(text.trim().parse()?)
        };
        let io = fs::read_to_string(format!("/proc/{pid}/io"))?;
        Ok(Self {
            exits: kvm("exits")?,
            device_exits: kvm("io_exits")? + kvm("mmio_exits")?,
            switches: switches(pid)?,
            calls: sum(&io, &["syscr:", "syscw:"]),
            bytes: sum(&io, &["rchar:", "wchar:"]),
        })
    }

    /// What has come to them since `before`.
    pub fn since(&self, before: &Self) -> Self {
        Self {
            exits: self.exits.saturating_sub(before.exits),
            device_exits: self.device_exits.saturating_sub(before.device_exits),
            switches: self.switches.saturating_sub(before.switches),
            calls: self.calls.saturating_sub(before.calls),
            bytes: self.bytes.saturating_sub(before.bytes),
        }
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exits, device_exits, switches, calls, bytes } = self;
        write!(
            f,
            "{exits:8} exits, {device_exits:6} of them to devices, {switches:6} switches, {calls:6} reads and writes of {bytes:9} bytes"
        )
    }
}

fn kvm_folder(pid: u32) -> Result<PathBuf> {
    let prefix = format!("{pid}-");
    let folders = fs::read_dir(KVM).context("KVM's counters need debugfs at /sys/kernel/debug")?;
    let mut found =
        folders.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    Ok(found.next().with_context(|| format!("process {pid} has no machine"))?.path())
}

fn sum(text: &str, names: &[&str]) -> u64 {
    let fields = text.lines().filter_map(|line| line.split_once(char::is_whitespace));
    fields
        .filter(|(name, _)| names.contains(name))
        .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
        .sum()
}

fn switches(pid: u32) -> Result<u64> {
    let status = |task: PathBuf| fs::read_to_string(task.join("status")).unwrap_or_default();
    let tasks = fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))?.flatten();
    let of = |text: String| sum(&text, &["voluntary_ctxt_switches:", "nonvoluntary_ctxt_switches:"]);
    Ok(tasks.map(|entry| of(status(entry.path()))).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_named_fields() {
        assert_eq!(sum("rchar: 12\nwchar:\t30\nsyscr: 7\n", &["rchar:", "wchar:"]), 42);
        assert!(switches(std::process::id()).unwrap() > 0);
    }
}
