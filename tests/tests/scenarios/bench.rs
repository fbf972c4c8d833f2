//! The monitor's benchmarks as scenarios: `tests/run bench boot`, `… memory`, `… elastic-tax`, `… resize`, `… requests`, `… resizes`. A missed target fails.

use std::path::Path;
use std::time::Duration;

use lathe_tests::bench::programs;
use lathe_tests::scenario::{Group, Hosts};

/// Beside QEMU, on a fresh host.
pub const MONITOR: Group = Group {
    name: "bench-monitor",
    hosts: 1,
    lathe: false,
    bench: true,
    scenarios: &[
        ("boot", boot),
        ("memory", memory),
        ("elastic-tax", elastic_tax),
        ("resize", resize),
        ("requests", requests),
        ("resizes", resizes),
    ],
};

/// Ten rounds of two kernels, emulated, on a busy machine.
const LIMIT: Duration = Duration::from_secs(3600);

fn measure(hosts: &Hosts, what: &str) {
    let host = hosts.host(1);
    let vmm = match programs::monitor() {
        Ok(path) => path,
        Err(error) => panic!("{error:#}"),
    };
    host.push(&vmm, "/root/bench/lathe-vmm");
    host.push(Path::new(env!("CARGO_BIN_EXE_bench")), "/root/bench/bench");
    let hand = match programs::hand() {
        Ok(path) => path,
        Err(error) => panic!("{error:#}"),
    };
    host.push(&hand, "/root/bench/hand");
    // KVM's counters are there.
    host.run("mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug").expect_ok();
    let outcome = host.run_within(
        LIMIT,
        &format!(
            "/root/bench/bench {what} --here --check --vmm /root/bench/lathe-vmm --hand /root/bench/hand"
        ),
    );
    outcome.stdout().lines().for_each(|line| hosts.note(line));
    outcome.expect_ok();
}

fn boot(hosts: &Hosts) {
    measure(hosts, "boot");
}

fn memory(hosts: &Hosts) {
    measure(hosts, "memory");
}

fn resize(hosts: &Hosts) {
    measure(hosts, "resize");
}

fn elastic_tax(hosts: &Hosts) {
    measure(hosts, "elastic-tax");
}

fn requests(hosts: &Hosts) {
    measure(hosts, "requests");
}

fn resizes(hosts: &Hosts) {
    measure(hosts, "resizes");
}
