//! What machines ask for over time: a load that comes and goes is in the rings and in the forecast's words, a kill of lathed costs no more
//! than a minute of it, the picture is one, and a machine that is removed leaves nothing. Where its mode is on, a machine grows with its load and
//! goes back after it, in CPU and in memory; who only observes changes nothing, and a person's word counts.

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
        ("a_machine_is_sculpted_and_a_person_has_the_last_word", a_machine_is_sculpted),
        ("memory_follows_what_is_in_use", memory_follows),
        ("what_goes_on_inside_is_told_and_what_is_wanted_is_seen", inside::told_and_wanted),
        ("what_people_say_outlives_a_kill", inside::what_people_say),
        ("a_goal_of_an_application_is_met", inside::a_goal_is_met),
    ],
};

/// Until a second is seen, in an emulated and busy host.
const SEEN: Duration = Duration::from_secs(60);
/// Until minutes are over.
const MINUTES: Duration = Duration::from_secs(300);
/// Until a machine that asks for all that it has gets more: twice the sculptor's turn, and what a busy host takes beside that.
const GROWN: Duration = Duration::from_secs(60);
/// Until it is made smaller again: its patience of a minute, twice that where the minute before was busy, and the resize.
const SHRUNK: Duration = Duration::from_secs(400);
/// How long it is watched that nothing happens: several turns.
const STILL: Duration = Duration::from_secs(25);
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

/// What `lathe why` told of the machine at last, and what it is.
fn told(host: &Host<'_>, name: &str) -> (Value, Value) {
    let json = |verb: &str| host.run(&format!("lathe {verb} {name} --json")).expect_ok().json();
    (json("why"), json("show"))
}

/// Waits until `jq` finds `condition` true of `lathe why`.
fn decided(host: &Host<'_>, name: &str, limit: Duration, condition: &str) {
    let line = format!(
        "lathe why {name} --json >/tmp/why && jq -e '{condition}' /tmp/why >/dev/null || \
         {{ jq -c '{{now, weighings, decisions: .decisions[:3]}}' /tmp/why; false; }}"
    );
    host.wait_until(condition, limit, &line);
}

fn a_machine_is_sculpted(hosts: &Hosts) {
    let host = hosts.host(1);
    let grown = "[.decisions[] | select(.resource == \"cpu\" and .to > .from and .cause == \"reached\")]";
    let spin = |seconds: u32| {
        host.run(&format!("systemd-run --quiet --collect lathe exec grower -- spin {seconds}")).expect_ok();
    };
    // Close to demand, so that it need not be waited for long; its memory stays as it is.
    let bounds = "--cpu 0.3..1 --memory 128M..128M --memory-min 128M --net none";
    make(&host, "grower", &format!("{bounds} --foresight observe --aggressiveness 1"));
    spin(30);
    decided(&host, "grower", GROWN, &format!("{grown} | any(.outcome == \"observed\" and .from == 300)"));
    let (why, shown) = told(&host, "grower");
    assert!(shown["cpu"]["desired"] == 300 && shown["revision"] == 1, "nothing was to change: {shown}");
    assert!(
        why["decisions"].as_array().is_some_and(|all| all.iter().all(|one| one["outcome"] == "observed"))
    );
    host.run("lathe why grower")
        .expect_ok()
        .expect_out("mode is observe")
        .expect_out("lathe forecast grower --mode on");

    host.run("lathe forecast grower --mode on").expect_ok().expect_out("foresight on (its own)");
    spin(60);
    decided(&host, "grower", GROWN, &format!("{grown} | any(.outcome == \"applied\" and .from == 300)"));
    let (why, shown) = told(&host, "grower");
    let cpu = shown["cpu"]["desired"].as_u64().unwrap_or(0);
    assert!((375..=1000).contains(&cpu) && shown["cpu"]["granted"] == cpu, "{shown}");
    hosts.note(&format!("grown to {cpu}: {}", why["decisions"][0]));
    host.run("lathe why grower").expect_ok().expect_out("it asks for").expect_out("chosen");
    let journal = "journalctl -u lathed MACHINE=grower RESOURCE=cpu CAUSE=reached -o cat";
    host.run(journal).expect_ok().expect_out("grower would get").expect_out("grower gets");
    let metric = "lathe_sculptor_changes_total{resource=\"cpu\",outcome=\"applied\"}";
    host.run(&format!("curl -sS --unix-socket /run/lathe/lathe.sock http://lathe/metrics | grep -F '{metric}' | grep -qv ' 0$'")).expect_ok();
    // What it does not need any more it gives back.
    let less = ".decisions | any(.resource == \"cpu\" and .to < .from and .cause == \"idle\" and .outcome == \"applied\")";
    decided(&host, "grower", SHRUNK, less);
    let (_, shown) = told(&host, "grower");
    assert!(shown["cpu"]["desired"].as_u64() < Some(cpu), "{shown}");

    // A person's resize is not fought, whatever it asks for.
    host.run("lathe resize grower --cpu 0.2").expect_ok();
    spin(40);
    seen(&host, "grower", SEEN, ".now != null and .now > 190");
    let watched = format!(
        "end=$(($(date +%s) + {})); while [ $(date +%s) -lt $end ]; do lathe show grower --json | jq .cpu.desired; sleep 1; done | sort -u",
        STILL.as_secs()
    );
    host.run_within(STILL * 4, &watched).expect_ok().expect_stdout("200");
    decided(&host, "grower", SEEN, ".now | startswith(\"somebody resized it\")");
    away(&host, &["grower"]);
}

/// A guest that fills its memory beyond what it was given at first, slowly enough for two reactions, and frees it again.
fn memory_follows(hosts: &Hosts) {
    let host = hosts.host(1);
    let bounds = "--cpu 1..1 --cpu-min 1 --memory 256M..1G --memory-min 128M --net none";
    make(&host, "filler", &format!("{bounds} --foresight on --aggressiveness 1"));
    let exec = |limit: Duration, script: &str| {
        host.run_within(limit, &format!("lathe exec filler -- sh -c '{script}'")).expect_ok().stdout()
    };
    exec(SEEN, "mkdir /tmp/full && mount -t tmpfs -o size=800M none /tmp/full");
    // 4 MiB at a time up to 240 MiB, with what its kernel has more than it was given at first; a file that is short would mean that there was no memory for it.
    let fill = "i=0; while [ $i -lt 60 ]; do dd if=/dev/zero of=/tmp/full/$i bs=1M count=4 2>/dev/null || exit 1; i=$((i+1)); sleep 2; done; du -sm /tmp/full";
    let held = exec(Duration::from_secs(900), fill);
    assert!(held.starts_with("240"), "{held}");
    let grown =
        "[.decisions[] | select(.resource == \"memory\" and .to > .from and .outcome == \"applied\")]";
    decided(&host, "filler", SEEN, &format!("{grown} | length > 0"));
    let (why, shown) = told(&host, "filler");
    let memory = shown["memory"]["actual"].as_u64().unwrap_or(0);
    assert!(memory > 256 << 20 && shown["memory"]["granted"].as_u64() >= Some(memory), "{shown}");
    hosts.note(&format!("grown to {} MiB: {}", memory >> 20, why["decisions"][0]));

    exec(SEEN, "rm /tmp/full/*");
    let less = ".decisions | any(.resource == \"memory\" and .to < .from and .cause == \"idle\" and .outcome == \"applied\")";
    decided(&host, "filler", SHRUNK, less);
    let (_, shown) = told(&host, "filler");
    let now = shown["memory"]["actual"].as_u64().unwrap_or(u64::MAX);
    assert!(now < memory, "{shown}");
    hosts.note(&format!("back at {} MiB", now >> 20));
    assert_eq!(exec(SEEN, "dmesg | grep -ci out.of.memory || true"), "0", "nothing was killed");
    away(&host, &["filler"]);
}
