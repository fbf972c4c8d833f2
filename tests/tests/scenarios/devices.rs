//! Disks and nics that come and go while the guest runs: `lathe-vmm` alone, with its system call filter on, and the built-in guest.

use std::time::Duration;

use lathe_tests::scenario::{Group, Hosts, Outcome};

use super::monitor::{Machine, prepared};

/// Boots four guests.
pub const GROUP: Group = Group {
    name: "devices",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[
        ("a_disk_comes_grows_and_goes", a_disk_comes_grows_and_goes),
        ("a_nic_comes_and_goes", a_nic_comes_and_goes),
        ("rings_come_back_and_a_reboot_ends_what_was_asked_to_go", rings_and_reboot),
    ],
};

/// From a command to the guest's deed, in an emulated and busy host.
const DEED_LIMIT: Duration = Duration::from_secs(30);

/// Sends a command along with what is opened for it.
fn ask<'a>(machine: &Machine<'a>, command: &str, fd: &str) -> Outcome<'a> {
    let folder = &machine.folder;
    machine.host.run(&format!("cd {folder} && /root/kit/lathe-vmm ask control '{command}' --fd {fd}"))
}

fn attach_disk(machine: &Machine<'_>, file: &str, name: &str) {
    ask(machine, r#"{"attach_disk":{"fd":0}}"#, file)
        .expect_ok()
        .expect_out(&format!(r#"{{"attached":{{"device":"{name}"}}}}"#));
}

fn detach<'a>(machine: &Machine<'a>, name: &str) -> Outcome<'a> {
    machine.ask(&format!(r#"{{"detach":{{"device":"{name}"}}}}"#))
}

/// Waits until a line of shell succeeds in the guest.
fn wait(machine: &Machine<'_>, what: &str, line: &str) {
    let command = format!("/root/kit/guest-exec {}/vsock sh -c '{line}'", machine.folder);
    machine.host.wait_until(what, DEED_LIMIT, &command);
}

/// Waits until the monitor has closed what it had of a file.
fn wait_closed(machine: &Machine<'_>, file: &str) {
    let line = format!("! ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q {}/{file}$", machine.folder);
    machine.host.wait_until("the monitor has closed the file", DEED_LIMIT, &line);
}

fn a_disk_comes_grows_and_goes(hosts: &Hosts) {
    let host = prepared(hosts);
    let kernel = "6.1";
    let machine = Machine::boot(&host, kernel, "vmlinux", "--memory 256M --hotplug-slots 4");
    let file = format!("{}/hot.raw", machine.folder);
    host.run(&format!("head -c 8M /dev/urandom >{file}")).expect_ok();
    let begun = std::time::Instant::now();
    attach_disk(&machine, "hot.raw", "block0");
    wait(&machine, "the disk is in the guest", "test -b /dev/vda");
    hosts.note(&format!("{kernel}: in the guest after {:.1} s", begun.elapsed().as_secs_f32()));
    let content = host.run(&format!("sha256sum <{file}")).expect_ok().stdout();
    machine.shell("sha256sum </dev/vda").expect_ok().expect_stdout(&content);

    host.run(&format!("truncate -s 16M {file}")).expect_ok();
    machine.ask(r#"{"grow_disk":{"device":"block0"}}"#).expect_ok().expect_out("16777216");
    wait(&machine, "the disk has grown", "grep -qx 32768 /sys/block/vda/size");
    machine.shell("echo written | dd of=/dev/vda bs=512 seek=32767 conv=sync && sync").expect_ok();
    host.run(&format!("tail -c 512 {file} | head -c 7")).expect_ok().expect_stdout("written");
    host.run(&format!("truncate -s 8M {file}")).expect_ok();
    machine.ask(r#"{"grow_disk":{"device":"block0"}}"#).expect_err("never shrinks");
    host.run(&format!("truncate -s 16M {file}")).expect_ok();

    detach(&machine, "block0").expect_ok();
    wait(&machine, "the disk has gone", "test ! -e /sys/block/vda");
    wait_closed(&machine, "hot.raw");
    detach(&machine, "block0").expect_err("there is no device block0");
    machine.powers_off();
}

fn a_nic_comes_and_goes(hosts: &Hosts) {
    let host = prepared(hosts);
    let machine = Machine::boot(&host, "6.12", "vmlinux", "--memory 256M --hotplug-slots 4");
    host.run(
        "ip tuntap add hot0 mode tap vnet_hdr && ip addr add 10.77.7.1/24 dev hot0 && ip link set hot0 up",
    )
    .expect_ok();
    for round in 0..2 {
        let nic = format!(r#"{{"attach_nic":{{"tap":0,"mac":[2,0,0,0,7,{round}],"mtu":1400}}}}"#);
        ask(&machine, &nic, "tap:hot0").expect_ok().expect_out(&format!("net{round}"));
        wait(&machine, "the nic is in the guest", "test -e /sys/class/net/eth0");
        let seen =
            format!(r#""nics":{{"nics":[{{"device":"net{round}","mac":[2,0,0,0,7,{round}]}}],"free":3}}"#);
        machine.ask(r#"{"status":{}}"#).expect_ok().expect_out(&seen);
        machine.shell("cat /sys/class/net/eth0/mtu").expect_ok().expect_stdout("1400");
        machine.exec("busybox ip addr add 10.77.7.2/24 dev eth0").expect_ok();
        machine.exec("busybox ip link set eth0 up").expect_ok();
        host.wait_until("the guest answers", DEED_LIMIT, "ping -c 1 -W 1 10.77.7.2");
        detach(&machine, &format!("net{round}")).expect_ok();
        wait(&machine, "the nic has gone", "test ! -e /sys/class/net/eth0");
        // The guest lets go of the slot last, and the monitor of the tap then.
        host.wait_until("the tap is free", DEED_LIMIT, "grep -qx 0 /sys/class/net/hot0/carrier");
    }
    machine.powers_off();
    host.run("ip link del hot0").expect_ok();
}

fn rings_and_reboot(hosts: &Hosts) {
    let host = prepared(hosts);
    let boot = host.run("f=$(mktemp /root/boot-XXXXXX) && truncate -s 8M $f && echo $f").expect_ok().stdout();
    let options = format!("--memory 256M --hotplug-slots 6 --disk {boot}");
    let machine = Machine::boot(&host, "6.12", "vmlinux", &options);
    for number in 1..=5 {
        host.run(&format!("truncate -s {number}M {}/{number}.raw", machine.folder)).expect_ok();
    }
    for number in 1..=4 {
        attach_disk(&machine, &format!("{number}.raw"), &format!("block{number}"));
    }
    ask(&machine, r#"{"attach_disk":{"fd":0}}"#, "5.raw").expect_err("no ring is left");
    // Also a disk from the start can go, and its ring serves another.
    wait(&machine, "all disks are there", "test -b /dev/vde");
    detach(&machine, "block0").expect_ok();
    wait(&machine, "the first disk has gone", "test ! -e /sys/block/vda");
    host.wait_until(
        "its ring is free",
        DEED_LIMIT,
        &format!(
            "cd {} && /root/kit/lathe-vmm ask control '{{\"attach_disk\":{{\"fd\":0}}}}' --fd 5.raw",
            machine.folder
        ),
    );
    // Nobody in the guest answers while it stands still; the reboot lets go.
    machine.ask(r#"{"pause":{}}"#).expect_ok();
    detach(&machine, "block2").expect_ok();
    machine.ask(r#"{"resume":{}}"#).expect_ok();
    machine.exec("reboot");
    machine.wait_ready(2);
    let sizes = machine.shell("cat /sys/block/vd*/size").expect_ok().stdout();
    let mut sizes: Vec<u64> = sizes.split_whitespace().filter_map(|size| size.parse().ok()).collect();
    sizes.sort_unstable();
    assert_eq!(sizes, [1, 3, 4, 5].map(|mib: u64| mib * 2048), "what was attached stays, block2 is gone");
    wait_closed(&machine, "2.raw");
    machine.powers_off();
}
