//! CPUs brought online and offline.
//!
//! Documentation/admin-guide/cputopology.rst and core-api/cpu_hotplug.rst of the kernel. Two ask for it: the host by request, and
//! the kernel by its event for a CPU that was plugged in ([`crate::hotplug`]), which on x86 stays offline until somebody writes 1
//! to its `online`. They take turns: the kernel lets whoever comes second sleep for milliseconds.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::parse_list;
use crate::failure::Failure;

const FOLDER: &str = "/sys/devices/system/cpu";
/// A CPU that the host has just plugged in shows up within this time; it is less than the host waits for an answer.
const PLUG_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks for it. The files cost microseconds to read, and the work that waits for the CPU costs more.
const PLUG_POLL: Duration = Duration::from_micros(500);

/// The CPUs of this guest.
static CPUS: Cpus = Cpus::new();

/// See [`Cpus::set`].
///
/// # Errors
/// As there.
pub fn set(online: u32) -> Result<(), Failure> {
    CPUS.set(Path::new(FOLDER), online, PLUG_TIMEOUT)
}

/// See [`Cpus::added`].
///
/// # Errors
/// As there.
pub fn added(cpu: u32) -> io::Result<()> {
    CPUS.added(Path::new(FOLDER), cpu)
}

/// See [`Cpus::removed`].
pub fn removed() {
    CPUS.removed(Path::new(FOLDER));
}

/// Who may switch CPUs, and what was asked for last.
struct Cpus {
    /// Most CPUs to have online, if the host asked for fewer than there were. Held while CPUs are switched.
    limit: Mutex<Option<u32>>,
    /// Requests so far; one that still waits for CPUs gives way to a later one.
    asked: AtomicU64,
}

impl Cpus {
    const fn new() -> Self {
        Self { limit: Mutex::new(None), asked: AtomicU64::new(0) }
    }

    /// Brings the first `online` present CPUs online and the others offline; waits for those that have yet to be plugged in.
    ///
    /// # Errors
    /// `bad-request` for 0; `failed` when fewer are present at the end, when a later request came, or when the kernel refuses; then as
    /// many as went.
    fn set(&self, folder: &Path, online: u32, timeout: Duration) -> Result<(), Failure> {
        if online == 0 {
            return Err(Failure::bad_request("at least one CPU must be online".into()));
        }
        let number = self.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let deadline = Instant::now() + timeout;
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let present = switchable(folder)?;
            *limit = (present.len() > online as usize).then_some(online);
            let count = present.len().min(online as usize);
            let (on, off) = present.split_at(count);
            let now_online = list(folder, "online")?;
            for cpu in on.iter().filter(|cpu| !now_online.contains(cpu)) {
                switch(folder, *cpu, true)?;
            }
            for cpu in off.iter().rev().filter(|cpu| now_online.contains(cpu)) {
                switch(folder, *cpu, false)?;
            }
            if count == online as usize {
                return Ok(());
            }
            let message = format!("{online} CPUs are asked for, {count} are present");
            if self.asked.load(Ordering::Acquire) != number {
                return Err(Failure::failed(format!("{message}, and now another number is asked for")));
            }
            if Instant::now() >= deadline {
                return Err(Failure::failed(message));
            }
            std::thread::sleep(PLUG_POLL);
        }
    }

    /// A CPU was plugged in: brings it online unless the host wants fewer.
    ///
    /// # Errors
    /// What the kernel says.
    fn added(&self, folder: &Path, cpu: u32) -> io::Result<()> {
        let limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        let online = parse_list(&fs::read_to_string(folder.join("online"))?);
        // A request that waited for it may have been here first.
        if online.contains(&cpu) || limit.is_some_and(|limit| online.len() >= limit as usize) {
            return Ok(());
        }
        fs::write(switch_of(folder, cpu), "1")
    }

    /// A CPU was taken away. Once no more are left than the host wants there is nothing to hold back: the next is for use.
    fn removed(&self, folder: &Path) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(most), Ok(present)) = (*limit, list(folder, "present"))
            && present.len() <= most as usize
        {
            *limit = None;
        }
    }
}

fn switch_of(folder: &Path, cpu: u32) -> PathBuf {
    folder.join(format!("cpu{cpu}/online"))
}

/// CPUs that are present and, but for CPU 0, can be switched: a new one is present a little before it has its files.
fn switchable(folder: &Path) -> Result<Vec<u32>, Failure> {
    let mut present = list(folder, "present")?;
    present.retain(|cpu| *cpu == 0 || switch_of(folder, *cpu).exists());
    Ok(present)
}

fn list(folder: &Path, name: &str) -> Result<Vec<u32>, Failure> {
    let path = folder.join(name);
    let text = fs::read_to_string(&path)
        .map_err(|error| Failure::failed(format!("cannot read {}: {error}", path.display())))?;
    Ok(parse_list(&text))
}

fn switch(folder: &Path, cpu: u32, online: bool) -> Result<(), Failure> {
    let (value, verb) = if online { ("1", "online") } else { ("0", "offline") };
    fs::write(switch_of(folder, cpu), value)
        .map_err(|error| Failure::failed(format!("the kernel does not take CPU {cpu} {verb}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(present: &str, online: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("online"), online).unwrap();
        plug(&folder, present);
        folder
    }

    /// Whole or not at all, as the kernel's files are: a request that waits may look at any moment.
    fn appear(file: &Path, content: &str) {
        let hidden = file.with_extension("new");
        fs::write(&hidden, content).unwrap();
        fs::rename(hidden, file).unwrap();
    }

    fn plug(folder: &tempfile::TempDir, present: &str) {
        appear(&folder.path().join("present"), present);
        for cpu in parse_list(present).into_iter().filter(|cpu| *cpu > 0) {
            let file = switch_of(folder.path(), cpu);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            if !file.exists() {
                appear(&file, "untouched");
            }
        }
    }

    fn switches(folder: &tempfile::TempDir) -> Vec<String> {
        (1..4).map(|cpu| fs::read_to_string(switch_of(folder.path(), cpu)).unwrap()).collect()
    }

    #[test]
    fn only_what_differs_is_switched() {
        let folder = machine("0-3", "0,2-3");
        Cpus::new().set(folder.path(), 2, Duration::ZERO).unwrap();
        assert_eq!(switches(&folder), ["1", "0", "0"]);
        let folder = machine("0-3", "0-1");
        Cpus::new().set(folder.path(), 2, Duration::ZERO).unwrap();
        assert_eq!(switches(&folder), ["untouched", "untouched", "untouched"]);
    }

    #[test]
    fn more_than_present_is_an_error_with_both_numbers() {
        let folder = machine("0-3", "0");
        let error = Cpus::new().set(folder.path(), 6, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains('6') && error.contains('4'), "{error}");
        assert_eq!(switches(&folder), ["1", "1", "1"]);
    }

    #[test]
    fn a_request_waits_for_a_cpu_and_for_its_files() {
        let folder = machine("0", "0");
        let cpus = Cpus::new();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| cpus.set(folder.path(), 4, Duration::from_secs(30)));
            appear(&folder.path().join("present"), "0-3");
            plug(&folder, "0-3");
            asked.join().unwrap().unwrap();
        });
        assert_eq!(switches(&folder), ["1", "1", "1"]);
    }

    #[test]
    fn a_later_request_replaces_one_that_waits() {
        let folder = machine("0-3", "0-3");
        let cpus = Cpus::new();
        std::thread::scope(|scope| {
            let first = scope.spawn(|| cpus.set(folder.path(), 9, Duration::from_secs(30)));
            while cpus.asked.load(Ordering::Acquire) == 0 {
                std::thread::yield_now();
            }
            cpus.set(folder.path(), 1, Duration::ZERO).unwrap();
            let error = first.join().unwrap().unwrap_err().to_string();
            assert!(error.contains("another number"), "{error}");
        });
    }

    #[test]
    fn a_new_cpu_comes_online_unless_the_host_wants_fewer() {
        let folder = machine("0-3", "0");
        let cpus = Cpus::new();
        cpus.added(folder.path(), 1).unwrap();
        assert_eq!(switches(&folder), ["1", "untouched", "untouched"]);
        fs::write(folder.path().join("online"), "0-1").unwrap();
        cpus.set(folder.path(), 2, Duration::ZERO).unwrap();
        cpus.added(folder.path(), 3).unwrap();
        assert_eq!(switches(&folder), ["1", "untouched", "untouched"]);
        // Once the others are gone two is all that there are.
        plug(&folder, "0-1");
        cpus.removed(folder.path());
        cpus.added(folder.path(), 2).unwrap();
        assert_eq!(switches(&folder), ["1", "1", "untouched"]);
    }
}
