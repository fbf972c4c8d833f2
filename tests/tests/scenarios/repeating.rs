//! What is foreseen on a real machine: `tests/run bench repeating`. A load that comes every three minutes is met in advance from its third time
//! on, shape up before it and down after it; a step that nothing told of is covered within two reaction times. Half an hour, so on request only.
//!
//! Grants are the kernel's own (`cpu.max`), sampled once a second, and loads are what the cgroup was charged for. Both are drawn to `LATHE_SVG`
//! (`target/repeating.svg` otherwise). `LATHE_TIMES` says how many times the load comes (8 otherwise).

use std::path::PathBuf;
use std::time::Duration;

use lathe_tests::picture::{Panel, Point, drawn};
use lathe_tests::scenario::{Group, Host, Hosts};
use lathe_tests::workspace;

use crate::node::{away, make};
use crate::steps::number;

/// On one host.
pub const GROUP: Group = Group {
    name: "repeating",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("what_comes_back_is_met_in_advance", what_comes_back_is_met_in_advance)],
};

/// From one time to the next, seconds, and how many of them it is busy.
const PERIOD_SEC: u64 = 180;
const BUSY_SEC: u64 = 60;
/// The one with the repeating load may have a whole CPU, the other one so much, in thousandths.
const WAVE_MILLI: f64 = 1000.0;
const CALM_MILLI: f64 = 600.0;
/// More than this was charged: it is busy. Both are granted more at least.
const BUSY_MILLI: f64 = 110.0;
/// Of the whole, that covers it: the wall is corrected by a few percent all the time.
const COVERED: f64 = 0.85;
/// Down: no more than half.
const DOWN: f64 = 0.5;
/// A reaction of the sculptor: a turn and a resize, seconds.
const REACTION_SEC: f64 = 10.0;
/// From the end of a load to a shape that is down: what the last ten seconds asked for is kept, and a cycle is known to its step of ten.
const DOWN_SEC: f64 = 45.0;
/// First time that must be met.
const MET_FROM: usize = 3;

/// Walls and charges of both machines, once a second.
const SAMPLER: &str = r#"
    cat >/tmp/sampler <<'END'
while :; do
    for name in wave calm; do
        folder=/sys/fs/cgroup/lathe.slice/lathe-vm@$name.service/machine
        read -r quota period <$folder/cpu.max || exit
        while read -r key value; do [ $key = usage_usec ] && used=$value; done <$folder/cpu.stat
        echo ${EPOCHREALTIME/./} $name $quota $period $used
    done
    sleep 1
done >/tmp/sampled
END
    systemd-run --quiet --collect --unit=sampler bash /tmp/sampler"#;

/// A second of a machine.
#[derive(Clone, Copy, Debug)]
struct Second {
    at_sec: f64,
    granted_milli: f64,
    used_milli: f64,
}

fn sampled(host: &Host<'_>, name: &str) -> Vec<Second> {
    let text = host.run(&format!("awk '$2 == \"{name}\"' /tmp/sampled")).expect_ok().stdout();
    let line = |line: &str| {
        let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
        // Without a limit the first is a word: such a line has three.
        let [at, quota, period, used] = numbers[..] else { return None };
        Some((at / 1e6, quota * 1000.0 / period, used))
    };
    let lines: Vec<_> = text.lines().filter_map(line).collect();
    let second = |pair: &[(f64, f64, f64)]| {
        let (at_sec, granted_milli, used) = pair[1];
        Second { at_sec, granted_milli, used_milli: (used - pair[0].2) / (at_sec - pair[0].0) / 1000.0 }
    };
    lines.windows(2).map(second).collect()
}

/// Begin and end of each time that it was busy for longer than a moment, the last of which may not be over.
fn busy(seconds: &[Second]) -> Vec<(usize, usize)> {
    let mut times: Vec<(usize, usize)> = Vec::new();
    for (at, second) in seconds.iter().enumerate().filter(|(_, second)| second.used_milli > BUSY_MILLI) {
        match times.last_mut() {
            // A second that was charged late is no end.
            Some((_, end)) if second.at_sec - seconds[*end].at_sec < 10.0 => *end = at,
            _ => times.push((at, at)),
        }
    }
    times.retain(|(begin, end)| seconds[*end].at_sec - seconds[*begin].at_sec > 10.0);
    times
}

fn points(seconds: &[Second], of: impl Fn(&Second) -> f64) -> Vec<Point> {
    let begin = seconds.first().map_or(0.0, |first| first.at_sec);
    seconds.iter().map(|second| Point { x: second.at_sec - begin, y: of(second) / 1000.0 }).collect()
}

fn what_comes_back_is_met_in_advance(hosts: &Hosts) {
    let host = hosts.host(1);
    let times = number("LATHE_TIMES", 8).max(MET_FROM as u64 + 1);
    let rest = "--memory 128M..128M --memory-min 128M --net none --foresight on --aggressiveness 1";
    make(&host, "wave", &format!("--cpu 0.2..1 --cpu-min 0.2 {rest}"));
    make(&host, "calm", &format!("--cpu 0.2..0.6 --cpu-min 0.2 {rest}"));
    host.run(SAMPLER).expect_ok();
    host.wait_until(
        "both are sampled",
        Duration::from_secs(20),
        "[ $(grep -c -e wave -e calm /tmp/sampled) -gt 4 ]",
    );
    let (quiet, last) = (PERIOD_SEC - BUSY_SEC, times * PERIOD_SEC);
    let load = format!("for time in $(seq {times}); do sleep {quiet}; spin {BUSY_SEC} >/dev/null; done");
    host.run(&format!("systemd-run --quiet --collect lathe exec wave -- sh -c '{load}'")).expect_ok();
    // In the middle of a quiet time, when nobody expects it.
    let step_at = (times - 2) * PERIOD_SEC + 40;
    let step = format!("sleep {step_at}; exec lathe exec calm -- spin 90");
    host.run(&format!("systemd-run --quiet --collect sh -c '{step}'")).expect_ok();
    for time in 0..times {
        std::thread::sleep(Duration::from_secs(PERIOD_SEC));
        let said = host.run("lathe forecast wave | grep -m 1 again; true").stdout();
        hosts.note(&format!(
            "after {} s: {}",
            (time + 1) * PERIOD_SEC,
            if said.is_empty() { "no cycle known" } else { said.trim() }
        ));
    }
    std::thread::sleep(Duration::from_secs(60));
    hosts.note(
        &host.run("lathe why wave").expect_ok().stdout().lines().take(24).collect::<Vec<_>>().join("\n    "),
    );
    let [wave, calm] = ["wave", "calm"].map(|name| sampled(&host, name));
    let file = std::env::var_os("LATHE_SVG")
        .map_or_else(|| workspace::root().join("target/repeating.svg"), PathBuf::from);
    let panel = |title: &str, seconds: &[Second]| Panel {
        title: title.to_owned(),
        used: points(seconds, |second| second.used_milli),
        granted: points(seconds, |second| second.granted_milli),
        marks: busy(seconds).iter().map(|(begin, _)| seconds[*begin].at_sec - seconds[0].at_sec).collect(),
    };
    let panels = [
        panel(&format!("CPUs of a load that comes every {PERIOD_SEC} s"), &wave),
        panel("CPUs of a load that comes once, without warning", &calm),
    ];
    std::fs::write(&file, drawn(&panels)).unwrap_or_else(|cause| panic!("{}: {cause}", file.display()));
    hosts.note(&format!("drawn into {}; {last} s", file.display()));
    judged(hosts, &wave, times);
    covered(hosts, &calm);
    host.run("systemctl stop sampler").expect_ok();
    away(&host, &["wave", "calm"]);
}

/// Each time from the third on: up before, down after.
fn judged(hosts: &Hosts, wave: &[Second], times: u64) {
    let bursts = busy(wave);
    assert_eq!(bursts.len() as u64, times, "{bursts:?}");
    let (mut missed, mut held, mut restless) = (Vec::new(), Vec::new(), Vec::new());
    for (time, (begin, end)) in (1_usize..).zip(&bursts) {
        let is_up = |second: &&Second| second.granted_milli >= COVERED * WAVE_MILLI;
        let rise_sec = wave[*begin].at_sec;
        let ahead =
            wave[..*begin].iter().rev().take_while(is_up).last().map_or(0.0, |up| rise_sec - up.at_sec);
        let late = wave[*begin..].iter().find(is_up).map_or(f64::INFINITY, |up| up.at_sec - rise_sec);
        let down = wave[*end..].iter().find(|second| second.granted_milli <= DOWN * WAVE_MILLI);
        let down = down.map_or(f64::INFINITY, |down| down.at_sec - wave[*end].at_sec);
        // What was had while nothing was asked for, from the end before on.
        let idle = time.checked_sub(2).map(|before| &wave[bursts[before].1..*begin]);
        let idle = idle.map_or(0.0, |idle| {
            idle.iter().map(|second| second.granted_milli).sum::<f64>() / idle.len().max(1) as f64
        });
        hosts.note(&format!(
            "time {time}: up {}, down {down:.0} s after it; {:.2} CPUs in the mean of the quiet time before",
            if ahead > 0.0 {
                format!("{ahead:.0} s before it")
            } else {
                format!("{late:.0} s after it began")
            },
            idle / 1000.0
        ));
        if time >= MET_FROM {
            if ahead <= 0.0 {
                missed.push(time);
            }
            // Down after the time before, up before this one.
            let since = &wave[bursts[time - 2].1..=*begin];
            let crossed = since.windows(2).filter(|pair| is_up(&&pair[0]) != is_up(&&pair[1])).count();
            if crossed > 2 {
                restless.push((time, crossed));
            }
            // Of the last one nothing is known yet: whether it comes again is not over.
            if down > DOWN_SEC && (time as u64) < times {
                held.push(time);
            }
        }
    }
    assert!(
        missed.is_empty() && held.is_empty() && restless.is_empty(),
        "not met in advance: {missed:?}; not given back: {held:?}; up and down in between, how often: {restless:?}"
    );
}

/// Two reactions after a step that nobody expected its shape is up.
fn covered(hosts: &Hosts, calm: &[Second]) {
    let times = busy(calm);
    let Some((begin, _)) = times.first() else { panic!("the step was not seen") };
    let up = calm[*begin..].iter().find(|second| second.granted_milli >= COVERED * CALM_MILLI);
    let took = up.map_or(f64::INFINITY, |up| up.at_sec - calm[*begin].at_sec);
    hosts.note(&format!(
        "a step without warning is covered after {took:.1} s; two reactions are {:.0} s",
        2.0 * REACTION_SEC
    ));
    assert!(took <= 2.0 * REACTION_SEC, "{took} s");
}
