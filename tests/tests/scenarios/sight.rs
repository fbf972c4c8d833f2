//! What machines ask for and get, as `lathe show`, `lathe host`, `lathe top` and `/metrics` tell it: a guest that spins asks for its grant,
//! one whose slice somebody holds back gets less than it asks for, and one that sleeps is not rated.

use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{away, make, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "sight",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_guest_that_spins_asks_for_its_grant_and_gets_it", a_guest_that_spins),
        ("a_slice_that_is_held_back_is_seen", a_slice_that_is_held_back),
    ],
};

/// On one host that has the time: a busy one does not fill ten megabits. `tests/run bench sight-net`.
pub const NET: Group = Group {
    name: "sight-net",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("a_full_uplink_asks_for_its_rate", a_full_uplink)],
};

/// From a deed to ten seconds of it in the books, in an emulated and busy host.
const SEEN: Duration = Duration::from_secs(60);

/// Waits until `jq` finds `condition` true of a machine.
fn seen(host: &Host<'_>, name: &str, condition: &str) {
    let line = format!(
        "lathe show {name} --json >/tmp/seen && jq -e '{condition}' /tmp/seen >/dev/null || {{ jq -c '.delivered, .cpu' /tmp/seen; false; }}"
    );
    host.wait_until(condition, SEEN, &line);
}

fn ten(machine: &Value, resource: &str) -> String {
    machine["delivered"][resource]["sec_10"].to_string()
}

fn a_guest_that_spins(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "busy", "--memory 128M --cpu 0.5 --net none");
    host.run("systemd-run --quiet --collect lathe exec busy -- spin 40").expect_ok();
    // All ten seconds of it: then what it asked for is its grant.
    seen(&host, "busy", ".delivered.cpu.sec_10 | .measured_msec > 9000 and .asked >= 470 and .asked <= 500");
    hosts.note(&format!("spinning, 10 s: {}", ten(&show(&host, "busy"), "cpu")));
    seen(&host, "busy", ".delivered.cpu.sec_10.permille | . >= 950 and . <= 1050");
    host.run("lathe show busy").expect_ok().expect_out("delivered cpu ");
    host.run("lathe host").expect_ok().expect_out("Least delivered of what was asked for in 10 s: cpu busy");
    host.run("curl -sS --unix-socket /run/lathe/lathe.sock http://lathe/metrics")
        .expect_ok()
        .expect_out("lathe_machine_delivered_ratio{machine=\"busy\",resource=\"cpu\",window=\"10s\"} ");
    host.run("lathe top").expect_ok().expect_out("GOT CPU").expect_out("busy");
    let top = host.run("lathe top --json").expect_ok().json();
    assert!(top["schema"] == 1 && top["machines"][0]["name"] == "busy", "{top}");
    // And when it is over it asks for next to nothing.
    seen(&host, "busy", ".delivered.cpu.sec_10 | .asked < 100");
    away(&host, &["busy"]);
}

fn a_slice_that_is_held_back(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "held", "--memory 128M --cpu 0.5 --net none");
    host.run("systemd-run --quiet --collect lathe exec held -- spin 120").expect_ok();
    seen(&host, "held", ".delivered.cpu.sec_10.asked >= 470");
    // An administrator's limit above the machine's own: the kernel throttles there, and the machine waits.
    host.run("systemctl set-property --runtime lathe.slice CPUQuota=25%").expect_ok();
    seen(&host, "held", ".delivered.cpu.sec_1 | .asked >= 450 and .delivered <= 350 and .permille < 800");
    hosts.note(&format!("held back, 10 s: {}", ten(&show(&host, "held"), "cpu")));
    // It shows the last ten seconds.
    host.wait_until("top marks it", Duration::from_secs(20), "lathe top | grep ' % !'");
    host.run("systemctl set-property --runtime lathe.slice CPUQuota=").expect_ok();
    seen(&host, "held", ".delivered.cpu.sec_1.permille >= 950");
    away(&host, &["held"]);
}

fn a_full_uplink(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "net", "--memory 256M --cpu 1 --net 10mbit");
    let gateway = host
        .run("ip -4 -o address show lathe0 | awk '{sub(\"/.*\", \"\", $4); print $4; exit}'")
        .expect_ok()
        .stdout();
    host.run(&format!(
        "systemd-run --quiet --collect /usr/lib/lathe/lathe-guest sink 5320
         until ss -Hltn sport = :5320 | grep -q .; do sleep 0.1; done
         systemd-run --quiet --collect lathe exec net -- blast {} 5320 60",
        gateway.trim()
    ))
    .expect_ok();
    seen(&host, "net", ".delivered.net_from_guest.sec_10 | .asked >= 9500000 and .asked <= 10000000");
    hosts.note(&format!("blasting, 10 s: {}", ten(&show(&host, "net"), "net_from_guest")));
    seen(&host, "net", ".delivered.net_from_guest.sec_10.permille | . >= 950 and . <= 1050");
    away(&host, &["net"]);
}
