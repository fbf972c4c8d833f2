//! Disks that come, grow and go through `lathe disk` while the machine runs, with lathed killed in between.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{boot_id, exec, make, settled};

/// On one host.
pub const GROUP: Group = Group {
    name: "disks",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[("a_disk_comes_grows_and_goes_while_the_guest_runs", a_disk_comes_grows_and_goes)],
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
