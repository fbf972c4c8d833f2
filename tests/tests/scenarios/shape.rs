//! Machines that change shape under lathed: vCPUs and memory both ways, operations that end, and what brings the old shape back.

use std::time::{Duration, Instant};

use lathe_tests::scenario::{Group, Host, Hosts};

use crate::monitor::push_beside;
use crate::node::{View, answers, away, boot_id, exec, make, settled, show};

/// On one host.
pub const GROUP: Group = Group {
    name: "shape",
    hosts: 1,
    lathe: true,
    bench: false,
    scenarios: &[
        ("cpus_and_memory_grow_and_shrink", cpus_and_memory_grow_and_shrink),
        ("an_operation_ends_by_its_deadline_and_goes_on", an_operation_ends_by_its_deadline_and_goes_on),
        ("a_change_for_a_time_ends_also_without_its_agent", a_change_for_a_time_ends_also_without_its_agent),
        ("memory_that_is_given_back_in_words_only_stays_in_the_books", memory_given_back_in_words_only),
        ("scattered_pages_leave_the_host_too", scattered_pages_leave_the_host),
    ],
};

/// How long a shape may take to be in force, emulated.
const IN_FORCE: Duration = Duration::from_secs(60);
const MIB: u64 = 1 << 20;

/// The machine `shape`, as every scenario begins with it.
fn shaped<'a>(hosts: &'a Hosts) -> Host<'a> {
    let host = hosts.host(1);
    host.run("lathe rm shape --force --purge 2>/dev/null");
    make(&host, "shape", "--cpu 1..1.5 --memory 256M..1G --net none");
    host
}

fn amount(host: &Host<'_>, resource: &str, key: &str) -> u64 {
    show(host, "shape")[resource][key].as_u64().unwrap_or_default()
}

/// MemTotal of the guest, MiB.
fn total_mib(host: &Host<'_>) -> u64 {
    let text = exec(host, "shape", "grep MemTotal /proc/meminfo").expect_ok().stdout();
    text.split_ascii_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or_default() >> 10
}

fn cpus_and_memory_grow_and_shrink(hosts: &Hosts) {
    let host = shaped(hosts);
    let (boot, before) = (boot_id(&host, "shape"), total_mib(&host));
    exec(&host, "shape", "nproc").expect_ok().expect_stdout("1");
    host.run("lathe resize shape --cpu 1.5 --memory 512M --plan --exit-code").expect_status(11);
    let grown = host.run("lathe resize shape --cpu 1.5 --memory 512M --json").expect_ok().json();
    assert!(grown["outcome"] == "applied", "{grown}");
    hosts.note(&format!(
        "1 → 2 vCPUs, +256 MiB: applied after {} ms",
        grown["took_usec"].as_u64().unwrap_or(0) / 1000
    ));
    exec(&host, "shape", "nproc").expect_ok().expect_stdout("2");
    let after = total_mib(&host);
    assert!(after >= before + 256, "MemTotal was {before} MiB and is {after} MiB");
    settled(&host).expect_agreement();
    // The new CPU and the new memory work.
    exec(&host, "shape", "sh -c 'dd if=/dev/zero of=/dev/shm/full bs=1M count=200 2>/dev/null; ls -l /dev/shm/full | wc -l; rm -f /dev/shm/full'").expect_ok();
    let same = host.run("lathe resize shape --cpu 1.5 --memory 512M --json").expect_ok().json();
    assert!(same["outcome"] == "unchanged", "{same}");
    let shrunk =
        host.run("lathe resize shape --cpu 0.5 --memory 256M --deadline 120s --json").expect_ok().json();
    assert!(shrunk["outcome"] == "applied", "{shrunk}");
    hosts.note(&format!(
        "2 → 1 vCPU, -256 MiB: applied after {} ms",
        shrunk["took_usec"].as_u64().unwrap_or(0) / 1000
    ));
    exec(&host, "shape", "nproc").expect_ok().expect_stdout("1");
    assert!(total_mib(&host) <= before + 8);
    let view = settled(&host);
    view.expect_agreement();
    assert!(
        amount(&host, "memory", "actual") == 256 * MIB && view.host["memory"]["granted"] == 256 * MIB,
        "{}",
        view.host
    );
    host.run("lathe resize shape --undo --deadline 120s").expect_ok();
    assert!(
        amount(&host, "cpu", "actual") == 1500 && amount(&host, "memory", "actual") == 512 * MIB,
        "{}",
        show(&host, "shape")
    );
    host.run("lathe resize shape --memory 4G").expect_failure().expect_err("fix:");
    assert!(boot_id(&host, "shape") == boot, "the guest has booted anew");
}

fn an_operation_ends_by_its_deadline_and_goes_on(hosts: &Hosts) {
    let host = shaped(hosts);
    // Its vCPUs stand still: the ceiling falls at once, the rest cannot follow.
    host.run("lathe pause shape").expect_ok();
    let outcome =
        host.run("lathe resize shape --cpu 1.5 --memory 384M --deadline 2s --json").expect_status(10);
    let ended = outcome.json();
    assert!(ended["outcome"] == "partial" && ended["reason"] != "", "{ended}");
    hosts.note(&format!("partial: {}", ended["reason"]));
    assert!(outcome.took < Duration::from_secs(15), "it took {:?}", outcome.took);
    let shown = show(&host, "shape");
    assert!(shown["memory"]["desired"] == 384 * MIB && shown["memory"]["granted"] == 384 * MIB, "{shown}");
    host.run("lathe resume shape").expect_ok();
    host.wait_until(
        "what was left is finished in the background",
        IN_FORCE,
        "lathe show shape --json >/tmp/shown && jq -e '.memory.actual == .memory.desired and .cpu.actual == 1500 and .vcpus == 2' /tmp/shown || { cat /tmp/shown; false; }",
    );
    settled(&host).expect_agreement();
    host.run("lathe pause shape").expect_ok();
    let back = host
        .run("lathe resize shape --memory 640M --deadline 2s --deadline-action revert --json")
        .expect_failure()
        .json();
    assert!(back["memory"]["desired"] == 384 * MIB, "{back}");
    host.run("lathe resume shape").expect_ok();
    answers(&host, "shape");
    host.wait_until(
        "the old shape is in force again",
        IN_FORCE,
        "lathe show shape --json >/tmp/shown && jq -e '.memory.actual == .memory.desired and .memory.granted == .memory.desired' /tmp/shown || { cat /tmp/shown; false; }",
    );
    settled(&host).expect_agreement();
}

fn a_change_for_a_time_ends_also_without_its_agent(hosts: &Hosts) {
    let host = shaped(hosts);
    host.run("lathe resize shape --cpu 0.5 --memory 384M --for 12s").expect_ok();
    assert!(amount(&host, "cpu", "desired") == 500 && amount(&host, "memory", "desired") == 384 * MIB);
    host.run("systemctl kill --signal=KILL --kill-who=main lathed.service").expect_ok();
    host.wait_until(
        "the old shape is back",
        IN_FORCE,
        "lathe show shape --json >/tmp/shown && jq -e '.cpu.actual == 1000 and .cpu.desired == 1000 and .memory.desired == 268435456 and .memory.actual == .memory.desired' /tmp/shown || { cat /tmp/shown; false; }",
    );
    settled(&host).expect_agreement();
    away(&host, &["shape"]);
}

/// Writes 220 MiB of the guest's memory and says what they hold.
const FILL: &str = "mount -t tmpfs -o size=300m none /mnt && dd if=/dev/urandom of=/mnt/some bs=1M count=20 2>/dev/null && \
                    for n in 1 2 3 4 5 6 7 8 9 10 11; do cat /mnt/some; done >/mnt/full && busybox md5sum </mnt/full";
/// What the kernel has of the machine: charged, and the limit; bytes.
const CHARGE: &str = "cd /sys/fs/cgroup/lathe.slice/lathe-vm@shape.service/machine && echo $(cat memory.current) $(cat memory.max)";
/// A guest that has every second page in use gives single pages back. Each is a part of one of the host's huge pages, of which the kernel goes
/// on holding all as long as it is not split.
fn scattered_pages_leave_the_host(hosts: &Hosts) {
    const FILES: u64 = 12_000;
    let host = hosts.host(1);
    host.run("lathe rm shape --force --purge 2>/dev/null");
    // Nothing of it is plugged in, so that less is a matter of its balloon.
    make(&host, "shape", "--cpu 1.5 --memory 160M --net none");
    let write = format!(
        "sh -c 'mount -t tmpfs -o size=100m,nr_inodes=40000 none /mnt && cd /mnt && i=0 && while [ $i -lt {FILES} ]; do echo >$i; i=$((i+1)); done'"
    );
    host.run_within(Duration::from_secs(300), &format!("lathe exec shape -- {write}")).expect_ok();
    exec(&host, "shape", "sh -c 'cd /mnt && rm *[02468]'").expect_ok();
    let charged = || {
        let text =
            host.run("set -- $(CHARGE); echo $1".replace("CHARGE", CHARGE).as_str()).expect_ok().stdout();
        text.parse::<u64>().unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    let scattered = FILES / 2 * 4096;
    let before = charged();
    let given = (scattered - scattered % (2 * MIB)) / MIB - 2;
    let resized = format!("lathe resize shape --memory {}M --deadline 60s --json", 160 - given);
    let resized = host.run_within(Duration::from_secs(90), &resized).json();
    let begun = Instant::now();
    let mut left = charged();
    while before.saturating_sub(left) < given * MIB / 2 && begun.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(500));
        left = charged();
    }
    let gone = before.saturating_sub(left);
    hosts.note(&format!(
        "{given} MiB of single pages given back, {}: {} MiB were charged, {} MiB are",
        resized["outcome"],
        before / MIB,
        left / MIB
    ));
    assert!(gone >= given * MIB / 2, "{gone} bytes have gone of {given} MiB: {resized}");
    // A kernel that is eager to make huge pages does not take them back: what it fills with zeroes would be charged again.
    host.run("cd /sys/kernel/mm/transparent_hugepage/khugepaged && echo 100 >scan_sleep_millisecs && echo 100000 >pages_to_scan && cat max_ptes_none full_scans")
        .expect_ok();
    std::thread::sleep(Duration::from_secs(40));
    let later = charged();
    hosts.note(&format!("{} MiB after khugepaged has been at it for 40 s", later / MIB));
    assert!(later < left + 3 * MIB, "{later} bytes are charged again, {left} were");
    host.run("lathe resize shape --memory 160M --deadline 60s").expect_ok();
    exec(
        &host,
        "shape",
        "sh -c 'rm -r /mnt/*; dd if=/dev/zero of=/mnt/full bs=1M count=90 2>/dev/null; rm /mnt/full'",
    )
    .expect_ok();
    settled(&host).expect_agreement();
    away(&host, &["shape"]);
}

/// What a monitor may have besides the guest's memory.
const OVERHEAD: u64 = 64 * MIB;

fn memory_given_back_in_words_only(hosts: &Hosts) {
    let host = hosts.host(1);
    host.run("lathe rm shape --force --purge 2>/dev/null");
    // Without iomem=relaxed its kernel would keep it from the registers of its drivers.
    make(
        &host,
        "shape",
        "--cpu 1 --memory 384M --net none --cmdline 'console=ttyS0 quiet panic=0 iomem=relaxed'",
    );
    push_beside(&host, "hostile");
    host.run("lathe exec shape -- sh -c 'cat >/tmp/hostile && chmod 755 /tmp/hostile' </root/kit/hostile")
        .expect_ok();
    let sum = exec(&host, "shape", &format!("sh -c '{FILL}'")).expect_ok().stdout();
    exec(&host, "shape", "sh -c '/tmp/hostile balloon 600 >/tmp/said 2>&1 & echo $! >/tmp/pid'").expect_ok();
    host.wait_until(
        "its balloon lies",
        IN_FORCE,
        "lathe exec shape -- sh -c 'grep lies /tmp/said || { cat /tmp/said; false; }'",
    );
    let partial = host.run("lathe resize shape --memory 192M --deadline 10s --json").expect_status(10).json();
    let said = exec(&host, "shape", "cat /tmp/said").expect_ok().stdout();
    assert!(said.contains(&format!("holds {} pages", 192 * MIB / 4096)), "{said}");
    assert!(partial["outcome"] == "partial", "{partial}");
    let reason = partial["reason"].as_str().unwrap_or_default();
    assert!(reason.contains("more than its guest says it has given back"), "{reason}");
    hosts.note(&format!("partial: {reason}"));
    // The guest has all of what it had, and it is charged, limited and in the books.
    exec(&host, "shape", "sh -c 'busybox md5sum </mnt/full'").expect_ok().expect_stdout(&sum);
    let view = View::of(&host);
    let granted = view.host["memory"]["granted"].as_u64().unwrap_or_default();
    assert!(
        view.machine("shape").is_some_and(|shape| shape["memory"]["granted"] == granted),
        "{}",
        view.host
    );
    let charge = host.run(CHARGE).expect_ok().stdout();
    let amounts: Vec<u64> = charge.split(' ').filter_map(|word| word.parse().ok()).collect();
    let [charged, limit] = amounts[..] else { panic!("charge and limit: {charge}") };
    hosts.note(&format!(
        "192 MiB by its word: {} MiB charged, {} MiB the limit, {} MiB granted",
        charged / MIB,
        limit / MIB,
        granted / MIB
    ));
    assert!(charged <= limit && limit <= granted + OVERHEAD && granted > 192 * MIB, "{charge} {granted}");
    // An honest driver again: what was left is finished in the background.
    exec(&host, "shape", "reboot");
    host.wait_until(
        "what was left is finished in the background",
        IN_FORCE,
        "lathe show shape --json >/tmp/shown && jq -e '.memory.actual == .memory.desired and .memory.granted == .memory.desired and .operation == null' /tmp/shown || { cat /tmp/shown; false; }",
    );
    settled(&host).expect_agreement();
    away(&host, &["shape"]);
}
