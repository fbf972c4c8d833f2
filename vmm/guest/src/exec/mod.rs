//! Runs a command for the host, with three pipes or a terminal.
//!
//! The command leads its own session and process group, which ends with the connection. The environment is made here,
//! nothing of the agent's own reaches it. Users other than root are not looked up: the host is root's equal.

mod relay;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use lathe_guest::protocol::{Exec, Response, Tty};
use nix::fcntl::{OFlag, open};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;

use crate::children::{self, Child};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::sys;
use relay::{Relay, Streams};

/// Where programs are looked up, in the order of Debian's root.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs `exec` and relays its streams until it is over or the connection has gone.
///
/// # Errors
/// What the connection says; failures of the command itself are answered on the connection.
pub fn run(connection: &mut Connection, exec: &Exec) -> io::Result<()> {
    let (child, streams) = match start(exec) {
        Ok(started) => started,
        Err(failure) => return connection.send(&failure.response()),
    };
    if let Err(error) = connection.send(&Response::Started { pid: child.pid as u32 }) {
        relay::end(&child);
        return Err(error);
    }
    Relay::new(connection, child, streams)?.run()
}

fn start(exec: &Exec) -> Result<(Child, Streams), Failure> {
    let mut command = command(exec)?;
    let master = match &exec.tty {
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
        Some(tty) => Some(attach_terminal(&mut command, tty).map_err(|error| {
            Failure::failed(format!("cannot make a terminal (is /dev/pts mounted?): {error}"))
        })?),
    };
    sys::in_new_session(&mut command, master.is_some());
    let mut child = children::spawn(&mut command).map_err(|error| why_not_started(&exec.argv[0], &error))?;
    let streams = match master {
        Some(master) => Streams::terminal(OwnedFd::from(master)),
        None => Streams::pipes(&mut child),
    };
    streams.map(|streams| (child, streams)).map_err(|error| Failure::failed(error.to_string()))
}

fn command(exec: &Exec) -> Result<Command, Failure> {
    let Some(program) = exec.argv.first().filter(|program| !program.is_empty()) else {
        return Err(Failure::bad_request("no program is given".into()));
    };
    let mut command = Command::new(program);
    command.args(&exec.argv[1..]).env_clear();
    for (name, value) in [("PATH", PATH), ("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")] {
        command.env(name, value);
    }
    if let Some(tty) = &exec.tty {
        command.env("TERM", &tty.term);
    }
    for pair in &exec.env {
        let Some((name, value)) = pair.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(Failure::bad_request(format!("not of the form NAME=VALUE: {pair:?}")));
        };
        command.env(name, value);
    }
    let home = if Path::new("/root").is_dir() { "/root" } else { "/" };
    let folder = exec.cwd.as_deref().unwrap_or(home);
    if !Path::new(folder).is_dir() {
        return Err(Failure::not_found(format!("no folder {folder} to run in")));
    }
    command.current_dir(folder);
    Ok(command)
}

/// Gives the command a new terminal and returns its master. Both ends close on exec from the start: another session
/// that starts a command meanwhile must not inherit them, or the terminal would never hang up.
fn attach_terminal(command: &mut Command, tty: &Tty) -> io::Result<PtyMaster> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = File::from(open(ptsname_r(&master)?.as_str(), flags, Mode::empty())?);
    sys::set_window_size(&slave, tty.columns, tty.rows)?;
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
    Ok(master)
}

fn why_not_started(program: &str, error: &io::Error) -> Failure {
    let message = format!("cannot run {program}: {error}");
    match error.kind() {
        io::ErrorKind::NotFound => Failure::not_found(message),
        io::ErrorKind::PermissionDenied => Failure::not_permitted(message),
        io::ErrorKind::InvalidInput | io::ErrorKind::ArgumentListTooLong => Failure::bad_request(message),
        _ => Failure::failed(message),
    }
}
