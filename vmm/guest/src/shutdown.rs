//! How this guest is shut down: by systemd where it runs, by ourselves as PID 1, by the init's own command otherwise.

use std::io;
use std::path::Path;
use std::process::Command;

use lathe_guest::protocol::ShutdownMode;

use crate::failure::Failure;
use crate::{children, sys};

/// Tells our own init to power off, as sysvinit and busybox understand it.
pub const SIGNAL_POWER_OFF: i32 = libc::SIGUSR2;
/// Tells our own init to reboot; the kernel sends it for Ctrl-Alt-Delete.
pub const SIGNAL_REBOOT: i32 = libc::SIGINT;

/// Who shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// This process is PID 1.
    Ourselves,
    /// `systemctl`.
    Systemd,
    /// The command `poweroff` or `reboot` of another init.
    Command,
}

/// Who shuts this guest down.
///
/// # Errors
/// `unsupported` when nobody is found.
pub fn way() -> Result<Way, Failure> {
    if std::process::id() == 1 {
        return Ok(Way::Ourselves);
    }
    // sd_booted(3)
    if Path::new("/run/systemd/system").is_dir() {
        return Ok(Way::Systemd);
    }
    if Path::new("/sbin/poweroff").exists() {
        return Ok(Way::Command);
    }
    Err(Failure::unsupported("neither systemd nor /sbin/poweroff is there to shut down".into()))
}

impl Way {
    /// Starts the shutdown; it goes on after this returns.
    ///
    /// # Errors
    /// When the command cannot be started.
    pub fn go(self, mode: ShutdownMode) -> io::Result<()> {
        let (verb, signal) = match mode {
            ShutdownMode::PowerOff => ("poweroff", SIGNAL_POWER_OFF),
            ShutdownMode::Reboot => ("reboot", SIGNAL_REBOOT),
        };
        let mut command = match self {
            Self::Ourselves => return sys::kill(1, signal),
            Self::Systemd => {
                let mut command = Command::new("systemctl");
                command.args(["--no-block", verb]);
                command
            }
            Self::Command => Command::new(format!("/sbin/{verb}")),
        };
        let child = children::spawn(&mut command)?;
        children::abandon(child.pid);
        Ok(())
    }
}
