//! What machines ask for over time: a load that comes and goes is in the rings and in the forecast's words, a kill of lathed costs no more
//! than a minute of it, the picture is one, and a machine that is removed leaves nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::inside;
use crate::node::{away, make};
use crate::uplink::KILL;

/// On one host.
pub const GROUP: Group = Group {
    name: "foresight",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("a_load_is_in_the_rings_and_outlives_a_kill", a_load_is_in_the_rings),
        ("a_machine_that_is_removed_leaves_no_past", a_machine_that_is_removed),
        ("what_goes_on_inside_is_told_and_what_is_wanted_is_seen", inside::told_and_wanted),
        ("what_people_say_outlives_a_kill", inside::what_people_say),
    ],
};

/// Until a second is seen, in an emulated and busy host.
const SEEN: Duration = Duration::from_secs(60);
/// Until minutes are over.
const MINUTES: Duration = Duration::from_secs(300);
/// What a kill may cost, and what a busy host takes to store the last minute.
const LOST_SEC: u64 = 60 + 15;

/// Waits until `jq` finds `condition` true of the machine's CPU, `.` in it.
fn seen(host: &Host<'_>, name: &str, limit: Duration, condition: &str) {
    let cpu = ".resources[] | select(.resource == \"cpu\")";
    let line = format!(
        "lathe forecast {name} --json >/tmp/forecast && jq -e '{cpu} | {condition}' /tmp/forecast >/dev/null || \
         {{ jq -c '{cpu} | {{now, ahead, minutes, seconds: .seconds.mean[-20:]}}' /tmp/forecast; false; }}"
    );
    host.wait_until(condition, limit, &line);
}

fn cpu(host: &Host<'_>, name: &str) -> (u64, Value) {
    let view = host.run(&format!("lathe forecast {name} --json")).expect_ok().json();
    let resources = view["resources"].as_array().cloned().unwrap_or_default();
    let cpu = resources.into_iter().find(|one| one["resource"] == "cpu").unwrap_or_default();
    (view["now_unix_sec"].as_u64().unwrap_or(0), cpu)
}

/// What was measured of a ring: the end of each step, and its mean.
fn measured(ring: &Value) -> BTreeMap<u64, u64> {
    let number = |key: &str| ring[key].as_u64().unwrap_or(0);
    let means = ring["mean"].as_array().cloned().unwrap_or_default();
    let ends = (1..).map(|step| number("from_unix_sec") + step * number("step_sec"));
    ends.zip(means).filter_map(|(end, mean)| Some((end, mean.as_u64()?))).collect()
}

/// Whether every tag is closed in its turn.
fn is_well_formed(xml: &str) -> bool {
    let mut open = Vec::new();
    for piece in xml.split('<').skip(1) {
        let Some((tag, text)) = piece.split_once('>') else { return false };
        let name = tag.split([' ', '/']).find(|word| !word.is_empty()).unwrap_or_default();
        if text.contains('&') && !text.contains(';') {
            return false;
        }
        match (tag.starts_with('/'), tag.starts_with('?') || tag.ends_with('/')) {
            (true, _) if open.pop() != Some(name) => return false,
            (false, false) => open.push(name),
            _ => {}
        }
    }
    xml.starts_with("<?xml") && open.is_empty()
}

fn a_load_is_in_the_rings(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "wave", "--memory 128M --cpu 0.5 --net none");
    host.run("lathe forecast wave").expect_ok().expect_out("no confidence yet").expect_out("granted 0.50");
    host.run("systemd-run --quiet --collect lathe exec wave -- spin 90").expect_ok();
    // It spins on half a CPU: what it would have had is more than it is granted.
    seen(&host, "wave", SEEN, "[.seconds.mean[] | select(. != null and . > 600)] | length >= 10");
    seen(&host, "wave", MINUTES, "[.minutes.max[] | select(. != null and . > 600)] | length >= 1");
    seen(&host, "wave", MINUTES, ".now != null and .now < 250");
    seen(&host, "wave", MINUTES, "(.minutes.mean | length >= 3) and (.ahead | length == 6)");
    let (before_sec, before) = cpu(&host, "wave");
    hosts.note(&format!("minutes: {}", before["minutes"]["mean"]));
    assert!(before["granted"] == 500 && before["of"] == "mean", "{before}");
    assert!(before["confidence_permille"].is_null(), "a few minutes make no confidence: {before}");
    let ahead = before["ahead"].as_array().cloned().unwrap_or_default();
    let ordered = |one: &Value| {
        one["p50"].as_u64() <= one["p95"].as_u64() && one["p95"].as_u64() <= one["p99"].as_u64()
    };
    assert!(ahead.iter().all(ordered), "{before}");

    host.run("lathe forecast wave --svg /tmp/wave.svg").expect_ok().expect_err("drawn into /tmp/wave.svg");
    let picture = host.run("cat /tmp/wave.svg").expect_ok().stdout();
    assert!(is_well_formed(&picture) && picture.contains("class=\"p95\""), "{picture}");
    let text = host
        .run("LC_ALL=C.UTF-8 lathe forecast wave --over 10min")
        .expect_ok()
        .expect_out("█ asked for")
        .stdout();
    hosts.note(&text.lines().take(10).collect::<Vec<_>>().join("\n    "));
    assert!(host.run("LC_ALL=C lathe forecast wave").expect_ok().stdout().is_ascii());

    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", SEEN, "lathe forecast wave --json >/dev/null");
    let (_, after) = cpu(&host, "wave");
    for (ring, oldest) in [("minutes", 0), ("seconds", before_sec - 500)] {
        let (was, is) = (measured(&before[ring]), measured(&after[ring]));
        let kept = was.range(oldest..before_sec - LOST_SEC);
        let lost: Vec<_> = kept.filter(|(end, mean)| is.get(*end) != Some(*mean)).collect();
        assert!(lost.is_empty(), "{ring} lost {lost:?}\nbefore: {was:?}\nafter: {is:?}");
    }
    // And it goes on.
    seen(&host, "wave", SEEN, ".now != null");
    away(&host, &["wave"]);
}

fn a_machine_that_is_removed(hosts: &Hosts) {
    let host = hosts.host(1);
    let pasts = "sqlite3 /var/lib/lathe/lathe.db 'SELECT count(*) FROM past'";
    make(&host, "brief", "--memory 128M --cpu 0.5 --net none");
    seen(&host, "brief", MINUTES, ".minutes.mean | length >= 1");
    host.run("systemctl stop lathed.socket lathed.service").expect_ok();
    host.run(pasts).expect_ok().expect_stdout("2");
    // What is damaged begins anew, and the journal says it once.
    host.run("sqlite3 /var/lib/lathe/lathe.db \"UPDATE past SET bytes = x'00' WHERE part = 0\"").expect_ok();
    host.run("systemctl start lathed.socket lathed.service").expect_ok();
    seen(&host, "brief", SEEN, ".now != null and (.minutes.mean | length == 0)");
    let said = "journalctl -u lathed -o cat | grep -c 'not all known any more'";
    host.run(said).expect_ok().expect_stdout("1");
    away(&host, &["brief"]);
    host.run("lathe forecast brief").expect_status(8).expect_err("no-such-machine");
    host.run("systemctl stop lathed.socket lathed.service").expect_ok();
    host.run(pasts).expect_ok().expect_stdout("0");
    host.run("systemctl start lathed.socket lathed.service").expect_ok();
    host.wait_until("lathed is back", SEEN, "lathe list");
}
