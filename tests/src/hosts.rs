//! A set of test hosts: boots them on one segment, holds them, gives access to their channels, saves what they leave.
//!
//! ```text
//! HostSet ─┬─ Hub (when there are several)
//!          ├─ Member 1: Qemu + Channel
//!          └─ Member 2: …           files in one directory: sockets, consoles, payload.tar
//! ```
//! Everything ends when the set is dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::channel::{Captured, Channel, ExecError};
use crate::frame::ExecSpec;
use crate::hub::Hub;
use crate::image::Image;
use crate::qemu::{Accel, Machine, Qemu, path_of};

/// The most hosts in a set: more do not fit on two cores.
pub const MAX_HOSTS: usize = 9;
/// How long a host may take from power-on to its agent's hello.
pub const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long systemd may take from there until no job is queued any more.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(120);

/// What is to be known of the machines of a host on which something went wrong: twice where each thread is and how much it has run, what
/// monitors and agent say, what guests have said.
const MACHINES: &str = r#"
exec 2>&1
threads() { ps -eLo pid,tid,stat,time,wchan:24,comm | grep -E 'lathe|vcpu|hand|kvm' | grep -v grep; }
threads; sleep 2; echo; threads
for control in /root/machine-*/control /run/lathe/vm/*.sock; do
    [ -S "$control" ] || continue
    echo "── $control"
    program=/usr/lib/lathe/lathe-vmm; [ -x "$program" ] || program=/root/kit/lathe-vmm
    for word in status stats; do timeout 5 "$program" ask "$control" "{\"$word\":{}}"; done
done
command -v lathe >/dev/null && timeout 10 lathe list
for said in /root/machine-*/said; do
    [ -s "$said" ] && { echo "── $said"; tail -c 2000 "$said"; }
done
for console in /root/machine-*/console /var/lib/lathe/machines/*/console.log; do
    [ -f "$console" ] && { echo "── $console"; tail -c 6000 "$console"; }
done
"#;

/// What a set is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many hosts.
    pub hosts: usize,
    /// CPUs of each.
    pub cpus: usize,
    /// Memory of each, MiB.
    pub memory_mib: usize,
    /// How they are run.
    pub accel: Accel,
}

struct Member {
    qemu: Mutex<Qemu>,
    channel: Channel,
    /// Boots that somebody asked for.
    asked_boots: AtomicU32,
}

/// Running hosts.
pub struct HostSet {
    directory: PathBuf,
    members: Vec<Member>,
    _hub: Option<Hub>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl HostSet {
    /// Starts the hosts and waits until each has settled. `directory` must hold `payload.tar` and nothing of another
    /// set.
    ///
    /// # Errors
    /// A host does not come up; its console lies in `directory`.
    pub fn boot(plan: &Plan, image: &Image, directory: &Path) -> Result<Self> {
        if !(1..=MAX_HOSTS).contains(&plan.hosts) {
            bail!("{} hosts asked for, 1 to {MAX_HOSTS} are possible", plan.hosts);
        }
        let segment = plan.hosts > 1;
        let hub = segment
            .then(|| Hub::start(directory, plan.hosts))
            .transpose()
            .context("cannot make the segment")?;
        let mut members = Vec::new();
        for number in 1..=plan.hosts {
            let machine =
                Machine { number, cpus: plan.cpus, memory_mib: plan.memory_mib, accel: plan.accel, segment };
            let mut qemu = Qemu::start(&machine, image, directory)?;
            let channel = Channel::new(qemu.connect("cmd.sock")?)?;
            members.push(Member { qemu: Mutex::new(qemu), channel, asked_boots: AtomicU32::new(1) });
        }
        let set = Self { directory: directory.to_owned(), members, _hub: hub };
        let booting = &set;
        thread::scope(|scope| {
            let waits: Vec<_> = (1..=plan.hosts)
                .map(|number| scope.spawn(move || (number, booting.settle(number, 1))))
                .collect();
            for wait in waits {
                match wait.join() {
                    Ok((number, result)) => {
                        result.with_context(|| format!("host {number} does not come up"))?
                    }
                    Err(_) => bail!("waiting for a host panicked"),
                }
            }
            anyhow::Ok(())
        })?;
        Ok(set)
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Never: a set has at least one host.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Where the set keeps its files.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The channel of host `number`, counted from 1.
    ///
    /// # Errors
    /// There is no such host.
    pub fn channel(&self, number: usize) -> Result<Channel> {
        Ok(self.member(number)?.channel.clone())
    }

    fn member(&self, number: usize) -> Result<&Member> {
        let index = number.checked_sub(1).context("hosts are counted from 1")?;
        self.members.get(index).with_context(|| format!("no host {number}: there are {}", self.members.len()))
    }

    /// Waits until host `number` has booted `boots` times and its systemd has no job left.
    fn settle(&self, number: usize, boots: u32) -> Result<()> {
        let channel = &self.member(number)?.channel;
        channel.wait_up(boots, BOOT_LIMIT)?;
        // udev's own work is no job of systemd.
        capture(channel, &["udevadm", "settle"], SETTLE_LIMIT)?;
        // `degraded` (exit 1) is reported by the state on stdout, and is for the scenario to judge.
        capture(channel, &["systemctl", "is-system-running", "--wait"], SETTLE_LIMIT)?;
        Ok(())
    }

    /// Reboots host `number` in order and waits until it has settled again.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reboot(&self, number: usize) -> Result<()> {
        let member = self.member(number)?;
        let channel = &member.channel;
        let boots = channel.boots();
        member.asked_boots.fetch_add(1, Ordering::AcqRel);
        match capture(channel, &["systemctl", "reboot"], SETTLE_LIMIT) {
            // The answer and the end of the host race.
            Ok(_) | Err(ExecError::Lost(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.settle(number, boots + 1)
    }

    /// Cuts host `number`'s power and switches it on again. What it had not written to its disk is lost.
    ///
    /// # Errors
    /// It does not come back.
    pub fn reset(&self, number: usize) -> Result<()> {
        let member = self.member(number)?;
        let boots = member.channel.boots();
        member.asked_boots.fetch_add(1, Ordering::AcqRel);
        lock(&member.qemu).monitor("system_reset")?;
        self.settle(number, boots + 1)
    }

    /// Whether host `number` has booted, or the agent in it has started, more often than anybody asked for.
    pub fn restarted_by_itself(&self, number: usize) -> bool {
        self.member(number)
            .is_ok_and(|member| member.channel.boots() > member.asked_boots.load(Ordering::Acquire))
    }

    /// Ends all hosts now.
    pub fn end(&self) {
        for member in &self.members {
            lock(&member.qemu).kill();
        }
    }

    /// Saves consoles and journals of all hosts to `target`, as far as they can be had.
    ///
    /// # Errors
    /// `target` cannot be written.
    pub fn save(&self, target: &Path) -> Result<()> {
        save_consoles(&self.directory, target)?;
        let looks: [(&str, &[&str]); 2] = [
            ("machines.log", &["sh", "-c", MACHINES]),
            ("journal.log", &["journalctl", "--no-pager", "--output=short-precise", "--lines=20000"]),
        ];
        for (index, member) in self.members.iter().enumerate() {
            for (name, argv) in looks {
                if let Ok((_, output)) = capture(&member.channel, argv, Duration::from_secs(60)) {
                    fs::write(path_of(target, index + 1, name), &output.stdout)?;
                }
            }
        }
        Ok(())
    }
}

/// Copies what QEMU wrote about the hosts (consoles, its own words) from one directory to another.
///
/// # Errors
/// `target` cannot be written.
pub fn save_consoles(directory: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target)?;
    for entry in fs::read_dir(directory)?.flatten() {
        if entry.path().extension().is_some_and(|extension| extension == "log") {
            fs::copy(entry.path(), target.join(entry.file_name()))?;
        }
    }
    Ok(())
}

/// Runs a command and keeps its output.
///
/// # Errors
/// [`ExecError`].
pub fn capture(channel: &Channel, argv: &[&str], limit: Duration) -> Result<(i32, Captured), ExecError> {
    let spec = ExecSpec { argv: argv.iter().map(|&word| word.to_owned()).collect(), ..ExecSpec::default() };
    let process = channel.begin(&spec)?;
    process.end_input()?;
    let mut output = Captured::default();
    let status = process.wait(&mut output, Some(limit))?;
    Ok((status, output))
}
