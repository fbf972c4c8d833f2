//! vCPUs plugged in and given back while the guest runs, by the monitor's own commands. Threads are made under the filter of system
//! calls, which the monitor always has here.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts, Running};

use super::elastic::{MIB, total_kib, wait_status};
use super::monitor::{KERNELS, Machine, prepared, push_beside};

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
        ("a_guest_may_refuse_to_give_a_vcpu_back", a_guest_may_refuse_to_give_a_vcpu_back),
        ("sixty_four_possible_vcpus_cost_little", sixty_four_possible_vcpus_cost_little),
        ("the_shape_stays_over_a_kexec", the_shape_stays_over_a_kexec),
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

/// Brings `inside` into a machine whose first disk it is.
fn bring_inside(host: &Host<'_>) {
    push_beside(host, "inside");
    host.run("cp /root/kit/inside /root/inside.raw && truncate -s %512 /root/inside.raw").expect_ok();
}

const UNPACK: &str = "cat /dev/vda >/tmp/inside && chmod 755 /tmp/inside";

fn a_guest_may_refuse_to_give_a_vcpu_back(hosts: &Hosts) {
    let host = prepared(hosts);
    bring_inside(&host);
    for kernel in ["6.1", "6.12"] {
        let machine =
            Machine::boot(&host, kernel, "vmlinux", "--cpus 1 --cpus-max 4 --disk /root/inside.raw,ro");
        set(&machine, 2);
        wait_for(&machine, "0-1", 2);
        machine.shell(UNPACK).expect_ok();
        // 1.7 CPUs are spoken for: one cannot carry them.
        machine.shell("/tmp/inside reserve 2 300 >/tmp/said 2>&1 &").expect_ok();
        let reserved = format!(
            "/root/kit/guest-exec {}/vsock sh -c '[ $(grep -c reserved /tmp/said) = 2 ] || {{ cat /tmp/said; false; }}'",
            machine.folder
        );
        host.wait_until("the CPUs are reserved", LIMIT, &reserved);
        set(&machine, 1);
        let refused = format!(
            "/root/kit/lathe-vmm ask {}/control '{{\"status\":{{}}}}' | grep '\"refused\":1'",
            machine.folder
        );
        host.wait_until("the refusal is known", LIMIT, &refused);
        machine.exec("cat /sys/devices/system/cpu/online").expect_ok().expect_stdout("0-1");
        // Asked again once nothing stands against it.
        machine.shell("kill $(busybox pidof inside)").expect_ok();
        set(&machine, 1);
        wait_for(&machine, "0", 1);
        set(&machine, 3);
        wait_for(&machine, "0-2", 3);
        machine.powers_off();
    }
}

/// What the monitor has in memory besides the guest's, KiB: the guest's memory is what is mapped in large pieces.
fn monitor_kib(machine: &Machine<'_>) -> u64 {
    let line = format!(
        "for pid in $(pgrep -x lathe-vmm); do [ $(readlink /proc/$pid/cwd) != {} ] || \
         awk '/^Size/ {{ size = $2 }} /^Private/ && size < 100000 {{ sum += $2 }} END {{ print sum }}' /proc/$pid/smaps; done",
        machine.folder
    );
    machine.host.run(&line).expect_ok().stdout().parse().unwrap_or(u64::MAX)
}

fn sixty_four_possible_vcpus_cost_little(hosts: &Hosts) {
    let host = prepared(hosts);
    let mut resident = Vec::new();
    for most in [1, 64] {
        let machine =
            Machine::boot(&host, "6.12", "vmlinux", &format!("--memory 256M --cpus 1 --cpus-max {most}"));
        resident.push((monitor_kib(&machine), total_kib(&machine) >> 10));
        if most == 64 {
            machine.exec("cat /sys/devices/system/cpu/possible").expect_ok().expect_stdout("0-63");
            set(&machine, 8);
            wait_for(&machine, "0-7", 8);
            set(&machine, 1);
            wait_for(&machine, "0", 1);
            is_content(&machine);
        }
        machine.powers_off();
    }
    let [(one, sees_one), (many, sees_many)] = resident[..] else { panic!("two machines were booted") };
    hosts.note(&format!(
        "1 possible vCPU: the monitor has {one} KiB of its own, the guest sees {sees_one} MiB; 64: {many} KiB, {sees_many} MiB"
    ));
    assert!(many <= one + 512, "63 vCPUs that are not there cost {} KiB", many.saturating_sub(one));
}

fn the_shape_stays_over_a_kexec(hosts: &Hosts) {
    let host = prepared(hosts);
    bring_inside(&host);
    let kernel = "6.12";
    host.run(&format!(
        "cp {KERNELS}/{kernel}/bzImage /root/next.raw && cp /root/kit/{kernel}.cpio /root/initrd.raw && \
         truncate -s %512 /root/next.raw /root/initrd.raw"
    ))
    .expect_ok();
    let cmdline = "console=ttyS0 quiet init_on_alloc=0 memhp_default_state=online_movable";
    let machine = Machine::boot(
        &host,
        kernel,
        "vmlinux",
        &format!(
            "--memory 384M --memory-max 640M --balloon --cpus 1 --cpus-max 4 --disk /root/inside.raw,ro \
             --disk /root/next.raw,ro --disk /root/initrd.raw,ro --cmdline '{cmdline}'"
        ),
    );
    set(&machine, 3);
    wait_for(&machine, "0-2", 3);
    machine.ask(r#"{"set_plugged":{"bytes":134217728}}"#).expect_ok();
    wait_status(&machine, "plugged_bytes", 128 * MIB);
    let grown = total_kib(&machine);
    machine.ask(r#"{"set_balloon":{"bytes":67108864}}"#).expect_ok();
    wait_status(&machine, "balloon_bytes", 64 * MIB);
    let boot = machine.exec("cat /proc/sys/kernel/random/boot_id").expect_ok().stdout();
    machine.shell(UNPACK).expect_ok();
    machine
        .shell("cat /dev/vdb >/tmp/kernel && cat /dev/vdc >/tmp/initrd && cat /proc/cmdline >/tmp/cmdline")
        .expect_ok();
    let watched = watch_balloon(&machine);
    // Nobody is left to answer when it works.
    machine
        .shell("/tmp/inside kexec /tmp/kernel /tmp/initrd \"$(cat /tmp/cmdline)\" >/dev/ttyS0 2>&1 &")
        .expect_ok();
    machine.wait_ready(2);
    assert!(machine.exec("cat /proc/sys/kernel/random/boot_id").expect_ok().stdout() != boot);
    watched.finish_within(LIMIT).expect_ok();
    let (without, looks) = without_driver(&machine);
    hosts.note(&format!("between the kernels: no balloon driver at {without} of {looks} looks"));
    // A device that went on for the old kernel would have a driver at nearly all of them: the next one resets it and begins in one breath.
    assert!(looks >= 4 && 4 * without >= looks, "no balloon driver at {without} of {looks} looks");
    wait_status(&machine, "plugged_bytes", 128 * MIB);
    wait_status(&machine, "balloon_bytes", 64 * MIB);
    machine
        .shell("for cpu in 1 2; do grep -q 1 /sys/devices/system/cpu/cpu$cpu/online || echo 1 >/sys/devices/system/cpu/cpu$cpu/online; done")
        .expect_ok();
    wait_for(&machine, "0-2", 3);
    let now = total_kib(&machine);
    assert!(now.abs_diff(grown) < 8 << 10, "the guest had {grown} KiB and has {now}");
    set(&machine, 1);
    wait_for(&machine, "0", 1);
    machine.ask(r#"{"set_balloon":{"bytes":0}}"#).expect_ok();
    wait_status(&machine, "balloon_bytes", 0);
    machine.ask(r#"{"set_plugged":{"bytes":0}}"#).expect_ok();
    wait_status(&machine, "plugged_bytes", 0);
    machine.powers_off();
}

/// Asks the monitor for its status again and again until the guest is ready for the second time, and keeps what it says.
fn watch_balloon<'a>(machine: &Machine<'a>) -> Running<'a> {
    let folder = &machine.folder;
    machine.host.start(&format!(
        "cd {folder} && end=$(($(date +%s) + {})) && until [ $(grep -c 'lathe-guest: ready' console) -ge 2 ]; do
             [ $(date +%s) -lt $end ] || exit 1
             begun=$(grep -c 'inside: kexec' console)
             /root/kit/lathe-vmm ask control '{{\"status\":{{}}}}' | sed \"s/^/$begun /\"
             sleep 0.1
         done >looks",
        2 * LIMIT.as_secs()
    ))
}

/// Of how many looks since the kexec how many found no driver, which then has nothing in its balloon, and how many there were.
fn without_driver(machine: &Machine<'_>) -> (usize, usize) {
    let text = machine.host.run(&format!("cat {}/looks", machine.folder)).expect_ok().stdout();
    let (mut without, mut looks) = (0, 0);
    for look in text.lines().filter_map(|line| line.strip_prefix("1 ")) {
        looks += 1;
        if look.contains("\"balloon_driver\":false") {
            without += 1;
            assert!(
                look.contains("\"balloon_bytes\":0,"),
                "a balloon without driver holds something: {look}"
            );
        }
    }
    (without, looks)
}
