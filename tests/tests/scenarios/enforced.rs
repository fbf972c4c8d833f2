//! From a decision of lathed until it is in force: `tests/run bench enforced`.
//!
//! lathed measures it itself, from the decision until it has read back what the kernel or the monitor has (`lathe_enforce_seconds` of
//! `/metrics`); a client's start and the write to the store are in no figure of it. This program changes quota, rate and I/O operations of a
//! machine [`CHANGES`] times each through `lathe resize`, checks after every change from outside that it is in force, and prints beside
//! it how long the whole request took. The first half of the changes against the second is the noise (A/A).
//!
//! ```text
//! lathe resize ─► lathed: admitted, stored ─► decided ── cpu.max │ netlink │ monitor ──► read back ─► answered
//!                                                └──────── lathe_enforce_seconds ───────┘
//! └───────────────────────────────────── took_usec ─────────────────────────────────────────────┘
//! ```
//! A quota that falls is decided, and in force, before it is stored. Five minutes on an emulated host.

use std::time::Duration;

use lathe_tests::bench::stats::{Series, verdict};
use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{away, make};

/// On one host.
pub const GROUP: Group = Group {
    name: "enforced",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("decisions_are_in_force_within_5_ms", decisions_are_in_force_within_5_ms)],
};

const NAME: &str = "swift";
/// Of each resource, in two halves.
const CHANGES: u32 = 200;
/// Most milliseconds, for 99 of 100.
const TARGET_MSEC: f64 = 5.0;
/// Half of the changes of one resource, emulated.
const LIMIT: Duration = Duration::from_secs(300);

/// What is changed: as `lathe_enforce_seconds` calls it, and a line of shell that makes change number `n` and prints `wrong` if it is not in
/// force. Each is another than the one before.
const RESOURCES: [(&str, &str); 3] = [
    (
        "cpu",
        r#"milli=$((300 + n * 37 % 600)); change --cpu 0.$milli
           read -r quota period <$unit/machine/cpu.max
           [ "$quota" = $((milli * period / 1000)) ] || echo wrong: $milli milliCPU, cpu.max $quota $period"#,
    ),
    (
        "net",
        r#"mbit=$((10 + n * 7 % 40)); change --net ${mbit}mbit
           for link in lt-$name li-$name; do
               tc class show dev $link | grep -q " rate ${mbit}Mbit " || echo wrong: $mbit Mbit/s, $(tc class show dev $link)
           done"#,
    ),
    (
        "iops",
        r#"iops=$((50 + n * 37 % 900)); change --iops $iops
           now=$(/usr/lib/lathe/lathe-vmm ask /run/lathe/vm/$name.sock '{"status":{}}' | jq .status.disk_rates.iops)
           [ "$now" = $iops ] || echo wrong: $iops a second, $now"#,
    ),
];

/// A histogram of `/metrics`: upper bounds in seconds with all that lie below them, and the sum of all, seconds.
#[derive(Clone, Debug, Default)]
struct Histogram {
    below: Vec<(f64, f64)>,
    sum: f64,
}

impl Histogram {
    fn read(host: &Host<'_>, resource: &str) -> Self {
        let metrics =
            "curl -sS --unix-socket /run/lathe/lathe.sock http://lathe/metrics | grep ^lathe_enforce_seconds";
        let text = host.run(metrics).expect_ok().stdout();
        let mut read = Self::default();
        for line in text.lines() {
            let Some((name, number)) = line.rsplit_once(' ') else { continue };
            if !name.contains(&format!("resource=\"{resource}\"")) {
                continue;
            }
            let number: f64 = number.parse().unwrap_or_else(|error| panic!("{error}: {line}"));
            let bound = name.split_once("le=\"").and_then(|(_, rest)| rest.split_once('"'));
            match bound {
                Some(("+Inf", _)) => read.below.push((f64::INFINITY, number)),
                Some((bound, _)) => {
                    let bound = bound.parse().unwrap_or_else(|error| panic!("{error}: {line}"));
                    read.below.push((bound, number));
                }
                None if name.starts_with("lathe_enforce_seconds_sum") => read.sum = number,
                None => {}
            }
        }
        assert!(!read.below.is_empty(), "no {resource} in: {text}");
        read
    }

    fn since(&self, before: &Self) -> Self {
        let below = self.below.iter().zip(&before.below).map(|(now, before)| (now.0, now.1 - before.1));
        Self { below: below.collect(), sum: self.sum - before.sum }
    }

    fn count(&self) -> f64 {
        self.below.last().map_or(0.0, |(_, count)| *count)
    }

    /// Milliseconds below which `share` (0 to 1) of all lie, as evenly spread within their bucket; infinite beyond the last bound.
    fn quantile_msec(&self, share: f64) -> f64 {
        let wanted = share * self.count();
        let mut before = (0.0, 0.0);
        for &(bound, below) in &self.below {
            if below >= wanted && below > before.1 {
                let part = (wanted - before.1).max(0.0) / (below - before.1);
                return 1000.0 * (before.0 + (bound - before.0) * part);
            }
            before = (bound, below);
        }
        f64::NAN
    }

    /// How many took at most so many milliseconds.
    fn within(&self, msec: f64) -> f64 {
        let fits = |bound: f64| bound * 1000.0 <= msec * (1.0 + 1e-9);
        self.below.iter().rfind(|(bound, _)| fits(*bound)).map_or(0.0, |(_, count)| *count)
    }

    fn story(&self) -> String {
        format!(
            "p50 {:.2} p90 {:.2} p99 {:.2} ms, mean {:.2} ms, {} of {} within {TARGET_MSEC} ms",
            self.quantile_msec(0.5),
            self.quantile_msec(0.9),
            self.quantile_msec(0.99),
            1000.0 * self.sum / self.count().max(1.0),
            self.within(TARGET_MSEC),
            self.count()
        )
    }
}

/// Makes changes `first` to `last`. Answers how long lathed took for each request, milliseconds.
fn change(host: &Host<'_>, deed: &str, first: u32, last: u32) -> Series {
    let line = format!(
        "name={NAME} unit=/sys/fs/cgroup/lathe.slice/lathe-vm@{NAME}.service
         change() {{ lathe resize {NAME} \"$@\" --json >/tmp/changed || exit 1; cat /tmp/changed >>/tmp/all; }}
         : >/tmp/all; for n in $(seq {first} {last}); do
         {deed}
         done; jq -r '\"took \\(.outcome) \\(.took_usec)\"' /tmp/all"
    );
    let text = host.run_within(LIMIT, &line).expect_ok().stdout();
    let mut took = Series::default();
    for line in text.lines() {
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["took", "applied", usec] => took.push(usec.parse().unwrap_or(f64::NAN) / 1000.0),
            _ => panic!("{line}\nof\n{text}"),
        }
    }
    took
}

/// Measures one resource. Returns whether the target is met.
fn measure(hosts: &Hosts, host: &Host<'_>, resource: &str, deed: &str) -> bool {
    let half = CHANGES / 2;
    // What is made once and only changed afterwards is no part of the figures.
    change(host, deed, 0, 1);
    let mut readings = vec![Histogram::read(host, resource)];
    let mut took = Series::default();
    for first in [2, 2 + half] {
        took = took.joined(&change(host, deed, first, first + half - 1));
        readings.push(Histogram::read(host, resource));
    }
    let halves = [readings[1].since(&readings[0]), readings[2].since(&readings[1])];
    for (half, word) in halves.iter().zip(["first", "second"]) {
        hosts.note(&format!("{resource}, {word} half: {}", half.story()));
    }
    let all = readings[2].since(&readings[0]);
    assert!(all.count() >= f64::from(CHANGES), "{resource}: {} of {CHANGES} changes were seen", all.count());
    let differ = halves[1].quantile_msec(0.99) - halves[0].quantile_msec(0.99);
    let (met, word) = verdict(all.quantile_msec(0.99), TARGET_MSEC, differ, TARGET_MSEC);
    hosts.note(&format!(
        "RESULT {resource}: decision to enforced {}; second half against the first {differ:+.2} ms; target p99 ≤ {TARGET_MSEC} ms: {word}",
        all.story()
    ));
    hosts.note(&format!(
        "  {resource}: the request, with the store: median {:.1}, p99 {:.1}, from {:.1} to {:.1} ms",
        took.median(),
        took.quantile(0.99),
        took.quantile(0.0),
        took.quantile(1.0)
    ));
    met
}

fn decisions_are_in_force_within_5_ms(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, NAME, "--memory 128M --cpu 1 --net 50mbit");
    host.run(&format!("lathe disk add {NAME} --size 16M")).expect_ok();
    let missed: Vec<_> = RESOURCES
        .iter()
        .filter(|(resource, deed)| !measure(hosts, &host, resource, deed))
        .map(|(resource, _)| *resource)
        .collect();
    away(&host, &[NAME]);
    assert!(missed.is_empty(), "in force too late: {missed:?}");
}
