//! `lathe-vmm ask`: sends one command to a control socket and prints the reply, for people who look into things.

use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use lathe_vmm::control::wire::{Command, MAX_MESSAGE_BYTES, Message, Request, VERSION};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, sendmsg, socket,
};

use super::run::{open, open_tap};
use super::{AskOptions, Failure};

/// Opens what goes along: a disk's file, or a queue of a tap.
fn open_fd(text: &str) -> Result<OwnedFd, Failure> {
    let file = match (text.strip_prefix("tap:"), text.strip_suffix(",ro")) {
        (Some(tap), _) => open_tap(tap)?,
        (None, Some(path)) => open("file", path, false)?,
        (None, None) => open("file", text, true)?,
    };
    Ok(file.into())
}

/// See the module.
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
    let along = options.fds.iter().map(|text| open_fd(text)).collect::<Result<Vec<_>, _>>()?;
    let numbers: Vec<RawFd> = along.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let rights = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let packet = [IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(fd.as_raw_fd(), &packet, rights, MsgFlags::MSG_NOSIGNAL, None).map_err(failed)?;
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
