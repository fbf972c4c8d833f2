//! The control loop's beat: once a second, what every machine and the host use.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_cgroup::MachineTree;
use lathe_shard::{BitRate, Bytes, MilliCpu, Shape};
use lathe_vmm::control::wire::{Answer, Command, Stats};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};

use super::core::{Core, DiskUse, Entry, Usage, rate};
use super::sight::{self, Observation};
use super::{cores, foresee, iomax, sculpt, tiers, walls};
use crate::host::Consumption;
use crate::network::{PortBytes, PortQueue, PortQueues};

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
    let mut troubles: [String; 3] = Default::default();
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
        foresee::take(&core);
        sculpt::note(&core);
        before = host(&core, before);
        let kept = [
            ("tiers", tiers::keep(&core)),
            ("places on the host's CPUs", cores::keep(&core)),
            ("walls of their disks", iomax::keep(&core)),
        ];
        for ((what, kept), trouble) in kept.into_iter().zip(&mut troubles) {
            let now = kept.err().unwrap_or_default();
            // Said when it changes, not every second.
            if !now.is_empty() && now != *trouble {
                tracing::warn!("machines' {what} are not all in force: {now}");
            }
            *trouble = now;
        }
        core.walls.tidy();
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
    let net = |entry: &Arc<Entry>| entry.with(|shared| shared.usage.net_bit_per_sec);
    core.set_used(Shape {
        net: BitRate(core.entries().iter().map(net).fold(0, u64::saturating_add)),
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
    let at = Instant::now();
    let mut now = Usage { at: Some(at), ..before };
    let mut observed = Observation { at_usec: usec(core, at), ..Observation::default() };
    if let Some(tree) = &launched.tree
        && let Ok(usage) = tree.usage()
    {
        now.cpu_usec = usage.machine.usage_usec;
        now.throttled_usec = throttled_usec(&usage);
        now.memory_bytes = usage.memory.current.0;
        now.memory_inactive_file_bytes = usage.memory.inactive_file.0;
        now.memory_swapped_bytes = usage.memory.swap_current.0;
        keep_wall(core, entry, tree, &usage, observed.at_usec);
        observed.cpu = cpu(core, entry, tree, &usage, observed.at_usec);
        observed.stalls = stalls(&usage, observed.at_usec);
    }
    let (first, more) = gone_through(core, &nics, &mut seen).await;
    now.rx_bytes = now.rx_bytes.saturating_add(more.to_guest);
    now.tx_bytes = now.tx_bytes.saturating_add(more.from_guest);
    if let Some(tap) = nics.first() {
        (observed.to_guest, observed.from_guest) = net(core, entry, tap, seen.get(tap), first).await;
    }
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
            shared.sight.observe(observed);
        }
    });
}

/// Microseconds since lathed started.
pub(super) fn usec(core: &Core, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(core.started).as_micros()).unwrap_or(u64::MAX)
}

/// Time that its threads were held back: at the wall, or its vCPUs at what they may take of it.
fn throttled_usec(usage: &lathe_cgroup::Usage) -> u64 {
    usage.machine.throttled_usec.saturating_add(usage.vcpu.throttled_usec)
}

/// Looks after the wall around a machine's CPU.
fn keep_wall(core: &Core, entry: &Entry, tree: &MachineTree, usage: &lathe_cgroup::Usage, at_usec: u64) {
    let counted = walls::Counted {
        at_usec,
        used_usec: usage.machine.usage_usec,
        vmm_usec: usage.vmm.usage_usec,
        wall_periods: usage.machine.nr_throttled,
        vcpu_periods: usage.vcpu.nr_throttled,
    };
    // It may have ended meanwhile; what else is refused is refused to the next change as well, which then says so.
    if let Err(cause) = core.walls.keep(tree, counted)
        && tree.unit().exists()
    {
        tracing::debug!(machine = entry.name, %cause, "its CPU is not divided anew");
    }
}

/// What is known of a machine's CPU.
fn cpu(
    core: &Core,
    entry: &Entry,
    tree: &MachineTree,
    usage: &lathe_cgroup::Usage,
    at_usec: u64,
) -> Option<sight::Cpu> {
    let granted_milli = entry.with(|shared| shared.record.held().cpu.0);
    let period = tree.period().ok()?;
    let tids = tree.vcpu_threads().unwrap_or_default();
    let wait = core.probe.waiting(&tids);
    Some(sight::Cpu {
        at_usec,
        granted_milli,
        used_usec: usage.machine.usage_usec,
        throttled_usec: throttled_usec(usage),
        wall_periods: usage.machine.nr_throttled,
        vcpu_periods: usage.vcpu.nr_throttled,
        period_usec: u64::try_from(period.as_micros()).unwrap_or(u64::MAX),
        wait: wait.map(|(waited, turns)| sight::Wait {
            waited_usec: u64::try_from(waited.as_micros()).unwrap_or(u64::MAX),
            turns,
            threads: tids.len() as u64,
        }),
    })
}

/// Its stalls; `None` where the kernel tells none.
fn stalls(usage: &lathe_cgroup::Usage, at_usec: u64) -> Option<sight::Stalls> {
    let pressure = [usage.pressure.cpu, usage.pressure.memory, usage.pressure.io];
    let some_usec = pressure.map(|pressure| pressure.map(|pressure| pressure.some_usec));
    some_usec.iter().any(Option::is_some).then_some(sight::Stalls { at_usec, some_usec })
}

/// What has gone through the first nic and through all nics since they were read last.
async fn gone_through(
    core: &Core,
    nics: &[String],
    seen: &mut BTreeMap<String, PortBytes>,
) -> (PortBytes, PortBytes) {
    let (mut first, mut all) = (PortBytes::default(), PortBytes::default());
    for (position, tap) in nics.iter().enumerate() {
        let Some(bytes) = port_bytes(core, tap).await else { continue };
        let earlier = seen.insert(tap.clone(), bytes).unwrap_or_default();
        let more = more(earlier, bytes);
        all.to_guest = all.to_guest.saturating_add(more.to_guest);
        all.from_guest = all.from_guest.saturating_add(more.from_guest);
        if position == 0 {
            first = more;
        }
    }
    seen.retain(|tap, _| nics.contains(tap));
    (first, all)
}

/// Both directions of the first nic. Its shapers are asked only while there is something to know: they are many questions.
async fn net(
    core: &Core,
    entry: &Entry,
    tap: &str,
    bytes: Option<&PortBytes>,
    more: PortBytes,
) -> (Option<sight::Net>, Option<sight::Net>) {
    let (Some(bytes), Some(ports)) = (bytes, &core.ports) else { return (None, None) };
    let (granted_bit_per_sec, waited) = entry.with(|shared| {
        let record = &shared.record;
        let last = shared.sight.last();
        let waits = |net: Option<sight::Net>| {
            net.and_then(|net| net.queue).is_some_and(|queue| queue.backlog_bytes > 0)
        };
        let granted = record.all_nics().next().map_or(0, |nic| record.rate_of(nic));
        (granted, waits(last.to_guest) || waits(last.from_guest))
    });
    let busy = is_busy(more, granted_bit_per_sec);
    let queues = match granted_bit_per_sec > 0 && (busy || waited) {
        true => ports.queues(tap).await.unwrap_or_default(),
        false => PortQueues::default(),
    };
    let at_usec = usec(core, Instant::now());
    let direction = |bytes, queue: Option<PortQueue>| {
        let queue = queue.map(|queue| sight::Queue {
            bytes: queue.bytes,
            overlimits: queue.overlimits,
            backlog_bytes: queue.backlog_bytes,
        });
        Some(sight::Net { at_usec, granted_bit_per_sec, bytes, queue })
    };
    (direction(bytes.to_guest, queues.to_guest), direction(bytes.from_guest, queues.from_guest))
}

/// Whether what went through in about a second is a hundredth of the rate or more.
fn is_busy(more: PortBytes, bit_per_sec: u64) -> bool {
    more.to_guest.max(more.from_guest).saturating_mul(8) >= bit_per_sec / 100
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
    fn queues_are_looked_at_from_a_hundredth_of_the_rate() {
        let bytes = |to_guest, from_guest| PortBytes { to_guest, from_guest };
        assert!(is_busy(bytes(0, 1250), 1_000_000));
        assert!(!is_busy(bytes(1249, 1249), 1_000_000));
    }

    #[test]
    fn counters_of_a_tap_that_was_made_anew_are_counted_from_nothing() {
        let bytes = |to_guest, from_guest| PortBytes { to_guest, from_guest };
        assert_eq!(more(bytes(10, 20), bytes(15, 20)), bytes(5, 0));
        assert_eq!(more(bytes(10, 20), bytes(3, 0)), bytes(3, 0));
    }
}
