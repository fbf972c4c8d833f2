//! Disks that come, grow and go through `lathe disk`, while the machine runs, while it is off, and with lathed killed in between.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{answers, away, boot_id, exec, make, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "disks",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_disk_comes_grows_and_goes_while_the_guest_runs", a_disk_comes_grows_and_goes),
        ("disks_outlive_lathed_and_the_guests_power", disks_outlive_lathed_and_power),
        ("what_cannot_be_is_refused_and_changes_nothing", what_cannot_be_is_refused),
        ("a_guest_that_does_not_answer_keeps_its_disk", a_guest_that_does_not_answer),
    ],
};

/// From a command to the guest's deed, in an emulated and busy host.
const DEED_LIMIT: Duration = Duration::from_secs(60);
const KILL: &str = "systemctl kill --signal=KILL --kill-who=main lathed.service";
const MIB: u64 = 1 << 20;

/// The machine of this group, made when it is not there yet.
fn demo(hosts: &Hosts) -> Host<'_> {
    let host = hosts.host(1);
    if host.run("lathe show demo").status != 0 {
        make(&host, "demo", "--memory 256M --net none");
    }
    host
}

/// Waits until a line of shell succeeds in the guest.
fn wait(host: &Host<'_>, what: &str, line: &str) {
    host.wait_until(what, DEED_LIMIT, &format!("lathe exec demo -- sh -c '{line}'"));
}

/// What the guest calls the disk of this serial.
fn device(host: &Host<'_>, serial: &str) -> String {
    wait(host, "the disk is in the guest", &format!("grep -qx {serial} /sys/block/vd*/serial"));
    let found = exec(host, "demo", &format!("sh -c 'grep -lx {serial} /sys/block/vd*/serial'")).expect_ok();
    found.stdout().split('/').nth(3).unwrap_or_default().to_owned()
}

fn disks(host: &Host<'_>, name: &str) -> Vec<Value> {
    let list = host.run(&format!("lathe disk list {name} --json")).expect_ok().json();
    list["disks"].as_array().cloned().unwrap_or_default()
}

/// More than asked never, a little less where the host has no time; how exactly is measured by `tests/run bench exactness`.
fn a_rate_is_held(host: &Host<'_>, device: &str) {
    host.run("lathe resize demo --iops 20").expect_ok();
    assert!(show(host, "demo")["iops"]["actual"] == 20, "{}", show(host, "demo"));
    let said = exec(host, "demo", &format!("lathe-guest iops /dev/{device} 4 8")).expect_ok().stdout();
    let rate = said.split_whitespace().find_map(|word| word.strip_prefix("iops=")?.parse::<f64>().ok());
    // Eight seconds at 20 a second, as lathed sees them.
    host.wait_until(
        "what was done is counted",
        Duration::from_secs(10),
        "lathe show demo --json >/tmp/shown && jq -e '.disk_operations >= 60 and .disk_read_bytes > 0' /tmp/shown || { cat /tmp/shown; false; }",
    );
    assert!(rate.is_some_and(|rate| (10.0..22.0).contains(&rate)), "{said}");
    // Twice as many and some more, where they reach the host's own disk.
    let wall = "cat /sys/fs/cgroup/lathe.slice/lathe-vm@demo.service/machine/io.max";
    host.run("lathe disk list demo --json").expect_ok().expect_out("104 iops at ");
    host.wait_until(
        "the wall stands",
        Duration::from_secs(10),
        &format!("{wall} | grep 'riops=104 wiops=104'"),
    );
    host.run("lathe resize demo --iops unlimited").expect_ok();
    assert!(show(host, "demo")["iops"]["actual"] == 0, "{}", show(host, "demo"));
    host.wait_until("the wall has gone", Duration::from_secs(10), &format!("! {wall} | grep iops=104"));
}

fn a_disk_comes_grows_and_goes(hosts: &Hosts) {
    let host = demo(hosts);
    let boot = boot_id(&host, "demo");
    host.run("lathe disk list demo").expect_ok().expect_err("lathe disk add demo");
    host.run("lathe disk add demo --size 64M --plan --exit-code")
        .expect_status(11)
        .expect_out("data1 plugged in at once");
    assert!(disks(&host, "demo").is_empty(), "a plan changes nothing");
    let begun = std::time::Instant::now();
    host.run("lathe disk add demo --size 64M").expect_ok().expect_out("data1").expect_out("attached");
    let found = device(&host, "data1");
    hosts.note(&format!("an added disk is in the guest after {:.1} s", begun.elapsed().as_secs_f32()));
    exec(&host, "demo", &format!("cat /sys/block/{found}/size")).expect_ok().expect_stdout("131072");
    a_rate_is_held(&host, &found);
    exec(
        &host,
        "demo",
        &format!("sh -c 'printf written | dd of=/dev/{found} conv=notrunc,fsync 2>/dev/null'"),
    )
    .expect_ok();
    host.run("head -c 7 /var/lib/lathe/machines/demo/disk-data1.raw").expect_stdout("written");

    host.run("lathe disk grow demo data1 +32M").expect_ok().expect_out("96 MiB");
    wait(&host, "the disk has grown", &format!("grep -qx 196608 /sys/block/{found}/size"));
    let last =
        format!("sh -c 'printf end | dd of=/dev/{found} bs=512 seek=196607 conv=notrunc,fsync 2>/dev/null'");
    exec(&host, "demo", &last).expect_ok();
    assert!(settled(&host).host["disk"]["granted"] == 96 * MIB);

    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
    let after = disks(&host, "demo");
    assert!(
        after.len() == 1 && after[0]["state"] == "attached" && after[0]["size_bytes"] == 96 * MIB,
        "{after:?}"
    );
    exec(&host, "demo", &format!("head -c 7 /dev/{found}")).expect_ok().expect_stdout("written");

    let removed = host.run("lathe disk remove demo data1 --json").expect_ok();
    hosts.note(&format!("a disk is removed after {:.1} s", removed.took.as_secs_f32()));
    exec(&host, "demo", &format!("test ! -e /sys/block/{found}")).expect_ok();
    let kept = removed.json()["kept"].as_str().unwrap_or_default().to_owned();
    host.run(&format!("head -c 7 {kept} && rm {kept}")).expect_ok().expect_stdout("written");
    host.run("ls /var/lib/lathe/machines/demo | grep -c disk-").expect_stdout("0");

    host.run("printf 'from a file' >/root/more.raw; lathe disk add demo --file /root/more.raw --size 8M --read-only --id more")
        .expect_ok();
    let found = device(&host, "more");
    exec(&host, "demo", &format!("head -c 11 /dev/{found}")).expect_ok().expect_stdout("from a file");
    exec(&host, "demo", &format!("cat /sys/block/{found}/ro")).expect_ok().expect_stdout("1");
    host.run("lathe disk rm demo more --purge").expect_ok();
    assert!(boot_id(&host, "demo") == boot, "the guest has booted anew");
    let view = settled(&host);
    view.expect_agreement();
    view.expect_no_uploads();
    assert!(view.host["disk"]["granted"] == 0, "{}", view.host);
}

fn disks_outlive_lathed_and_power(hosts: &Hosts) {
    let host = demo(hosts);
    host.run("lathe disk add demo --size 64M --id hot").expect_ok();
    let found = device(&host, "hot");
    exec(&host, "demo", &format!("sh -c 'printf kept | dd of=/dev/{found} conv=notrunc,fsync 2>/dev/null'"))
        .expect_ok();
    host.run("lathe stop demo --timeout 60").expect_ok();
    host.run("lathe disk add demo --size 16M --id cold").expect_ok().expect_out("detached");
    host.run("lathe disk grow demo hot 80M").expect_ok();
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe start demo");
    answers(&host, "demo");
    let found = device(&host, "hot");
    exec(&host, "demo", &format!("head -c 4 /dev/{found}")).expect_ok().expect_stdout("kept");
    exec(&host, "demo", &format!("cat /sys/block/{found}/size")).expect_ok().expect_stdout("163840");
    device(&host, "cold");
    // Ten kills around changes: what was acknowledged is there, and nothing else.
    for round in 0..10 {
        let delay = f64::from(round) * 0.03;
        let adding = host.start("lathe disk add demo --size 4M --id fleeting --json");
        host.run(&format!("sleep {delay}; {KILL}")).expect_ok();
        let acknowledged = adding.finish().status == 0;
        host.wait_until("lathed is back", Duration::from_secs(30), "lathe show demo");
        host.wait_until(
            "disks settle",
            DEED_LIMIT,
            "lathe disk list demo --json >/tmp/disks && jq -e 'all(.disks[]; .state == \"attached\")' /tmp/disks",
        );
        let there = disks(&host, "demo").iter().any(|disk| disk["name"] == "fleeting");
        assert!(there || !acknowledged, "round {round}: acknowledged and lost");
        if there {
            device(&host, "fleeting");
            host.run("lathe disk remove demo fleeting --purge").expect_ok();
        }
        host.run("ls /var/lib/lathe/machines/demo | grep -c disk-").expect_stdout("2");
    }
    // A disk from its start goes like any other.
    host.run("lathe disk remove demo cold --purge && lathe disk remove demo hot --purge").expect_ok();
    exec(&host, "demo", "sh -c 'ls /sys/block | grep -c vd'").expect_stdout("0");
    settled(&host).expect_agreement();
}

fn what_cannot_be_is_refused(hosts: &Hosts) {
    // As many disks as slots: those that it starts with have slots of their own.
    if hosts.host(1).run("lathe show demo").status == 0 {
        away(&hosts.host(1), &["demo"]);
    }
    let host = demo(hosts);
    host.run("lathe disk add demo --size 8M").expect_ok();
    let before = show(&host, "demo")["revision"].clone();
    let granted = settled(&host).host["disk"]["granted"].clone();
    for (line, status, code) in [
        ("add demo --size 8M --id data1", 9, "disk-name-taken"),
        ("add demo --size 8M --id Data", 2, "bad-name"),
        ("add demo --size 4K", 2, "bad-amount"),
        ("add demo --size 900T", 1, "disk-over-capacity"),
        ("add demo --file in-place:/etc/passwd", 4, "disk-not-allowed"),
        ("add demo --file /root/nothing.raw", 2, "no-such-file"),
        ("add demo --image nothing", 8, "no-such-image"),
        ("add none --size 8M", 8, "no-such-machine"),
        ("grow demo data1 4M", 1, "disk-cannot-shrink"),
        ("grow demo data2 4M", 8, "no-such-disk"),
        ("grow demo data1 900T", 1, "disk-over-capacity"),
        ("remove demo data2", 8, "no-such-disk"),
        ("list none", 8, "no-such-machine"),
    ] {
        host.run(&format!("lathe disk {line}")).expect_status(status).expect_err(&format!("error[{code}]"));
    }
    host.run("lathe disk add demo").expect_status(2);
    for _ in 0..3 {
        host.run("lathe disk add demo --size 1M").expect_ok();
    }
    host.run("lathe disk add demo --size 1M")
        .expect_status(9)
        .expect_err("error[no-disk-slot]")
        .expect_err("fix: lathe disk remove demo NAME");
    for name in ["data2", "data3", "data4"] {
        device(&host, name);
        host.run(&format!("lathe disk remove demo {name} --purge")).expect_ok();
    }
    assert!(settled(&host).host["disk"]["granted"] == granted);
    assert!(show(&host, "demo")["revision"].as_u64() == before.as_u64().map(|revision| revision + 6));
    host.run("lathe pause demo").expect_ok();
    host.run("lathe disk remove demo data1").expect_status(9).expect_err("error[machine-paused]");
    host.run("lathe resume demo").expect_ok();
    host.run("lathe disk remove demo data1 --purge").expect_ok();
    settled(&host).expect_no_uploads();
    away(&host, &["demo"]);
}

fn a_guest_that_does_not_answer(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "deaf", "--memory 128M --net none --cmdline 'console=ttyS0 panic=-1 acpiphp.disable=1'");
    host.run("lathe disk add deaf --size 8M").expect_ok();
    host.run("lathe disk remove deaf data1 --timeout 3")
        .expect_status(9)
        .expect_err("error[disk-not-released]")
        .expect_err("it stays");
    let stays = disks(&host, "deaf");
    assert!(stays.len() == 1 && stays[0]["state"] == "attached", "{stays:?}");
    // Its power goes before its patience: then it has let go.
    let removing = host.start("lathe disk remove deaf data1 --timeout 600 --json");
    host.wait_until(
        "the disk is to go",
        DEED_LIMIT,
        "lathe disk list deaf --json >/tmp/disks && jq -e '.disks[0].state == \"removing\"' /tmp/disks",
    );
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", Duration::from_secs(30), "lathe show deaf");
    removing.finish();
    assert!(disks(&host, "deaf")[0]["state"] == "removing");
    host.run("lathe stop deaf --force").expect_ok();
    assert!(disks(&host, "deaf").is_empty());
    let kept = host.run("ls -d /var/lib/lathe/kept/deaf-*/disk-data1.raw").expect_ok().stdout();
    host.run(&format!("rm -r $(dirname {kept})")).expect_ok();
    away(&host, &["deaf"]);
}
