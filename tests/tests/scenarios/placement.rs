//! Placement: who has cores to itself has them alone, what cannot be is refused, and what others write is corrected or told.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{away, exec, make, make_small, settled, show};

/// On one host, which has two CPUs, each a core.
pub const GROUP: Group = Group {
    name: "placement",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_dedicated_machine_has_its_core_alone", a_dedicated_machine_has_its_core_alone),
        ("what_cannot_be_is_refused_and_changes_nothing", what_cannot_be_is_refused_and_changes_nothing),
        ("what_somebody_else_writes_is_corrected_or_told", what_somebody_else_writes_is_corrected_or_told),
        ("cpus_that_go_and_come_are_noticed", cpus_that_go_and_come_are_noticed),
    ],
};

const SLICE: &str = "/sys/fs/cgroup/lathe.slice";
/// How long lathed may take to see what somebody else has done: it looks once a second.
const SEEN: Duration = Duration::from_secs(20);
const ALONE: &str = "--memory 128M --cpu 1 --net none --tier guaranteed --cores dedicated";

fn machine(name: &str) -> String {
    format!("{SLICE}/lathe-vm@{name}.service/machine")
}

/// What a machine may really run on, its vCPUs and its monitor's other threads.
fn effective(host: &Host<'_>, name: &str) -> [String; 2] {
    ["vcpu", "vmm"].map(|threads| {
        let line = format!("cat {}/{threads}/cpuset.cpus.effective", machine(name));
        host.run(&line).expect_ok().stdout().trim().to_owned()
    })
}

fn cpus(host: &Host<'_>, name: &str) -> Value {
    show(host, name)["cpus"].clone()
}

/// Waits until `jq` says so of `lathe show NAME --json`.
fn comes(host: &Host<'_>, what: &str, name: &str, is: &str) {
    let line = format!(
        "lathe show {name} --json >/tmp/shown && jq -e '.cpus | {is}' /tmp/shown >/dev/null || {{ jq .cpus /tmp/shown; cat {SLICE}/cpuset.cpus.effective {}/cpuset.cpus; false; }}",
        machine(name)
    );
    host.wait_until(what, SEEN, &line);
}

const IN_ITS_PLACE: &str = r#".wanted == "1" and .actual == "1" and .problem == """#;

/// On which CPUs the vCPUs of two machines are found while both guests spin.
fn found_on(host: &Host<'_>, names: [&str; 2]) -> [String; 2] {
    let spin: String =
        names.iter().map(|name| format!("lathe exec {name} -- spin 10 1 >/dev/null &\n")).collect();
    let looks = names.map(|name| {
        format!(
            "for tid in $(cat {0}/vcpu/cgroup.threads); do sed 's/.*) //' /proc/$tid/stat | awk '{{ print \"{name}\", $37 }}'; done",
            machine(name)
        )
    });
    let line = format!(
        "{spin}sleep 3; for time in 1 2 3 4 5 6 7 8; do {}; {}; sleep 0.4; done; wait",
        looks[0], looks[1]
    );
    let text = host.run(&line).expect_ok().stdout();
    names.map(|name| {
        let mut on: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&format!("{name} "))).collect();
        on.sort_unstable();
        on.dedup();
        on.join(",")
    })
}

fn a_dedicated_machine_has_its_core_alone(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "other", "--net none");
    assert_eq!(effective(&host, "other"), ["0-1", "0-1"]);
    let list = format!("cat {}/cpuset.cpus", machine("other"));
    assert_eq!(host.run(&list).expect_ok().stdout().trim(), "", "nothing is written while nobody asks");
    host.run(&format!("lathe run alone {ALONE} --plan")).expect_ok().expect_out("cores");
    make(&host, "alone", ALONE);
    assert_eq!(effective(&host, "alone"), ["1", "1"]);
    assert_eq!(effective(&host, "other"), ["0", "0"]);
    let shown = cpus(&host, "alone");
    assert_eq!(shown["cores"], "dedicated");
    assert_eq!(
        (&shown["wanted"], &shown["actual"], &shown["problem"]),
        (&"1".into(), &"1".into(), &"".into())
    );
    let shown = cpus(&host, "other");
    assert_eq!(shown["cores"], "shared");
    assert_eq!(
        (&shown["wanted"], &shown["actual"], &shown["problem"]),
        (&"0".into(), &"0".into(), &"".into())
    );
    host.run("lathe show alone").expect_ok().expect_out("cores     dedicated   CPUs 1 of the host");
    assert_eq!(found_on(&host, ["alone", "other"]), ["1", "0"]);
    // A lathed that was killed finds everybody in place.
    host.run("systemctl kill -s KILL lathed").expect_ok();
    comes(&host, "lathed finds it in its place", "alone", IN_ITS_PLACE);
    assert_eq!(effective(&host, "other"), ["0", "0"]);
    let cpu = host.run("lathe host --json").expect_ok().json()["cpu"].clone();
    assert_eq!((&cpu["granted"], &cpu["capacity"]), (&1250.into(), &2000.into()), "{cpu}");
    away(&host, &["alone"]);
    comes(&host, "the others get the core back", "other", r#".actual == "0-1" and .problem == """#);
    assert_eq!(effective(&host, "other"), ["0-1", "0-1"]);
    away(&host, &["other"]);
    settled(&host).expect_agreement();
}

fn what_cannot_be_is_refused_and_changes_nothing(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "alone", ALONE);
    let before = settled(&host).essence();
    let run = "lathe run more --memory 128M --net none --wait 0 --cores dedicated";
    host.run(&format!("{run} --tier guaranteed --cpu 0.5")).expect_failure().expect_err("--cpu 1");
    host.run(&format!("{run} --tier guaranteed --cpu 1")).expect_failure().expect_err("over-capacity");
    host.run(&format!("{run} --cpu 1")).expect_failure().expect_err("--tier guaranteed");
    host.run("lathe resize alone --cpu 1.5").expect_failure().expect_err("whole number");
    host.run("lathe resize alone --cpu 2").expect_failure().expect_err("over-capacity");
    host.run("lathe resize alone --tier harvest").expect_failure().expect_err("guaranteed");
    assert_eq!(settled(&host).essence(), before, "nothing changed");
    assert_eq!(effective(&host, "alone"), ["1", "1"]);
    away(&host, &["alone"]);
    // With nothing kept for the host in the books there is still a core for all others.
    let config = "/etc/lathe/lathe.d/70-placement.toml";
    host.run(&format!(
        "mkdir -p /etc/lathe/lathe.d; printf '[reserve]\\ncpu = \"0\"\\n' >{config}; /usr/lib/lathe/lathed --check && systemctl restart lathed"
    ))
    .expect_ok();
    host.run(&format!("{run} --tier guaranteed --cpu 2")).expect_failure().expect_err("cores-over-capacity");
    host.run(&format!("rm {config}; systemctl restart lathed")).expect_ok();
    settled(&host).expect_agreement();
}

fn what_somebody_else_writes_is_corrected_or_told(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "other", "--net none");
    make(&host, "alone", ALONE);
    let is = |name: &str, list: &str| {
        format!(
            "test \"$(cat {0}/cpuset.cpus {0}/vcpu/cpuset.cpus.effective | tr '\\n' ' ')\" = '{list} {list} '",
            machine(name)
        )
    };
    host.run(&format!(
        "echo 0-1 >{}/cpuset.cpus; echo 0-1 >{}/cpuset.cpus",
        machine("alone"),
        machine("other")
    ))
    .expect_ok();
    host.wait_until("what somebody has written is corrected", SEEN, &is("alone", "1"));
    host.wait_until("also of the other machine", SEEN, &is("other", "0"));
    host.run(&format!("echo 0-1 >{0}/cpuset.cpus; echo 0 >{0}/vcpu/cpuset.cpus", machine("alone")))
        .expect_ok();
    host.wait_until("and of a group of threads", SEEN, &is("alone", "1"));
    // An administrator's bound of the unit stays, and is told.
    host.run("systemctl set-property --runtime lathe-vm@alone.service AllowedCPUs=0").expect_ok();
    let narrowed = r#".wanted == "1" and .actual == "0" and (.problem | contains("AllowedCPUs"))"#;
    comes(&host, "it is told that its unit is narrowed", "alone", narrowed);
    host.run("lathe show alone").expect_ok().expect_out("instead of 1");
    assert_eq!(effective(&host, "alone"), ["0", "0"], "it is respected");
    host.run("systemctl set-property --runtime lathe-vm@alone.service AllowedCPUs=0-1").expect_ok();
    comes(&host, "it is back in its place", "alone", IN_ITS_PLACE);
    // The same of all machines: there is no core for one of them alone any more.
    host.run("systemctl set-property --runtime lathe.slice AllowedCPUs=0").expect_ok();
    let none = r#".wanted == null and .actual == "0" and (.problem | contains("no place"))"#;
    comes(&host, "it is told that there is no place", "alone", none);
    let cpu = host.run("lathe host --json").expect_ok().json()["cpu"].clone();
    assert_eq!((&cpu["capacity"], &cpu["reserved"]), (&2000.into(), &1000.into()), "{cpu}");
    assert_eq!(effective(&host, "other"), ["0", "0"]);
    host.run("systemctl set-property --runtime lathe.slice AllowedCPUs=0-1").expect_ok();
    comes(&host, "it has its place again", "alone", IN_ITS_PLACE);
    exec(&host, "alone", "true").expect_ok();
    away(&host, &["alone", "other"]);
    host.run("systemctl set-property --runtime lathe.slice AllowedCPUs=; rm -f /run/systemd/system.control/lathe.slice.d/*AllowedCPUs.conf; systemctl daemon-reload")
        .expect_ok();
    settled(&host).expect_agreement();
}

fn cpus_that_go_and_come_are_noticed(hosts: &Hosts) {
    let host = hosts.host(1);
    let capacity = |cpus: u32| format!("test $(lathe host --json | jq .cpu.capacity) = {}", cpus * 1000);
    host.wait_until("both CPUs are counted", SEEN, &capacity(2));
    host.run("echo 0 >/sys/devices/system/cpu/cpu1/online").expect_ok();
    host.wait_until("a CPU that has gone is no capacity", SEEN, &capacity(1));
    host.run(&format!("lathe run alone {ALONE} --wait 0")).expect_failure().expect_err("over-capacity");
    host.run("echo 1 >/sys/devices/system/cpu/cpu1/online").expect_ok();
    host.wait_until("a CPU that has come is capacity", SEEN, &capacity(2));
    settled(&host).expect_agreement();
}
