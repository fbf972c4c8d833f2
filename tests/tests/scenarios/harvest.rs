//! What a harvest machine takes of the CPU that others leave idle, and what that costs the one whose CPU it is: `tests/run bench harvest`.
//!
//! The owner serves bursts of work with rests in between, about 30 % of a CPU, under a grant that it never reaches; the harvest machine spins on
//! all that is left. A round measures the owner alone, beside the harvest machine, and alone again:
//!
//! ```text
//! spin 3 s ─► rounds of work in a burst      alone 20 s │ beside 20 s │ alone 20 s      3 rounds as standard, 3 as guaranteed
//! ```
//! The two alone differ by noise (A/A): where they differ by more than half of what the target leaves, the slowdown says nothing about the
//! harvest machine, and what the host counted is there instead. How fast the CPU comes back is told from both sides: by the run queue, as
//! the waiting of the owner's vCPU threads per wake-up (`/proc/TID/schedstat`, sched-stats.rst) and the longest of them
//! (`/proc/TID/sched`, if the kernel has it), and by the guest, as how late its rests ended.
//!
//! Ten minutes on an emulated host.

use std::time::Duration;

use lathe_tests::bench::stats::{Series, verdict};
use lathe_tests::scenario::{Group, Host, Hosts};

use crate::exactness::value;
use crate::node::{away, exec, make, settled};

/// On one host.
pub const GROUP: Group = Group {
    name: "harvest",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("what_is_idle_is_lent_and_comes_back", what_is_idle_is_lent_and_comes_back)],
};

const OWNER: &str = "owner";
const OTHER: &str = "lent";
/// Tiers that the owner is measured in.
const TIERS: [&str; 2] = ["standard", "guaranteed"];
/// Rounds of each.
const ROUNDS: usize = 3;
/// How long each figure is measured, seconds.
const SECONDS: u32 = 20;
/// How much longer the harvest machine spins: before the owner begins, and while `lathe exec` reaches a guest.
const MARGIN: u32 = 8;
/// A burst's work on a CPU of its own, and the rest after it, milliseconds: 30 %.
const WORK_MSEC: f64 = 3.0;
const REST_MSEC: u32 = 7;
/// One figure, emulated.
const LIMIT: Duration = Duration::from_secs(180);

/// Least of the idle CPU that is lent, percent.
const TARGET_LENT: f64 = 80.0;
/// Most that the owner's p99 may grow by, as a part of it.
const TARGET_SLOWER: f64 = 0.03;
/// Most that the CPU may take to come back, milliseconds.
const TARGET_BACK_MSEC: f64 = 10.0;

/// What the host counts of both machines, as words; times in the units that the words end in.
fn counting() -> String {
    let [owner, other] = [OWNER, OTHER].map(|name| format!("lathe.slice/lathe-vm@{name}.service"));
    format!(
        r#"cd /sys/fs/cgroup
        spent() {{ awk -v key="$2" '$1 == key {{ print $2; exit }}' "$1/cpu.stat"; }}
        tids=$(cat {owner}/machine/vcpu/cgroup.threads)
        waited() {{ for tid in $tids; do cat /proc/$tid/schedstat; done | awk '{{ w += $2 }} END {{ printf "%.0f", w }}'; }}
        switches() {{ for tid in $tids; do cat /proc/$tid/status; done | awk -v key="$1" '$1 == key {{ n += $2 }} END {{ printf "%.0f", n }}'; }}
        longest() {{ for tid in $tids; do awk '/wait_max/ {{ print $NF }}' /proc/$tid/sched; done 2>/dev/null | sort -g | tail -n 1; }}
        at() {{
            echo now_nsec=$(date +%s%N) owner_usec=$(spent {owner} usage_usec) other_usec=$(spent {other} usage_usec) \
                machines_usec=$(spent lathe.slice usage_usec) host_usec=$(spent . usage_usec) \
                throttled=$(spent {owner}/machine nr_throttled) wait_nsec=$(waited) \
                slept=$(switches voluntary_ctxt_switches:) pushed=$(switches nonvoluntary_ctxt_switches:)
        }}"#
    )
}

/// One figure: what the guest said, and what the host counted before and after.
struct Measured {
    said: String,
    before: String,
    after: String,
}

impl Measured {
    fn take(host: &Host<'_>, work: u64, beside: bool) -> Self {
        let (spin, over) = if beside {
            let seconds = SECONDS + MARGIN;
            // All of it lies within the spinning, or it counts for nothing.
            (
                format!("lathe exec {OTHER} -- spin {seconds} 2 >/tmp/spin & spinning=$!; sleep 2"),
                "kill -0 $spinning || { echo the harvest machine does not spin any more >&2; exit 1; }; wait",
            )
        } else {
            (String::new(), "")
        };
        let line = format!(
            "{}
             {spin}
             for tid in $tids; do echo 0 >/proc/$tid/sched; done 2>/dev/null
             before=$(at); lathe exec {OWNER} -- bursts {work} {SECONDS} {REST_MSEC} >/tmp/bursts || exit 1
             after=$(at); longest=$(longest)
             {over}
             echo \"$before\"; echo \"$after\"; echo $(cat /tmp/bursts) longest_wait_msec=${{longest:--1}}",
            counting()
        );
        let text = host.run_within(LIMIT, &line).expect_ok().stdout();
        let mut lines = text.lines().map(str::to_owned);
        let mut next = || lines.next().unwrap_or_else(|| panic!("three lines were expected: {text}"));
        let (before, after) = (next(), next());
        Self { said: next(), before, after }
    }

    fn more(&self, key: &str) -> f64 {
        value(&self.after, key) - value(&self.before, key)
    }

    fn said(&self, key: &str) -> f64 {
        value(&self.said, key)
    }

    /// CPUs that what is counted in microseconds has used.
    fn cpus(&self, key: &str) -> f64 {
        self.more(key) * 1000.0 / self.more("now_nsec")
    }

    fn per_second(&self, key: &str) -> f64 {
        self.more(key) * 1e9 / self.more("now_nsec")
    }

    /// Mean wait of the owner's vCPU threads on the run queue, for each time that they woke up, microseconds.
    fn wait_usec(&self) -> f64 {
        self.more("wait_nsec") / 1000.0 / self.more("slept").max(1.0)
    }

    /// Percent of what owner and host reserve leave idle, `all` being the CPUs beyond the reserve.
    fn lent_percent(&self, all: f64) -> f64 {
        100.0 * self.cpus("other_usec") / (all - self.cpus("owner_usec"))
    }

    fn story(&self, all: f64) -> String {
        format!(
            "p50 {:.0} p99 {:.0} longest {:.0} µs, late p99 {:.0} longest {:.0} µs, {} bursts; CPUs: owner {:.3}, harvest {:.3} of {:.3} idle, host {:.3}",
            self.said("p50_usec"),
            self.said("p99_usec"),
            self.said("longest_usec"),
            self.said("late_p99_usec"),
            self.said("late_longest_usec"),
            self.said("bursts"),
            self.cpus("owner_usec"),
            self.cpus("other_usec"),
            all - self.cpus("owner_usec"),
            self.cpus("host_usec") - self.cpus("machines_usec"),
        )
    }

    fn counts(&self) -> String {
        format!(
            "wait {:.0} µs a wake-up, longest {}; {:.0} wake-ups and {:.0} times pushed aside a second, {:.0} periods throttled",
            self.wait_usec(),
            match self.said("longest_wait_msec") {
                longest if longest < 0.0 => "not told by this kernel".to_owned(),
                longest => format!("{longest:.2} ms"),
            },
            self.per_second("slept"),
            self.per_second("pushed"),
            self.more("throttled"),
        )
    }
}

/// Alone, beside, alone again.
type Round = [Measured; 3];

fn series(rounds: &[Round], place: usize, figure: impl Fn(&Measured) -> f64) -> Series {
    let mut series = Series::default();
    rounds.iter().for_each(|round| series.push(figure(&round[place])));
    series
}

/// How much longer `figure` is beside than alone, as a part of it, and the most that it differs alone within a round.
fn slower(rounds: &[Round], figure: impl Fn(&Measured) -> f64 + Copy) -> (f64, f64) {
    let [first, beside, second] = [0, 1, 2].map(|place| series(rounds, place, figure));
    let against_itself = second.ratios(&first);
    let differ = (against_itself.quantile(1.0) - 1.0).max(1.0 - against_itself.quantile(0.0));
    (beside.median() / first.joined(&second).median() - 1.0, differ)
}

/// Prints what came of one tier and returns what was missed.
fn judge(hosts: &Hosts, tier: &str, rounds: &[Round], all: f64) -> Vec<String> {
    let lent = series(rounds, 1, |measured| measured.lent_percent(all));
    let enough = lent.median() >= TARGET_LENT;
    hosts.note(&format!(
        "RESULT {tier}: idle CPU lent: {:.1} % (from {:.1} to {:.1}), target ≥ {TARGET_LENT} %: {}",
        lent.median(),
        lent.quantile(0.0),
        lent.quantile(1.0),
        if enough { "met" } else { "MISSED" }
    ));
    let (p50, p50_differs) = slower(rounds, |measured| measured.said("p50_usec"));
    let (p99, differs) = slower(rounds, |measured| measured.said("p99_usec"));
    let (fast, word) = verdict(p99, TARGET_SLOWER, differs, TARGET_SLOWER);
    hosts.note(&format!(
        "RESULT {tier}: slowdown of the owner: p99 {:+.1} %, alone against itself within {:.1} % (p50 {:+.1} %, {:.1} %), target ≤ {:+.0} %: {word}",
        100.0 * p99,
        100.0 * differs,
        100.0 * p50,
        100.0 * p50_differs,
        100.0 * TARGET_SLOWER
    ));
    let late = |place| series(rounds, place, |measured| measured.said("late_p99_usec") / 1000.0);
    let [first, beside, second] = [0, 1, 2].map(late);
    let alone = first.joined(&second);
    let (back, noise) = (beside.median() - alone.median(), alone.quantile(1.0) - alone.quantile(0.0));
    let (soon, word) = verdict(back, TARGET_BACK_MSEC, noise, TARGET_BACK_MSEC);
    hosts.note(&format!(
        "RESULT {tier}: given back: a guest that wakes up is late by {back:+.2} ms more (p99 {:.2} beside, {:.2} alone), alone against itself within {noise:.2}, target ≤ {TARGET_BACK_MSEC} ms: {word}",
        beside.median(),
        alone.median()
    ));
    for (place, what) in [(0, "alone"), (1, "beside"), (2, "alone again")] {
        let wait = series(rounds, place, Measured::wait_usec);
        let longest = series(rounds, place, |measured| measured.said("longest_wait_msec"));
        hosts.note(&format!(
            "  {tier}, {what:11}: run-queue wait a wake-up {:.0} µs (from {:.0} to {:.0}), longest {:.2} ms; pushed aside {:.0} times a second; {:.0} periods throttled",
            wait.median(),
            wait.quantile(0.0),
            wait.quantile(1.0),
            longest.quantile(1.0),
            series(rounds, place, |measured| measured.per_second("pushed")).median(),
            series(rounds, place, |measured| measured.more("throttled")).quantile(1.0)
        ));
    }
    let missed =
        [(enough, "too little is lent"), (fast, "the owner is slower"), (soon, "given back too late")];
    missed.iter().filter(|(met, _)| !met).map(|(_, what)| format!("{tier}: {what}")).collect()
}

fn what_is_idle_is_lent_and_comes_back(hosts: &Hosts) {
    let host = hosts.host(1);
    make(&host, OWNER, "--memory 128M --cpu 1 --net none");
    make(&host, OTHER, "--memory 128M --cpu 1.75 --net none --tier harvest");
    let cpu = settled(&host).host["cpu"].clone();
    let milli = |key: &str| cpu[key].as_f64().unwrap_or_default();
    let all = (milli("capacity") - milli("reserved")) / 1000.0;
    // Without it the kernel counts no longest wait; one that lacks it says so in the figures.
    let file = "/proc/sys/kernel/sched_schedstats";
    host.run(&format!("test ! -e {file} || echo 1 >{file}")).expect_ok();
    let text = exec(&host, OWNER, "spin 3").expect_ok().stdout();
    let per_second = value(&text, "rounds") / value(&text, "cpu_sec");
    let work = (per_second * WORK_MSEC / 1000.0).max(1.0) as u64;
    hosts.note(&format!(
        "{all:.2} CPUs beyond the reserve; {work} rounds of work in a burst, {WORK_MSEC} ms; rests of {REST_MSEC} ms; {SECONDS} s a figure"
    ));
    let mut missed = Vec::new();
    for tier in TIERS {
        host.run(&format!("lathe resize {OWNER} --tier {tier}")).expect_ok();
        let mut rounds: Vec<Round> = Vec::new();
        for number in 1..=ROUNDS {
            let round = [("alone", false), ("beside", true), ("alone again", false)].map(|(what, beside)| {
                let measured = Measured::take(&host, work, beside);
                hosts.note(&format!("{tier}, round {number}, {what:11}: {}", measured.story(all)));
                hosts.note(&format!("  {}", measured.counts()));
                measured
            });
            rounds.push(round);
        }
        missed.extend(judge(hosts, tier, &rounds, all));
    }
    host.run(&format!("test ! -e {file} || echo 0 >{file}")).expect_ok();
    away(&host, &[OWNER, OTHER]);
    assert!(missed.is_empty(), "missed: {}", missed.join("; "));
}
