//! A Linux guest whose root goes past its drivers and at the monitor. The monitor lives, answers, and holds no more memory than it was
//! granted. What its own threads spend on it is printed, not judged: in an emulated host the same attack takes 0.5 to 9 % of a core.

use std::time::Duration;

use lathe_tests::scenario::{Group, Hosts};

use super::monitor::{Machine, prepared, push_beside};

/// On one host.
pub const GROUP: Group = Group {
    name: "hostile",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[("a_guest_that_lies_gets_nowhere", a_guest_that_lies_gets_nowhere)],
};

/// How long it tries.
const ATTACK_SEC: u64 = 12;
/// MiB of guest memory at boot, and what the monitor may hold besides.
const GRANT_MIB: u64 = 192;
const OVERHEAD_MIB: u64 = 16;

/// Ticks of CPU time that each thread of the monitor has used, `NAME TICKS` lines, and the host's time in ticks; what it has resident, MiB.
const LOOK: &str = r#"
    for task in /proc/$pid/task/*; do awk '{ sub(/.*\(/, "", $2); gsub(/[()]/, "", $2); print $2, $14 + $15 }' $task/stat; done
    echo "resident $(awk '/^Rss/ { print int($2 / 1024) }' /proc/$pid/smaps_rollup)"
    awk '{ print "now", int($1 * 100) }' /proc/uptime"#;

/// Ticks of the threads that are no vCPUs; time; MiB.
fn look(machine: &Machine<'_>) -> (u64, u64, u64) {
    let find = format!(
        "pid=$(for pid in $(pgrep -x lathe-vmm); do [ $(readlink /proc/$pid/cwd) != {} ] || echo $pid; done)",
        machine.folder
    );
    let text = machine.host.run(&format!("{find}\n{LOOK}")).expect_ok().stdout();
    let (mut ticks, mut now, mut resident) = (0, 0, 0);
    for (name, count) in text.lines().filter_map(|line| line.rsplit_once(' ')) {
        let count: u64 = count.parse().unwrap_or(0);
        match name {
            "now" => now = count,
            "resident" => resident = count,
            name if name.starts_with("vcpu") || name.starts_with("kvm") => {}
            _ => ticks += count,
        }
    }
    assert!(now > 0 && resident > 0, "{text}");
    (ticks, now, resident)
}

fn a_guest_that_lies_gets_nowhere(hosts: &Hosts) {
    let host = prepared(hosts);
    push_beside(&host, "hostile");
    hosts.guests_lie();
    let seed = u64::from(std::process::id());
    for (round, kernel) in (0..).zip(["6.1", "6.12"]) {
        // The guest brings it along on a disk; without iomem=relaxed its kernel would keep it from the registers of its drivers.
        host.run("cp /root/kit/hostile /root/hostile.raw && truncate -s 16M /root/hostile.raw && truncate -s 64M /root/victim.raw").expect_ok();
        let machine = Machine::boot(
            &host,
            kernel,
            "bzImage",
            &format!(
                "--memory {GRANT_MIB}M --memory-max 448M --cpus 1 --cpus-max 4 --balloon --hotplug-slots 2 --disk /root/hostile.raw \
                 --disk /root/victim.raw --cmdline 'console=ttyS0 quiet panic=5 iomem=relaxed'"
            ),
        );
        machine.shell("cat /dev/vda >/tmp/hostile && chmod 755 /tmp/hostile").expect_ok();
        let before = look(&machine);
        let attack = format!("/tmp/hostile {ATTACK_SEC} {} >/dev/ttyS0 2>&1 &", seed + round);
        machine.shell(&attack).expect_ok();
        let mut most = 0;
        for _ in 0..ATTACK_SEC / 2 {
            std::thread::sleep(Duration::from_secs(2));
            let status = machine.ask(r#"{"status":{}}"#).expect_ok().json();
            assert!(status["status"]["phase"] == "running", "{status}");
            most = most.max(look(&machine).2);
        }
        let after = look(&machine);
        let share = 100.0 * (after.0 - before.0) as f64 / (after.1 - before.1) as f64;
        let said =
            host.run(&format!("grep -a -o 'hostile: .*' {}/console | tail -n 1", machine.folder)).stdout();
        hosts.note(&format!(
            "{kernel}, seed {}: {said}; the monitor's own threads used {share:.1} % of a core, {most} MiB resident",
            seed + round
        ));
        assert!(said.contains("hostile:"), "the attack never began");
        assert!(most <= GRANT_MIB + OVERHEAD_MIB, "{most} MiB are held of a grant of {GRANT_MIB} MiB");
        machine.ask(r#"{"quit":{}}"#).expect_ok();
        machine.ends().expect_ok();
    }
}
