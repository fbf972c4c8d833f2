//! Random changes of shape, one after the other, on a real guest: `tests/run bench shape-steps`. Minutes, so on request only.
//!
//! `LATHE_STEPS` says how many (1,000 otherwise), in four parts with a machine each, so that an emulated host that falls over costs a part;
//! `LATHE_SEED` repeats a run.

use std::time::{Duration, Instant};

use lathe_tests::dice::Dice;
use lathe_tests::scenario::{Group, Host, Hosts};

use crate::node::{away, boot_id, make, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "shape-steps",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[
        ("the_first_quarter", |hosts| random_changes(hosts, 0)),
        ("the_second_quarter", |hosts| random_changes(hosts, 1)),
        ("the_third_quarter", |hosts| random_changes(hosts, 2)),
        ("the_last_quarter", |hosts| random_changes(hosts, 3)),
    ],
};

const MIB: u64 = 1 << 20;
/// What virtio-mem plugs at once.
const BLOCK: u64 = 2 * MIB;
/// What a monitor may hold besides guest memory, as the books have it.
const OVERHEAD: u64 = 64 * MIB;
/// How long it may take to fill memory, emulated.
const FILL_LIMIT: Duration = Duration::from_secs(300);
/// What takes longer is told.
const SLOW: Duration = Duration::from_secs(30);
/// How long one change may take, emulated.
const STEP_LIMIT: Duration = Duration::from_secs(60);

/// A number from the environment.
pub fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

/// Bytes charged to the machine's cgroup that are no page cache.
fn charged(host: &Host<'_>) -> u64 {
    let line = "cd /sys/fs/cgroup/lathe.slice/lathe-vm@steps.service && echo $(($(cat memory.current) - $(awk '$1 == \"file\" { f = $2 } $1 == \"shmem\" { s = $2 } END { print f - s }' memory.stat)))";
    let text = host.run(line).expect_ok().stdout();
    text.parse().unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// How often lathed has told that the machine boots anew, and that a triple fault was why. An emulated guest has a few of these in a thousand
/// steps; its shape and the books have to be right after them too.
fn boots(host: &Host<'_>) -> [u64; 2] {
    ["steps reboots", "steps reset itself by a triple fault"].map(|told| {
        let line = format!("journalctl -q -u lathed -o cat | grep -c '{told}' || true");
        let text = host.run(&line).expect_ok().stdout();
        text.parse().unwrap_or_else(|error| panic!("{error}: {text}"))
    })
}

/// Has the guest use `mib` MiB, perhaps while it unplugs the memory of the step before.
fn fill(host: &Host<'_>, mib: u64) {
    let line = format!(
        "lathe exec steps -- sh -c 'rm -f /dev/shm/full; dd if=/dev/zero of=/dev/shm/full bs=1M count={mib} 2>/dev/null; true'"
    );
    let filled = host.run_within(FILL_LIMIT, &line);
    if filled.took > SLOW {
        println!("    {mib} MiB were filled in {:.0} s", filled.took.as_secs_f64());
    }
}

/// What the machine shows, what its guest has and what is charged, bytes; the books hold the one, and what they hold covers the other.
fn held(host: &Host<'_>, step: u64, partial: bool) -> (serde_json::Value, u64, u64) {
    let shown = show(host, "steps");
    let [granted, actual] = ["granted", "actual"].map(|key| shown["memory"][key].as_u64().unwrap_or(0));
    assert!(granted >= actual, "step {step}: the books hold less than the guest: {shown}");
    let mut charge = charged(host);
    // What ended partial goes on: the host may be about to take what the guest has given a moment ago, and has it in its books so long.
    let mut waits = if partial { 20 } else { 0 };
    while charge > actual + OVERHEAD && waits > 0 {
        assert!(charge <= granted + OVERHEAD, "step {step}: {charge} bytes are charged: {shown}");
        std::thread::sleep(Duration::from_millis(500));
        (charge, waits) = (charged(host), waits - 1);
    }
    assert!(charge <= actual + OVERHEAD, "step {step}: {charge} bytes are charged: {shown}");
    (shown, actual, charge)
}

fn random_changes(hosts: &Hosts, part: u64) {
    let steps = number("LATHE_STEPS", 1000).div_ceil(4);
    let seed = number("LATHE_SEED", u64::from(std::process::id()));
    hosts.note(&format!("{steps} steps, LATHE_SEED={seed}"));
    let (host, mut dice) = (hosts.host(1), Dice(seed + part));
    let before = boots(&host);
    make(&host, "steps", "--cpu 1..1.5 --memory 256M..1G --net none");
    let boot = boot_id(&host, "steps");
    let begun = Instant::now();
    let (mut partial, mut made_up, mut most_over) = (0, 0, i64::MIN);
    let mut has = 256_u64;
    for step in 1..=steps {
        // With less, an emulated guest takes minutes to fill or free that memory, and a thousand steps hours.
        let cpu = [0.4, 0.6, 0.75, 1.0, 1.2, 1.5][dice.below(6) as usize];
        let memory = 2 * (64 + dice.below(449));
        // Memory in use, of which some is given back and some is not. No more than it has: without swap it would look for a page for minutes.
        if dice.below(3) == 0 {
            fill(&host, dice.below(96).min(has.saturating_sub(120)));
        }
        let line = format!("lathe resize steps --cpu {cpu} --memory {memory}M --deadline 15s --json");
        let ended = host.run_within(STEP_LIMIT, &line);
        let view = ended.json();
        if ended.took > SLOW {
            hosts.note(&format!("step {step}: {:.0} s: {view}", ended.took.as_secs_f64()));
        }
        let outcome = view["outcome"].as_str().unwrap_or_default().to_owned();
        assert!(
            ["applied", "partial", "unchanged"].contains(&outcome.as_str()),
            "step {step}: {}",
            ended.story()
        );
        partial += u64::from(outcome == "partial");
        let (shown, actual, charge) = held(&host, step, outcome == "partial");
        most_over = most_over.max(charge.cast_signed() - actual.cast_signed());
        // What a guest could not unplug in time its balloon holds. It goes on trying, and each block that goes at last is made up for from the
        // balloon: for that moment it has less, by no more than that block, and never more.
        let within = (memory * MIB - BLOCK)..=memory * MIB;
        assert!(outcome == "partial" || within.contains(&actual), "step {step}: {shown}");
        has = memory.min(actual / MIB);
        if outcome != "partial" && actual < memory * MIB {
            made_up += 1;
            let exact = |_| {
                std::thread::sleep(Duration::from_millis(500));
                show(&host, "steps")["memory"]["actual"].as_u64() == Some(memory * MIB)
            };
            assert!((0..20).any(exact), "step {step}: {}", show(&host, "steps"));
        }
        if step % 50 == 0 {
            hosts.note(&format!(
                "{step} steps, {partial} ended partial, after {:.0} s",
                begun.elapsed().as_secs_f64()
            ));
        }
    }
    host.run_within(Duration::from_secs(120), "lathe resize steps --cpu 1 --memory 256M --deadline 100s")
        .expect_ok();
    settled(&host).expect_agreement();
    let after = boots(&host);
    let (reboots, faults) = (after[0] - before[0], after[1] - before[1]);
    assert!(
        reboots == faults,
        "the guest has booted anew {reboots} times, {faults} of them for a triple fault"
    );
    assert!(faults <= steps.div_ceil(50), "{faults} triple faults are more than an emulated CPU has");
    assert!(faults > 0 || boot_id(&host, "steps") == boot, "the guest has booted anew, and nobody told");
    let per_step = begun.elapsed().as_secs_f64() / steps as f64;
    hosts.note(&format!(
        "{per_step:.2} s a step, {partial} ended partial, {faults} triple faults, {made_up} were seen while a late block was made up for; at most {:.1} MiB were charged beyond the guest's memory",
        most_over as f64 / MIB as f64
    ));
    away(&host, &["steps"]);
}
