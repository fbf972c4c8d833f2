//! vCPUs plugged in and given back while the guest runs, by the monitor's own commands. Threads are made under the filter of system
//! calls, which the monitor always has here.

use std::time::Duration;

use lathe_tests::scenario::{Group, Hosts};

use super::monitor::{Machine, prepared};

/// Everything that takes seconds.
pub const GROUP: Group = Group {
    name: "hotplug",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[
        ("vcpus_come_and_go", vcpus_come_and_go),
        ("the_last_of_many_targets_holds", the_last_of_many_targets_holds),
        ("vcpus_added_during_boot_are_not_lost", vcpus_added_during_boot_are_not_lost),
    ],
};

/// From a command to its effect, in an emulated and busy host.
const LIMIT: Duration = Duration::from_secs(60);

fn set(machine: &Machine<'_>, count: u32) {
    machine.ask(&format!(r#"{{"set_cpus":{{"count":{count}}}}}"#)).expect_ok();
}

/// Waits until the guest has these online and the monitor knows it.
fn wait_for(machine: &Machine<'_>, online: &str, present: u32) {
    let folder = &machine.folder;
    let line = format!(
        "/root/kit/guest-exec {folder}/vsock cat /sys/devices/system/cpu/online | grep -x {online} && \
         /root/kit/lathe-vmm ask {folder}/control '{{\"status\":{{}}}}' | grep '\"present\":{present},'"
    );
    machine.host.wait_until(&format!("vCPUs {online} are online"), LIMIT, &line);
}

/// The kernel complains of nothing that has to do with its processors.
fn is_content(machine: &Machine<'_>) {
    machine
        .shell("busybox dmesg | grep -iE \"check_tsc_sync|failed to (boot|initialize)|refuse|ACPI.*error|WARNING:.*(cpu|smp)\"")
        .expect_status(1);
}

fn vcpus_come_and_go(hosts: &Hosts) {
    let host = prepared(hosts);
    for kernel in ["6.1", "6.12"] {
        let machine = Machine::boot(&host, kernel, "vmlinux", "--cpus 1 --cpus-max 4");
        machine.exec("cat /sys/devices/system/cpu/possible").expect_ok().expect_stdout("0-3");
        wait_for(&machine, "0", 1);
        for (count, online) in [(4, "0-3"), (1, "0"), (3, "0-2"), (2, "0-1")] {
            set(&machine, count);
            wait_for(&machine, online, count);
        }
        is_content(&machine);
        machine.ask(r#"{"set_cpus":{"count":5}}"#).expect_failure();
        // The shape stays, and an ejected vCPU is good for another life.
        machine.exec("reboot");
        machine.wait_ready(2);
        wait_for(&machine, "0-1", 2);
        set(&machine, 4);
        wait_for(&machine, "0-3", 4);
        machine.powers_off();
    }
}

fn the_last_of_many_targets_holds(hosts: &Hosts) {
    let host = prepared(hosts);
    let kernel = "6.12";
    let machine = Machine::boot(&host, kernel, "vmlinux", "--cpus 2 --cpus-max 4");
    for _ in 0..3 {
        [4, 1, 3, 2].into_iter().for_each(|count| set(&machine, count));
        machine.ask(r#"{"pause":{}}"#).expect_ok();
        set(&machine, 1);
        set(&machine, 4);
        machine.ask(r#"{"resume":{}}"#).expect_ok();
    }
    wait_for(&machine, "0-3", 4);
    [1, 4, 1].into_iter().for_each(|count| set(&machine, count));
    wait_for(&machine, "0", 1);
    machine.powers_off();
}

fn vcpus_added_during_boot_are_not_lost(hosts: &Hosts) {
    let host = prepared(hosts);
    let kernel = "6.1";
    let files = format!(
        "--kernel /usr/lib/lathe-test/kernels/{kernel}/vmlinux --initrd /root/kit/{kernel}.cpio --cpus 1 --cpus-max 8"
    );
    let machine = Machine::start(&host, &files);
    let control = format!("test -S {}/control", machine.folder);
    host.wait_until("the monitor listens", LIMIT, &control);
    for count in 2..=6 {
        set(&machine, count);
        // Spread over the boot.
        std::thread::sleep(Duration::from_millis(300));
    }
    machine.wait_ready(1);
    let present = format!(
        "/root/kit/guest-exec {}/vsock cat /sys/devices/system/cpu/present | grep -x 0-5",
        machine.folder
    );
    host.wait_until("the guest has all vCPUs", LIMIT, &present);
    // Those that were there before the guest's agent are nobody's business yet.
    machine
        .shell("for cpu in 1 2 3 4 5; do echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done")
        .expect_ok();
    wait_for(&machine, "0-5", 6);
    is_content(&machine);
    machine.powers_off();
}
