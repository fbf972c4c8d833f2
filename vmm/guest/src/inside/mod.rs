//! What goes on inside: applications, what the kernel says is short, and what is wanted of the host.
//!
//! ```text
//! host asks, once a second ─► look ─┬─ machine: /proc, PSI                     ┐
//!                                   ├─ cgroups: units, where there are any     ├─► the most demanding by name, the others as one
//!                                   ├─ sessions: of processes, where not       ┘
//!                                   ├─ wants ◄─ socket ◄─ lathe-guest want
//!                                   └─ goals ◄─ socket ◄─ lathe-guest goal
//!                                        ▲
//!                                        └─ thread ◄─ metrics of applications
//! ```
//! | file | what |
//! |---|---|
//! | [`machine`] | the whole machine |
//! | [`cgroups`], [`sessions`] | applications of either kind |
//! | [`choice`] | who is told by name |
//! | [`wants`], [`ask`] | what is wanted of the host, and the command that wants it |
//! | [`goals`] | what is expected of applications, and what their metrics say |
//! | [`socket`], [`command`] | the socket of the commands, and what these have in common |
//! | [`files`], [`rate`] | reading small files, and what counters have done since |
//!
//! Nothing is looked at unless the host asks, and whatever runs here costs no more: each look reads some two hundred files at most, those
//! of the busy first and the others in turn. A guest with ten thousand processes is known later, not at a higher price. Metrics are read beside
//! that, on a thread that a look never waits for.

pub mod ask;
mod cgroups;
mod choice;
mod command;
mod files;
pub mod goals;
mod machine;
mod rate;
mod sessions;
pub mod socket;
mod wants;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use lathe_guest::protocol::inside::{ApplicationKind, Inside, Settled};

use self::cgroups::Cgroups;
use self::files::Files;
use self::machine::Machine;
use self::sessions::Sessions;

/// Who asks again sooner hears the same again.
const LEAST_INTERVAL: Duration = Duration::from_millis(900);

static OBSERVER: Mutex<Option<Observer>> = Mutex::new(None);

/// What goes on now; takes in what the host made of what was wanted.
pub fn look(settled: &[Settled]) -> Inside {
    let now = Instant::now();
    wants::settle(settled);
    let mut observer = OBSERVER.lock().unwrap_or_else(PoisonError::into_inner);
    let mut inside = observer.get_or_insert_with(|| Observer::new(Path::new("/"))).look(now);
    // Even when the rest is what was told before: neither of them is looked at anew.
    inside.wants = wants::told(now);
    inside.goals = goals::told(now);
    inside
}

/// Remembers counters between two looks.
struct Observer {
    root: PathBuf,
    files: Files,
    machine: Machine,
    cgroups: Cgroups,
    sessions: Sessions,
    last: Option<(Instant, Inside)>,
}

impl Observer {
    fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            files: Files::default(),
            machine: Machine::default(),
            cgroups: Cgroups::default(),
            sessions: Sessions::default(),
            last: None,
        }
    }

    fn look(&mut self, now: Instant) -> Inside {
        let elapsed = self.last.as_ref().map(|(at, _)| now.saturating_duration_since(*at));
        if let (Some((_, inside)), Some(elapsed)) = (&self.last, elapsed)
            && elapsed < LEAST_INTERVAL
        {
            return inside.clone();
        }
        let (machine, cpus) = self.machine.look(&self.root, &mut self.files, now);
        self.cgroups.look(&self.root, &mut self.files, now);
        let (kind, found, unseen) = if self.cgroups.is_empty() {
            let found = self.sessions.look(&self.root, &mut self.files, now);
            (ApplicationKind::Sessions, found, self.sessions.unseen())
        } else {
            (ApplicationKind::Units, self.cgroups.told(), self.cgroups.unseen())
        };
        let choice = choice::choose(found, cpus, machine.memory_total_bytes);
        let inside = Inside {
            over_msec: elapsed.map_or(0, |elapsed| u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX)),
            machine,
            kind,
            applications: choice.named,
            others: choice.others,
            others_count: choice.others_count.saturating_add(unseen),
            wants: Vec::new(),
            goals: Vec::new(),
        };
        self.last = Some((now, inside.clone()));
        inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_machine_is_looked_at() {
        let mut observer = Observer::new(Path::new("/"));
        let now = Instant::now();
        let first = observer.look(now);
        assert_eq!(first.over_msec, 0);
        assert!(first.machine.memory_total_bytes > 0 && first.machine.memory_available_bytes > 0);
        assert_eq!(observer.look(now + LEAST_INTERVAL / 2), first, "asked too soon");
        let second = observer.look(now + LEAST_INTERVAL);
        assert_eq!(second.over_msec, 900);
        let bytes = serde_json::to_vec(&second).unwrap();
        assert!(bytes.len() < lathe_guest::protocol::MAX_FRAME_BYTES / 4, "{} bytes", bytes.len());
        assert_eq!(serde_json::from_slice::<Inside>(&bytes).unwrap(), second);
    }

    /// A look opens so many files at most, whatever runs here. What that costs in CPU time is told: `cargo test -p lathe-guest --release --
    /// --nocapture looks_cost`.
    #[test]
    fn looks_cost_little_whatever_runs_here() {
        const LOOKS: u32 = 30;
        const MOST_FILES: u64 = 400;
        for sessions in [false, true] {
            let mut observer = Observer::new(Path::new("/"));
            let begin = Instant::now();
            let used = || {
                let clock = nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID;
                Duration::from(nix::time::clock_gettime(clock).unwrap())
            };
            let before = used();
            for second in 0..LOOKS {
                let (at, opened) = (begin + Duration::from_secs(second.into()), observer.files.opened);
                if sessions {
                    observer.sessions.look(Path::new("/"), &mut observer.files, at);
                } else {
                    observer.look(at);
                }
                let opened = observer.files.opened - opened;
                assert!((1..=MOST_FILES).contains(&opened), "look {second} opened {opened} files");
            }
            let usec = (used() - before).as_micros() / u128::from(LOOKS);
            println!("sessions alone: {sessions}: {usec} µs of CPU a look");
        }
    }
}
