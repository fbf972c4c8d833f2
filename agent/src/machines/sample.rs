//! The control loop's beat: once a second, what every machine and the host use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_shard::{Bytes, MilliCpu, Shape};
use tokio::time::MissedTickBehavior;

use super::core::{Core, Entry, Usage, rate};
use crate::host::Consumption;
use crate::network::PortBytes;

/// Between two readings.
const INTERVAL: Duration = Duration::from_secs(1);
/// One clock tick in microseconds (`USER_HZ` is 100 on every Linux architecture that we know).
const TICK_USEC: u64 = 10_000;

/// Reads and beats until lathed ends.
pub(super) async fn run(core: Arc<Core>) {
    let mut beat = tokio::time::interval(INTERVAL);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: Option<(Instant, Consumption)> = None;
    loop {
        beat.tick().await;
        let entries = core.entries();
        for entry in &entries {
            machine(&core, entry).await;
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
    use super::*;

    #[test]
    fn half_a_second_of_cpu_time_in_a_second_is_half_a_cpu() {
        assert_eq!(milli(1_000_000, 1_500_000, Duration::from_secs(1)), 500);
        assert_eq!(milli(0, 3_000_000, Duration::from_millis(1500)), 2000);
    }

    #[test]
    fn counters_of_a_tap_that_was_made_anew_are_counted_from_nothing() {
        let bytes = |to_guest, from_guest| PortBytes { to_guest, from_guest };
        assert_eq!(more(bytes(10, 20), bytes(15, 20)), bytes(5, 0));
        assert_eq!(more(bytes(10, 20), bytes(3, 0)), bytes(3, 0));
    }
}
