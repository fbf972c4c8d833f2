//! Machines outlive the agent and come through the host's own life: kills at random moments, restarts, reboots.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lathe_tests::dice::Dice;
use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{View, answers, away, boot_id, copy_initrd, exec, make, make_small, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "survival",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_stopped_agent_leaves_machines_alone", a_stopped_agent_leaves_machines_alone),
        ("an_end_while_nobody_looked_is_seen", an_end_while_nobody_looked_is_seen),
        ("twenty_kills_lose_nothing", twenty_kills_lose_nothing),
        ("a_reboot_brings_back_what_shall_come_back", a_reboot_brings_back_what_shall_come_back),
    ],
};

/// How often the agent is killed.
const KILLS: u64 = 20;
const KILL: &str = "systemctl kill --signal=KILL --kill-who=main lathed.service";

fn a_stopped_agent_leaves_machines_alone(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "keeper", "--net 10mbit");
    let boot = boot_id(&host, "keeper");
    let pid = show(&host, "keeper")["pid"].clone();
    let before = settled(&host).essence();
    for line in [
        "systemctl restart lathed",
        "systemctl stop lathed.service && sleep 1 && systemctl start lathed",
        KILL,
    ] {
        host.run(line).expect_ok();
        answers(&host, "keeper");
        assert!(
            settled(&host).essence() == before,
            "{line}: before:\n{before}\nafter:\n{}",
            View::of(&host).essence()
        );
        assert!(
            boot_id(&host, "keeper") == boot && show(&host, "keeper")["pid"] == pid,
            "{line}: the machine was replaced"
        );
    }
    exec(&host, "keeper", "sh -c 'echo said after all that >/dev/console'").expect_ok();
    host.wait_until(
        "its console is attached again",
        Duration::from_secs(20),
        "lathe logs keeper | grep 'said after all that'",
    );
    host.run("lathe resize keeper --cpu 0.5 --net 20mbit --json >/tmp/shown && jq -e '.outcome == \"applied\"' /tmp/shown")
        .expect_ok();
    settled(&host).expect_agreement();
    away(&host, &["keeper"]);
}

fn an_end_while_nobody_looked_is_seen(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "killed", "--net none");
    make_small(&host, "again", "--net none --restart on-failure");
    host.run("lathe resize again --cpu 1").expect_ok();
    let boot = boot_id(&host, "again");
    let pids = ["killed", "again"].map(|name| show(&host, name)["pid"].to_string());
    host.run("systemctl stop lathed.socket lathed.service").expect_ok();
    host.run(&format!("kill -9 {}", pids.join(" "))).expect_ok();
    host.wait_until("both are gone", Duration::from_secs(20), "! pgrep -x lathe-vmm");
    host.run("systemctl start lathed.socket lathed.service").expect_ok();
    host.wait_until(
        "the end is seen",
        Duration::from_secs(30),
        "lathe show killed --json >/tmp/shown && jq -e '.state == \"failed\"' /tmp/shown",
    );
    host.wait_until(
        "the other is started again",
        Duration::from_secs(60),
        "lathe show again --json >/tmp/shown && jq -e '.state == \"running\" and .restarts == 1' /tmp/shown",
    );
    answers(&host, "again");
    assert!(boot_id(&host, "again") != boot);
    settled(&host).expect_agreement();
    away(&host, &["killed", "again"]);
}

/// What is killed in the middle, and how long it takes undisturbed.
struct Step {
    /// `{}`: name of the machine.
    line: &'static str,
    took: Duration,
}

fn twenty_kills_lose_nothing(hosts: &Hosts) {
    let host = hosts.host(1);
    let seed = std::env::var("LATHE_SEED").ok().and_then(|text| text.parse().ok());
    let seed =
        seed.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs()));
    hosts.note(&format!("seed {seed}; again with LATHE_SEED={seed}"));
    let mut dice = Dice(seed);
    make_small(&host, "keeper", "--net 10mbit --restart always");
    let keeper = boot_id(&host, "keeper");
    let mut steps = [
        "lathe run {} --wait 0 --memory 128M --cpu 0.25 --net 10mbit",
        "lathe resize {} --cpu 0.5 --net 20mbit",
        "lathe stop {} --timeout 2",
        "lathe rm {} --force --purge",
    ]
    .map(|line| Step { line, took: Duration::ZERO });
    for step in &mut steps {
        let begun = Instant::now();
        host.run(&step.line.replace("{}", "calm")).expect_ok();
        step.took = begun.elapsed();
    }
    let mut told = Vec::new();
    for kill in 0..KILLS {
        let index = usize::try_from(kill).unwrap_or_default() % steps.len();
        let step = &steps[index];
        // A little beyond its end: also the moments just after a promise.
        let bound = u64::try_from(step.took.as_millis()).unwrap_or(u64::MAX).max(50) * 6 / 5;
        let delay = dice.below(bound);
        let status = kill_in_the_middle(&host, &step.line.replace("{}", "victim"), delay);
        let view = settled(&host);
        judge(&view, index, status);
        view.expect_agreement();
        view.expect_no_uploads();
        assert!(view.state("keeper") == "running", "the bystander is {}", view.state("keeper"));
        told.push(format!(
            "{} +{delay} ms → client {status}, {}",
            step.line.split(' ').nth(1).unwrap_or_default(),
            view.state("victim")
        ));
        catch_up(&host, index, &view);
    }
    told.iter().for_each(|line| hosts.note(line));
    assert!(boot_id(&host, "keeper") == keeper, "the bystander has booted anew");
    let view = settled(&host);
    let names: Vec<_> = view.machines.iter().filter_map(|machine| machine["name"].as_str()).collect();
    away(&host, &names);
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.machines.is_empty() && view.host["disk"]["granted"] == 0, "{}", view.host);
}

/// Kills the agent `delay_msec` into a command and waits until it answers again. Returns the command's exit status.
fn kill_in_the_middle(host: &Host<'_>, line: &str, delay_msec: u64) -> i32 {
    let seconds = format!("{}.{:03}", delay_msec / 1000, delay_msec % 1000);
    let script = format!(
        "{{ {line} >/tmp/victim.out 2>&1; echo $? >/tmp/victim.status; }} & sleep {seconds}; {KILL}; wait
         timeout 60 sh -c 'until lathe list >/dev/null 2>&1; do sleep 0.1; done'; cat /tmp/victim.status"
    );
    host.run(&script).expect_ok().stdout().trim().parse().unwrap_or(-1)
}

/// What may have become of the victim: all of what was asked or nothing of it; all of it if the client was told so.
fn judge(view: &View, index: usize, status: i32) {
    let state = view.state("victim");
    let cpu = view.machine("victim").map(|machine| machine["cpu"]["desired"].clone());
    let fine = match index {
        0 => state == "running" || (state == "none" && status != 0),
        1 => state == "running" && cpu.is_some_and(|cpu| cpu == 500 || (cpu == 250 && status != 0)),
        2 => state == "stopped" || (state == "running" && status != 0),
        _ => state == "none" || (matches!(state, "running" | "stopped") && status != 0),
    };
    assert!(fine, "after step {index}, which the client saw end with {status}, the victim is {state}");
}

/// Brings the victim to where the next step begins.
fn catch_up(host: &Host<'_>, index: usize, view: &View) {
    match (index, view.state("victim")) {
        (0, "none") => {
            drop(host.run("lathe run victim --wait 0 --memory 128M --cpu 0.25 --net 10mbit").expect_ok())
        }
        (3, "running" | "stopped") => away(host, &["victim"]),
        _ => {}
    }
}

fn a_reboot_brings_back_what_shall_come_back(hosts: &Hosts) {
    let host = hosts.host(1);
    copy_initrd(&host);
    host.run("truncate -s 4M /root/disk.raw").expect_ok();
    make(
        &host,
        "back",
        "--memory 128M --cpu 1 --net 10mbit --autostart --kernel /boot/vmlinuz-$(uname -r) --initrd /root/initrd.img --disk /root/disk.raw",
    );
    host.run("lathe run left --wait 0 --memory 128M --cpu 0.75 --net none").expect_ok();
    host.run("lathe resize back --cpu 0.5 --net 20mbit").expect_ok();
    exec(&host, "back", "sh -c 'printf kept | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null'").expect_ok();
    let address = show(&host, "back")["addresses"].clone();
    let begun = Instant::now();
    host.reboot();
    hosts.note(&format!("the host was down and up again after {:.1} s", begun.elapsed().as_secs_f32()));
    let view = settled(&host);
    view.expect_agreement();
    assert!(view.state("back") == "running" && view.state("left") == "stopped", "{:?}", view.machines);
    answers(&host, "back");
    let back = show(&host, "back");
    assert!(
        back["cpu"]["actual"] == 500 && back["net"]["actual"] == 20_000_000 && back["addresses"] == address,
        "{back}"
    );
    exec(&host, "back", "head -c 4 /dev/vda").expect_ok().expect_stdout("kept");
    host.run("journalctl -b -1 --no-pager -u 'lathe-vm@*' -u lathed -u lathe-machines | grep -iE 'timed out|timeout|sigkill' | grep -v 'on client request'").expect_status(1);
    host.run("lathe start left").expect_ok();
    // Without a word: what is in force comes back as well.
    host.run("lathe list; sync").expect_ok();
    host.cut_power();
    let view = settled(&host);
    view.expect_agreement();
    assert!(
        view.state("back") == "running" && matches!(view.state("left"), "stopped" | "failed"),
        "{:?}",
        view.machines
    );
    answers(&host, "back");
    exec(&host, "back", "head -c 4 /dev/vda").expect_ok().expect_stdout("kept");
    away(&host, &["back", "left"]);
}
