//! The control loop's beat: once a second, what every machine and the host use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_shard::{Bytes, MilliCpu, Shape};
use lathe_vmm::control::wire::{Answer, Command, Stats};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};

use super::core::{Core, DiskUse, Entry, Usage, rate};
use crate::host::Consumption;
use crate::network::PortBytes;

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long a monitor may take to say what its devices have done.
const MONITOR_TIMEOUT: Duration = Duration::from_millis(500);
/// One clock tick in microseconds (`USER_HZ` is 100 on every Linux architecture that we know).
const TICK_USEC: u64 = 10_000;

/// Reads and beats until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    let mut beat = tokio::time::interval(INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<(Instant, Consumption)> = None;
    loop {
        beat.tick().await;
        // Beside each other: one monitor that stands still delays no other machine.
        let mut readings = JoinSet::new();
        for entry in core.entries() {
            let core = Arc::clone(&core);
            readings.spawn(async move { machine(&core, &entry).await });
        }
        while let Some(read) = readings.join_next().await {
            if let Err(cause) = read {
                tracing::error!(%cause, "cannot read what a machine uses");
            }
        }
        before = host(&core, before);
        core.heartbeat.send_replace(Instant::now());
    }
}

fn host(core: &Core, before: Option<(Instant, Consumption)>) -> Option<(Instant, Consumption)> {
    let now = Instant::now();
    let read = match core.probe.consumption() {
        Ok(read) => read,
        Err(problem) => {
            tracing::warn!(%problem, "cannot read what the host uses");
            return before;
        }
    };
    let cpu = before.map_or(0, |(at, earlier)| {
        let usec = |ticks: u64| ticks.saturating_mul(TICK_USEC);
        milli(usec(earlier.cpu_busy_ticks), usec(read.cpu_busy_ticks), now - at)
    });
    core.set_used(Shape {
        cpu: MilliCpu(cpu),
        memory: Bytes(read.memory_bytes),
        disk: Bytes(read.disk_bytes),
        ..Shape::default()
    });
    Some((now, read))
}

/// milliCPU from two readings of microseconds of CPU time.
fn milli(before: u64, after: u64, elapsed: Duration) -> u64 {
    rate(before, after, elapsed) / 1000
}

async fn machine(core: &Core, entry: &Entry) {
    let (launched, nics, before, mut seen) = entry.with(|shared| {
        let nics: Vec<_> = shared.record.all_nics().map(|nic| nic.tap.clone()).collect();
        (shared.launched.clone(), nics, shared.usage, shared.seen.clone())
    });
    let Some(launched) = launched else { return };
    let mut now = Usage { at: Some(Instant::now()), ..before };
    if let Some(tree) = &launched.tree
        && let Ok(usage) = tree.usage()
    {
        now.cpu_usec = usage.vcpu.usage_usec.saturating_add(usage.vmm.usage_usec);
        now.throttled_usec = usage.vcpu.throttled_usec;
        now.memory_bytes = usage.memory.current.0;
    }
    let mut first = PortBytes::default();
    for (position, tap) in nics.iter().enumerate() {
        let Some(bytes) = port_bytes(core, tap).await else { continue };
        let earlier = seen.insert(tap.clone(), bytes).unwrap_or_default();
        let more = more(earlier, bytes);
        now.rx_bytes = now.rx_bytes.saturating_add(more.to_guest);
        now.tx_bytes = now.tx_bytes.saturating_add(more.from_guest);
        if position == 0 {
            first = more;
        }
    }
    seen.retain(|tap, _| nics.contains(tap));
    if let Some(told) = disks(entry).await {
        let at = Instant::now();
        let (earlier, seen_at) =
            before.disks_told.map_or((DiskUse::default(), None), |(at, told)| (told, Some(at)));
        let more = told.since(earlier);
        now.disks = before.disks.plus(more);
        // What was done before the first reading was done at some time or other.
        now.iops = seen_at.map_or(0, |seen_at| rate(0, more.operations, at - seen_at));
        now.disks_told = Some((at, told));
    } else if entry.with(|shared| shared.record.source.disks.is_empty()) {
        (now.iops, now.disks_told) = (0, None);
    }
    if let (Some(earlier), Some(at)) = (before.at, now.at) {
        let elapsed = at - earlier;
        now.cpu_milli = milli(before.cpu_usec, now.cpu_usec, elapsed);
        now.net_bit_per_sec = rate(0, first.to_guest.max(first.from_guest), elapsed).saturating_mul(8);
    }
    entry.with(|shared| {
        // It may have ended while it was being read.
        if shared.launched.is_some() {
            (shared.usage, shared.seen) = (now, seen);
        }
    });
}

/// What a machine's disks have done; `None` when it has none, or its monitor does not say.
async fn disks(entry: &Entry) -> Option<DiskUse> {
    let monitor =
        entry.with(|shared| shared.monitor.clone().filter(|_| !shared.record.source.disks.is_empty()))?;
    match timeout(MONITOR_TIMEOUT, monitor.call(Command::Stats {}, &[])).await {
        Ok(Ok(Answer::Stats(stats))) => Some(disk_use(&stats)),
        _ => None,
    }
}

impl DiskUse {
    fn combined(self, other: Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            operations: combine(self.operations, other.operations),
            read_bytes: combine(self.read_bytes, other.read_bytes),
            written_bytes: combine(self.written_bytes, other.written_bytes),
        }
    }

    fn plus(self, more: Self) -> Self {
        self.combined(more, u64::saturating_add)
    }

    /// What has been done since an earlier reading; where a disk has gone meanwhile, that is not known.
    fn since(self, earlier: Self) -> Self {
        self.combined(earlier, u64::saturating_sub)
    }
}

/// The sums of all disks.
fn disk_use(stats: &Stats) -> DiskUse {
    stats.disks.iter().fold(DiskUse::default(), |sum, disk| {
        let operations = [disk.reads, disk.writes, disk.flushes, disk.discards];
        DiskUse {
            operations: operations.into_iter().fold(sum.operations, u64::saturating_add),
            read_bytes: sum.read_bytes.saturating_add(disk.read_bytes),
            written_bytes: sum.written_bytes.saturating_add(disk.written_bytes),
        }
    })
}

async fn port_bytes(core: &Core, tap: &str) -> Option<PortBytes> {
    core.ports.as_ref()?.bytes(tap).await.ok()
}

/// What has gone through since an earlier reading; counters that are below it began anew with their tap.
fn more(earlier: PortBytes, now: PortBytes) -> PortBytes {
    let more = |earlier: u64, now: u64| now.checked_sub(earlier).unwrap_or(now);
    PortBytes {
        to_guest: more(earlier.to_guest, now.to_guest),
        from_guest: more(earlier.from_guest, now.from_guest),
    }
}

#[cfg(test)]
mod tests {
    use lathe_vmm::control::wire::DiskStats;

    use super::*;

    #[test]
    fn half_a_second_of_cpu_time_in_a_second_is_half_a_cpu() {
        assert_eq!(milli(1_000_000, 1_500_000, Duration::from_secs(1)), 500);
        assert_eq!(milli(0, 3_000_000, Duration::from_millis(1500)), 2000);
    }

    #[test]
    fn operations_of_all_disks_are_summed_as_the_guest_sent_them() {
        let disk = DiskStats {
            reads: 1,
            writes: 2,
            flushes: 3,
            discards: 4,
            read_bytes: 10,
            ..DiskStats::default()
        };
        let stats = Stats { disks: vec![disk, disk], ..Stats::default() };
        let both = disk_use(&stats);
        assert_eq!(both, DiskUse { operations: 20, read_bytes: 20, written_bytes: 0 });
        let one = disk_use(&Stats { disks: vec![disk], ..Stats::default() });
        assert_eq!(both.plus(one.since(both)), both, "a disk that goes takes its counters along");
        assert_eq!(one.plus(both.since(one)), both);
    }

    #[test]
    fn counters_of_a_tap_that_was_made_anew_are_counted_from_nothing() {
        let bytes = |to_guest, from_guest| PortBytes { to_guest, from_guest };
        assert_eq!(more(bytes(10, 20), bytes(15, 20)), bytes(5, 0));
        assert_eq!(more(bytes(10, 20), bytes(3, 0)), bytes(3, 0));
    }
}
