//! Applications by session of processes (setsid(2)), in a guest without units, such as the built-in one: each command that the host runs is
//! one.
//!
//! Three files of a process are read (proc(5)): `stat`, `statm`, `io`. In a look that happens to the processes that were busy in the one
//! before, and to some others in turn. A process that came and went between two looks is missed, with whatever it used; disk operations and
//! stalls are not told, for the kernel does not count them by process.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use lathe_guest::protocol::inside::Application;

use super::files::{Files, field};
use super::machine::TICK_USEC;
use super::rate::Rate;
use crate::sys;

/// Busy processes that are read in a look.
const BUSY: usize = 32;
/// Others that are read in turn.
const IN_TURN: usize = 32;
/// Most files read in a look: three of each, and the time.
#[cfg(test)]
const MOST_FILES: usize = (BUSY + IN_TURN) * 3 + 1;
/// Processes that are known at a time; as files of a test ten thousand would take their time.
const MAX_PROCESSES: usize = if cfg!(test) { 800 } else { 8192 };
/// Entries of /proc that are no processes, passed over in one look.
const MAX_OTHERS: usize = 256;
/// PF_KTHREAD of include/linux/sched.h.
const KERNEL_THREAD: u64 = 0x0020_0000;
/// A process this young, in ticks, has used what it has used in its life.
const YOUNG_TICKS: u64 = 1000;

/// All that is known.
#[derive(Default)]
pub struct Sessions {
    processes: HashMap<i32, Process>,
    /// Where the turn through /proc is.
    turn: Option<fs::ReadDir>,
    turns: u64,
    missed: (u32, u32),
}

#[derive(Default)]
struct Process {
    turn: u64,
    born_ticks: u64,
    session: i32,
    name: String,
    kernel: bool,
    /// It ran when it was read.
    runs: bool,
    cpu: Rate,
    read: Rate,
    written: Rate,
    anon_bytes: u64,
    shared_bytes: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    runs: bool,
    session: i32,
    kernel: bool,
    ticks: u64,
    born_ticks: u64,
}

impl Sessions {
    /// How many processes there are that are not looked at.
    pub fn unseen(&self) -> u32 {
        self.missed.1
    }

    /// Looks a little further, and tells what is known of each session.
    pub fn look(&mut self, root: &Path, files: &mut Files, now: Instant) -> Vec<Application> {
        let proc = root.join("proc");
        let uptime_ticks = files.read(&proc.join("uptime")).map_or(0, ticks_of);
        let mut busy: Vec<(u64, i32)> = self
            .processes
            .iter()
            .filter(|(_, process)| process.runs || process.cpu.per_sec > 0)
            .map(|(pid, process)| (process.cpu.per_sec, *pid))
            .collect();
        busy.sort_unstable_by(|one, other| other.cmp(one));
        busy.truncate(BUSY);
        for (_, pid) in &busy {
            self.read(&proc, files, *pid, uptime_ticks, now);
        }
        for _ in 0..IN_TURN {
            let Some(pid) = self.next(&proc) else { break };
            if busy.iter().all(|(_, known)| *known != pid) {
                self.read(&proc, files, pid, uptime_ticks, now);
            } else if let Some(process) = self.processes.get_mut(&pid) {
                process.turn = self.turns;
            }
        }
        self.told()
    }

    /// The process whose turn it is; `None` when all have had theirs, or there were too many other things in between.
    fn next(&mut self, proc: &Path) -> Option<i32> {
        if self.turn.is_none() {
            self.turn = fs::read_dir(proc).ok();
            self.turns += 1;
            self.missed.0 = 0;
        }
        let entries = self.turn.as_mut()?;
        for _ in 0..MAX_OTHERS {
            let Some(entry) = entries.next() else {
                self.turn = None;
                let turns = self.turns;
                self.processes.retain(|_, process| process.turn == turns);
                self.missed.1 = self.missed.0;
                return None;
            };
            let pid = entry.ok().and_then(|entry| entry.file_name().to_str()?.parse().ok());
            if pid.is_some() {
                return pid;
            }
        }
        None
    }

    fn read(&mut self, proc: &Path, files: &mut Files, pid: i32, uptime_ticks: u64, now: Instant) {
        let folder = proc.join(pid.to_string());
        let Some(stat) = files.read(&folder.join("stat")).and_then(parse_stat) else {
            self.processes.remove(&pid);
            return;
        };
        let known = self.processes.get(&pid).is_some_and(|known| known.born_ticks == stat.born_ticks);
        if !known {
            if self.processes.len() >= MAX_PROCESSES && !self.processes.contains_key(&pid) {
                self.missed.0 = self.missed.0.saturating_add(1);
                return;
            }
            self.processes.insert(pid, Process::default());
        }
        let turn = self.turns;
        let Some(process) = self.processes.get_mut(&pid) else { return };
        (process.turn, process.born_ticks, process.kernel) = (turn, stat.born_ticks, stat.kernel);
        (process.session, process.name) = (stat.session, stat.name);
        if process.kernel {
            return;
        }
        process.runs = stat.runs;
        process.cpu.take(now, stat.ticks.saturating_mul(TICK_USEC));
        let age_ticks = uptime_ticks.saturating_sub(stat.born_ticks).max(1);
        if !known && age_ticks <= YOUNG_TICKS {
            process.cpu.per_sec = stat.ticks.saturating_mul(1_000_000) / age_ticks;
        }
        if let Some((resident, shared)) = files.read(&folder.join("statm")).and_then(parse_statm) {
            process.anon_bytes = resident.saturating_sub(shared).saturating_mul(sys::page_bytes());
            process.shared_bytes = shared.saturating_mul(sys::page_bytes());
        }
        // Other users' are hidden from an agent that is not root.
        if let Some(text) = files.read(&folder.join("io")) {
            process.read.take(now, field(text, "read_bytes").unwrap_or(0));
            process.written.take(now, field(text, "write_bytes").unwrap_or(0));
        }
    }

    fn told(&self) -> Vec<Application> {
        let mut sessions: HashMap<i32, (i32, Application)> = HashMap::new();
        for (pid, process) in self.processes.iter().filter(|(_, process)| !process.kernel) {
            let (first, told) =
                sessions.entry(process.session).or_insert_with(|| (i32::MAX, Application::default()));
            // The leader's name; without it, that of the oldest number.
            let rank = if *pid == process.session { 0 } else { *pid };
            if rank < *first {
                *first = rank;
                told.name = format!("{}[{}]", process.name, process.session);
            }
            told.cpu_milli = told.cpu_milli.saturating_add(process.cpu.milli());
            told.anon_bytes = told.anon_bytes.saturating_add(process.anon_bytes);
            // Processes of one session mostly share the same: the sum would count it again and again.
            told.file_bytes = told.file_bytes.max(process.shared_bytes);
            told.read_bytes_per_sec = told.read_bytes_per_sec.saturating_add(process.read.per_sec);
            told.written_bytes_per_sec = told.written_bytes_per_sec.saturating_add(process.written.per_sec);
        }
        let whole = |(_, mut told): (i32, Application)| {
            told.memory_bytes = told.anon_bytes.saturating_add(told.file_bytes);
            told.working_set_bytes = told.memory_bytes;
            told
        };
        sessions.into_values().map(whole).collect()
    }
}

/// `12.34 56.78` as 1234.
fn ticks_of(uptime: &str) -> u64 {
    let word = uptime.split_whitespace().next().unwrap_or_default();
    let (whole, fraction) = word.split_once('.').unwrap_or((word, "0"));
    let hundredths = fraction.get(..2).and_then(|digits| digits.parse::<u64>().ok()).unwrap_or(0);
    whole.parse::<u64>().unwrap_or(0).saturating_mul(100).saturating_add(hundredths)
}

/// The name may hold anything, brackets and line feeds too: it ends at the last bracket.
fn parse_stat(text: &str) -> Option<Stat> {
    let (begin, rest) = text.rsplit_once(')')?;
    let (_, name) = begin.split_once('(')?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    // Counted from the state, the third field of proc(5).
    let number = |at: usize| words.get(at)?.parse::<u64>().ok();
    Some(Stat {
        name: name.to_owned(),
        runs: *words.first()? == "R",
        session: words.get(3)?.parse().ok()?,
        kernel: number(6)? & KERNEL_THREAD != 0,
        ticks: number(11)?.saturating_add(number(12)?),
        born_ticks: number(19)?,
    })
}

/// Pages that are resident, and those of them with a file or shared memory behind them.
fn parse_statm(text: &str) -> Option<(u64, u64)> {
    let mut words = text.split_whitespace().skip(1).map_while(|word| word.parse().ok());
    Some((words.next()?, words.next()?))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn process(root: &Path, pid: i32, session: i32, name: &str, ticks: u64, born: u64) {
        let folder = root.join("proc").join(pid.to_string());
        fs::create_dir_all(&folder).unwrap();
        let flags = if session == 0 { KERNEL_THREAD } else { 0 };
        let stat = format!(
            "{pid} ({name}) S 1 {session} {session} 0 -1 {flags} 0 0 0 0 {ticks} 0 9 9 20 0 1 0 {born} 4096 10\n"
        );
        fs::write(folder.join("stat"), stat).unwrap();
        fs::write(folder.join("statm"), "100 30 10 1 0 9 0\n").unwrap();
        fs::write(folder.join("io"), "rchar: 9\nread_bytes: 0\nwrite_bytes: 0\n").unwrap();
    }

    fn uptime(root: &Path, seconds: u64) {
        fs::create_dir_all(root.join("proc")).unwrap();
        fs::write(root.join("proc/uptime"), format!("{seconds}.00 1.00\n")).unwrap();
    }

    #[test]
    fn processes_of_a_session_are_one_application() {
        let root = tempfile::tempdir().unwrap();
        let (mut sessions, mut files, now) = (Sessions::default(), Files::default(), Instant::now());
        let second = |at| now + Duration::from_secs(at);
        uptime(root.path(), 5000);
        process(root.path(), 2, 0, "kthreadd", 900, 0);
        process(root.path(), 40, 40, "sh", 100, 10);
        process(root.path(), 41, 40, "wor) k\ner", 100, 10);
        process(root.path(), 60, 60, "spin", 150, 499_800);
        let told = sessions.look(root.path(), &mut files, now);
        let cpu = |told: &[Application], name: &str| {
            told.iter().find(|one| one.name == name).map(|one| one.cpu_milli)
        };
        assert_eq!(told.len(), 2, "{told:?}");
        assert_eq!(cpu(&told, "spin[60]"), Some(750), "it is two seconds old");
        assert_eq!(cpu(&told, "sh[40]"), Some(0), "what it has used in its life is not of now");
        process(root.path(), 41, 40, "wor) k\ner", 150, 10);
        process(root.path(), 60, 60, "spin", 250, 499_800);
        let told = sessions.look(root.path(), &mut files, second(1));
        assert_eq!((cpu(&told, "sh[40]"), cpu(&told, "spin[60]")), (Some(500), Some(1000)));
        let sh = told.iter().find(|one| one.name == "sh[40]").unwrap();
        let page = sys::page_bytes();
        assert_eq!((sh.anon_bytes, sh.file_bytes, sh.memory_bytes), (40 * page, 10 * page, 50 * page));
        fs::remove_dir_all(root.path().join("proc/60")).unwrap();
        let told = sessions.look(root.path(), &mut files, second(2));
        assert_eq!(cpu(&told, "spin[60]"), None);
        // Its number is somebody else's by now.
        process(root.path(), 41, 41, "other", 400, 400_000);
        for at in 3..6 {
            sessions.look(root.path(), &mut files, second(at));
        }
        assert_eq!(cpu(&sessions.told(), "other[41]"), Some(0));
    }

    #[test]
    fn a_thousand_processes_cost_no_more_than_a_hundred() {
        let root = tempfile::tempdir().unwrap();
        uptime(root.path(), 5000);
        for pid in 1..=1000 {
            process(root.path(), pid, pid, "idle", 1, 1);
        }
        let (mut sessions, mut files, now) = (Sessions::default(), Files::default(), Instant::now());
        for at in 0..40 {
            let before = files.opened;
            sessions.look(root.path(), &mut files, now + Duration::from_secs(at));
            assert!(files.opened - before <= MOST_FILES as u64);
            assert!(sessions.processes.len() <= MAX_PROCESSES);
        }
        assert_eq!(sessions.unseen(), 1000 - MAX_PROCESSES as u32);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[a-zA-Z0-9 .:()=\\n-]{0,200}") {
            parse_stat(&text);
            parse_stat(&format!("1 (a) {text}"));
            parse_statm(&text);
            ticks_of(&text);
        }
    }
}
