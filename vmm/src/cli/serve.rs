//! `lathe-vmm serve`: takes the listening socket from systemd (sd_listen_fds(3)) or makes one, says READY, and serves.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use lathe_vmm::control::server::Server;
use lathe_vmm::monitor::Monitor;
use lathe_vmm::sandbox::Extra;

use super::{Failure, ServeOptions, Unlink, listen, outcome};

/// First descriptor that systemd passes.
const FIRST_PASSED: i32 = 3;

/// The socket of `NOTIFY_SOCKET` (sd_notify(3)), connected before anything is sandboxed.
pub struct Notifier(Option<UnixDatagram>);

impl Notifier {
    fn connect() -> io::Result<Self> {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(Self(None)) };
        let socket = UnixDatagram::unbound()?;
        match path.as_bytes().strip_prefix(b"@") {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt;
                socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?;
            }
            None => socket.connect(&path)?,
        }
        Ok(Self(Some(socket)))
    }

    fn say(&self, state: &str) {
        if let Some(socket) = &self.0 {
            // systemd times a unit out that never becomes ready; there is nobody else to tell.
            let _ = socket.send(state.as_bytes());
        }
    }
}

/// The listening socket that systemd passed to this very process, if it did.
fn passed_socket() -> Result<Option<OwnedFd>, Failure> {
    let number = |name: &str| std::env::var(name).ok().and_then(|v| v.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(None);
    }
    match number("LISTEN_FDS") {
        Some(1) => {}
        other => {
            let message = format!("systemd passed {} descriptors; one is needed", other.unwrap_or(0));
            return Err(Failure::new("control-socket", message));
        }
    }
    // SAFETY: fcntl on a descriptor number changes flags only; a closed one gives EBADF.
    let flagged = unsafe { libc::fcntl(FIRST_PASSED, libc::F_SETFD, libc::FD_CLOEXEC) };
    if flagged < 0 {
        return Err(Failure::new("control-socket", "descriptor 3, promised by LISTEN_FDS, is not open"));
    }
    // SAFETY: systemd passed descriptor 3 to this process, it is open, and nothing else here uses it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(FIRST_PASSED) }))
}

/// See the module.
pub fn serve(options: &ServeOptions) -> Result<(), Failure> {
    let host = |error: io::Error| Failure::new("host", error);
    let listener = match &options.control {
        Some(path) => listen(path)?,
        None => passed_socket()?.ok_or_else(|| {
            Failure::new("control-socket", "no control socket: systemd passed none")
                .fix("lathe-vmm serve --control /run/lathe-vmm.sock")
        })?,
    };
    let _unlink = Unlink(options.control.clone());
    let notifier = Notifier::connect().map_err(host)?;
    let extra = if options.control.is_some() { Extra::Unlink } else { Extra::None };
    let monitor = Monitor::new().map_err(host)?.sandboxed(extra);
    let server = Server::new(monitor, Some(listener)).map_err(host)?;
    notifier.say("READY=1\nSTATUS=waiting for a machine");
    let reason = server.run().map_err(host)?;
    notifier.say("STOPPING=1\nSTATUS=the machine is over");
    outcome(&reason)
}
