//! `lathed helper …`: what systemd's units run.
//!
//! `helper cgroup NAME` is root's part of starting a machine: it makes the machine's cgroups and gives them to lathed's user,
//! and of the cgroups above them the few files that say how machines stand against each other.
//! `helper power-off` is the net below lathed at shutdown: it presses the power button of every machine that still runs, and waits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use lathe_cgroup::{MachineTree, Owner};
use lathe_vmm::control::wire::{Command, Phase};
use nix::unistd::User;
use tokio::task::JoinSet;

use crate::api::answer::check_name;
use crate::config::Config;
use crate::machines::SLICE;
use crate::monitor::{Monitor, Notice};
use crate::problem::{Kind, Problem};

/// The account that machines' cgroups are given to.
const ACCOUNT: &str = "lathe";
/// How long a monitor may take to say hello at shutdown.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause between two presses of the power button: a guest that just starts does not watch it yet.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// Most machines of a host.
const MAX_MACHINES: usize = 4096;

/// Makes the cgroups of machine `name`, whose monitor is process `main_pid`.
///
/// # Errors
/// `bad-name`, `internal`.
pub fn cgroup(name: &str, main_pid: Option<&str>) -> Result<(), Problem> {
    check_name(name)?;
    let pid: Option<u32> = main_pid.and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 1);
    let pid = pid.ok_or_else(|| {
        Problem::internal("helper cgroup", "MAINPID is not set: systemd runs this, nobody else")
    })?;
    let table = fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .map_err(|error| Problem::internal(format!("process {pid}"), error))?;
    let unit = unit_cgroup(&table, name)?;
    let account = User::from_name(ACCOUNT).ok().flatten();
    let account = account.ok_or_else(|| {
        Problem::internal("helper cgroup", format!("there is no user {ACCOUNT}"))
            .fix("sudo systemd-sysusers lathe.conf")
    })?;
    let owner = Owner { uid: account.uid.as_raw(), gid: account.gid.as_raw() };
    let failed = |error| Problem::internal(format!("cgroups of {name}"), error);
    MachineTree::prepare(&unit, pid, owner).map_err(failed)?;
    // An administrator who puts machines into another slice keeps that slice.
    if let Some(slice) = unit.parent().filter(|slice| slice.ends_with(SLICE)) {
        MachineTree::prepare_slice(slice, owner).map_err(failed)?;
    }
    Ok(())
}

/// The cgroup of machine `name`'s unit, from a process's `/proc/PID/cgroup` (cgroups(7)).
fn unit_cgroup(table: &str, name: &str) -> Result<PathBuf, Problem> {
    let path = table.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.ok_or_else(|| Problem::internal("helper cgroup", "this host has no cgroup v2"))?;
    let unit = format!("lathe-vm@{name}.service");
    let parts: Vec<&str> = path.split('/').collect();
    match parts.iter().position(|part| *part == unit) {
        Some(at) if !parts.contains(&"..") => Ok(Path::new("/sys/fs/cgroup").join(parts[..=at].join("/"))),
        _ => Err(Problem::internal("helper cgroup", format!("the monitor runs in /{path}, not in {unit}"))),
    }
}

/// Presses every machine's power button and waits until all are off, or the configured time is over. Says how many there were.
///
/// # Errors
/// `internal` when the folder of sockets cannot be read; a machine that does not answer is said and left to systemd.
pub async fn power_off(config: &Config) -> Result<usize, Problem> {
    let folder = config.host.runtime_dir.join("vm");
    let timeout = Duration::from_secs(config.machines.shutdown_timeout_sec.into());
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Problem::internal(folder.display(), error)),
    };
    let sockets = entries.filter_map(Result::ok).map(|entry| entry.path());
    let sockets = sockets
        .filter(|path| path.extension().is_some_and(|extension| extension == "sock"))
        .take(MAX_MACHINES);
    let mut waiting: JoinSet<bool> = sockets.map(|path| power_off_one(path, timeout)).collect();
    let mut machines = 0;
    while let Some(result) = waiting.join_next().await {
        machines += usize::from(result.unwrap_or(false));
    }
    Ok(machines)
}

/// One machine; whether it ran.
async fn power_off_one(path: PathBuf, timeout: Duration) -> bool {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    match tokio::time::timeout(timeout, press_and_wait(&path)).await {
        Ok(Ok(ran)) => ran,
        Ok(Err(problem)) => {
            eprintln!("{name}: {problem}");
            false
        }
        Err(_) => {
            eprintln!("{name} did not power off within {} s; its power is cut", timeout.as_secs());
            true
        }
    }
}

async fn press_and_wait(path: &Path) -> Result<bool, Problem> {
    let failed = |error| Problem::new(Kind::Internal, "internal", format!("{error}"));
    let Ok((monitor, mut notices)) = Monitor::connect(path) else { return Ok(false) };
    // A socket of a machine that does not run accepts, too, and systemd starts nothing any more: nobody says hello.
    let Ok(Ok(phase)) = tokio::time::timeout(HELLO_TIMEOUT, monitor.hello()).await else { return Ok(false) };
    match phase {
        Phase::Running => monitor.tell(Command::PowerButton {}).await.map_err(failed)?,
        Phase::Paused => {
            monitor.tell(Command::Resume {}).await.map_err(failed)?;
            monitor.tell(Command::PowerButton {}).await.map_err(failed)?;
        }
        _ => return Ok(false),
    }
    loop {
        match tokio::time::timeout(PRESS_AGAIN, notices.recv()).await {
            Ok(None | Some(Notice::Gone)) => return Ok(true),
            Ok(Some(_)) => {}
            // It may have ended just now, which is the next notice.
            Err(_) => drop(monitor.tell(Command::PowerButton {}).await),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_units_cgroup_is_found_wherever_the_monitor_is_in_it() {
        let unit = Path::new("/sys/fs/cgroup/lathe.slice/lathe-vm@web-1.service");
        for path in ["lathe.slice/lathe-vm@web-1.service", "lathe.slice/lathe-vm@web-1.service/machine/vmm"] {
            assert_eq!(unit_cgroup(&format!("1:name=x:/\n0::/{path}\n"), "web-1").unwrap(), unit);
        }
    }

    #[test]
    fn another_machines_cgroup_is_not_touched() {
        for table in [
            "0::/lathe.slice/lathe-vm@db.service\n",
            "0::/user.slice\n",
            "1:cpu:/lathe-vm@web.service\n",
            "",
            "0::/../lathe-vm@web.service\n",
        ] {
            assert!(unit_cgroup(table, "web").is_err(), "{table}");
        }
        assert_eq!(cgroup("../web", Some("1234")).unwrap_err().code, "bad-name");
        assert!(
            cgroup("web", None).is_err()
                && cgroup("web", Some("1")).is_err()
                && cgroup("web", Some("x")).is_err()
        );
    }

    #[tokio::test]
    async fn without_machines_there_is_nothing_to_power_off() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.host.runtime_dir = dir.path().to_owned();
        assert_eq!(power_off(&config).await, Ok(0));
    }
}
