//! A host with Lathe on it, in the words that its scenarios use.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lathe_tests::scenario::{Host, Outcome};
use serde_json::Value;

/// How long a machine's state may take to settle in an emulated and busy host.
pub const SETTLE: Duration = Duration::from_secs(90);
/// From `lathe run` to the built-in guest's answer, in an emulated and busy host.
pub const READY: Duration = Duration::from_secs(180);
/// What `lathe run` ends with when the machine runs and its guest agent has not answered in time.
const SILENT: i32 = 10;

/// Everything that the host shows of machines, each from where it really is. One line each: a word, then what was found.
const LOOK: &str = r#"
words() { sort | tr '\n' ' '; }
echo "list $(lathe list --json)"
echo "host $(lathe host --json)"
echo "taps $(ip -o link show | sed -n 's/^[0-9]*: \(lt-[^:@]*\).*/\1/p' | words)"
echo "nics $(lathe list --json | jq -r '.machines[] | select(.state == "running") | .name' | while read -r name; do lathe nic list "$name" --json </dev/null | jq -r '.nics[].tap'; done | words)"
echo "ifbs $(ip -o link show | sed -n 's/^[0-9]*: li-\([^:@]*\).*/\1/p' | words)"
echo "units $(systemctl list-units 'lathe-vm@*.service' --all --plain --no-legend | awk '{print $1}' | words)"
echo "sockets $(ls /run/lathe/vm | words)"
echo "groups $(cd /sys/fs/cgroup/lathe.slice 2>/dev/null && ls -d lathe-vm@* 2>/dev/null | words)"
echo "monitors $(pgrep -xc lathe-vmm)"
echo "folders $(ls /var/lib/lathe/machines | words)"
echo "uploads $(ls -A /var/lib/lathe/uploads | words)"
"#;

/// What a host shows at one moment.
pub struct View {
    lines: BTreeMap<String, String>,
    /// `lathe list --json`, the machines.
    pub machines: Vec<Value>,
    /// `lathe host --json`.
    pub host: Value,
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn parse(line: &str) -> Value {
    match serde_json::from_str(line) {
        Ok(value) => value,
        Err(error) => panic!("{error}: {line}"),
    }
}

impl View {
    /// Looks.
    pub fn of(host: &Host<'_>) -> Self {
        let outcome = host.run(LOOK).expect_ok();
        let lines: BTreeMap<_, _> = outcome
            .stdout()
            .lines()
            .filter_map(|line| line.split_once(' ').or(Some((line, ""))))
            .map(|(word, rest)| (word.to_owned(), rest.trim().to_owned()))
            .collect();
        let list = parse(&lines["list"]);
        let machines = list["machines"].as_array().cloned().unwrap_or_default();
        Self { host: parse(&lines["host"]), machines, lines }
    }

    fn found(&self, what: &str) -> BTreeSet<String> {
        self.lines[what].split_whitespace().map(str::to_owned).collect()
    }

    /// The machine of this name.
    pub fn machine(&self, name: &str) -> Option<&Value> {
        self.machines.iter().find(|machine| text(machine, "name") == name)
    }

    /// State of the machine of this name, `none` when there is none.
    pub fn state(&self, name: &str) -> &str {
        self.machine(name).map_or("none", |machine| text(machine, "state"))
    }

    /// What must not change when nothing is changed: machines, what is desired of them, and the books.
    pub fn essence(&self) -> String {
        let keys = ["name", "state", "revision", "vcpus", "addresses", "restart", "autostart", "pid"];
        let machines = self.machines.iter().map(|machine| {
            let mut words: Vec<_> = keys.iter().map(|key| machine[key].to_string()).collect();
            let amounts = ["cpu", "memory", "net"]
                .iter()
                .flat_map(|r| ["desired", "granted", "actual"].map(|a| (*r, a)));
            words.extend(amounts.map(|(resource, amount)| machine[resource][amount].to_string()));
            words.join(" ")
        });
        let books = ["cpu", "memory", "disk"].map(|resource| self.host[resource]["granted"].to_string());
        format!(
            "{}\nbooks {} machines {}",
            machines.collect::<Vec<_>>().join("\n"),
            books.join(" "),
            self.host["machines"]
        )
    }

    /// Books, processes, units, cgroups, links and folders are those of the machines: nothing is missing, nothing left over.
    ///
    /// # Panics
    /// They are not.
    pub fn expect_agreement(&self) {
        let running = |machine: &&Value| text(machine, "state") == "running";
        let names = |of: &dyn Fn(&Value) -> String| {
            self.machines.iter().filter(running).map(of).collect::<BTreeSet<_>>()
        };
        let expected = [
            ("units", names(&|m| format!("lathe-vm@{}.service", text(m, "name")))),
            ("groups", names(&|m| format!("lathe-vm@{}.service", text(m, "name")))),
            ("sockets", names(&|m| format!("{}.sock", text(m, "name")))),
            ("taps", self.found("nics")),
            ("folders", self.machines.iter().map(|m| text(m, "name").to_owned()).collect()),
        ];
        for (what, names) in expected {
            assert!(
                self.found(what) == names,
                "{what}: found {:?}, expected {names:?}\n{}",
                self.found(what),
                self.story()
            );
        }
        let taps: BTreeSet<_> =
            self.found("taps").iter().filter_map(|tap| tap.strip_prefix("lt-").map(str::to_owned)).collect();
        assert!(self.found("ifbs").is_subset(&taps), "shapers of no machine\n{}", self.story());
        let monitors = self.machines.iter().filter(running).count().to_string();
        assert!(
            self.lines["monitors"] == monitors,
            "{} monitors, {monitors} running machines\n{}",
            self.lines["monitors"],
            self.story()
        );
        assert!(
            self.host["machines"] == self.machines.len(),
            "the host counts other machines\n{}",
            self.story()
        );
        for resource in ["cpu", "memory"] {
            let sum: u64 =
                self.machines.iter().filter_map(|machine| machine[resource]["granted"].as_u64()).sum();
            assert!(
                self.host[resource]["promised"] == sum,
                "{resource}: the machines hold {sum}\n{}",
                self.story()
            );
            for machine in self.machines.iter().filter(running) {
                let [desired, actual] = ["desired", "actual"].map(|key| &machine[resource][key]);
                assert!(
                    desired == actual,
                    "{resource} of {} is not in force\n{}",
                    machine["name"],
                    self.story()
                );
            }
        }
    }

    /// No upload waits to be used.
    pub fn expect_no_uploads(&self) {
        assert!(self.found("uploads").is_empty(), "uploads are left over\n{}", self.story());
    }

    fn story(&self) -> String {
        self.lines.iter().map(|(word, rest)| format!("  {word}: {rest}\n")).collect()
    }
}

/// Waits until no machine is on its way from one state to another.
pub fn settled(host: &Host<'_>) -> View {
    host.wait_until(
        "machines settle",
        SETTLE,
        r#"lathe list --json >/tmp/settling && jq -e '[.machines[] | select(.state != "running" and .state != "stopped" and .state != "failed")] == []' /tmp/settling >/dev/null || { cat /tmp/settling; false; }"#,
    );
    View::of(host)
}

/// Makes a machine of the built-in guest and waits until it answers.
pub fn make<'a>(host: &Host<'a>, name: &str, options: &str) -> Outcome<'a> {
    host.preparing(|| {
        let made = host.run_within(READY, &format!("lathe run {name} --wait 150 {options}"));
        assert!(made.status != SILENT, "the guest is silent: {}", made.story());
        made.expect_ok()
    })
}

/// The same with a quarter of a CPU, which it gets once it has booted with more.
pub fn make_small(host: &Host<'_>, name: &str, options: &str) {
    make(host, name, &format!("--memory 128M --cpu 1 {options}"));
    host.preparing(|| host.run(&format!("lathe resize {name} --cpu 0.25")).expect_ok());
}

/// Copies the boot image of the built-in guest to `/root/initrd.img`, to be used as somebody's own.
pub fn copy_initrd(host: &Host<'_>) {
    host.preparing(|| {
        host.run(
            "lathe run seed --wait 0 --memory 128M --cpu 0.5 --net none && lathe rm seed --force --purge && \
             cp $(find /var/lib/lathe/boot -type f | head -n 1) /root/initrd.img",
        )
        .expect_ok();
    });
}

/// Waits until the guest agent of a machine answers.
pub fn answers(host: &Host<'_>, name: &str) {
    let line = format!(
        "lathe show {name} --json >/tmp/shown && jq -e .guest_agent /tmp/shown >/dev/null || {{ lathe show {name}; lathe logs {name} -n 10; false; }}"
    );
    host.wait_until("the guest agent answers", READY, &line);
}

/// `lathe show NAME --json`.
pub fn show(host: &Host<'_>, name: &str) -> Value {
    host.run(&format!("lathe show {name} --json")).expect_ok().json()
}

/// Runs a command in a machine.
pub fn exec<'a>(host: &Host<'a>, name: &str, command: &str) -> Outcome<'a> {
    host.run(&format!("lathe exec {name} -- {command}"))
}

/// Which boot of the guest's kernel it is.
pub fn boot_id(host: &Host<'_>, name: &str) -> String {
    exec(host, name, "cat /proc/sys/kernel/random/boot_id").expect_ok().stdout()
}

/// Removes machines with all that belongs to them.
pub fn away(host: &Host<'_>, names: &[&str]) {
    for name in names {
        host.run(&format!("lathe rm {name} --force --purge")).expect_ok();
    }
}
