//! Monitors as our own child processes, where there is no systemd: containers, tests.
//!
//! Same path but for the start: the control socket is bound here and handed in as descriptor 3 with `LISTEN_FDS=1`, as systemd does
//! (sd_listen_fds(3)). A process has its own group and no tie to lathed's life, so it survives it and is found again by its pid file and start time.
//! `LISTEN_PID` must name the process itself and only the process knows its pid, hence the one line of shell, which becomes the monitor by `exec`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use lathe_cgroup::{MachineTree, Owner};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use tokio::process::{Child, Command};

use super::{Launched, Launcher, Pending};
use crate::machines::life::{End, EndKind};
use crate::problem::Problem;

/// Becomes the monitor, with standard input as descriptor 3.
const BECOME: &str = "exec 3<&0 </dev/null; export LISTEN_FDS=1 LISTEN_PID=$$; exec \"$0\" \"$@\"";
/// Between two looks whether a process that is not our child has gone.
const POLL: Duration = Duration::from_millis(20);
/// How long a killed process may take to go.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);

/// Starts monitors as children.
pub struct DirectLauncher {
    monitor: PathBuf,
    sockets: PathBuf,
    cgroup: Option<PathBuf>,
    children: Mutex<HashMap<String, Child>>,
    ends: Mutex<HashMap<String, ExitStatus>>,
}

impl DirectLauncher {
    /// Starts `monitor`; control sockets and pid files are in `sockets`, cgroups below `cgroup` if there is one.
    pub fn new(monitor: PathBuf, sockets: PathBuf, cgroup: Option<PathBuf>) -> Self {
        Self {
            monitor,
            sockets,
            cgroup,
            children: Mutex::new(HashMap::new()),
            ends: Mutex::new(HashMap::new()),
        }
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(format!("{name}.sock"))
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.sockets.join(format!("{name}.pid"))
    }

    fn unit_cgroup(&self, name: &str) -> Option<PathBuf> {
        self.cgroup.as_ref().map(|folder| folder.join(format!("lathe-vm@{name}.service")))
    }

    fn spawn(&self, name: &str) -> io::Result<(Child, u32)> {
        fs::create_dir_all(&self.sockets)?;
        let listener = bind(&self.socket(name))?;
        let log = fs::File::create(self.sockets.join(format!("{name}.log")))?;
        let child = Command::new("/bin/sh")
            .args(["-c", BECOME])
            .arg(&self.monitor)
            .arg("serve")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::from(listener))
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("it ended at once"))?;
        let started = start_time(pid).ok_or_else(|| io::Error::other("it ended at once"))?;
        write_durably(&self.pid_file(name), &format!("{pid} {started}\n"))?;
        Ok((child, pid))
    }

    fn place(&self, name: &str, pid: u32) -> Result<Option<MachineTree>, Problem> {
        let Some(folder) = self.unit_cgroup(name) else { return Ok(None) };
        let failed = |cause: &dyn std::fmt::Display| {
            Problem::internal(format!("cannot make the cgroups of machine {name}"), cause)
        };
        match fs::create_dir(&folder) {
            Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => return Err(failed(&cause)),
            _ => {}
        }
        fs::write(folder.join("cgroup.procs"), pid.to_string()).map_err(|cause| failed(&cause))?;
        let owner = Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        MachineTree::prepare(&folder, pid, owner).map(Some).map_err(|cause| failed(&cause))
    }

    /// The living monitor of `name`, if its pid file names one.
    fn living(&self, name: &str) -> Option<u32> {
        let text = fs::read_to_string(self.pid_file(name)).ok()?;
        let (pid, started) = text.trim().split_once(' ')?;
        let pid = pid.parse().ok()?;
        (start_time(pid)? == started.parse::<u64>().ok()?).then_some(pid)
    }

    async fn kill(&self, name: &str, pid: u32) -> Result<(), Problem> {
        let failed = |cause: &dyn std::fmt::Display| {
            Problem::internal(format!("cannot end the monitor of machine {name} (process {pid})"), cause)
        };
        let raw = i32::try_from(pid).map_err(|cause| failed(&cause))?;
        match kill(Pid::from_raw(raw), Signal::SIGKILL) {
            Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
            Err(cause) => return Err(failed(&cause)),
        }
        let gone = async {
            loop {
                self.reap(name);
                if self.living(name) != Some(pid) {
                    break;
                }
                tokio::time::sleep(POLL).await;
            }
        };
        tokio::time::timeout(KILL_TIMEOUT, gone).await.map_err(|_| failed(&"it does not go"))
    }

    /// Keeps the exit status of a child that has ended, so that no zombie looks alive.
    fn reap(&self, name: &str) {
        let mut children = self.children.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(child) = children.get_mut(name)
            && let Ok(Some(status)) = child.try_wait()
        {
            children.remove(name);
            self.ends
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .insert(name.to_owned(), status);
        }
    }
}

/// A listening control socket, for its owner only.
fn bind(path: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => return Err(cause),
        _ => {}
    }
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    rustix::net::listen(&socket, 8)?;
    Ok(socket)
}

fn write_durably(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("pid.new");
    fs::write(&new, text)?;
    fs::rename(&new, path)
}

/// Field 22 of `/proc/PID/stat` (proc_pid_stat(5)): with the pid it names a process for ever. `None` for a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command in parentheses may hold anything, also parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn end_of(status: ExitStatus) -> End {
    match (status.code(), status.signal()) {
        (Some(0), _) => End { kind: EndKind::PowerOff, reason: "its monitor ended in order".to_owned() },
        (Some(code), _) => {
            End { kind: EndKind::Failure, reason: format!("monitor ended with status {code}") }
        }
        (None, signal) => {
            let reason = format!("monitor killed by signal {}", signal.unwrap_or(0));
            End { kind: EndKind::Failure, reason }
        }
    }
}

impl Launcher for DirectLauncher {
    fn kind(&self) -> &'static str {
        "direct"
    }

    fn launch<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Launched, Problem>> {
        Box::pin(async move {
            let what = || format!("cannot start {} for machine {name}", self.monitor.display());
            let (child, pid) = self.spawn(name).map_err(|cause| Problem::internal(what(), cause))?;
            let lock = std::sync::PoisonError::into_inner;
            self.children.lock().unwrap_or_else(lock).insert(name.to_owned(), child);
            let tree = self.place(name, pid)?;
            Ok(Launched { socket: self.socket(name), pid: Some(pid), unit: String::new(), tree })
        })
    }

    fn find<'a>(&'a self, name: &'a str) -> Pending<'a, Result<Option<Launched>, Problem>> {
        Box::pin(async move {
            self.reap(name);
            let Some(pid) = self.living(name) else { return Ok(None) };
            let tree = self.unit_cgroup(name).map(|folder| MachineTree::open(&folder)).transpose();
            let tree =
                tree.map_err(|cause| Problem::internal(format!("the cgroups of machine {name}"), cause))?;
            Ok(Some(Launched { socket: self.socket(name), pid: Some(pid), unit: String::new(), tree }))
        })
    }

    fn how_it_ended<'a>(&'a self, name: &'a str) -> Pending<'a, End> {
        Box::pin(async move {
            let wait = async {
                while self.living(name).is_some() {
                    self.reap(name);
                    tokio::time::sleep(POLL).await;
                }
            };
            // A monitor that hung up but lives on is ended by whoever asked.
            let _ = tokio::time::timeout(Duration::from_secs(1), wait).await;
            self.reap(name);
            let ends = self.ends.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            ends.get(name).map_or_else(
                || End { kind: EndKind::Failure, reason: "its monitor is gone".to_owned() },
                |status| end_of(*status),
            )
        })
    }

    fn end<'a>(&'a self, name: &'a str) -> Pending<'a, Result<(), Problem>> {
        Box::pin(async move {
            self.reap(name);
            if let Some(pid) = self.living(name) {
                self.kill(name, pid).await?;
            }
            self.reap(name);
            if let Some(folder) = self.unit_cgroup(name)
                && let Ok(tree) = MachineTree::open(&folder)
            {
                let removed = tree.kill().and_then(|()| tree.remove());
                removed
                    .map_err(|cause| Problem::internal(format!("the cgroups of machine {name}"), cause))?;
            }
            for path in [self.socket(name), self.pid_file(name), self.sockets.join(format!("{name}.log"))] {
                match fs::remove_file(&path) {
                    Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                        return Err(Problem::internal(format!("cannot remove {}", path.display()), cause));
                    }
                    _ => {}
                }
            }
            self.ends.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(name);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor that only shows how it was started.
    fn monitor(folder: &Path, script: &str) -> PathBuf {
        let path = folder.join("monitor");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_monitor_is_started_with_its_socket_found_again_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let show = format!(
            "readlink /proc/self/fd/3 >{0}/out.new; echo $LISTEN_FDS $LISTEN_PID $$ $1 >>{0}/out.new; mv {0}/out.new {0}/out; exec sleep 1000",
            folder.path().display()
        );
        let program = monitor(folder.path(), &show);
        let launcher = DirectLauncher::new(program.clone(), folder.path().join("vm"), None);
        let launched = launcher.launch("demo").await.unwrap();
        let pid = launched.pid.unwrap();
        let out = folder.path().join("out");
        while !out.exists() {
            tokio::task::yield_now().await;
        }
        let text = fs::read_to_string(out).unwrap();
        assert!(text.starts_with("socket:["), "{text}");
        assert!(text.ends_with(&format!("1 {pid} {pid} serve\n")), "{text}");
        // Another lathed finds it, as it does after a restart, and ends it.
        let second = DirectLauncher::new(program, folder.path().join("vm"), None);
        assert_eq!(second.find("demo").await.unwrap().unwrap().pid, Some(pid));
        kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
        assert_eq!(launcher.how_it_ended("demo").await.reason, "monitor killed by signal 9");
        assert!(second.find("demo").await.unwrap().is_none());
        second.end("demo").await.unwrap();
        second.end("demo").await.unwrap();
        assert_eq!(fs::read_dir(folder.path().join("vm")).unwrap().count(), 0, "nothing is left");
    }

    #[tokio::test]
    async fn a_living_monitor_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let program = monitor(folder.path(), "exec sleep 1000");
        let launcher = DirectLauncher::new(program, folder.path().join("vm"), None);
        let pid = launcher.launch("demo").await.unwrap().pid.unwrap();
        launcher.end("demo").await.unwrap();
        assert_eq!(start_time(pid), None);
    }

    #[test]
    fn a_pid_that_was_given_to_another_process_is_not_ours() {
        let folder = tempfile::tempdir().unwrap();
        let launcher = DirectLauncher::new("x".into(), folder.path().to_owned(), None);
        let own = std::process::id();
        fs::write(folder.path().join("demo.pid"), format!("{own} {}\n", start_time(own).unwrap())).unwrap();
        assert_eq!(launcher.living("demo"), Some(own));
        fs::write(folder.path().join("demo.pid"), format!("{own} 1\n")).unwrap();
        assert_eq!(launcher.living("demo"), None);
    }
}
