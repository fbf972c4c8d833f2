//! The whole machine, as its kernel sees it: proc(5), accounting/psi.rst.

use std::path::Path;
use std::time::Instant;

use lathe_guest::protocol::inside::Whole;

use super::files::{Files, field, stalled_usec};
use super::rate::Rate;

/// USER_HZ, which the kernel fixes at 100 for user space on x86, is this long, microseconds.
pub const TICK_USEC: u64 = 10_000;

/// Counters of the whole machine.
#[derive(Default)]
pub struct Machine {
    busy: Rate,
    stalled: [Rate; 3],
    received: Rate,
    sent: Rate,
}

impl Machine {
    /// What it does now, and how many CPUs are online.
    pub fn look(&mut self, root: &Path, files: &mut Files, now: Instant) -> (Whole, u64) {
        let mut whole = Whole::default();
        let mut cpus = 1;
        if let Some(stat) = files.read(&root.join("proc/stat")) {
            let (busy_usec, online) = cpu(stat);
            self.busy.take(now, busy_usec);
            cpus = online.max(1);
        }
        whole.cpu_milli = self.busy.milli();
        if let Some(meminfo) = files.read(&root.join("proc/meminfo")) {
            let bytes = |name| field(meminfo, name).unwrap_or(0).saturating_mul(1024);
            whole.memory_total_bytes = bytes("MemTotal");
            whole.memory_available_bytes = bytes("MemAvailable");
            whole.swap_used_bytes = bytes("SwapTotal").saturating_sub(bytes("SwapFree"));
        }
        for (rate, name) in self.stalled.iter_mut().zip(["cpu", "memory", "io"]) {
            let path = root.join("proc/pressure").join(name);
            if let Some(usec) = files.read(&path).and_then(stalled_usec) {
                rate.take(now, usec);
            }
        }
        [whole.cpu_some_permille, whole.memory_some_permille, whole.io_some_permille] =
            self.stalled.map(|rate| rate.permille());
        if let Some((received, sent)) = files.read(&root.join("proc/net/dev")).map(network) {
            self.received.take(now, received);
            self.sent.take(now, sent);
        }
        whole.net_rx_bit_per_sec = self.received.per_sec.saturating_mul(8);
        whole.net_tx_bit_per_sec = self.sent.per_sec.saturating_mul(8);
        (whole, cpus)
    }
}

/// Busy time of all CPUs in microseconds, and their number.
fn cpu(stat: &str) -> (u64, u64) {
    let mut lines = stat.lines();
    let ticks: Vec<u64> = lines
        .next()
        .and_then(|line| line.strip_prefix("cpu "))
        .map(|line| line.split_whitespace().map_while(|word| word.parse().ok()).collect())
        .unwrap_or_default();
    // user nice system idle iowait irq softirq steal
    let busy = [0, 1, 2, 5, 6].map(|at| ticks.get(at).copied().unwrap_or(0));
    let busy = busy.into_iter().fold(0, u64::saturating_add).saturating_mul(TICK_USEC);
    (busy, lines.take_while(|line| line.starts_with("cpu")).count() as u64)
}

/// Bytes received and sent by all interfaces but loopback.
fn network(dev: &str) -> (u64, u64) {
    let (mut received, mut sent) = (0_u64, 0_u64);
    for (name, figures) in dev.lines().filter_map(|line| line.split_once(':')) {
        let mut figures = figures.split_whitespace().map_while(|word| word.parse::<u64>().ok());
        if let (Some(first), Some(ninth)) = (figures.next(), figures.nth(7))
            && name.trim() != "lo"
        {
            received = received.saturating_add(first);
            sent = sent.saturating_add(ninth);
        }
    }
    (received, sent)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_looks_make_rates() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("proc/pressure")).unwrap();
        fs::create_dir_all(root.path().join("proc/net")).unwrap();
        let write = |path: &str, text: &str| fs::write(root.path().join("proc").join(path), text).unwrap();
        let figures = |busy: u64, stalled: u64, bytes: u64| {
            write("stat", &format!("cpu  {busy} 0 0 9 9 0 0 7\ncpu0 1\ncpu1 1\nintr 5\n"));
            write("pressure/memory", &format!("some avg10=0.00 total={stalled}\n"));
            write(
                "net/dev",
                &format!("head\n  lo: 9 0 0 0 0 0 0 0 9 0\neth0: {bytes} 0 0 0 0 0 0 0 {bytes} 0\n"),
            );
        };
        write("meminfo", "MemTotal: 100 kB\nMemAvailable: 60 kB\nSwapTotal: 50 kB\nSwapFree: 20 kB\n");
        let (mut machine, mut files, now) = (Machine::default(), Files::default(), Instant::now());
        figures(100, 0, 0);
        machine.look(root.path(), &mut files, now);
        figures(225, 250_000, 1000);
        let (whole, cpus) = machine.look(root.path(), &mut files, now + Duration::from_secs(1));
        let expected = Whole {
            cpu_milli: 1250,
            cpu_some_permille: None,
            memory_some_permille: Some(250),
            io_some_permille: None,
            memory_total_bytes: 100 << 10,
            memory_available_bytes: 60 << 10,
            swap_used_bytes: 30 << 10,
            net_rx_bit_per_sec: 8000,
            net_tx_bit_per_sec: 8000,
        };
        assert_eq!((whole, cpus), (expected, 2));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-z0-9 .:=\\n-]{0,200}") {
            cpu(&text);
            cpu(&format!("cpu {text}"));
            network(&format!("eth0: {text}"));
        }
    }
}
