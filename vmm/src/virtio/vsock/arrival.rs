//! Connections that the guest makes: a stream socket travels to whoever serves the port.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::connection::Ports;
use crate::control::wire::VsockArrival;

/// Why a connection was not taken.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Nobody holds the other end any more.
    Gone,
    /// Too many arrivals wait there, or there are no more descriptors.
    Busy,
}

/// Sends one end of a new stream over `socket` with a [`VsockArrival`]; returns ours, non-blocking.
///
/// # Errors
/// When nobody takes it.
pub fn announce(socket: &OwnedFd, ports: Ports) -> Result<UnixStream, Refused> {
    let (ours, theirs) = UnixStream::pair().map_err(|_| Refused::Busy)?;
    ours.set_nonblocking(true).map_err(|_| Refused::Busy)?;
    let arrival = VsockArrival { port: ports.host, guest_port: ports.guest };
    let text = serde_json::to_vec(&arrival).map_err(|_| Refused::Busy)?;
    let descriptors = [theirs.as_raw_fd()];
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[std::io::IoSlice::new(&text)],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
        None,
    );
    match sent {
        Ok(_) => Ok(ours),
        Err(Errno::EPIPE | Errno::ECONNREFUSED | Errno::ECONNRESET | Errno::ENOTCONN) => Err(Refused::Gone),
        Err(_) => Err(Refused::Busy),
    }
}
