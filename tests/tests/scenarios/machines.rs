//! Machines' lives through `lathe`, on a host where nothing was prepared.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use nix::sys::signal::Signal;

use crate::node::{View, answers, away, boot_id, copy_initrd, exec, make, make_small, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "machines",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("one_command_makes_a_machine", one_command_makes_a_machine),
        ("the_doctor_finds_nothing_wrong", the_doctor_finds_nothing_wrong),
        ("exec_carries_streams_status_and_terminal", exec_carries_streams_status_and_terminal),
        ("console_and_logs_show_the_serial_line", console_and_logs_show_the_serial_line),
        ("resize_changes_a_running_machine", resize_changes_a_running_machine),
        ("a_paused_machine_stands_still_and_goes_on", a_paused_machine_stands_still_and_goes_on),
        ("stop_start_and_remove", stop_start_and_remove),
        ("a_panic_is_told_and_the_machine_boots_again", a_panic_is_told_and_the_machine_boots_again),
        ("a_panic_or_a_watchdog_pauses_or_ends_as_configured", trouble_pauses_or_ends),
        ("a_guest_that_stands_still_is_booted_again_by_its_watchdog", a_watchdog_boots_a_guest_again),
        ("restart_policies_are_kept", restart_policies_are_kept),
        ("own_kernel_initrd_and_disk_are_uploaded", own_kernel_initrd_and_disk_are_uploaded),
        ("an_image_becomes_a_private_disk", an_image_becomes_a_private_disk),
    ],
};

fn the_doctor_finds_nothing_wrong(hosts: &Hosts) {
    let host = hosts.host(1);
    let report = host.run("lathe doctor --json").expect_ok().json();
    let checks = report["checks"].as_array().cloned().unwrap_or_default();
    assert!(checks.len() > 10, "{report}");
    for check in &checks {
        // The test host has no network to ask for the time.
        assert!(check["verdict"] == "ok" || check["code"] == "time", "{check}");
    }
    host.run("lathe doctor").expect_ok().expect_out("0 failed");
}

fn one_command_makes_a_machine(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("lathe list").expect_ok().expect_err("lathe run demo");
    let made = make(&host, "demo", "").expect_out("READY");
    hosts.note(&format!("lathe run demo, first of all: ready after {:.1} s", made.took.as_secs_f32()));
    let machine = show(&host, "demo");
    for (key, value) in [("schema", 1), ("revision", 1), ("vcpus", 1)] {
        assert!(machine[key] == value, "{key}: {machine}");
    }
    assert!(
        machine["name"] == "demo"
            && machine["state"] == "running"
            && machine["unit"] == "lathe-vm@demo.service",
        "{machine}"
    );
    assert!(
        machine["guest_agent"] == true && machine["restart"] == "no" && machine["autostart"] == false,
        "{machine}"
    );
    for (resource, amount) in [("cpu", 1000), ("memory", 512 << 20), ("net", 0), ("iops", 0)] {
        for word in ["desired", "granted", "actual"] {
            assert!(machine[resource][word] == amount, "{resource} {word}: {machine}");
        }
        assert!(machine[resource]["used"].is_u64(), "{resource} used: {machine}");
    }
    exec(&host, "demo", "uname -r").expect_ok().expect_stdout(&host.run("uname -r").stdout());
    exec(&host, "demo", "nproc").expect_ok().expect_stdout("1");
    let address =
        machine["addresses"][0].as_str().and_then(|a| a.split('/').next()).unwrap_or_default().to_owned();
    host.wait_until(
        "the guest is on the network",
        Duration::from_secs(30),
        &format!("ping -c 1 -W 1 {address}"),
    );
    host.run("systemctl status lathe-vm@demo --no-pager").expect_ok().expect_out("lathe-vmm");
    host.run("lathe list").expect_ok().expect_out("demo").expect_out(&address);
    let view = settled(&host);
    view.expect_agreement();
    assert!(
        view.host["schema"] == 1 && view.host["launcher"] == "systemd" && view.host["state"] == "healthy",
        "{}",
        view.host
    );
}

fn exec_carries_streams_status_and_terminal(hosts: &Hosts) {
    let host = demo(hosts);
    exec(&host, "demo", "sh -c 'echo out; echo err >&2; exit 7'")
        .expect_status(7)
        .expect_stdout("out")
        .expect_err("err");
    host.run("printf 'a line\\nand another' | lathe exec demo -- cat")
        .expect_ok()
        .expect_stdout("a line\nand another");
    host.run(
        "head -c 1000000 /dev/urandom >/tmp/noise; lathe exec demo -- cat </tmp/noise | cmp - /tmp/noise",
    )
    .expect_ok();
    host.run("lathe exec --env GREETING=hello --cwd /proc demo -- sh -c 'echo $GREETING in $PWD'")
        .expect_ok()
        .expect_stdout("hello in /proc");
    exec(&host, "demo", "sh -c 'kill -9 $$'").expect_status(137);
    exec(&host, "demo", "no-such-command")
        .expect_status(127)
        .expect_err("error[command-not-found]")
        .expect_err("no-such-command");
    exec(&host, "demo", "tty").expect_failure();
    host.run("lathe exec --tty demo -- tty </dev/null").expect_ok().expect_out("/dev/pts/");
}

fn console_and_logs_show_the_serial_line(hosts: &Hosts) {
    let host = demo(hosts);
    exec(&host, "demo", "sh -c 'echo heard on the serial line >/dev/console'").expect_ok();
    host.wait_until(
        "logs have it",
        Duration::from_secs(20),
        "lathe logs demo -n 5 | grep 'heard on the serial line'",
    );
    host.run("timeout 3 lathe console demo </dev/null | grep 'heard on the serial line'").expect_ok();
    let following = host.start("timeout 20 lathe logs demo -f -n 0 | grep -m 1 'and a second time'");
    for _ in 0..10 {
        exec(&host, "demo", "sh -c 'echo and a second time >/dev/console'").expect_ok();
    }
    following.finish().expect_ok();
}

fn resize_changes_a_running_machine(hosts: &Hosts) {
    let host = demo(hosts);
    let boot = boot_id(&host, "demo");
    let before = show(&host, "demo")["revision"].as_u64().unwrap_or_default();
    let plan = host
        .run("lathe resize demo --cpu 0.5 --net 10mbit --plan --exit-code --json")
        .expect_status(11)
        .json();
    assert!(
        plan["revision"] == before && plan["steps"].as_array().is_some_and(|steps| steps.len() == 2),
        "{plan}"
    );
    assert!(show(&host, "demo")["revision"] == before);
    let resized = host.run("lathe resize demo --cpu 0.5 --net 10mbit --json").expect_ok().json();
    assert!(resized["outcome"] == "applied" && resized["revision"] == before + 1, "{resized}");
    assert!(resized["cpu"]["actual"] == 500 && resized["net"]["actual"] == 10_000_000, "{resized}");
    host.run("cat /sys/fs/cgroup/lathe.slice/lathe-vm@demo.service/machine/cpu.max | awk '{print $1 / $2}'")
        .expect_stdout("0.5");
    host.run("tc qdisc show dev lt-demo; tc class show dev lt-demo").expect_ok().expect_out("10Mbit");
    let again = host.run("lathe resize demo --cpu 0.5 --net 10mbit --json").expect_ok().json();
    assert!(again["outcome"] == "unchanged" && again["revision"] == before + 1, "{again}");
    host.run("lathe resize demo --cpu 1 --plan --exit-code --if-revision 999")
        .expect_status(9)
        .expect_err("error[revision]");
    host.run(&format!("lathe resize demo --cpu 1 --if-revision {before}"))
        .expect_status(9)
        .expect_err("error[revision]");
    let relative = host.run("lathe resize demo --cpu +50% --net unlimited --json").expect_ok().json();
    assert!(relative["cpu"]["actual"] == 750 && relative["net"]["actual"] == 0, "{relative}");
    host.run("lathe resize demo --cpu 0.75 --plan --exit-code").expect_ok().expect_out("nothing to do");
    assert!(boot_id(&host, "demo") == boot, "the guest has booted anew");
    View::of(&host).expect_agreement();
}

fn a_paused_machine_stands_still_and_goes_on(hosts: &Hosts) {
    let host = demo(hosts);
    let boot = boot_id(&host, "demo");
    let took = host.run("lathe pause demo").expect_ok().expect_out("paused").took;
    hosts.note(&format!("paused after {:.2} s", took.as_secs_f32()));
    host.run("lathe pause demo").expect_ok();
    let usage = "awk '/usage_usec/ {print $2}' /sys/fs/cgroup/lathe.slice/lathe-vm@demo.service/machine/vcpu/cpu.stat";
    host.run(&format!("a=$({usage}); sleep 2; b=$({usage}); echo $((b - a))")).expect_stdout("0");
    for refused in ["lathe exec demo -- true", "lathe start demo"] {
        host.run(refused)
            .expect_status(9)
            .expect_err("error[machine-paused]")
            .expect_err("fix: lathe resume demo");
    }
    host.run("systemctl restart lathed").expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
    assert!(show(&host, "demo")["state"] == "paused", "{}", show(&host, "demo"));
    host.run("lathe resume demo").expect_ok().expect_out("running");
    answers(&host, "demo");
    assert!(boot_id(&host, "demo") == boot, "the guest has booted anew");
    host.run("lathe pause demo").expect_ok();
    host.run("lathe stop demo --timeout 60").expect_ok().expect_out("stopped on request");
    host.run("lathe pause demo").expect_status(9).expect_err("error[machine-not-running]");
    host.run("lathe start demo").expect_ok();
    answers(&host, "demo");
    settled(&host).expect_agreement();
}

fn a_panic_is_told_and_the_machine_boots_again(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "falls", "--net none");
    host.run("lathe resize falls --cpu 1").expect_ok();
    let boot = boot_id(&host, "falls");
    // The module that tells is loaded after the first hello.
    host.wait_until(
        "the guest can tell",
        Duration::from_secs(30),
        "lathe exec falls -- grep -q pvpanic_mmio /proc/modules",
    );
    let events = host.start("timeout 90 lathe events | grep -m 1 'kernel panicked: sysrq triggered crash'");
    host.run("timeout 20 lathe exec falls -- sh -c 'sleep 1; echo c >/proc/sysrq-trigger'");
    events.finish_within(Duration::from_secs(90)).expect_ok();
    host.wait_until(
        "it boots again by itself",
        Duration::from_secs(60),
        "lathe show falls --json >/tmp/shown && jq -e '.restarts == 1 and .state == \"running\" and .reason == \"\"' /tmp/shown",
    );
    answers(&host, "falls");
    assert!(boot_id(&host, "falls") != boot);
    settled(&host).expect_agreement();
    away(&host, &["falls"]);
}

/// What `--on-panic` and `--watchdog` may say, and what becomes of such a machine, which is called so as well.
const TROUBLE: [(&str, &str); 2] = [("pause", "paused"), ("end", "failed")];

fn trouble_pauses_or_ends(hosts: &Hosts) {
    let host = hosts.host(1);
    for (action, _) in TROUBLE {
        let options = format!("--cpu 0.7 --memory 128M --net none --on-panic {action} --watchdog {action}");
        make(&host, action, &options);
        host.wait_until(
            "the guest can tell",
            Duration::from_secs(30),
            &format!("lathe exec {action} -- grep -q pvpanic_mmio /proc/modules"),
        );
    }
    let events = host.start("timeout 300 lathe events >/tmp/events");
    for (action, _) in TROUBLE {
        host.run(&format!("timeout 5 lathe exec {action} -- sh -c 'sleep 1; echo c >/proc/sysrq-trigger'"));
    }
    expect_trouble(&host, "the guest's kernel panicked: sysrq triggered crash", [0, 0]);
    // Whoever has seen enough lets it boot again, as it would have.
    host.run("lathe resume pause").expect_ok();
    host.run("lathe start end").expect_ok();
    for (action, _) in TROUBLE {
        answers(&host, action);
    }
    settled(&host).expect_agreement();
    stop_feeding_watchdogs(&host);
    // One of them has booted anew by itself since, which counts for it.
    let expired = "the guest's watchdog expired";
    expect_trouble(&host, expired, [1, 0]);
    events.signal(Signal::SIGTERM);
    events.finish();
    // It is known also to a lathed that was not there.
    host.run("systemctl restart lathed").expect_ok();
    expect_trouble(&host, expired, [1, 0]);
    // The reason to stand still is over with it.
    host.run("lathe resume pause").expect_ok().expect_out("running");
    let shown = show(&host, "pause");
    assert!(shown["state"] == "running" && shown["reason"] == "", "{shown}");
    away(&host, &["pause", "end"]);
}

/// Their kernels live; PID 1, which feeds the watchdog and is the guest agent, stands still.
fn stop_feeding_watchdogs(host: &Host<'_>) {
    let freeze =
        "cd /sys/fs/cgroup && mkdir still && echo 1 >still/cgroup.procs && echo 1 >still/cgroup.freeze";
    for (action, _) in TROUBLE {
        host.wait_until(
            "the guest feeds its watchdog",
            Duration::from_secs(30),
            &format!("lathe exec {action} -- grep -q '^i6300esb [0-9]* 1 ' /proc/modules"),
        );
        // Nobody is left to say how it ended.
        host.run(&format!("timeout 5 lathe exec {action} -- sh -c '{freeze}'")).expect_failure();
    }
}

/// Waits until each machine is as configured and says why, in these words.
fn expect_trouble(host: &Host<'_>, words: &str, restarts: [u64; 2]) {
    for ((action, state), restarts) in TROUBLE.into_iter().zip(restarts) {
        host.wait_until(
            "it is as configured",
            Duration::from_secs(90),
            &format!("lathe show {action} --json >/tmp/shown && jq -e '.state == \"{state}\"' /tmp/shown"),
        );
        let shown = show(host, action);
        assert!(shown["reason"] == words && shown["restarts"] == restarts, "{shown}");
        host.run(&format!("lathe show {action}"))
            .expect_ok()
            .expect_out(&format!("{action}   {state}   {words}"))
            .expect_out(&format!("on panic {action}   watchdog {action}"));
        host.run(&format!("grep \"{action}: {words}\" /tmp/events")).expect_ok();
    }
}

fn stop_start_and_remove(hosts: &Hosts) {
    let host = demo(hosts);
    host.run("lathe rm demo")
        .expect_status(9)
        .expect_err("error[machine-running]")
        .expect_err("fix: lathe stop demo");
    let boot = boot_id(&host, "demo");
    let took = host.run("lathe stop demo --timeout 60").expect_ok().expect_out("stopped").took;
    hosts.note(&format!("stopped in order after {:.1} s", took.as_secs_f32()));
    assert!(show(&host, "demo")["reason"] == "stopped on request", "{}", show(&host, "demo"));
    host.run("lathe stop demo").expect_ok();
    host.run("lathe logs demo").expect_ok().expect_out("lathe-guest: ready");
    exec(&host, "demo", "true")
        .expect_status(9)
        .expect_err("error[machine-not-running]")
        .expect_err("fix: lathe start demo");
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.host["cpu"]["granted"] == 0 && view.host["memory"]["granted"] == 0, "{}", view.host);
    host.run("lathe resize demo --cpu 0.5").expect_ok();
    host.run("lathe start demo").expect_ok().expect_out("running");
    answers(&host, "demo");
    assert!(boot_id(&host, "demo") != boot);
    assert!(show(&host, "demo")["cpu"]["actual"] == 500);
    host.run("lathe stop demo --force").expect_ok();
    host.run("lathe rm demo").expect_ok().expect_out("removed");
    host.run("lathe show demo").expect_status(8).expect_err("error[no-such-machine]");
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.machines.is_empty());
}

fn a_watchdog_boots_a_guest_again(hosts: &Hosts) {
    let host = hosts.host(1);
    // A kernel that neither runs on nor resets after its panic.
    make_small(&host, "hangs", "--net none --watchdog reboot --cmdline 'console=ttyS0 quiet panic=0'");
    host.run("lathe resize hangs --cpu 1").expect_ok();
    host.run("lathe show hangs").expect_ok().expect_out("on panic report   watchdog reboot");
    let boot = boot_id(&host, "hangs");
    host.wait_until(
        "the guest feeds its watchdog",
        Duration::from_secs(30),
        "lathe exec hangs -- grep -q '^i6300esb [0-9]* 1 ' /proc/modules",
    );
    let panicked = std::time::Instant::now();
    host.run("timeout 5 lathe exec hangs -- sh -c 'sleep 1; echo c >/proc/sysrq-trigger'");
    host.wait_until(
        "the watchdog expires",
        Duration::from_secs(90),
        "journalctl -b -u lathed | grep -q 'hangs: .*watchdog expired'",
    );
    hosts.note(&format!("the watchdog expired {:.0} s after the panic", panicked.elapsed().as_secs_f32()));
    answers(&host, "hangs");
    assert!(boot_id(&host, "hangs") != boot);
    assert!(show(&host, "hangs")["restarts"] == 1);
    away(&host, &["hangs"]);
}

fn restart_policies_are_kept(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "never", "--net none");
    make_small(&host, "failing", "--net none --restart on-failure");
    make_small(&host, "always", "--net none --restart always");
    host.run("lathe resize failing --cpu 1").expect_ok();
    let boot = boot_id(&host, "failing");
    for name in ["never", "failing"] {
        host.run(&format!("kill -9 $(lathe show {name} --json | jq .pid)")).expect_ok();
    }
    host.wait_until(
        "a killed monitor is noticed",
        Duration::from_secs(30),
        "lathe show never --json >/tmp/shown && jq -e '.state == \"failed\"' /tmp/shown",
    );
    assert!(
        show(&host, "never")["reason"].as_str().is_some_and(|reason| reason.contains("signal 9")),
        "{}",
        show(&host, "never")
    );
    host.wait_until(
        "it is started again",
        Duration::from_secs(60),
        "lathe show failing --json >/tmp/shown && jq -e '.restarts == 1 and .state == \"running\"' /tmp/shown",
    );
    answers(&host, "failing");
    assert!(boot_id(&host, "failing") != boot);
    for name in ["failing", "always"] {
        exec(&host, name, "poweroff");
    }
    host.wait_until(
        "on-failure ends with the guest's wish",
        Duration::from_secs(60),
        "lathe show failing --json >/tmp/shown && jq -e '.state == \"stopped\"' /tmp/shown",
    );
    host.wait_until(
        "always does not",
        Duration::from_secs(60),
        "lathe show always --json >/tmp/shown && jq -e '.restarts == 1 and .state == \"running\"' /tmp/shown",
    );
    host.run("lathe stop always --force").expect_ok();
    assert!(show(&host, "always")["state"] == "stopped");
    settled(&host).expect_agreement();
    away(&host, &["never", "failing", "always"]);
}

fn own_kernel_initrd_and_disk_are_uploaded(hosts: &Hosts) {
    let host = hosts.host(1);
    copy_initrd(&host);
    host.run("printf 'from the disk' >/root/small.raw; truncate -s 8M /root/small.raw").expect_ok();
    make(
        &host,
        "own",
        "--cpu 0.7 --memory 256M --kernel /usr/lib/lathe-test/kernels/6.12/vmlinux --initrd /root/initrd.img --disk /root/small.raw",
    );
    exec(&host, "own", "head -c 13 /dev/vda").expect_ok().expect_stdout("from the disk");
    exec(&host, "own", "sh -c 'printf FROM | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null'").expect_ok();
    host.run("head -c 4 /root/small.raw").expect_stdout("from");
    let view = settled(&host);
    view.expect_agreement();
    view.expect_no_uploads();
    host.run("lathe stop own --timeout 60 && lathe start own").expect_ok();
    answers(&host, "own");
    exec(&host, "own", "head -c 13 /dev/vda").expect_ok().expect_stdout("FROM the disk");
    let kept = host.run("lathe rm own --force --json").expect_ok().json();
    let folder = kept["kept"].as_str().unwrap_or_default();
    host.run(&format!("head -c 13 {folder}/disk0.raw && rm -r {folder}"))
        .expect_ok()
        .expect_stdout("FROM the disk");
}

fn an_image_becomes_a_private_disk(hosts: &Hosts) {
    let host = hosts.host(1);
    let took = host
        .run_within(
            Duration::from_secs(240),
            "lathe image import debian /usr/lib/lathe-test/debian.ext4 --format raw",
        )
        .expect_ok()
        .took;
    hosts.note(&format!("a disk of 1 GiB imported in {:.1} s", took.as_secs_f32()));
    let images = host.run("lathe image list --json").expect_ok().json();
    assert!(
        images["images"][0]["name"] == "debian" && images["images"][0]["size_bytes"] == 1_u64 << 30,
        "{images}"
    );
    host.run("truncate -s 8M /root/small.raw; lathe image import debian /root/small.raw --format raw")
        .expect_status(9)
        .expect_err("error[image-exists]");
    // The host itself boots without an initial RAM disk; an image needs the distribution's.
    host.run("install -m 644 /usr/lib/lathe-test/kernels/6.12/initrd.img /boot/initrd.img-$(uname -r)")
        .expect_ok();
    let run = host
        .run_within(Duration::from_secs(240), "lathe run web --image debian --memory 512M --disk-size 1280M")
        .expect_ok();
    hosts.note(&format!("run --image: running after {:.1} s", run.took.as_secs_f32()));
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.host["disk"]["granted"] == 1280_u64 << 20, "{}", view.host);
    host.wait_until(
        "the kernel mounts the private disk",
        Duration::from_secs(240),
        "lathe logs web | grep -E 'EXT4-fs .vda.: mounted|systemd\\[1\\]'",
    );
    host.run("lathe image rm debian").expect_ok();
    assert!(show(&host, "web")["state"] == "running");
    away(&host, &["web"]);
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.host["disk"]["granted"] == 0, "{}", view.host);
}

/// The host with a running machine `demo`, also when an earlier scenario has failed.
fn demo<'a>(hosts: &'a Hosts) -> Host<'a> {
    let host = hosts.host(1);
    if host.run("lathe show demo --json >/tmp/shown && jq -e '.guest_agent' /tmp/shown").status != 0 {
        host.run("lathe rm demo --force --purge 2>/dev/null");
        make(&host, "demo", "");
    }
    host
}
