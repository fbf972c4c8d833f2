//! Scenarios: end-to-end tests that read as sentences, on hosts that a group of them shares.
//!
//! ```text
//! fn a_reboot_keeps_the_disk(hosts: &Hosts) {
//!     let host = hosts.host(1);
//!     host.run("echo kept >/root/note").expect_ok();
//!     host.reboot();
//!     host.run("cat /root/note").expect_ok().expect_stdout("kept");
//! }
//! ```
//!
//! A scenario fails by panicking, which every `expect_…` does with what was run and what came of it. A host that
//! vanishes, or a command that stays silent, *before the scenario's first expectation* is an infrastructure failure:
//! the consoles are saved, the scenario gets fresh hosts, at most [`RETRIES`] times, and every retry is counted aloud.
//! What helpers wait for while they [prepare](Host::preparing) is not the scenario's own: on an emulated host a guest that stays silent when
//! it is first booted is one of those, too. A wrong answer is none.
//! The same holds at any time for an *emulated* host that restarts by itself or has a panic of its own kernel on its console:
//! QEMU's emulation of SVM corrupts a kernel's stack about once in a hundred nested boots, whatever runs there. So it does for the
//! guest inside: a guest's console that tells of a [corrupted stack](CORRUPTION) counts as the emulation's, too, and so does one whose
//! kernel has stopped in the middle of a line. Guests of an emulated host also stand still at times, QEMU's own ones likewise: a command that
//! never ends there is tried once more, and the second silence counts. A failed expectation is never retried otherwise.

use std::cell::Cell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};

use crate::channel::{Captured, Channel, ExecError, NOT_FINISHED, Process};
use crate::cli::{self, RETRIES};
use crate::frame::ExecSpec;
use crate::hosts::{HostSet, Plan};
use crate::image::Image;
use crate::qemu::Accel;
use crate::{payload, place, transfer, workspace};

/// How long a look at guests' consoles may take.
const LOOK_LIMIT: Duration = Duration::from_secs(20);
/// How long a command of a scenario may take unless it says otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// What a kernel says whose stack has become unreachable or was overwritten under it, and what monitor and agent say of one that could not
/// say so any more. A fault of the monitor could look so as well: it would come again, and the third time fails.
pub const CORRUPTION: [&str; 4] = [
    "PANIC: double fault",
    "stack guard page was hit",
    "corrupted stack end",
    "the guest reset itself by a triple fault",
];
/// For how long nothing has come from a guest whose kernel stopped in the middle of a line.
const STUCK_SECONDS: u32 = 30;
/// Where guests' consoles are kept, in a host, and what monitors say that no agent hears.
const CONSOLES: &str = "/root/machine-*/console /root/machine-*/said /var/lib/lathe/machines/*/console.log";

/// Environment variable: seconds since the epoch after which no scenario begins.
pub const UNTIL: &str = "LATHE_SCENARIOS_UNTIL";

/// A scenario's body.
pub type Body = fn(&Hosts);

/// Scenarios that share hosts, also with the groups before and after that need the same. One that fails leaves fresh ones to the next.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Its name; a scenario is called `group::scenario`.
    pub name: &'static str,
    /// How many hosts.
    pub hosts: usize,
    /// Whether this workspace is installed on them.
    pub lathe: bool,
    /// Whether it measures: run on request only.
    pub bench: bool,
    /// Names and bodies, in the order in which they run.
    pub scenarios: &'static [(&'static str, Body)],
}

/// The hosts that a scenario runs on.
pub struct Hosts {
    set: HostSet,
    expected: Cell<bool>,
    /// What is expected now is not the scenario's own.
    preparing: Cell<bool>,
    emulated: bool,
    /// Since when the present scenario runs.
    begun: Cell<Instant>,
    /// Its guests corrupt themselves on purpose, so that what they say excuses nothing.
    guests_lie: Cell<bool>,
}

/// The payload of a panic that is no failed expectation.
struct Infrastructure(String);

impl Hosts {
    /// Host `number`, counted from 1.
    #[track_caller]
    pub fn host(&self, number: usize) -> Host<'_> {
        match self.set.channel(number) {
            Ok(channel) => Host { hosts: self, number, channel },
            Err(error) => panic!("{error:#}"),
        }
    }

    /// All hosts.
    pub fn all(&self) -> Vec<Host<'_>> {
        (1..=self.set.len()).map(|number| self.host(number)).collect()
    }

    /// Says something about the scenario's progress or a figure that it measured.
    pub fn note(&self, text: &str) {
        println!("    {text}");
    }

    /// From here on a failure is the scenario's own. Every `expect_…` does this, outside of [`Host::preparing`].
    pub fn expecting(&self) {
        self.expected.set(self.expected.get() || !self.preparing.get());
    }

    /// Somebody has answered, as expected or not: only silence is excused while a helper prepares.
    fn answered(&self, as_expected: bool) {
        self.expecting();
        self.expected.set(self.expected.get() || !as_expected);
    }

    /// From here on a guest's corrupted stack is its own doing.
    pub fn guests_lie(&self) {
        self.guests_lie.set(true);
    }

    /// Ends the scenario because of what carries it, not because of what it tests.
    #[track_caller]
    fn lost(&self, what: String) -> ! {
        if self.expected.get() && !self.emulation_failed() {
            panic!("{what}");
        }
        // No panic message: the runner prints it as what it is.
        resume_unwind(Box::new(Infrastructure(what)))
    }
}

impl Hosts {
    /// Whether an emulated host has not even come to the scenario's beginning.
    fn unprepared(&self) -> bool {
        self.emulated && self.preparing.get() && !self.expected.get()
    }

    /// Whether an emulated host has restarted by itself, or its console tells of the end of its kernel, or a guest's of a corrupted stack or
    /// of a kernel that stopped in the middle of a line.
    fn emulation_failed(&self) -> bool {
        let panicked = |number| {
            let console = fs::read(crate::qemu::path_of(self.set.directory(), number, "console.log"));
            console
                .is_ok_and(|console| String::from_utf8_lossy(&console).contains("Kernel panic - not syncing"))
        };
        let words = CORRUPTION.map(|words| format!("-e '{words}'")).join(" ");
        // Only what was written since the scenario began.
        let seconds = self.begun.get().elapsed().as_secs() + 1;
        let line = format!(
            "find {CONSOLES} -newermt '{seconds} seconds ago' -exec grep -la {words} {{}} + 2>/dev/null
             find {CONSOLES} -newermt '{seconds} seconds ago' ! -newermt '{STUCK_SECONDS} seconds ago' 2>/dev/null | while read -r console; do
                 [ -z \"$(tail -c 1 \"$console\")\" ] || ! tail -n 1 \"$console\" | grep -aE '^\\[ *[0-9]+\\.[0-9]+\\] ' || echo \"$console\"
             done
             journalctl -q --since=-{seconds}s -u lathed | grep -a 'reset itself by a triple fault'"
        );
        let corrupted = |number| {
            if self.guests_lie.get() {
                return false;
            }
            let spec =
                ExecSpec { argv: ["sh", "-c", &line].map(str::to_owned).to_vec(), ..ExecSpec::default() };
            let mut found = Captured::default();
            let ran = self.set.channel(number).ok().and_then(|channel| channel.begin(&spec).ok());
            let ended = ran.and_then(|process| process.wait(&mut found, Some(LOOK_LIMIT)).ok());
            ended.is_some() && !found.stdout.is_empty()
        };
        let failed = |number| self.set.restarted_by_itself(number) || panicked(number) || corrupted(number);
        self.emulated && (1..=self.set.len()).any(failed)
    }
}

/// One host as a scenario sees it.
#[derive(Clone)]
pub struct Host<'a> {
    hosts: &'a Hosts,
    number: usize,
    channel: Channel,
}

impl<'a> Host<'a> {
    /// Its number, from 1.
    pub fn number(&self) -> usize {
        self.number
    }

    /// Its address on the private segment.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", self.number)
    }

    /// Does what a scenario stands on: what stays silent in `work` before the scenario's own first expectation is an infrastructure failure
    /// of an emulated host.
    pub fn preparing<T>(&self, work: impl FnOnce() -> T) -> T {
        let outer = self.hosts.preparing.replace(true);
        let made = work();
        // A panic leaves it as it is, for whoever catches it.
        self.hosts.preparing.set(outer);
        made
    }

    /// Runs a line of shell as root and waits for its end, at most [`COMMAND_LIMIT`].
    #[track_caller]
    pub fn run(&self, line: &str) -> Outcome<'a> {
        self.run_within(COMMAND_LIMIT, line)
    }

    /// Runs a line of shell as root and waits for its end.
    #[track_caller]
    pub fn run_within(&self, limit: Duration, line: &str) -> Outcome<'a> {
        self.start(line).finish_within(limit)
    }

    /// Starts a line of shell and does not wait.
    #[track_caller]
    pub fn start(&self, line: &str) -> Running<'a> {
        let spec = ExecSpec { argv: ["sh", "-c", line].map(str::to_owned).to_vec(), ..ExecSpec::default() };
        let begun = Instant::now();
        match self
            .channel
            .begin(&spec)
            .and_then(|process| process.end_input().map(|()| process).map_err(Into::into))
        {
            Ok(process) => {
                Running { hosts: self.hosts, number: self.number, line: line.to_owned(), process, begun }
            }
            Err(error) => self.hosts.lost(format!("host {}: `{line}`: {error}", self.number)),
        }
    }

    /// Runs `line` until it succeeds.
    ///
    /// # Panics
    /// It has not within `limit`; the message carries `what` and the last attempt.
    #[track_caller]
    pub fn wait_until(&self, what: &str, limit: Duration, line: &str) -> Outcome<'a> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_secs(1));
            let outcome = self.run_within(left.max(Duration::from_secs(5)), line);
            if outcome.status == 0 {
                return outcome;
            }
            if Instant::now() > deadline {
                self.hosts.expecting();
                panic!("{what}: not within {} s; last:\n{}", limit.as_secs_f32(), outcome.story());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Copies a file or the content of a folder into the host.
    #[track_caller]
    pub fn push(&self, source: &Path, target: &str) {
        if let Err(error) = transfer::push(&self.channel, source, target) {
            self.hosts.lost(format!("host {}: {error:#}", self.number));
        }
    }

    /// Reboots it in order and waits until it has settled again.
    #[track_caller]
    pub fn reboot(&self) {
        if let Err(error) = self.hosts.set.reboot(self.number) {
            self.hosts.lost(format!("host {} does not come back from its reboot: {error:#}", self.number));
        }
    }

    /// Cuts its power, switches it on again and waits until it has settled.
    #[track_caller]
    pub fn cut_power(&self) {
        if let Err(error) = self.hosts.set.reset(self.number) {
            self.hosts.lost(format!("host {} does not come back from a power cut: {error:#}", self.number));
        }
    }
}

/// A command under way in a host. Dropping it kills it.
pub struct Running<'a> {
    hosts: &'a Hosts,
    number: usize,
    line: String,
    process: Process,
    begun: Instant,
}

impl<'a> Running<'a> {
    /// Sends a signal to it and what it has started.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        if let Err(error) = self.process.signal(signal) {
            self.hosts.lost(format!("host {}: {error}", self.number));
        }
    }

    /// Waits for its end, at most [`COMMAND_LIMIT`].
    #[track_caller]
    pub fn finish(self) -> Outcome<'a> {
        self.finish_within(COMMAND_LIMIT)
    }

    /// Waits for its end.
    #[track_caller]
    pub fn finish_within(self, limit: Duration) -> Outcome<'a> {
        let Self { hosts, number, line, process, begun } = self;
        let mut output = Captured::default();
        match process.wait(&mut output, Some(limit)) {
            Ok(status) => Outcome { hosts, number, line, status, output, took: begun.elapsed() },
            Err(error @ (ExecError::Lost(_) | ExecError::TimedOut(_) | ExecError::Io(_))) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                hosts.lost(format!("host {number}: `{line}`: {error}\n{said}"))
            }
        }
    }
}

/// What came of a command.
pub struct Outcome<'a> {
    hosts: &'a Hosts,
    number: usize,
    line: String,
    /// Exit status, 128 + n for signal n.
    pub status: i32,
    output: Captured,
    /// From its start to its end, seen from outside.
    pub took: Duration,
}

impl Outcome<'_> {
    /// Standard output as text, without the last line's end.
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the last line's end.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).trim_end().to_owned()
    }

    /// What was run and what came of it, for a person.
    pub fn story(&self) -> String {
        let Self { number, line, status, .. } = self;
        format!("host {number}: `{line}` → {status}\nstdout: {}\nstderr: {}", self.stdout(), self.stderr())
    }

    /// It succeeded.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn expect_ok(self) -> Self {
        self.expect_status(0)
    }

    /// It ended with `status`.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn expect_status(self, status: i32) -> Self {
        self.hosts.answered(self.status == status);
        assert!(self.status == status, "expected status {status}\n{}", self.story());
        self
    }

    /// It failed.
    ///
    /// # Panics
    /// It succeeded.
    #[track_caller]
    pub fn expect_failure(self) -> Self {
        self.hosts.answered(self.status != 0);
        assert!(self.status != 0, "expected a failure\n{}", self.story());
        self
    }

    /// Its standard output is exactly `text`, apart from the last line's end.
    ///
    /// # Panics
    /// It is not.
    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        self.hosts.answered(self.stdout() == text);
        assert!(self.stdout() == text, "expected on stdout: {text}\n{}", self.story());
        self
    }

    /// Its standard output contains `text`.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn expect_out(self, text: &str) -> Self {
        self.hosts.answered(self.stdout().contains(text));
        assert!(self.stdout().contains(text), "expected in stdout: {text}\n{}", self.story());
        self
    }

    /// Its standard error contains `text`.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn expect_err(self, text: &str) -> Self {
        self.hosts.answered(self.stderr().contains(text));
        assert!(self.stderr().contains(text), "expected in stderr: {text}\n{}", self.story());
        self
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// It is none.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        self.hosts.expecting();
        match serde_json::from_slice(&self.output.stdout) {
            Ok(value) => value,
            Err(error) => panic!("expected JSON on stdout: {error}\n{}", self.story()),
        }
    }
}

/// Runs the scenarios whose names match `wanted` (a group, a scenario, or `group::scenario`; none: all that are no
/// benchmarks) and prints what came of each in the form of Rust's own test runner. Returns whether all passed.
///
/// Where [`UNTIL`] is set, the groups share the time until then: the first scenario of each, which shows the group's main matter, is run
/// as long as there is time at all, and the others while the group's share lasts, beginning with another one every day, so that the turn
/// comes to all. What a group leaves goes to those after it. What was not run is said: the others are worth more than a run that somebody
/// ends from outside.
///
/// # Errors
/// The image, the binaries or the runtime directory cannot be made; no scenario matches; [`UNTIL`] is no number.
pub fn run_all(groups: &[Group], wanted: &[String]) -> Result<bool> {
    let mut runner = Runner::new()?;
    let begun = Instant::now();
    for word in wanted {
        let known = groups.iter().any(|group| !selected(group, std::slice::from_ref(word)).is_empty());
        anyhow::ensure!(known, "no scenario is called {word}; there are: {}", names(groups));
    }
    let chosen: Vec<_> = groups.iter().map(|group| (group, selected(group, wanted))).collect();
    let mut left: usize = chosen.iter().map(|(_, scenarios)| scenarios.len()).sum();
    for (group, mut scenarios) in chosen.into_iter().filter(|(_, scenarios)| !scenarios.is_empty()) {
        let share = runner.until.map(|until| share_until(SystemTime::now(), until, scenarios.len(), left));
        if share.is_some() {
            rotate(&mut scenarios, days(SystemTime::now()));
        }
        runner.run_group(group, &scenarios, share)?;
        left -= scenarios.len();
    }
    Ok(runner.conclude(begun.elapsed()))
}

/// When a group of `own` of `all` scenarios that share the time from `now` to `until` has had its share.
fn share_until(now: SystemTime, until: SystemTime, own: usize, all: usize) -> SystemTime {
    let [own, all] = [own, all.max(1)].map(|count| u32::try_from(count).unwrap_or(u32::MAX));
    now + until.duration_since(now).unwrap_or_default() / all * own
}

/// All but the first, beginning with another one every `day`.
fn rotate<T>(scenarios: &mut [T], day: u64) {
    if let Some((_, others)) = scenarios.split_first_mut()
        && !others.is_empty()
    {
        let by = day % others.len() as u64;
        others.rotate_left(usize::try_from(by).unwrap_or_default());
    }
}

/// Whole days since the epoch.
fn days(now: SystemTime) -> u64 {
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() / (24 * 60 * 60)
}

/// What [`UNTIL`] says.
fn until() -> Result<Option<SystemTime>> {
    let Ok(text) = std::env::var(UNTIL) else { return Ok(None) };
    let seconds = text.parse().with_context(|| format!("{UNTIL}={text} is no number of seconds"))?;
    Ok(SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
}

fn names(groups: &[Group]) -> String {
    let all = groups
        .iter()
        .flat_map(|group| group.scenarios.iter().map(|(name, _)| format!("{}::{name}", group.name)));
    all.collect::<Vec<_>>().join(" ")
}

fn selected(group: &Group, wanted: &[String]) -> Vec<(&'static str, Body)> {
    let chosen = |name: &str| match wanted {
        [] => !group.bench,
        words => words
            .iter()
            .any(|word| word == group.name || word == name || *word == format!("{}::{name}", group.name)),
    };
    group.scenarios.iter().filter(|(name, _)| chosen(name)).copied().collect()
}

/// How a scenario ended.
enum Verdict {
    Passed,
    /// There was no time left for it.
    NotRun,
    Failed(String),
    /// A command has not ended on an emulated host.
    Silent(String),
    Infrastructure(String),
}

struct Runner {
    image: Image,
    accel: Accel,
    directory: PathBuf,
    /// Payloads with and without Lathe, as they become needed.
    payloads: [Option<PathBuf>; 2],
    /// Hosts of the last group: how many, whether Lathe is installed.
    shared: Option<(usize, bool, Hosts)>,
    passed: usize,
    failed: Vec<String>,
    not_run: Vec<String>,
    retries: usize,
    until: Option<SystemTime>,
}

impl Runner {
    fn new() -> Result<Self> {
        let image = cli::image_of_workspace()?;
        let accel = cli::accelerator(&image)?;
        let directory = place::own()?;
        Ok(Self {
            image,
            accel,
            directory,
            payloads: [None, None],
            shared: None,
            passed: 0,
            failed: Vec::new(),
            not_run: Vec::new(),
            retries: 0,
            until: until()?,
        })
    }

    /// Runs the first of `scenarios` while there is time at all, the others until the group's share is used up.
    fn run_group(
        &mut self,
        group: &Group,
        scenarios: &[(&'static str, Body)],
        share: Option<SystemTime>,
    ) -> Result<()> {
        println!("\nrunning {} scenarios of {}, on {} host(s)", scenarios.len(), group.name, group.hosts);
        let same = |shared: &(usize, bool, Hosts)| (shared.0, shared.1) == (group.hosts, group.lathe);
        let mut hosts = self.shared.take().filter(same).map(|(.., hosts)| hosts);
        let mut before = None;
        for (place, (name, body)) in scenarios.iter().enumerate() {
            let begun = Instant::now();
            let until = if place == 0 { self.until } else { share };
            let late = until.is_some_and(|until| SystemTime::now() > until);
            let here = group.scenarios.iter().position(|(other, _)| other == name);
            // One that does not follow the scenario before it as in the list expects nothing of it. Fresh hosts come where that fails.
            if !late && group.lathe && (here.is_none() || here != before.map(|before: usize| before + 1)) {
                hosts = hosts.filter(without_machines);
            }
            before = here;
            let verdict =
                if late { Verdict::NotRun } else { self.run_scenario(group, (name, *body), &mut hosts)? };
            let took = begun.elapsed().as_secs_f32();
            match verdict {
                Verdict::Passed => {
                    self.passed += 1;
                    println!("test {}::{name} ... ok ({took:.1} s)", group.name);
                }
                Verdict::NotRun => {
                    println!("test {}::{name} ... ignored, no time was left for it", group.name);
                    self.not_run.push(format!("{}::{name}", group.name));
                }
                Verdict::Failed(why) | Verdict::Silent(why) | Verdict::Infrastructure(why) => {
                    println!("test {}::{name} ... FAILED ({took:.1} s)\n{why}", group.name);
                    self.failed.push(format!("{}::{name}", group.name));
                }
            }
        }
        self.shared = hosts.map(|hosts| (group.hosts, group.lathe, hosts));
        Ok(())
    }

    fn run_scenario(
        &mut self,
        group: &Group,
        (name, body): (&str, Body),
        hosts: &mut Option<Hosts>,
    ) -> Result<Verdict> {
        for attempt in 1.. {
            let verdict = match self.provide(group, hosts) {
                Ok(()) => hosts.as_ref().map_or(Verdict::Passed, |hosts| attempt_once(body, hosts)),
                Err(error) => Verdict::Infrastructure(format!("{error:#}")),
            };
            if matches!(verdict, Verdict::Passed) {
                return Ok(verdict);
            }
            self.save(hosts.take(), &format!("{}::{name}", group.name), &verdict)?;
            match verdict {
                Verdict::Infrastructure(why) if attempt <= RETRIES => {
                    self.retries += 1;
                    println!("INFRASTRUCTURE FAILURE, retry {attempt} of {RETRIES}: {why}");
                }
                Verdict::Silent(why) if attempt == 1 => {
                    self.retries += 1;
                    println!("SILENCE ON AN EMULATED HOST, tried once more: {why}");
                }
                verdict => return Ok(verdict),
            }
        }
        Ok(Verdict::Passed)
    }

    /// Boots the group's hosts if there are none.
    fn provide(&mut self, group: &Group, hosts: &mut Option<Hosts>) -> Result<()> {
        if hosts.is_some() {
            return Ok(());
        }
        let payload = self.payload(group.lathe)?;
        let directory = place::own()?;
        fs::hard_link(payload, directory.join("payload.tar"))?;
        let plan = Plan { hosts: group.hosts, cpus: 2, memory_mib: 4096, accel: self.accel };
        let begun = Instant::now();
        let booted = HostSet::boot(&plan, &self.image, &directory);
        if booted.is_err() {
            let saved = place::failures();
            crate::hosts::save_consoles(&directory, &saved)?;
            println!("consoles in {}", saved.display());
        }
        let set = booted?;
        for number in (1..=group.hosts).filter(|_| group.lathe) {
            workspace::install(&set.channel(number)?).with_context(|| format!("on host {number}"))?;
        }
        println!("    {} host(s) up in {:.1} s", group.hosts, begun.elapsed().as_secs_f32());
        let emulated = matches!(self.accel, Accel::Tcg);
        *hosts = Some(Hosts {
            set,
            expected: Cell::new(false),
            preparing: Cell::new(false),
            emulated,
            begun: Cell::new(Instant::now()),
            guests_lie: Cell::new(false),
        });
        Ok(())
    }

    fn payload(&mut self, lathe: bool) -> Result<PathBuf> {
        let slot = usize::from(lathe);
        if let Some(ready) = &self.payloads[slot] {
            return Ok(ready.clone());
        }
        let stage = self.directory.join("stage");
        fs::create_dir_all(&stage)?;
        if lathe {
            anyhow::ensure!(
                workspace::stage(&stage)?,
                "this workspace has no systemd/install, so nothing to test"
            );
        }
        let target = self.directory.join(format!("payload-{slot}.tar"));
        payload::write(&target, &stage, &cli::own_program()?)?;
        fs::remove_dir_all(&stage)?;
        self.payloads[slot] = Some(target.clone());
        Ok(target)
    }

    /// Saves what hosts leave behind and what was wrong, and ends them.
    fn save(&self, hosts: Option<Hosts>, scenario: &str, verdict: &Verdict) -> Result<()> {
        if let Some(hosts) = hosts {
            let saved = place::failures();
            hosts.set.save(&saved)?;
            let (Verdict::Failed(why) | Verdict::Silent(why) | Verdict::Infrastructure(why)) = verdict else {
                return Ok(());
            };
            fs::write(saved.join("failure.txt"), format!("{scenario}\n{why}\n"))?;
            println!("journals and consoles in {}", saved.display());
        }
        Ok(())
    }

    fn conclude(&self, took: Duration) -> bool {
        if !self.failed.is_empty() {
            println!("\nfailures:");
            self.failed.iter().for_each(|name| println!("    {name}"));
        }
        if !self.not_run.is_empty() {
            println!(
                "\nnot run, because no time was left; run them with: tests/run scenario {}",
                self.not_run.join(" ")
            );
        }
        println!("\ninfrastructure retries: {}", self.retries);
        let (word, failed) = (if self.failed.is_empty() { "ok" } else { "FAILED" }, self.failed.len());
        println!(
            "test result: {word}. {} passed; {failed} failed; {} ignored; 0 measured; 0 filtered out; finished in {:.2}s",
            self.passed,
            self.not_run.len(),
            took.as_secs_f32()
        );
        // A run in which nothing ran has shown nothing.
        failed == 0 && (self.passed > 0 || self.not_run.is_empty())
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // What stays is removed by the next run.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.set.end();
        // What stays is removed by the next run.
        let _ = fs::remove_dir_all(self.set.directory());
    }
}

/// Takes the machines away that scenarios before have left; each makes what it misses.
fn without_machines(hosts: &Hosts) -> bool {
    const LINE: &str = "lathe list --json | jq -r '.machines[].name' | while read -r name; do lathe rm $name --force --purge || exit 1; done";
    let away = |host: Host<'_>| host.run(LINE).status == 0;
    catch_unwind(AssertUnwindSafe(|| hosts.all().into_iter().all(away))).unwrap_or(false)
}

fn attempt_once(body: Body, hosts: &Hosts) -> Verdict {
    hosts.expected.set(false);
    hosts.preparing.set(false);
    hosts.guests_lie.set(false);
    hosts.begun.set(Instant::now());
    match catch_unwind(AssertUnwindSafe(|| body(hosts))) {
        Ok(()) => Verdict::Passed,
        Err(payload) => match payload.downcast::<Infrastructure>() {
            Ok(infrastructure) => Verdict::Infrastructure(infrastructure.0),
            // What does not hold on a host that has fallen over, or before anything was tried, says nothing.
            Err(payload) if hosts.unprepared() || hosts.emulation_failed() => {
                Verdict::Infrastructure(message_of(&*payload))
            }
            // The panic hook has printed the message and where it came from.
            Err(payload) => match message_of(&*payload) {
                silence if hosts.emulated && silence.contains(NOT_FINISHED) => Verdict::Silent(silence),
                why => Verdict::Failed(why),
            },
        },
    }
}

fn message_of(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_share_the_time_that_is_left() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert_eq!(share_until(now, now + Duration::from_secs(600), 2, 6), now + Duration::from_secs(200));
        assert_eq!(share_until(now, now + Duration::from_secs(600), 4, 4), now + Duration::from_secs(600));
        assert_eq!(share_until(now, now - Duration::from_secs(1), 3, 4), now, "none is left");
    }

    #[test]
    fn every_scenario_is_the_first_after_the_first_one_day() {
        let second = |day| {
            let mut scenarios = ["main", "a", "b", "c"];
            rotate(&mut scenarios, day);
            assert_eq!(scenarios[0], "main");
            scenarios[1]
        };
        assert_eq!([0, 1, 2, 3].map(second), ["a", "b", "c", "a"]);
        rotate(&mut [(); 0], 5);
        rotate(&mut ["main"], 5);
    }
}
