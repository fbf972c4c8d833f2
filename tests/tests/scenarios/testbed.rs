//! The test host itself: what every other scenario takes for granted. Nothing of Lathe is in these.

use std::time::Duration;

use lathe_tests::scenario::{Group, Hosts};

/// On one host.
pub const ALONE: Group = Group {
    name: "testbed",
    hosts: 1,
    lathe: false,
    bench: false,
    scenarios: &[
        ("the_host_has_settled", the_host_has_settled),
        ("both_kernels_boot_under_kvm", both_kernels_boot_under_kvm),
        ("traffic_control_is_complete", traffic_control_is_complete),
        ("streams_and_status_come_through", streams_and_status_come_through),
        ("a_reboot_keeps_the_disk", a_reboot_keeps_the_disk),
        ("a_power_cut_keeps_what_was_synced", a_power_cut_keeps_what_was_synced),
    ],
};

/// On two hosts.
pub const TOGETHER: Group = Group {
    name: "segment",
    hosts: 2,
    lathe: false,
    bench: false,
    scenarios: &[
        ("hosts_reach_each_other", hosts_reach_each_other),
        ("hosts_differ_in_identity", hosts_differ_in_identity),
    ],
};

fn the_host_has_settled(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("systemctl is-system-running").expect_ok().expect_stdout("running");
    host.run("cat /sys/fs/cgroup/cgroup.controllers").expect_out("cpu io memory").expect_out("pids");
    host.run("cat /proc/pressure/cpu").expect_ok().expect_out("some avg10");
    host.run("busctl call org.freedesktop.PolicyKit1 / org.freedesktop.DBus.Peer Ping").expect_ok();
    host.run("busybox; iperf3 --version; fio --version; qemu-system-x86_64 --version").expect_ok();
}

fn both_kernels_boot_under_kvm(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run(
        "set -e; mkdir -p /root/ramfs/bin; cd /root/ramfs; cp /bin/busybox bin/; ln -sf busybox bin/sh
         printf '#!/bin/sh\\necho reached init of $(busybox uname -r)\\nbusybox reboot -f\\n' >init; chmod +x init
         printf 'init\\nbin\\nbin/busybox\\nbin/sh\\n' | busybox cpio -o -H newc >/root/ramfs.cpio",
    )
    .expect_ok();
    for kernel in ["6.1", "6.12"] {
        // An emulated guest stands still once in some hundred boots, whoever runs it: only that is tried again, and told.
        let booted = host.run_within(
            Duration::from_secs(300),
            &format!(
                "cd /usr/lib/lathe-test/kernels/{kernel}; for file in vmlinux initrd.img; do test -s $file || exit 9; done
                 for attempt in 1 2 3; do
                     timeout 75 qemu-system-x86_64 -accel kvm -M microvm -m 256 -nodefaults -no-user-config -display none \
                         -no-reboot -serial stdio -kernel bzImage -initrd /root/ramfs.cpio \
                         -append 'console=ttyS0 quiet panic=-1 reboot=t' </dev/null
                     status=$?; [ $status = 124 ] || exit $status; echo stood still
                 done; exit $status"
            ),
        );
        let booted = booted.expect_ok().expect_out(&format!("reached init of {kernel}."));
        let stood = booted.stdout().matches("stood still").count();
        let also = if stood == 0 { String::new() } else { format!("; stood still before, {stood} times") };
        hosts.note(&format!("{kernel}: {:.1} s in QEMU's microvm{also}", booted.took.as_secs_f32()));
    }
}

fn traffic_control_is_complete(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("ip link add tc0 type dummy && ip link add ifb7 type ifb && ip link set tc0 up && ip link set ifb7 up")
        .expect_ok();
    for discipline in [
        "htb default 10",
        "tbf rate 1mbit burst 32k latency 50ms",
        "fq_codel",
        "cake bandwidth 10mbit",
        "netem delay 5ms",
    ] {
        host.run(&format!("tc qdisc replace dev tc0 root {discipline} && tc qdisc del dev tc0 root"))
            .expect_ok();
    }
    host.run("tc qdisc add dev tc0 clsact").expect_ok();
    for filter in [
        "matchall action mirred egress redirect dev ifb7",
        "matchall action police rate 1mbit burst 32k conform-exceed drop",
        "flower ip_proto tcp action pass",
    ] {
        host.run(&format!("tc filter add dev tc0 ingress protocol ip {filter}")).expect_ok();
    }
    host.run("ip link del tc0 && ip link del ifb7").expect_ok();
}

fn streams_and_status_come_through(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("echo to stdout; echo to stderr >&2; exit 7")
        .expect_status(7)
        .expect_stdout("to stdout")
        .expect_err("to stderr");
    host.run("kill -TERM $$").expect_status(128 + 15);
    let sleeper = host.start("sleep 1000");
    host.run("head -c 3000000 /dev/zero | wc -c").expect_ok().expect_stdout("3000000");
    sleeper.signal(nix::sys::signal::Signal::SIGKILL);
    sleeper.finish().expect_status(128 + 9);
}

fn a_reboot_keeps_the_disk(hosts: &Hosts) {
    let host = hosts.host(1);
    let before = host.run("cat /proc/sys/kernel/random/boot_id").stdout();
    host.run("echo kept >/root/note");
    host.reboot();
    host.run("cat /root/note").expect_ok().expect_stdout("kept");
    let after = host.run("cat /proc/sys/kernel/random/boot_id").expect_ok().stdout();
    assert_ne!(before, after, "the host has not rebooted");
}

fn a_power_cut_keeps_what_was_synced(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("echo safe >/root/synced; sync /root/synced /root");
    host.cut_power();
    host.run("cat /root/synced").expect_ok().expect_stdout("safe");
    host.wait_until("the host settles again", Duration::from_secs(60), "systemctl is-system-running");
}

fn hosts_reach_each_other(hosts: &Hosts) {
    for host in hosts.all() {
        let other = 3 - host.number();
        host.run(&format!("ping -c 3 -i 0.2 host{other}")).expect_ok().expect_out("0% packet loss");
    }
    let server = hosts.host(2).start("iperf3 --server --one-off");
    // With `--json` a client whom nobody answered ends with 0 too, so the server is waited for by its socket.
    hosts.host(2).wait_until(
        "iperf3 listens",
        Duration::from_secs(30),
        "ss -Hltn 'sport = :5201' | grep -q .",
    );
    let client = hosts.host(1).run("iperf3 --client host2 --time 3 --json").expect_ok();
    server.finish().expect_ok();
    let rate = client.json()["end"]["sum_received"]["bits_per_second"].as_f64().unwrap_or_default();
    hosts.note(&format!("one TCP stream between hosts: {:.0} Mbit/s", rate / 1e6));
    assert!(rate > 20e6, "the segment carries only {rate} bit/s");
}

fn hosts_differ_in_identity(hosts: &Hosts) {
    let identity = |number| hosts.host(number).run("hostname; cat /etc/machine-id").expect_ok().stdout();
    let (first, second) = (identity(1), identity(2));
    assert!(first.starts_with("host1\n") && second.starts_with("host2\n"), "hostnames: {first} / {second}");
    assert_ne!(first.lines().nth(1), second.lines().nth(1), "machine ids are the same");
}
