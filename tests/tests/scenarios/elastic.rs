//! Machines that change shape while they run, by the monitor's own commands: what the guest gets and what the host gets back.

use std::time::{Duration, Instant};

use lathe_tests::scenario::{Group, Hosts};

use super::monitor::{Machine, prepared};

/// Everything that takes seconds.
pub const GROUP: Group = Group {
    name: "elastic",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[
        ("memory_comes_and_goes", memory_comes_and_goes),
        ("plugged_memory_comes_back_after_a_reboot", plugged_memory_comes_back_after_a_reboot),
        ("the_balloon_takes_and_gives", the_balloon_takes_and_gives),
        ("unused_memory_goes_back_by_itself", unused_memory_goes_back_by_itself),
    ],
};

/// From a command to its effect, in an emulated and busy host.
const LIMIT: Duration = Duration::from_secs(60);
pub const MIB: u64 = 1 << 20;

/// Has the guest write this much memory and keep it until [`RELEASE`]. Its root file system takes half of the boot memory only.
fn fill(mib: u64) -> String {
    format!(
        "mount -t tmpfs -o size=1g none /mnt && dd if=/dev/zero of=/mnt/fill bs=1M count={mib} 2>/dev/null"
    )
}

const RELEASE: &str = "umount /mnt";

/// Options of a machine that can grow; blocks come online at once, and untouched memory stays untouched.
fn options(memory: &str) -> String {
    format!("{memory} --cmdline 'console=ttyS0 quiet init_on_alloc=0 memhp_default_state=online_movable'")
}

/// One number of the machine's memory status.
fn status(machine: &Machine<'_>, field: &str) -> u64 {
    let status = machine.ask(r#"{"status":{}}"#).expect_ok().json();
    status["status"]["memory"][field].as_u64().unwrap_or(u64::MAX)
}

pub fn wait_status(machine: &Machine<'_>, field: &str, value: u64) {
    let line = format!(
        "/root/kit/lathe-vmm ask {}/control '{{\"status\":{{}}}}' | grep '\"{field}\":{value}[,}}]'",
        machine.folder
    );
    machine.host.wait_until(&format!("{field} is {value}"), LIMIT, &line);
}

/// The guest's own sum of its memory, KiB.
pub fn total_kib(machine: &Machine<'_>) -> u64 {
    machine.shell("grep MemTotal /proc/meminfo | tr -dc 0-9").expect_ok().stdout().parse().unwrap_or_default()
}

/// What the host has in memory for the machine, MiB.
fn resident_mib(machine: &Machine<'_>) -> u64 {
    let line = format!(
        "awk '/^Private/ {{ sum += $2 }} END {{ print int(sum / 1024) }}' /proc/$(pgrep -f 'vsock 3,vsock' | while read pid; do \
         [ \"$(readlink /proc/$pid/cwd)/$(cat /proc/$pid/comm)\" != {}/lathe-vmm ] || echo $pid; done)/smaps_rollup",
        machine.folder
    );
    machine.host.run(&line).expect_ok().stdout().parse().unwrap_or(u64::MAX)
}

/// Waits until the host has at most so much in memory for the machine.
fn wait_resident(machine: &Machine<'_>, what: &str, most_mib: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let now = resident_mib(machine);
        if now <= most_mib {
            return now;
        }
        assert!(begun.elapsed() < LIMIT, "{what}: {now} MiB are resident, at most {most_mib} were expected");
    }
}

fn memory_comes_and_goes(hosts: &Hosts) {
    let host = prepared(hosts);
    for kernel in ["6.1", "6.12"] {
        let machine = Machine::boot(&host, kernel, "vmlinux", &options("--memory 256M --memory-max 768M"));
        let before = total_kib(&machine);
        machine.ask(r#"{"set_plugged":{"bytes":268435456}}"#).expect_ok();
        wait_status(&machine, "plugged_bytes", 256 * MIB);
        let begun = Instant::now();
        while total_kib(&machine) != before + (256 << 10) {
            assert!(begun.elapsed() < LIMIT, "the guest has {} KiB, {before} before", total_kib(&machine));
        }
        machine.shell(&fill(300)).expect_ok();
        let full = resident_mib(&machine);
        machine.exec(RELEASE).expect_ok();
        assert!(full >= 300, "300 MiB were written, {full} MiB are resident");

        machine.ask(r#"{"set_plugged":{"bytes":0}}"#).expect_ok();
        wait_status(&machine, "plugged_bytes", 0);
        assert_eq!(total_kib(&machine), before);
        let left = resident_mib(&machine);
        // What was written there is gone at once; the rest is the boot memory's.
        assert!(left <= 256 + 16, "{left} MiB are resident after all of it was unplugged");
        machine.ask(r#"{"set_plugged":{"bytes":1}}"#).expect_failure().expect_err("a multiple of 2097152");
        machine.ask(r#"{"set_plugged":{"bytes":1073741824}}"#).expect_failure().expect_err("up to 536870912");
        machine.powers_off();
        hosts.note(&format!("{kernel}: {full} MiB resident with 256 MiB plugged and full, {left} MiB after"));
    }
}

fn plugged_memory_comes_back_after_a_reboot(hosts: &Hosts) {
    let host = prepared(hosts);
    let machine = Machine::boot(&host, "6.12", "vmlinux", &options("--memory 256M --memory-max 512M"));
    machine.ask(r#"{"set_plugged":{"bytes":134217728}}"#).expect_ok();
    wait_status(&machine, "plugged_bytes", 128 * MIB);
    let grown = total_kib(&machine);
    machine.exec("reboot");
    machine.wait_ready(2);
    wait_status(&machine, "plugged_bytes", 128 * MIB);
    assert_eq!(total_kib(&machine), grown);
    machine.powers_off();
}

fn the_balloon_takes_and_gives(hosts: &Hosts) {
    let host = prepared(hosts);
    let kernel = "6.1";
    let machine = Machine::boot(&host, kernel, "vmlinux", &options("--memory 384M --balloon"));
    machine.ask(r#"{"set_balloon":{"bytes":134217728}}"#).expect_ok();
    wait_status(&machine, "balloon_bytes", 128 * MIB);
    machine.ask(r#"{"set_balloon":{"bytes":402653184}}"#).expect_failure();
    machine.ask(r#"{"set_balloon":{"bytes":0}}"#).expect_ok();
    wait_status(&machine, "balloon_bytes", 0);
    // The guest's own account, which is asked for when somebody looks.
    let line = format!(
        "/root/kit/lathe-vmm ask {}/control '{{\"status\":{{}}}}' | grep -E '\"total_bytes\":3[0-9]{{8}},'",
        machine.folder
    );
    host.wait_until("the guest's statistics", LIMIT, &line);
    machine.shell(&fill(150)).expect_ok();
    machine.powers_off();
}

fn unused_memory_goes_back_by_itself(hosts: &Hosts) {
    let host = prepared(hosts);
    let kernel = "6.12";
    let machine = Machine::boot(&host, kernel, "vmlinux", &options("--memory 384M --balloon"));
    machine.shell(&fill(150)).expect_ok();
    let full = resident_mib(&machine);
    assert!(full >= 150, "150 MiB were written, {full} MiB are resident");
    machine.exec(RELEASE).expect_ok();
    let left = wait_resident(&machine, "what was freed is reported", full - 120);
    assert_eq!(status(&machine, "balloon_bytes"), 0);
    machine.powers_off();
    hosts.note(&format!("{kernel}: {full} MiB resident when full, {left} MiB after reporting"));
}
