//! Random changes of everything that lathed holds of a real host, and what they leave: `tests/run bench books`.
//!
//! Three tiny machines are run, resized (CPU, network, I/O operations, tier), given nics and disks that go again, stopped, started and
//! removed; the uplink is shared for a third of the time; lathed is killed at random moments in the first two thirds, so that what it leaks
//! in the last third stays leaked. After every [`LOOKED_AT`] steps books, monitors and kernel must tell the same. At the end everything is
//! removed, and links, queues, classes, filters, cgroups, monitors, descriptors of lathed and programs of BPF must be as they were before.
//!
//! `LATHE_STEPS` says how many (60 otherwise, about ten minutes on an emulated host; `LATHE_STEPS=1000 tests/run bench books` takes about two
//! hours), `LATHE_SEED` repeats a run. Each step has dice of its own, so what a kill has changed does not change all that follows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use lathe_tests::dice::Dice;
use lathe_tests::scenario::{Group, Host, Hosts};
use serde_json::Value;

use crate::node::{READY, answers, away, make, settled};
use crate::steps::number;
use crate::uplink::{self, KILL};

/// On one host.
pub const GROUP: Group = Group {
    name: "books",
    hosts: 1,
    lathe: true,
    bench: true,
    scenarios: &[("random_changes_leave_nothing", random_changes_leave_nothing)],
};

const NAMES: [&str; 3] = ["one", "two", "three"];
/// After so many steps all is compared.
const LOOKED_AT: u64 = 20;
/// One in so many steps has lathed killed in its midst.
const KILLED: u64 = 12;
/// How long a kill may wait for its moment, milliseconds.
const MOMENTS: u64 = 400;
/// Nics besides the first, and disks, of one machine.
const MOST: usize = 2;
/// One step, emulated: a guest that lets nothing go is waited for.
const STEP_LIMIT: Duration = Duration::from_secs(200);
/// Until what a command or a process has left is gone.
const REST: Duration = Duration::from_secs(60);
/// Programs of BPF that may be there more than before: systemd loads and drops some of its own when it likes.
const PROGRAMS: u64 = 8;
/// What a guest may refuse: it was asked and has not answered in time, and the device stays.
const REFUSALS: [&str; 2] = ["disk-not-released", "nic-not-released"];

/// What lathed makes in the kernel and on the disk, by name, whoever made it.
const LEFT: &str = r#"
ip -o link show | awk -F': ' '{ sub("@.*", "", $2); print "link", $2 }'
tc qdisc show | sed 's/ refcnt [0-9]*//'
for dev in $(ls /sys/class/net); do
    tc class show dev $dev | awk -v dev=$dev '$2 == "htb" { print "class", dev, $3 }'
    for at in root ingress egress; do tc filter show dev $dev $at 2>/dev/null | awk -v at="$dev $at" '{ print "filter", at, $0 }'; done
done
find /sys/fs/cgroup/lathe.slice -mindepth 1 -type d | sed 's/^/cgroup /'
ls /run/lathe/vm | sed 's/^/socket /'
ls /var/lib/lathe/machines /var/lib/lathe/uploads | sed 's/^/folder /'
pgrep -x lathe-vmm | sed 's/.*/monitor/'
"#;

/// Descriptors of lathed, and what they lead to.
const DESCRIPTORS: &str = "ls -l /proc/$(systemctl show -p MainPID --value lathed)/fd";

/// Where kernel or monitors differ from what `lathe list` says; nothing where they do not.
const DIFFERENCES: &str = r#"
cd /sys/fs/cgroup/lathe.slice; lathe list --json >/tmp/books
for name in $(jq -r '.machines[] | select(.state == "running") | .name' /tmp/books); do
    of() { jq -r --arg name "$name" ".machines[] | select(.name == \$name) | $1" /tmp/books; }
    unit=lathe-vm@$name.service
    milli=$(of .cpu.desired); read -r quota period <$unit/machine/cpu.max
    [ "$quota" = $((milli * period / 1000)) ] || echo $name: $milli milliCPU, cpu.max $quota $period
    standing="$(cat $unit/cpu.idle) $(cat $unit/cpu.weight)"
    case "$(of .tier) $standing" in
        'guaranteed 0 10000' | 'standard 0 100' | 'harvest 1 '*) ;;
        *) echo $name: $(of .tier), cpu.idle and cpu.weight $standing ;;
    esac
    /usr/lib/lathe/lathe-vmm ask /run/lathe/vm/$name.sock '{"status":{}}' >/tmp/status
    rate=$(jq .status.disk_rates.iops /tmp/status)
    [ "$rate" = "$(of .iops.desired)" ] || echo $name: $(of .iops.desired) I/O operations a second, its monitor has $rate
    lathe nic list $name --json >/tmp/nics; lathe disk list $name --json >/tmp/disks
    [ "$(jq '.nics | length' /tmp/nics)" = "$(jq '.status.nics.nics | length' /tmp/status)" ] ||
        echo $name: nics $(jq -c '[.nics[].mac]' /tmp/nics), its monitor has $(jq -c '[.status.nics.nics[].mac]' /tmp/status)
    [ "$(jq -c '[.disks[].name] | sort' /tmp/disks)" = "$(jq -c '[.status.disks.disks[].serial] | sort' /tmp/status)" ] ||
        echo $name: disks $(jq -c '[.disks[].name]' /tmp/disks), its monitor has $(jq -c '[.status.disks.disks[].serial]' /tmp/status)
    jq -r '.nics[] | "\(.tap) \(.bit_per_sec / 1000000)"' /tmp/nics | while read -r tap mbit; do
        for link in $tap li-${tap#lt-}; do
            tc class show dev $link | grep -q " rate ${mbit}Mbit " || echo $name: $link shall have $mbit Mbit/s: $(tc class show dev $link)
        done
        tc filter show dev $tap ingress | grep -q bpf || echo $name: nothing checks what $tap sends
    done
done
"#;

/// What a step changes of one machine, as a word for the count and a line of shell.
struct Deed {
    word: &'static str,
    line: String,
}

/// What there is of one machine.
struct Seen {
    state: Option<String>,
    /// But the first.
    nics: Vec<String>,
    disks: Vec<String>,
}

impl Seen {
    fn of(host: &Host<'_>, name: &str) -> Self {
        let line = format!(
            "{{ lathe show {name} --json && lathe nic list {name} --json && lathe disk list {name} --json; }} 2>/tmp/missing | jq -cs ."
        );
        let all = host.run(&line).expect_ok().json();
        let names = |list: &Value| -> Vec<String> {
            let names = list.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
            names.filter(|name| *name != "net0").map(str::to_owned).collect()
        };
        Self {
            state: all[0]["state"].as_str().map(str::to_owned),
            nics: names(&all[1]["nics"]),
            disks: names(&all[2]["disks"]),
        }
    }

    /// What the dice say.
    fn deed(&self, dice: &mut Dice, name: &str) -> Deed {
        let deed = |word, what: String| Deed { word, line: format!("lathe {what}") };
        // With all that it may have, or it boots for minutes.
        let start = || deed("start", format!("resize {name} --cpu 0.5 && lathe start {name}"));
        let mbit = 5 + dice.below(46);
        let Some(state) = &self.state else {
            return deed("run", format!("run {name} --wait 150 --memory 128M --cpu 0.5 --net {mbit}mbit"));
        };
        let running = state == "running";
        if !running && dice.below(2) == 0 {
            return start();
        }
        match dice.below(100) {
            // Together they stay below what the host has, whatever their tiers.
            0..20 => deed("cpu", format!("resize {name} --cpu 0.{}", 200 + dice.below(301))),
            20..36 => deed("net", format!("resize {name} --net {mbit}mbit")),
            36..48 if dice.below(4) == 0 => deed("iops", format!("resize {name} --iops unlimited")),
            36..48 => deed("iops", format!("resize {name} --iops {}", 20 + dice.below(2000))),
            48..58 => {
                let tier = ["guaranteed", "standard", "harvest"][dice.below(3) as usize];
                deed("tier", format!("resize {name} --tier {tier}"))
            }
            58..70 => match self.nics.last() {
                Some(nic) if self.nics.len() >= MOST || dice.below(2) == 0 => {
                    deed("nic removed", format!("nic remove {name} {nic}"))
                }
                _ => deed("nic added", format!("nic add {name} --net {mbit}mbit")),
            },
            70..76 => match self.nics.first() {
                Some(nic) => deed("nic limited", format!("nic limit {name} {nic} {mbit}mbit")),
                None => deed("net", format!("resize {name} --net {mbit}mbit")),
            },
            76..89 => match self.disks.last() {
                Some(disk) if self.disks.len() >= MOST || dice.below(2) == 0 => {
                    deed("disk removed", format!("disk remove {name} {disk} --purge"))
                }
                _ => deed("disk added", format!("disk add {name} --size 16M")),
            },
            89..96 if running => deed("stop", format!("stop {name} --timeout 60")),
            89..96 => start(),
            _ => deed("rm", format!("rm {name} --force --purge")),
        }
    }
}

/// Waits until nothing is under way: guests that run answer, and no device is on its way.
fn calm(host: &Host<'_>) {
    let line = r#"lathe list --json >/tmp/calm &&
        jq -e 'all(.machines[]; .state == "stopped" or .state == "failed" or (.state == "running" and .guest_agent))' /tmp/calm >/dev/null || { cat /tmp/calm; exit 1; }
        for name in $(jq -r '.machines[].name' /tmp/calm); do
            { lathe nic list $name --json && lathe disk list $name --json; } >/tmp/devices || exit 1
            jq -se '[.[] | (.nics // .disks)[].state] | all(. == "attached" or . == "detached")' /tmp/devices >/dev/null || { cat /tmp/devices; exit 1; }
        done"#;
    host.wait_until("nothing is under way", READY, line);
}

/// Books, monitors and kernel tell the same.
fn expect_truth(host: &Host<'_>, shared: bool) {
    calm(host);
    let view = settled(host);
    view.expect_agreement();
    // lathed corrects what systemd writes anew, within a second or so.
    let same = format!(
        "( {DIFFERENCES} ) >/tmp/differences 2>&1; test ! -s /tmp/differences || {{ cat /tmp/differences; false; }}"
    );
    host.wait_until("kernel and monitors have what the books say", REST, &same);
    let running: Vec<_> = view.machines.iter().filter(|machine| machine["state"] == "running").collect();
    let taps = host.run("ls /sys/class/net | grep -c ^lt-").stdout();
    let expected =
        if shared { (running.len().to_string(), taps.trim().to_owned()) } else { ("0".into(), "0".into()) };
    let found = uplink::classes_and_marks(host);
    assert!(found == expected, "classes and marks of the uplink: {found:?}, expected {expected:?}");
}

/// What is left, in order.
fn left(host: &Host<'_>) -> Vec<String> {
    let mut lines: Vec<_> = host.run(LEFT).expect_ok().stdout().lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// How many descriptors lathed has, and how many programs of BPF the kernel (as a page or more for each in vmallocinfo).
fn held(host: &Host<'_>) -> [u64; 2] {
    let line =
        format!("sleep 3; {DESCRIPTORS} | grep -c -e '->'; grep -c bpf_prog_alloc /proc/vmallocinfo || true");
    let text = host.run(&line).expect_ok().stdout();
    let numbers: Vec<u64> = text.lines().filter_map(|line| line.trim().parse().ok()).collect();
    let [descriptors, programs] = numbers[..] else { panic!("two numbers were expected: {text}") };
    [descriptors, programs]
}

/// Uses once whatever a later step may use, so that what lathed opens once and keeps is no leak.
fn warm_up(host: &Host<'_>) {
    make(host, "warm", "--memory 128M --cpu 1 --net 20mbit");
    host.run(
        "lathe nic add warm --net 10mbit && lathe disk add warm --size 16M && lathe resize warm --iops 100 --net 30mbit --tier guaranteed && \
         lathe host uplink enable --device up0 --capacity 1gbit && lathe host uplink disable",
    )
    .expect_ok();
    away(host, &["warm"]);
    // After a kill SQLite keeps the index of its log in a file instead of in its own memory.
    host.run(KILL).expect_ok();
    calm(host);
    host.run("lathe list; lathe host; lathe top --once").expect_ok();
}

/// What has been done.
#[derive(Default)]
struct Tally {
    deeds: BTreeMap<&'static str, u64>,
    kills: u64,
    refused: u64,
}

impl Tally {
    /// One change of one machine; `kill`: after so many milliseconds lathed dies.
    fn step(&mut self, host: &Host<'_>, step: u64, dice: &mut Dice, may_kill: bool) {
        let name = NAMES[dice.below(3) as usize];
        let kill = (dice.below(KILLED) == 0 && may_kill).then_some(dice.below(MOMENTS));
        let Deed { word, line } = Seen::of(host, name).deed(dice, name);
        *self.deeds.entry(word).or_default() += 1;
        if let Some(moment) = kill {
            self.kills += 1;
            let changing = host.start(&line);
            host.run(&format!("sleep 0.{moment:03}; {KILL}")).expect_ok();
            // Whether it was before or after is anybody's guess; what counts is that it is all or nothing.
            changing.finish_within(STEP_LIMIT);
            host.wait_until("lathed is back", REST, "lathe list");
            return calm(host);
        }
        let ended = host.run_within(STEP_LIMIT, &line);
        let said = ended.stderr();
        if ended.status != 0 && REFUSALS.iter().any(|code| said.contains(&format!("error[{code}]"))) {
            self.refused += 1;
            return calm(host);
        }
        assert!(ended.status == 0, "step {step}: {}", ended.story());
        if word == "start" {
            answers(host, name);
        }
    }
}

fn random_changes_leave_nothing(hosts: &Hosts) {
    let (steps, seed) = (number("LATHE_STEPS", 60), number("LATHE_SEED", u64::from(std::process::id())));
    hosts.note(&format!("{steps} steps, LATHE_SEED={seed}; LATHE_STEPS=1000 for the whole"));
    let (host, _) = uplink::linked(hosts);
    warm_up(&host);
    let (before, [descriptors, programs]) = (left(&host), held(&host));
    let (begun, mut tally, mut shared) = (Instant::now(), Tally::default(), false);
    for step in 1..=steps {
        let mut dice = Dice(seed.wrapping_add(step << 32));
        tally.step(&host, step, &mut dice, step <= steps * 2 / 3);
        if step == steps.div_ceil(3) || step == (steps * 2).div_ceil(3) {
            shared = !shared;
            let verb = if shared { "enable --device up0 --capacity 1gbit" } else { "disable" };
            host.run(&format!("lathe host uplink {verb}")).expect_ok();
        }
        if step % LOOKED_AT == 0 || step == steps {
            expect_truth(&host, shared);
            let [descriptors, _] = held(&host);
            hosts.note(&format!(
                "step {step}: books, monitors and kernel agree; lathed has {descriptors} descriptors"
            ));
        }
    }
    let per_step = begun.elapsed().as_secs_f64() / steps.max(1) as f64;
    let deeds: Vec<_> = tally.deeds.iter().map(|(word, count)| format!("{word} {count}")).collect();
    hosts.note(&format!("{per_step:.1} s a step: {}", deeds.join(", ")));
    host.run("lathe host uplink disable; for name in $(lathe list --quiet); do lathe rm $name --force --purge || exit 1; done")
        .expect_ok();
    let view = settled(&host);
    view.expect_agreement();
    view.expect_no_uploads();
    let after = left(&host);
    let more: Vec<_> = after.iter().filter(|line| !before.contains(line)).collect();
    let less: Vec<_> = before.iter().filter(|line| !after.contains(line)).collect();
    assert!(after == before, "left over: {more:#?}\nmissing: {less:#?}");
    let rest = format!(
        "test $({DESCRIPTORS} | grep -c -e '->') -le {descriptors} || {{ {DESCRIPTORS}; false; }}; \
         test $(grep -c bpf_prog_alloc /proc/vmallocinfo) -le {} || {{ grep bpf_prog_alloc /proc/vmallocinfo; false; }}",
        programs + PROGRAMS
    );
    host.wait_until(
        "lathed holds no more descriptors, the kernel no more programs",
        REST,
        &format!("set -e; {rest}"),
    );
    let [now, programs_now] = held(&host);
    hosts.note(&format!(
        "RESULT books: {steps} changes, {} kills, {} refused by guests; nothing differs, nothing is left; descriptors {descriptors} before, {now} after; BPF programs {programs} before, {programs_now} after: met",
        tally.kills, tally.refused
    ));
    host.run("ip link del up0").expect_ok();
}
