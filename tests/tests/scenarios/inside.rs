//! What guests tell of what goes on inside, what is wanted there, and what people say of what is ahead; in the group `foresight`.

use std::time::{Duration, Instant};

use lathe_tests::scenario::{Host, Hosts};

use crate::node::{away, make, show};
use crate::uplink::KILL;

/// Until a second is seen, in an emulated and busy host.
const SEEN: Duration = Duration::from_secs(60);

/// Waits until `jq` finds `condition` true of the forecast.
fn seen(host: &Host<'_>, name: &str, condition: &str) {
    let line = format!(
        "lathe forecast {name} --json >/tmp/inside && jq -e '{condition}' /tmp/inside >/dev/null || \
         {{ jq -c '{{wanted, by_hand, inside}}' /tmp/inside; false; }}"
    );
    host.wait_until(condition, SEEN, &line);
}

/// Applications of the built-in guest are told, a wish from inside is bounded, seen, said anew after a kill of lathed, and taken back.
pub fn told_and_wanted(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "talk", "--memory 128M --cpu 0.5..1 --net none");
    host.run("systemd-run --quiet --collect lathe exec talk -- spin 120").expect_ok();
    let spins = ".inside.applications[] | select(.name | startswith(\"spin[\"))";
    seen(&host, "talk", &format!("[{spins} | select(.cpu_milli > 200)] | length == 1"));
    seen(&host, "talk", ".inside.kind == \"sessions\" and .inside.age_msec < 5000");
    let table = host.run("lathe forecast talk --apps").expect_ok().expect_out("spin[").stdout();
    hosts.note(&table);
    // What the agent itself has used, user and system, in ticks of 10 ms, and what it keeps: it has been asked for some time now.
    let agent =
        host.run("lathe exec talk -- cat /proc/1/stat /proc/1/statm /proc/uptime").expect_ok().stdout();
    hosts.note(&format!("the agent: {agent}"));

    host.run("lathe exec talk -- lathe-guest want --cpu +0.25 --for 10m")
        .expect_ok()
        .expect_out("cpu     0.75 wanted for 10 min");
    seen(
        &host,
        "talk",
        "[.wanted[] | select(.resource == \"cpu\" and .amount == 750 and .source == \"inside\")] | length == 1",
    );
    host.run("lathe show talk").expect_ok().expect_out("wanted    cpu 0.75   from inside");
    host.run("lathe exec talk -- lathe-guest want --cpu +9 --for 10m")
        .expect_ok()
        .expect_out("1.00 wanted for 10 min")
        .expect_out("bounds of this machine");
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", SEEN, "lathe list");
    seen(&host, "talk", ".wanted | length == 1 and .[0].amount == 1000 and .[0].left_sec < 600");
    host.run("lathe exec talk -- lathe-guest want --none").expect_ok().expect_out("nothing is wanted");
    seen(&host, "talk", ".wanted | length == 0");
    host.run("lathe exec talk -- lathe-guest want --cpu -1")
        .expect_status(2)
        .expect_err("only more can be wanted");
    host.run("lathe exec talk -- lathe-guest want --cpu 0.7 --for 5s").expect_ok();
    seen(&host, "talk", ".wanted | length == 0");
    away(&host, &["talk"]);
}

/// A blueprint by hand and an event are part of the forecast, survive a kill of lathed, and can be taken back.
pub fn what_people_say(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "said", "--memory 128M --cpu 0.5 --net none");
    let plan = "printf 'from,until,resource,p50,p95\\n00:00,24:00,cpu,0.2,0.4\\n'";
    host.run(&format!("{plan} | lathe forecast said --set -")).expect_ok().expect_out("1 step of cpu");
    host.run("lathe forecast said --event 'now sale' --for 2h --cpu 0.45 --memory +64M")
        .expect_ok()
        .expect_out("cpu 0.45, memory +64 MiB   goes on now");
    host.run("lathe forecast said --event 'daily 03:00 backup'")
        .expect_ok()
        .expect_out("as at the busiest time");
    let cpu = ".resources[] | select(.resource == \"cpu\")";
    let ahead =
        format!("[{cpu} | .ahead[] | select(.by_hand and .p50 >= 200 and .p95 == 450)] | length == 6");
    seen(&host, "said", &ahead);
    seen(
        &host,
        "said",
        "[.wanted[] | select(.source == \"by-hand\" and .resource == \"cpu\" and .amount == 450)] | length == 1",
    );
    host.run("lathe forecast said").expect_ok().expect_out("(by hand)").expect_out("event     sale");
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", SEEN, "lathe list");
    seen(&host, "said", &ahead);
    seen(
        &host,
        "said",
        "[.by_hand.events[].name] == [\"backup\", \"sale\"] and (.by_hand.steps | length == 1)",
    );

    host.run("printf 'from,until,resource,p95\\n8:00,24:00,cpu,1\\n' | lathe forecast said --set -")
        .expect_status(2)
        .expect_err("standard input: line 2")
        .expect_err("bad-blueprint");
    host.run("lathe forecast said --event '2020-01-01 00:00 old'")
        .expect_status(2)
        .expect_err("over already");
    host.run("lathe forecast said --remove-event none").expect_status(8).expect_err("no-such-event");
    host.run("lathe forecast said --unset").expect_ok();
    host.run("lathe forecast said --remove-event sale").expect_ok();
    host.run("lathe forecast said --remove-event backup").expect_ok().expect_out("nothing is said by hand");
    seen(&host, "said", ".wanted == [] and .by_hand.steps == [] and .by_hand.events == []");
    away(&host, &["said"]);
}

/// Until a goal is met or given up, in an emulated and busy host.
const PURSUED: Duration = Duration::from_secs(300);
/// An application that serves a request a second by four processes at once, and says so. All of it is a third of a CPU, and no quota holds it
/// back: nothing but its own metrics tells that it is too slow on one CPU.
const SERVER: &str = r##"
all=0
while :; do
    read before rest </proc/uptime
    for one in 1 2 3 4; do bursts ROUNDS 0.001 1 >/dev/null & done
    wait
    read after rest </proc/uptime
    took=$(((${after%.*}${after#*.} - ${before%.*}${before#*.}) * 10))
    all=$((all + 1))
    printf '# TYPE app_request_seconds gauge\napp_request_seconds %d.%03d\n# TYPE app_requests counter\napp_requests_total %d\n' \
        $((took / 1000)) $((took % 1000)) $all >/run/app.new
    mv /run/app.new /run/app.prom
    sleep 1
done
"##;
/// Rounds of the calibration, and what each process is to take of a whole CPU, microseconds.
const CALIBRATION: u64 = 100_000;
const PROCESS_USEC: u64 = 100_000;

/// A goal of an application is judged by its own metrics, gets it more CPU than anybody would see that it needs, is seen, and ends.
pub fn a_goal_is_met(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, "goal", "--memory 128M --cpu 1..1.5 --net none");
    let bursts = host.run(&format!("lathe exec goal -- bursts {CALIBRATION} 4 300")).expect_ok().stdout();
    let field = |text: &str, name: &str| {
        let word = text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        word.and_then(|word| word.parse::<u64>().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    let usec = field(&bursts, "p50_usec").max(1);
    let rounds = CALIBRATION * PROCESS_USEC / usec;
    let server = SERVER.replace("ROUNDS", &rounds.to_string());
    host.run(&format!(
        "cat >/tmp/server <<'END'\n{server}\nEND\nlathe exec goal -- sh -c 'cat >/tmp/server' </tmp/server"
    ))
    .expect_ok();
    host.run("systemd-run --quiet --collect lathe exec goal -- sh /tmp/server").expect_ok();
    let goal = "lathe exec goal -- lathe-guest goal web";
    host.run(&format!("{goal} --latency 'p95 < soon' --metrics /run/app.prom"))
        .expect_status(2)
        .expect_err("soon");
    host.run(&format!("{goal} --latency 'p95 < 330ms' --metrics /run/none.prom"))
        .expect_status(1)
        .expect_err("/run/none.prom");
    host.wait_until("it tells", SEEN, "lathe exec goal -- cat /run/app.prom");
    host.run("lathe forecast goal --mode on").expect_ok();
    // A gauge may be anything, so that it has to be named.
    host.run(&format!("{goal} --latency 'p95 < 330ms' --metrics /run/app.prom"))
        .expect_status(1)
        .expect_err("app_request_seconds (gauge)");
    host.run(&format!("{goal} --latency 'p95 < 330ms' --metrics /run/app.prom --metric app_request_seconds"))
        .expect_ok();
    seen(&host, "goal", ".inside.goals | length == 1 and .[0].name == \"web\" and .[0].latency_usec > 0");
    let line = "lathe forecast goal --json >/tmp/goal && jq -c .inside.goals /tmp/goal && jq -e '(.wanted | map(.source)) == [\"goal\"] and .inside.goals[0].stands == \"met\"' /tmp/goal";
    let begun = Instant::now();
    host.wait_until("the goal is met", PURSUED, line);
    let took = begun.elapsed();
    let applications = host
        .run("lathe forecast goal --apps")
        .expect_ok()
        .expect_out("goal      web   p95 under 330 ms")
        .stdout();
    hosts.note(&format!(
        "{usec} µs for {CALIBRATION} rounds; met after {:.0} s\n{applications}",
        took.as_secs_f64()
    ));
    let granted = show(&host, "goal")["cpu"]["granted"].as_u64().unwrap_or_default();
    assert!(granted > 1000, "it is met with {granted} milliCPU");
    host.run("lathe why goal").expect_ok().expect_out("for a goal of an application");
    host.run(KILL).expect_ok();
    host.wait_until("lathed is back", SEEN, "lathe list");
    seen(&host, "goal", ".inside.goals | length == 1");
    host.run("lathe exec goal -- lathe-guest goal").expect_ok().expect_out("web").expect_out("under 330");
    host.run(&format!("{goal} --none")).expect_ok();
    seen(&host, "goal", ".wanted == [] and (.inside.goals | length) == 0");
    away(&host, &["goal"]);
}
