//! Tiers: what is promised to whom is kept by the books and by the kernel, on a machine that runs, and after somebody else has written.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{away, make, make_small, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "tiers",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_tier_is_in_force_in_the_kernel", a_tier_is_in_force_in_the_kernel),
        ("what_systemd_writes_anew_is_corrected", what_systemd_writes_anew_is_corrected),
        ("harvest_gives_way_and_takes_what_is_idle", harvest_gives_way_and_takes_what_is_idle),
        ("harvest_gives_memory_back_that_the_host_lacks", harvest_gives_memory_back),
        ("a_guaranteed_machine_gets_its_grant", a_guaranteed_machine_gets_its_grant),
        ("no_promise_breaks_a_guarantee", no_promise_breaks_a_guarantee),
    ],
};

const SLICE: &str = "/sys/fs/cgroup/lathe.slice";
/// How long lathed may take to see what somebody else has written: it looks once a second.
const SEEN: Duration = Duration::from_secs(20);
/// Attempts at each figure: an emulated host on a busy machine loses time that it cannot see.
const ATTEMPTS: usize = 4;
const MIB: u64 = 1 << 20;

fn unit(name: &str) -> String {
    format!("{SLICE}/lathe-vm@{name}.service")
}

/// The first line of a kernel file.
fn file(host: &Host<'_>, path: &str) -> String {
    host.run(&format!("head -n 1 {path}")).expect_ok().stdout().trim().to_owned()
}

/// `cpu.weight cpu.idle memory.min memory.low` of a machine's unit.
fn standing(host: &Host<'_>, name: &str) -> String {
    let unit = unit(name);
    let files = ["cpu.weight", "cpu.idle", "memory.min", "memory.low"];
    files.map(|name| file(host, &format!("{unit}/{name}"))).join(" ")
}

fn resize(host: &Host<'_>, name: &str, options: &str) -> Value {
    host.run(&format!("lathe resize {name} {options} --json")).expect_ok().json()
}

fn a_tier_is_in_force_in_the_kernel(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "tier", "--net none");
    assert_eq!(show(&host, "tier")["tier"], "standard");
    assert_eq!(standing(&host, "tier"), format!("100 0 0 {}", 64 * MIB));
    host.run("lathe resize tier --tier guaranteed --plan --exit-code")
        .expect_status(11)
        .expect_out("standard -> guaranteed");
    let firmer = resize(&host, "tier", "--tier guaranteed");
    assert!(firmer["outcome"] == "applied" && firmer["tier_actual"] == "guaranteed", "{firmer}");
    hosts.note(&format!("another tier: in force after {} us", firmer["took_usec"]));
    assert_eq!(standing(&host, "tier"), format!("10000 0 {0} {0}", 128 * MIB));
    let inside = format!("{}/machine", unit("tier"));
    assert_eq!(file(&host, &format!("{inside}/memory.min")), (128 * MIB).to_string());
    assert_ne!(file(&host, &format!("{inside}/cpu.max.burst")), "0");
    // What a machine keeps it keeps only as far as its slice does.
    let slice = format!("test $(cat {SLICE}/memory.min) = {}", 128 * MIB);
    host.wait_until("the slice is protected as its machines are", SEEN, &slice);
    resize(&host, "tier", "--memory 256M");
    assert_eq!(standing(&host, "tier"), format!("10000 0 {0} {0}", 256 * MIB));
    let idle = resize(&host, "tier", "--tier harvest");
    assert!(idle["outcome"] == "applied" && idle["tier_actual"] == "harvest", "{idle}");
    assert_eq!(file(&host, &format!("{}/cpu.idle", unit("tier"))), "1");
    assert_eq!(file(&host, &format!("{inside}/cpu.max.burst")), "0");
    host.run("lathe list").expect_ok().expect_out("TIER").expect_out("harvest");
    host.run("lathe show tier").expect_ok().expect_out("tier      harvest");
    host.run("curl -sS --unix-socket /run/lathe/lathe.sock http://lathe/metrics")
        .expect_ok()
        .expect_out("lathe_machine_tier{machine=\"tier\",tier=\"harvest\"} 1");
    host.run("lathe resize tier --undo").expect_ok();
    assert_eq!(standing(&host, "tier"), format!("10000 0 {0} {0}", 256 * MIB));
    // The monitor owns none of it, lathed four files and no more.
    let owned =
        format!("cd {} && find . -maxdepth 1 -user lathe -type f | sort | tr '\\n' ' '", unit("tier"));
    host.run(&owned).expect_ok().expect_stdout("./cpu.idle ./cpu.weight ./memory.low ./memory.min");
    let weight = host.run("systemctl show -p CPUWeight --value lathe.slice").expect_ok().stdout();
    // (2 CPUs - 0.25 for the host) : 0.25, where one other slice counts 100.
    assert_eq!((weight.trim(), file(&host, &format!("{SLICE}/cpu.weight")).as_str()), ("700", "700"));
    away(&host, &["tier"]);
    settled(&host).expect_agreement();
}

fn what_systemd_writes_anew_is_corrected(hosts: &Hosts) {
    let host = hosts.host(1);
    make_small(&host, "tier", "--net none --tier guaranteed");
    let wanted = standing(&host, "tier");
    assert_eq!(wanted, format!("10000 0 {0} {0}", 128 * MIB));
    let is_so = format!(
        "cd {} && test \"$(cat cpu.weight cpu.idle memory.min memory.low | tr '\\n' ' ')\" = '{wanted} '",
        unit("tier")
    );
    host.run(&format!("echo 1 >{0}/cpu.idle; echo 0 >{0}/memory.min", unit("tier"))).expect_ok();
    host.wait_until("what somebody has written is corrected", SEEN, &is_so);
    host.run("systemctl daemon-reload").expect_ok();
    host.wait_until("what systemd has written is corrected", SEEN, &is_so);
    let slice = format!("test $(cat {SLICE}/memory.min) = {}", 128 * MIB);
    host.wait_until("and of the slice too", SEEN, &slice);
    // Also by a lathed that finds the machine again.
    host.run("systemctl kill -s KILL lathed; systemctl daemon-reload").expect_ok();
    host.wait_until(
        "lathed answers again",
        SEEN,
        "lathe show tier --json | jq -e '.tier_actual == \"guaranteed\"'",
    );
    host.wait_until("it is so again", SEEN, &is_so);
    away(&host, &["tier"]);
}

/// What two machines get, in CPUs, over 8 s in which the guests spin that shall; each guest's two threads.
fn shares(host: &Host<'_>, machines: [&str; 2], spinning: &[&str]) -> [f64; 2] {
    let spin: String =
        spinning.iter().map(|name| format!("lathe exec {name} -- spin 12 2 >/dev/null &\n")).collect();
    let stats = machines.map(|name| format!("{}/machine/cpu.stat", unit(name))).join(" ");
    let line = format!(
        "at() {{ awk '/^usage_usec/ {{ print $2 }}' {stats} | tr '\\n' ' '; date +%s%N; }}
         {spin}sleep 2; at; sleep 8; at; wait"
    );
    let text = host.run(&line).expect_ok().stdout();
    let readings: Vec<Vec<f64>> = text
        .lines()
        .map(|line| line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
        .collect();
    let (before, after) = (&readings[0], &readings[1]);
    let usec = (after[2] - before[2]) / 1000.0;
    [(after[0] - before[0]) / usec, (after[1] - before[1]) / usec]
}

/// Measures until it is as expected.
fn within(hosts: &Hosts, what: &str, mut measure: impl FnMut() -> [f64; 2], good: impl Fn([f64; 2]) -> bool) {
    let mut last = [0.0; 2];
    for attempt in 1..=ATTEMPTS {
        last = measure();
        hosts.note(&format!("{what}: {:.3} and {:.3} CPUs; attempt {attempt}", last[0], last[1]));
        if good(last) {
            return;
        }
    }
    hosts.expecting();
    panic!("{what}: {:.3} and {:.3} CPUs in the last of {ATTEMPTS} attempts", last[0], last[1]);
}

fn harvest_gives_way_and_takes_what_is_idle(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "owner", "--memory 128M --cpu 1.5 --net none");
    make(&host, "idle", "--memory 128M --cpu 1.5 --net none --tier harvest");
    let both = ["owner", "idle"];
    within(hosts, "owner asleep", || shares(&host, both, &["idle"]), |[_, idle]| idle >= 0.8 * 1.5);
    let mut alone = 0.0;
    within(
        hosts,
        "owner alone",
        || {
            let figures = shares(&host, both, &["owner"]);
            alone = figures[0];
            figures
        },
        |[owner, _]| owner >= 0.9 * 1.5,
    );
    within(hosts, "both", || shares(&host, both, &both), |[owner, _]| owner >= 0.97 * alone);
    away(&host, &both);
}

fn a_guaranteed_machine_gets_its_grant(hosts: &Hosts) {
    let host = hosts.host(1);
    let config = "/etc/lathe/lathe.d/70-tiers.toml";
    host.run(&format!(
        "mkdir -p /etc/lathe/lathe.d; printf '[overcommit]\\ncpu = 4\\n' >{config}; /usr/lib/lathe/lathed --check && systemctl restart lathed"
    ))
    .expect_ok();
    make(&host, "sure", "--memory 128M --cpu 1.25 --net none --tier guaranteed");
    make(&host, "greedy", "--memory 128M --cpu 1.75 --net none");
    let both = ["sure", "greedy"];
    within(hosts, "guaranteed and standard", || shares(&host, both, &both), |[sure, _]| sure >= 0.97 * 1.25);
    away(&host, &both);
    host.run(&format!("rm {config}; systemctl restart lathed")).expect_ok();
}

fn no_promise_breaks_a_guarantee(hosts: &Hosts) {
    let host = hosts.host(1);
    let cpu = || host.run("lathe host --json").expect_ok().json()["cpu"].clone();
    let sums = || {
        let cpu = cpu();
        let of = |key: &str| cpu[key].as_u64().unwrap_or_default();
        assert_eq!(of("capacity"), of("reserved") + of("granted") + of("free"), "{cpu}");
        (of("granted"), of("promised"))
    };
    make_small(&host, "sure", "--net none");
    resize(&host, "sure", "--cpu 1.75 --tier guaranteed");
    assert_eq!(sums(), (1750, 1750));
    host.run("lathe run more --net none --wait 0 --memory 128M --cpu 0.05")
        .expect_failure()
        .expect_err("cpu");
    host.run("lathe run more --net none --wait 0 --memory 128M --cpu 2 --tier harvest").expect_failure();
    make(&host, "idle", "--memory 128M --cpu 1.75 --net none --tier harvest");
    assert_eq!(sums(), (1750, 3500));
    let before = settled(&host).essence();
    host.run("lathe resize idle --tier standard").expect_failure().expect_err("1.75");
    assert_eq!(settled(&host).essence(), before, "nothing changed");
    resize(&host, "sure", "--cpu 1 --tier standard");
    let shared = resize(&host, "idle", "--cpu 0.75 --tier standard");
    assert!(shared["outcome"] == "applied", "{shared}");
    assert_eq!(sums(), (1750, 1750));
    away(&host, &["sure", "idle"]);
    assert_eq!(sums(), (0, 0));
    host.run("printf '[overcommit]\\nmemory = 0.5\\n' >/tmp/wrong.toml; /usr/lib/lathe/lathed --check --config /tmp/wrong.toml")
        .expect_failure()
        .expect_err("must be 1.0");
    settled(&host).expect_agreement();
}

/// A guest full of page cache, and a host whose own programs take all but a fraction of its reserve.
fn harvest_gives_memory_back(hosts: &Hosts) {
    const MACHINE: u64 = 1024;
    const CACHED: u64 = 600;
    /// Half of the reserve is 256 MiB; large pages, or an emulated host takes minutes to fill them.
    const LEFT_MIB: u64 = 150;
    let host = hosts.host(1);
    make(&host, "lent", &format!("--memory {MACHINE}M --cpu 1 --net none --tier harvest"));
    make(&host, "sure", "--memory 128M --cpu 0.5 --net none");
    host.preparing(|| host.run(&format!("lathe disk add lent --size {CACHED}M")).expect_ok());
    // What is cached of a device goes when nobody has it open any more.
    let reading = host.start(
        "lathe exec lent -- sh -c 'until [ -e /dev/vda ]; do sleep 0.1; done; exec 3</dev/vda; dd bs=1M of=/dev/null <&3; sleep 600'",
    );
    let charged = format!("[ $(head -n 1 {}/memory.current) -gt $(({CACHED} << 20)) ]", unit("lent"));
    host.preparing(|| host.wait_until("the guest's cache is full", Duration::from_secs(100), &charged));
    let before = show(&host, "lent")["memory"]["granted"].as_u64().unwrap_or(0);
    assert!(before == MACHINE * MIB, "{}", show(&host, "lent"));
    let available = "awk '/^MemAvailable:/ { print int($2 / 1024) }' /proc/meminfo";
    // Pages of a tmpfs can go nowhere on a host without swap.
    host.run("mkdir -p /run/eaten && mount -t tmpfs -o size=4G,huge=always tmpfs /run/eaten").expect_ok();
    let eating = host.start(&format!("fallocate -l $(($({available}) - {LEFT_MIB}))M /run/eaten/all"));
    let waited = host.run_within(
        Duration::from_secs(200),
        &format!(
            "until [ $({available}) -lt 256 ]; do sleep 0.05; done; begun=$(date +%s%N)
             until [ $({available}) -ge 256 ]; do sleep 0.05; done; echo $((($(date +%s%N) - begun) / 1000000))"
        ),
    );
    hosts.note(&format!("what the host lacked was back after {} ms", waited.expect_ok().stdout().trim()));
    eating.finish().expect_ok();
    host.run("umount /run/eaten").expect_ok();
    let after = show(&host, "lent");
    assert!(after["memory"]["granted"].as_u64().is_some_and(|now| now < before), "{after}");
    assert!(after["memory"]["actual"].as_u64().is_some_and(|now| now >= 64 * MIB), "{after}");
    host.run("journalctl -u lathed --since=-5min | grep 'harvest gives way'")
        .expect_ok()
        .expect_out("lent has ");
    assert!(show(&host, "sure")["memory"]["granted"] == 128 * MIB, "{}", show(&host, "sure"));
    assert!(after["back_unix_msec"].is_u64(), "it has it back by itself later: {after}");
    host.run(&format!("lathe resize lent --memory {MACHINE}M")).expect_ok();
    settled(&host).expect_agreement();
    drop(reading);
    away(&host, &["lent", "sure"]);
}
