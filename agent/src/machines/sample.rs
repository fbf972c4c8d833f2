//! The control loop's beat: once a second, what every machine and the host use.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lathe_shard::{Bytes, MilliCpu, Shape};
use tokio::time::MissedTickBehavior;

use super::core::{Core, Entry, Usage, rate};
use super::record::Net;
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
    let (launched, net, before) =
        entry.with(|shared| (shared.launched.clone(), shared.record.net.clone(), shared.usage));
    let Some(launched) = launched else { return };
    let mut now = Usage { at: Some(Instant::now()), ..before };
    if let Some(tree) = &launched.tree
        && let Ok(usage) = tree.usage()
    {
        now.cpu_usec = usage.vcpu.usage_usec.saturating_add(usage.vmm.usage_usec);
        now.throttled_usec = usage.vcpu.throttled_usec;
        now.memory_bytes = usage.memory.current.0;
    }
    if let Some(bytes) = port_bytes(core, net).await {
        now.rx_bytes = bytes.to_guest;
        now.tx_bytes = bytes.from_guest;
    }
    if let (Some(earlier), Some(at)) = (before.at, now.at) {
        let elapsed = at - earlier;
        now.cpu_milli = milli(before.cpu_usec, now.cpu_usec, elapsed);
        let rx = rate(before.rx_bytes, now.rx_bytes, elapsed);
        let tx = rate(before.tx_bytes, now.tx_bytes, elapsed);
        now.net_bit_per_sec = rx.max(tx).saturating_mul(8);
    }
    entry.with(|shared| {
        // It may have ended while it was being read.
        if shared.launched.is_some() {
            shared.usage = now;
        }
    });
}

async fn port_bytes(core: &Core, net: Option<Net>) -> Option<PortBytes> {
    core.ports.as_ref()?.bytes(&net?.tap).await.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_second_of_cpu_time_in_a_second_is_half_a_cpu() {
        assert_eq!(milli(1_000_000, 1_500_000, Duration::from_secs(1)), 500);
        assert_eq!(milli(0, 3_000_000, Duration::from_millis(1500)), 2000);
    }
}
