//! Child processes, spawned and collected in one place.
//!
//! As PID 1 every orphan becomes ours and must be reaped, while a session waits for its own child: two waiters would
//! steal each other's results. So only [`reap`] waits, under the lock under which children are spawned, and keeps
//! what somebody will ask for. Nothing else in this crate may wait for a process.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{ChildStderr, ChildStdin, ChildStdout, Command};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::sys::{self, Ended};

/// Processes that somebody waits for; ended ones with their status. At most one per session.
static WATCHED: Mutex<Option<HashMap<i32, Option<Ended>>>> = Mutex::new(None);

/// A running child.
pub struct Child {
    /// Its process id, and its group's when it leads one.
    pub pid: i32,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
    /// What was piped.
    pub stdin: Option<ChildStdin>,
    /// What was piped.
    pub stdout: Option<ChildStdout>,
    /// What was piped.
    pub stderr: Option<ChildStderr>,
}

fn watched() -> MutexGuard<'static, Option<HashMap<i32, Option<Ended>>>> {
    // A panic while holding it leaves a map that is still whole.
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a process; the caller calls [`collect`] or [`abandon`] in the end.
///
/// # Errors
/// As fork(2) and execve(2).
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let mut guard = watched();
    let mut child = command.spawn()?;
    let pid = child.id() as i32;
    let pidfd = sys::pidfd_open(pid)?;
    guard.get_or_insert_default().insert(pid, None);
    drop(guard);
    // A command is no more precious than any other process, even if this agent is. Without /proc it stays as it is.
    let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), "0");
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    Ok(Child { pid, pidfd, stdin, stdout, stderr })
}

/// How the process ended, once; `None` while it runs.
pub fn collect(pid: i32) -> Option<Ended> {
    let mut guard = watched();
    let map = guard.get_or_insert_default();
    reap_into(map);
    let ended = map.get(&pid).copied().flatten();
    if ended.is_some() {
        map.remove(&pid);
    }
    ended
}

/// Nobody will ask for this process any more.
pub fn abandon(pid: i32) {
    watched().get_or_insert_default().remove(&pid);
}

/// Collects everything that has ended; true when no child is left.
pub fn reap() -> bool {
    reap_into(watched().get_or_insert_default())
}

fn reap_into(map: &mut HashMap<i32, Option<Ended>>) -> bool {
    loop {
        match sys::wait_any() {
            Ok(Some((pid, ended))) => {
                if let Some(slot) = map.get_mut(&pid) {
                    *slot = Some(ended);
                }
            }
            Ok(None) => return false,
            Err(error) => return error.raw_os_error() == Some(libc::ECHILD),
        }
    }
}
