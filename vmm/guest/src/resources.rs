//! CPUs and memory blocks brought online and offline through sysfs.
//!
//! Documentation/admin-guide/cputopology.rst, cpu-hotplug.rst and mm/memory-hotplug.rst of the kernel. The guest
//! only follows here: what the host has taken away it has taken away already.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::failure::Failure;

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// A CPU that the host has just plugged in shows up within this time.
const PLUG_TIMEOUT: Duration = Duration::from_secs(2);
const PLUG_POLL: Duration = Duration::from_millis(5);
/// Largest CPU number that is taken seriously (CONFIG_NR_CPUS of the largest kernels).
const MAX_CPU: u32 = 8192;

/// Numbers of a list as the kernel prints them: `0-3,5`.
pub fn parse_list(text: &str) -> Vec<u32> {
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            numbers.extend(first..=last.min(MAX_CPU));
        }
    }
    numbers
}

/// Brings the first `online` present CPUs online and the others offline.
///
/// # Errors
/// `bad-request` for 0, `failed` when fewer are present or the kernel refuses; then as many as went.
pub fn cpus(online: u32) -> Result<(), Failure> {
    if online == 0 {
        return Err(Failure::bad_request("at least one CPU must be online".into()));
    }
    cpus_in(Path::new(CPUS), online, PLUG_TIMEOUT)
}

fn cpus_in(folder: &Path, online: u32, timeout: Duration) -> Result<(), Failure> {
    let deadline = Instant::now() + timeout;
    let present = loop {
        let present = list(folder, "present")?;
        if present.len() >= online as usize || Instant::now() >= deadline {
            break present;
        }
        std::thread::sleep(PLUG_POLL);
    };
    let (on, off) = present.split_at(present.len().min(online as usize));
    let now_online = list(folder, "online")?;
    let now_online = |cpu: &u32| now_online.contains(cpu);
    for cpu in on.iter().filter(|cpu| !now_online(cpu)) {
        switch(folder, *cpu, "1")?;
    }
    for cpu in off.iter().rev().filter(|cpu| now_online(cpu)) {
        switch(folder, *cpu, "0")?;
    }
    if on.len() < online as usize {
        return Err(Failure::failed(format!("{online} CPUs are asked for, {} are present", on.len())));
    }
    Ok(())
}

fn list(folder: &Path, name: &str) -> Result<Vec<u32>, Failure> {
    let path = folder.join(name);
    let text = fs::read_to_string(&path)
        .map_err(|error| Failure::failed(format!("cannot read {}: {error}", path.display())))?;
    Ok(parse_list(&text))
}

fn switch(folder: &Path, cpu: u32, value: &str) -> Result<(), Failure> {
    let path = folder.join(format!("cpu{cpu}/online"));
    let verb = if value == "1" { "online" } else { "offline" };
    fs::write(&path, value)
        .map_err(|error| Failure::failed(format!("the kernel does not take CPU {cpu} {verb}: {error}")))
}

/// Brings every offline memory block online, movable where the kernel agrees, so that it can be taken back.
///
/// # Errors
/// `unsupported` without memory hotplug; `failed` with the number of blocks that stayed offline.
pub fn memory_online() -> Result<(), Failure> {
    memory_online_in(Path::new(MEMORY))
}

fn memory_online_in(folder: &Path) -> Result<(), Failure> {
    let entries = fs::read_dir(folder)
        .map_err(|error| Failure::unsupported(format!("no memory hotplug in this kernel: {error}")))?;
    let (mut refused, mut last) = (0, None);
    for entry in entries.flatten() {
        let state = entry.path().join("state");
        if !entry.file_name().to_string_lossy().starts_with("memory")
            || !fs::read_to_string(&state).is_ok_and(|state| state.trim() == "offline")
        {
            continue;
        }
        let switched = fs::write(&state, "online_movable").or_else(|_| fs::write(&state, "online"));
        if let Err(error) = switched {
            refused += 1;
            last = Some(error);
        }
    }
    match last {
        None => Ok(()),
        Some(error) => Err(Failure::failed(format!("{refused} memory blocks stayed offline: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_prints_them() {
        assert_eq!(parse_list("0-3,5\n"), [0, 1, 2, 3, 5]);
        assert_eq!(parse_list("0\n"), [0]);
        assert_eq!(parse_list("\n"), [0; 0]);
        assert_eq!(parse_list("3-1,x,4-"), [0; 0]);
        assert!(parse_list("0-4294967295").len() <= MAX_CPU as usize + 1);
    }

    fn machine(present: &str, online: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("present"), present).unwrap();
        fs::write(folder.path().join("online"), online).unwrap();
        for cpu in parse_list(present).into_iter().filter(|cpu| *cpu > 0) {
            fs::create_dir(folder.path().join(format!("cpu{cpu}"))).unwrap();
            fs::write(folder.path().join(format!("cpu{cpu}/online")), "untouched").unwrap();
        }
        folder
    }

    fn switches(folder: &tempfile::TempDir) -> Vec<String> {
        (1..4)
            .map(|cpu| fs::read_to_string(folder.path().join(format!("cpu{cpu}/online"))).unwrap())
            .collect()
    }

    #[test]
    fn only_what_differs_is_switched() {
        let folder = machine("0-3", "0,2-3");
        cpus_in(folder.path(), 2, Duration::ZERO).unwrap();
        assert_eq!(switches(&folder), ["1", "0", "0"]);
        let folder = machine("0-3", "0-1");
        cpus_in(folder.path(), 2, Duration::ZERO).unwrap();
        assert_eq!(switches(&folder), ["untouched", "untouched", "untouched"]);
    }

    #[test]
    fn more_than_present_is_an_error_with_both_numbers() {
        let folder = machine("0-3", "0");
        let error = cpus_in(folder.path(), 6, Duration::ZERO).unwrap_err().to_string();
        assert!(error.contains('6') && error.contains('4'), "{error}");
        assert_eq!(switches(&folder), ["1", "1", "1"]);
    }

    #[test]
    fn offline_blocks_come_online_movable() {
        let folder = tempfile::tempdir().unwrap();
        for (name, state) in [("memory0", "online\n"), ("memory32", "offline\n"), ("power", "offline\n")] {
            fs::create_dir(folder.path().join(name)).unwrap();
            fs::write(folder.path().join(name).join("state"), state).unwrap();
        }
        memory_online_in(folder.path()).unwrap();
        let state = |name: &str| fs::read_to_string(folder.path().join(name).join("state")).unwrap();
        assert_eq!((state("memory0").as_str(), state("memory32").as_str()), ("online\n", "online_movable"));
        assert_eq!(state("power"), "offline\n");
    }
}
