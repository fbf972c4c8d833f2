//! What lathed promises of a resize, measured on a real guest: `tests/run bench returned`, `… ceiling`.
//!
//! Memory counts as returned when the books hold less for the machine: what others can be given. They follow the charge downwards and never
//! lead it, which is checked in the same breath; the charge itself says nothing of memory that the guest never touched.

use std::path::Path;
use std::time::Duration;

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{answers, away, copy_initrd, exec, make, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "promises",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("returned", returned), ("ceiling", ceiling)],
};

const MIB: u64 = 1 << 20;
/// What a monitor may hold besides guest memory, as the books have it.
const OVERHEAD: u64 = 64 * MIB;
/// The machine when it is large, and how much of it is asked back, MiB.
const LARGE_MIB: u64 = 768;
const ASKED_MIB: u64 = 256;
/// Each guest is asked so often; the figures differ by noise.
const TIMES: usize = 2;
/// How long what comes before and after may take, emulated.
const PATIENCE: Duration = Duration::from_secs(150);

/// A guest, and what it must return.
struct Guest {
    name: &'static str,
    /// What it does before it is asked, as a line of shell in it.
    before: &'static str,
    /// What the host has in memory for it then at least, MiB: else it has not done so.
    least_charged_mib: u64,
    least_percent: f64,
}

/// Page cache: a sparse file of ext4, read once. Held: every other of many small files in memory, which fill the guest at first: no swap takes
/// what stays, it can only be moved.
const GUESTS: [Guest; 3] = [
    Guest { name: "idle", before: "true", least_charged_mib: 0, least_percent: 99.0 },
    Guest {
        name: "full of page cache",
        before: "mkdir -p /mnt; mountpoint -q /mnt || mount -t ext4 /dev/vda /mnt; rm -f /mnt/sparse; truncate -s 768M /mnt/sparse; cat /mnt/sparse >/dev/null",
        least_charged_mib: 600,
        least_percent: 97.0,
    },
    Guest {
        name: "nearly half held and fragmented",
        before: "umount /mnt; mount -t tmpfs -o size=2g none /mnt; n=0; while [ $n -lt 660 ]; do dd if=/dev/zero of=/mnt/$n bs=1M count=1 2>/dev/null; n=$((n + 1)); done; rm -f /mnt/*[13579]; ls /mnt | wc -l",
        least_charged_mib: 330,
        least_percent: 80.0,
    },
];

/// Bytes charged to the machine that are no page cache of the host.
fn charged(host: &Host<'_>) -> u64 {
    let line = "cd /sys/fs/cgroup/lathe.slice/lathe-vm@back.service && echo $(($(cat memory.current) - $(awk '$1 == \"file\" { f = $2 } $1 == \"shmem\" { s = $2 } END { print f - s }' memory.stat)))";
    let text = host.run(line).expect_ok().stdout();
    text.parse().unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn granted(host: &Host<'_>) -> u64 {
    show(host, "back")["memory"]["granted"].as_u64().unwrap_or_default()
}

/// Grows the machine, has the guest do what it does, asks for memory back. Returns the share that came within five seconds, in percent, and
/// what the operation says of the rest.
fn ask_back(hosts: &Hosts, host: &Host<'_>, guest: &Guest) -> (f64, String) {
    host.run_within(PATIENCE, &format!("lathe resize back --memory {LARGE_MIB}M --deadline 120s"))
        .expect_ok();
    let prepared = host.run_within(
        PATIENCE,
        &format!("lathe exec back -- sh -c '{}'; lathe exec back -- free", guest.before),
    );
    let (before, charge) = (granted(host), charged(host));
    assert!(charge >= guest.least_charged_mib * MIB, "{charge} bytes are charged: {}", prepared.story());
    let line = format!("lathe resize back --memory {}M --deadline 5s --json", LARGE_MIB - ASKED_MIB);
    let ended = host.run_within(PATIENCE, &line);
    let view = ended.json();
    let (after, left) = (granted(host), charged(host));
    assert!(left <= after + OVERHEAD, "{left} bytes are charged, the books hold {after}: {view}");
    let share = 100.0 * before.saturating_sub(after) as f64 / (ASKED_MIB * MIB) as f64;
    let (outcome, reason) =
        (view["outcome"].as_str().unwrap_or_default(), view["reason"].as_str().unwrap_or_default());
    hosts.note(&format!(
        "{}: {share:.1} % of {ASKED_MIB} MiB, {outcome} after {} ms {reason:?}; charged {} MiB before, {} MiB after",
        guest.name,
        view["took_usec"].as_u64().unwrap_or(0) / 1000,
        charge / MIB,
        left / MIB
    ));
    prepared
        .stdout()
        .lines()
        .filter(|line| line.contains("Mem"))
        .for_each(|line| hosts.note(&format!("  guest: {line}")));
    assert!(outcome == "applied" || (outcome == "partial" && !reason.is_empty()), "{}", ended.story());
    (share, reason.to_owned())
}

fn returned(hosts: &Hosts) {
    let host = hosts.host(1);
    copy_initrd(&host);
    host.run("truncate -s 64M /root/cache.raw && mkfs.ext4 -q -F /root/cache.raw").expect_ok();
    make(
        &host,
        "back",
        "--cpu 1 --memory 256M..1G --net none --kernel /usr/lib/lathe-test/kernels/6.12/vmlinux \
         --initrd /root/initrd.img --disk /root/cache.raw",
    );
    let mut missed = Vec::new();
    for guest in &GUESTS {
        let shares: Vec<f64> = (0..TIMES).map(|_| ask_back(hosts, &host, guest).0).collect();
        let least = shares.iter().copied().fold(f64::INFINITY, f64::min);
        let most = shares.iter().copied().fold(0.0, f64::max);
        let word = if least >= guest.least_percent { "met" } else { "MISSED" };
        hosts.note(&format!(
            "RESULT returned within 5 s, {}: {least:.1} %, target ≥ {} %, against itself {:.1}: {word}",
            guest.name,
            guest.least_percent,
            most - least
        ));
        if least < guest.least_percent {
            missed.push(guest.name);
        }
    }
    away(&host, &["back"]);
    hosts.expecting();
    assert!(missed.is_empty(), "returned too little: {missed:?}");
}

fn ceiling(hosts: &Hosts) {
    let host = hosts.host(1);
    host.push(Path::new(env!("CARGO_BIN_EXE_bench")), "/root/bench/bench");
    make(&host, "deaf", "--cpu 1.5 --memory 256M --net none");
    assert!(exec(&host, "deaf", "nproc").expect_ok().stdout() == "2");
    // From here on its guest answers nothing, and gives no CPU back.
    host.run("lathe pause deaf").expect_ok();
    let outcome =
        host.run_within(Duration::from_secs(300), "/root/bench/bench ceiling --here --check --machine deaf");
    outcome.stdout().lines().for_each(|line| hosts.note(line));
    outcome.expect_ok();
    host.run("lathe resume deaf").expect_ok();
    answers(&host, "deaf");
    away(&host, &["deaf"]);
}
