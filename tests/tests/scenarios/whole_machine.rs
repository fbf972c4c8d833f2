//! Whether a machine as a whole, its monitor's threads included, gets the CPU that it is granted and no more: `tests/run bench whole-machine`.
//!
//! ```text
//! grant ─► load runs ─► 10 s │ 10 s │ …   cpu.stat of machine/ at each stroke, ÷ time ÷ grant      $LATHE_WINDOWS of them, 3 if not said
//! ```
//! | load | in the guest |
//! |---|---|
//! | spin | one thread that spins |
//! | spinners | two of them on two vCPUs |
//! | I/O | a thread that spins, four readers of a disk, a sender whose rate is far above what the grant carries |
//! | resized | one thread that spins, while the grant goes to and fro by a fifth once a second; asked is what was granted over time |
//!
//! Beside it QEMU's whole process under systemd's `CPUQuota=`, with a guest that spins. A window is one figure; the median of a load's
//! windows is held against the target. A host that runs on a busy machine loses time that it cannot see: how much CPU a process without any
//! quota gets there is measured before each figure, and where that is short of a CPU by more than half the target nothing is said.
//!
//! An hour on an emulated host; `$LATHE_GRANTS` names some of the grants, in thousandths of a CPU: `LATHE_WINDOWS=2 LATHE_GRANTS="100 500"`.

use std::fmt::Write as _;
use std::time::Duration;

use lathe_tests::bench::stats::{Series, mean_of_steps, verdict};
use lathe_tests::scenario::{Group, Host, Hosts};

use crate::exactness::value;
use crate::node::{away, copy_initrd, make};

/// On one host.
pub const GROUP: Group = Group {
    name: "whole-machine",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("a_whole_machine_gets_its_grant", a_whole_machine_gets_its_grant)],
};

/// Grants, milliCPU, unless `$LATHE_GRANTS` says otherwise.
const GRANTS: [u32; 7] = [100, 150, 250, 500, 750, 1000, 1500];
/// What a machine is granted while the other is measured: the books carry no more on an emulated host.
const ASLEEP: &str = "50m";
/// Length of a window, seconds.
const SECONDS: u32 = 10;
/// Until the load runs and the division between vCPUs and monitor has settled, seconds.
const SETTLE: u32 = 10;
/// Windows of each load, unless `$LATHE_WINDOWS` says otherwise, and the most of them.
const WINDOWS: u32 = 3;
const WINDOWS_MAX: u32 = 20;
/// What the median may be off, percent.
const TARGET_PERCENT: f64 = 1.0;
/// What a figure takes besides its windows, emulated.
const LIMIT: Duration = Duration::from_secs(240);

/// What a guest does, as it is called and as lines of shell that begin it for `$seconds`; `one` and `two` are machines with so many vCPUs.
struct Load {
    name: &'static str,
    machine: &'static str,
    begin: &'static str,
    /// Changes the grant once a second.
    resized: bool,
}

const SPIN: &str = "lathe exec $machine -- spin $seconds >/tmp/spin &";
const LOADS: [Load; 4] = [
    Load { name: "spin", machine: "one", begin: SPIN, resized: false },
    Load {
        name: "spinners",
        machine: "two",
        begin: "lathe exec $machine -- spin $seconds 2 >/tmp/spin &",
        resized: false,
    },
    Load {
        name: "I/O",
        machine: "two",
        begin: "lathe exec $machine -- spin $seconds >/tmp/spin &
            lathe exec $machine -- lathe-guest iops /dev/vda $seconds 4 >/tmp/iops &
            timeout $((seconds + 60)) /usr/lib/lathe/lathe-guest sink $port >/tmp/sink &
            until ss -Hltn sport = :$port | grep -q .; do sleep 0.1; done
            lathe exec $machine -- blast $gateway $port $seconds >/dev/null &",
        resized: false,
    },
    Load { name: "resized", machine: "one", begin: SPIN, resized: true },
];

/// `figures CGROUP COUNT` prints `window from= usec= nsec=` so often.
const FIGURES: &str = r#"
    usage() { awk '/^usage_usec/ { print $2; exit }' $1/cpu.stat; }
    figures() {
        for window in $(seq $2); do
            from=$(date +%s%N); before=$(usage $1); sleep 10; to=$(date +%s%N); after=$(usage $1)
            echo window from=$from usec=$((after - before)) nsec=$((to - from))
        done
    }"#;

fn windows() -> u32 {
    let said = std::env::var("LATHE_WINDOWS").ok();
    let windows = said.map_or(Ok(WINDOWS), |said| said.parse());
    match windows {
        Ok(windows @ 1..=WINDOWS_MAX) => windows,
        other => panic!("LATHE_WINDOWS is {other:?}, but can only be 1 to {WINDOWS_MAX}"),
    }
}

fn grants() -> Vec<u32> {
    let Ok(said) = std::env::var("LATHE_GRANTS") else { return GRANTS.to_vec() };
    let grants: Vec<u32> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let known = grants.iter().all(|milli| GRANTS.contains(milli));
    assert!(known && !grants.is_empty(), "LATHE_GRANTS is {said}, but can only be some of {GRANTS:?}");
    grants
}

/// Delivered ÷ asked of each window that a text tells, and the mean of what was delivered.
fn ratios(text: &str, grant: f64) -> (Series, f64) {
    let mut changes: Vec<(f64, f64)> = vec![(0.0, grant)];
    changes.extend(
        text.lines()
            .filter(|line| line.starts_with("changed"))
            .map(|line| (value(line, "at"), value(line, "milli") / 1000.0)),
    );
    let (mut series, mut sum, mut count) = (Series::default(), 0.0, 0.0);
    for line in text.lines().filter(|line| line.starts_with("window")) {
        let (from, nsec) = (value(line, "from"), value(line, "nsec"));
        let delivered = value(line, "usec") * 1000.0 / nsec;
        series.push(delivered / mean_of_steps(&changes, from, from + nsec));
        (sum, count) = (sum + delivered, count + 1.0);
    }
    assert!(count > 0.0, "no window in: {text}");
    (series, sum / count)
}

/// One load under one grant.
fn measure(host: &Host<'_>, load: &Load, milli: u32, number: u32) -> (Series, f64, String) {
    let (machine, begin) = (load.machine, load.begin);
    let seconds = SETTLE + windows() * (SECONDS + 1) + 4;
    let mut line = format!(
        "{FIGURES}
         machine={machine} seconds={seconds} port={} group=/sys/fs/cgroup/lathe.slice/lathe-vm@{machine}.service/machine
         gateway=$(ip -4 -o address show lathe0 | awk '{{sub(\"/.*\", \"\", $4); print $4; exit}}')
         lathe resize $machine --cpu {milli}m >/dev/null || exit 1
         {begin}
         sleep {SETTLE}; u=$(usage $group/vmm); v=$(usage $group)\n",
        lathe_tests::workspace::HOST_PORTS.start() + u16::try_from(number).unwrap_or(0)
    );
    if load.resized {
        let _ = writeln!(
            line,
            "(for round in $(seq {seconds}); do
                 begun=$(date +%s%N); milli=$(({milli} * (4 + round % 2) / 5))
                 lathe resize $machine --cpu ${{milli}}m >/dev/null && echo changed at=$(date +%s%N) milli=$milli
                 rest=$((1000000000 - $(date +%s%N) + begun)); [ $rest -le 0 ] || sleep $(printf 0.%09d $rest)
             done) >/tmp/changes & changing=$!; sleep 2"
        );
    }
    let _ = writeln!(
        line,
        "figures $group {}; u=$(($(usage $group/vmm) - u)); v=$(($(usage $group) - v))
         {}
         wait; lathe resize $machine --cpu {ASLEEP} >/dev/null; echo monitor_percent=$((100 * u / v))",
        windows(),
        if load.resized { "kill $changing; cat /tmp/changes" } else { "" }
    );
    let limit = LIMIT + Duration::from_secs(seconds.into());
    let text = host.run_within(limit, &line).expect_ok().stdout();
    let (series, delivered) = ratios(&text, f64::from(milli) / 1000.0);
    (series, delivered, format!("; {:.0} % of it the monitor's", value(&text, "monitor_percent")))
}

/// QEMU's whole process under the same quota; so many vCPUs spin. What became of it instead where it has ended before all was measured.
fn rival(host: &Host<'_>, milli: u32, vcpus: u32) -> Result<(Series, f64), String> {
    let line = format!(
        "{FIGURES}
         systemctl stop rival.service 2>/dev/null; systemctl reset-failed rival.service 2>/dev/null
         systemd-run --quiet --unit=rival -p CPUAccounting=yes qemu-system-x86_64 -accel kvm -M microvm -cpu host -smp {vcpus} -m 256 \
             -nodefaults -no-user-config -display none -no-reboot -serial file:/tmp/rival.log \
             -kernel /usr/lib/lathe-test/kernels/6.12/vmlinux -initrd /root/spin.cpio -append 'console=ttyS0 quiet panic=-1' || exit 1
         for attempt in $(seq 120); do grep -q 'all spin' /tmp/rival.log && break; sleep 1; done
         grep -q 'all spin' /tmp/rival.log || exit 2
         systemctl set-property --runtime rival.service CPUQuota={}%; sleep 3
         figures /sys/fs/cgroup/system.slice/rival.service {}
         systemctl is-active --quiet rival.service || {{ journalctl -q -n 3 -o cat -u rival.service; tail -n 2 /tmp/rival.log; exit 3; }}
         systemctl stop rival.service; rm /tmp/rival.log",
        f64::from(milli) / 10.0,
        windows()
    );
    let limit = LIMIT + Duration::from_secs((windows() * SECONDS).into());
    let outcome = host.run_within(limit, &line);
    if outcome.status == 3 {
        return Err(outcome.stdout());
    }
    Ok(ratios(&outcome.expect_ok().stdout(), f64::from(milli) / 1000.0))
}

/// How much of a CPU a process without a quota gets.
fn unlimited(host: &Host<'_>) -> f64 {
    let text = host.run("/usr/lib/lathe/lathe-guest spin 5").expect_ok().stdout();
    value(&text, "share")
}

fn prepare(host: &Host<'_>) {
    copy_initrd(host);
    host.run(
        "set -e; mkdir -p /root/spin/bin; cd /root/spin; cp /bin/busybox bin/; ln -sf busybox bin/sh
         printf '#!/bin/sh\\nbusybox mkdir -p /proc; busybox mount -t proc proc /proc\\n(while :; do :; done) &\\n[ $(busybox nproc) = 1 ] || (while :; do :; done) &\\necho all spin\\nwait\\n' >init
         chmod +x init; printf 'init\\nbin\\nbin/busybox\\nbin/sh\\n' | busybox cpio -o -H newc >/root/spin.cpio
         head -c 64M /dev/urandom >/root/disk.raw",
    )
    .expect_ok();
    let boot = "--kernel /usr/lib/lathe-test/kernels/6.12/vmlinux --initrd /root/initrd.img";
    for (name, options) in [
        ("one", "--memory 128M --net none --cpu 1..1"),
        ("two", "--memory 256M --net 400mbit --cpu 1..2 --vcpus 2 --disk /root/disk.raw"),
    ] {
        make(host, name, &format!("{options} {boot}"));
        host.run(&format!("lathe resize {name} --cpu {ASLEEP}")).expect_ok();
    }
}

/// `delivered ÷ asked` in words, and how far its median is off, percent.
fn told(series: &Series) -> (String, f64) {
    let off = |share| 100.0 * (series.quantile(share) - 1.0);
    (format!("{:+.2} % (from {:+.2} to {:+.2})", off(0.5), off(0.0), off(1.0)), off(0.5))
}

fn a_whole_machine_gets_its_grant(hosts: &Hosts) {
    let host = hosts.host(1);
    prepare(&host);
    let mut missed = Vec::new();
    let mut number = 0;
    for milli in grants() {
        let grant = f64::from(milli) / 1000.0;
        for load in &LOADS {
            // One vCPU carries no more than a CPU.
            if load.machine == "one" && milli > 1000 {
                continue;
            }
            number += 1;
            let lost = 100.0 * (1.0 - unlimited(&host));
            let (series, delivered, also) = measure(&host, load, milli, number);
            let (words, off) = told(&series);
            let (met, word) = verdict(off.abs(), TARGET_PERCENT, lost, TARGET_PERCENT);
            hosts.note(&format!(
                "RESULT {grant} CPU, {:8}: delivered {delivered:.4}, {words}{also}; host lost {lost:.1} %; target ± {TARGET_PERCENT} %: {word}",
                load.name
            ));
            if !met {
                missed.push(format!("{} at {grant}: {words}", load.name));
            }
        }
        for vcpus in [1, 2] {
            if milli <= vcpus * 1000 {
                let said = match rival(&host, milli, vcpus) {
                    Ok((series, delivered)) => format!("delivered {delivered:.4}, {}", told(&series).0),
                    Err(why) => format!("not measured, it has ended: {why}"),
                };
                hosts.note(&format!(
                    "  QEMU with CPUQuota={}%, {vcpus} vCPU spinning: {said}",
                    f64::from(milli) / 10.0
                ));
            }
        }
    }
    away(&host, &["one", "two"]);
    assert!(missed.is_empty(), "missed: {}", missed.join("; "));
}
