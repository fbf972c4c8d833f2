//! `lathe-vmm ask`: sends one command to a control socket and prints the reply, for people who look into things.

use std::io::{self, Write};
use std::os::fd::AsRawFd;

use lathe_vmm::control::wire::{Command, MAX_MESSAGE_BYTES, Message, Request, VERSION};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};

use super::{AskOptions, Failure};

/// See the module. Commands that need descriptors cannot be sent this way.
pub fn ask(options: &AskOptions) -> Result<(), Failure> {
    let failed = |e: nix::Error| Failure::new("control-socket", format!("{}: {}", options.control, e.desc()));
    let command: Command = serde_json::from_str(&options.command).map_err(|e| {
        Failure::new("usage", format!("{}: {e}", options.command)).fix("lathe-vmm ask PATH '{\"status\":{}}'")
    })?;
    let request = Request { v: VERSION, id: 1, command };
    let bytes = serde_json::to_vec(&request).map_err(|e| Failure::new("usage", e))?;
    let fd =
        socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
    UnixAddr::new(options.control.as_str())
        .and_then(|address| connect(fd.as_raw_fd(), &address))
        .map_err(failed)?;
    send(fd.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL).map_err(failed)?;
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    loop {
        let count = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(failed)?;
        if count == 0 {
            return Err(Failure::new("control-socket", "the monitor hung up"));
        }
        let message = serde_json::from_slice(&buffer[..count]).map_err(|e| Failure::new("bad-reply", e))?;
        if let Message::Reply(reply) = message {
            let text = serde_json::to_string(&reply.result?).map_err(|e| Failure::new("bad-reply", e))?;
            return writeln!(io::stdout(), "{text}").map_err(|e| Failure::new("output", e));
        }
    }
}
