//! Serves the control socket: connections, one packet per message, descriptors, events to everybody.
//!
//! ```text
//! poll(2): listener · clients · notices of the machine · signals
//! ```
//!
//! Nothing here blocks but poll: what a client does not take is kept up to a bound, and then the client is dropped. All descriptors
//! that arrive are close-on-exec; those that no command takes are closed.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{MsgFlags, send};
use serde::Deserialize;

use super::wire::{
    Answer, Command, Event, ExitReason, MAX_CLIENTS, MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS, Message,
    OLDEST_VERSION, Phase, Refusal, Reply, Request, VERSION,
};
use crate::monitor::Monitor;

/// Messages kept for a client that does not read.
const OUTBOX: usize = 64;
/// How long clients have to take the last events before the process ends.
const FAREWELL: Duration = Duration::from_secs(1);
/// Requests taken from one client before the others get their turn.
const REQUESTS_PER_TURN: usize = 16;
/// Most descriptors that the kernel delivers at once (`SCM_MAX_FD`).
const SCM_MAX_FD: usize = 253;

/// What one receive gave.
pub(crate) enum Received {
    /// A message with its descriptors.
    Message(Vec<u8>, Vec<OwnedFd>),
    /// Too long, too many descriptors, or descriptors were lost.
    Broken(String),
    /// Nothing there now.
    Nothing,
    /// The client is gone.
    Closed,
}

struct Client {
    socket: OwnedFd,
    outbox: VecDeque<Vec<u8>>,
    gone: bool,
}

impl Client {
    fn queue(&mut self, message: &Message) {
        if self.outbox.len() >= OUTBOX {
            self.gone = true;
        }
        if !self.gone {
            self.outbox.push_back(encode(message));
            self.flush();
        }
    }

    fn flush(&mut self) {
        while let Some(front) = self.outbox.front() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.socket.as_raw_fd(), front, flags) {
                Ok(_) => drop(self.outbox.pop_front()),
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                Err(_) => {
                    self.gone = true;
                    return;
                }
            }
        }
    }
}

/// Encodes a message, cutting until it fits: of a console's text the older half, of a refusal, which may repeat what was asked, the
/// latter.
pub(crate) fn encode(message: &Message) -> Vec<u8> {
    let mut message = message.clone();
    loop {
        let bytes = serde_json::to_vec(&message).unwrap_or_default();
        if bytes.len() <= MAX_MESSAGE_BYTES {
            return bytes;
        }
        match &mut message {
            Message::Reply(Reply { result: Ok(Answer::Console { text }), .. }) if !text.is_empty() => {
                let keep = (text.len().div_ceil(2)..).find(|at| text.is_char_boundary(*at));
                text.drain(..keep.unwrap_or(text.len()));
            }
            Message::Reply(Reply { result: Err(Refusal { message, .. }), .. }) if !message.is_empty() => {
                let keep = (0..=message.len() / 2).rev().find(|at| message.is_char_boundary(*at));
                message.truncate(keep.unwrap_or(0));
            }
            _ => return bytes,
        }
    }
}

/// Room for a control message, aligned as the kernel wants it.
#[repr(align(8))]
struct ControlBuffer([u8; 16 + 4 * SCM_MAX_FD + 8]);

pub(crate) fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> Received {
    let mut control = ControlBuffer([0; 16 + 4 * SCM_MAX_FD + 8]);
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: an all-zero msghdr is valid.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = control.0.len();
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: the header points to live buffers of the lengths it states.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) };
    let fds = take_fds(&header);
    match count {
        0 => Received::Closed,
        1.. if header.msg_flags & libc::MSG_TRUNC != 0 => {
            Received::Broken(format!("a message is longer than {MAX_MESSAGE_BYTES} bytes"))
        }
        1.. if header.msg_flags & libc::MSG_CTRUNC != 0 => {
            Received::Broken("descriptors were lost on the way: the process has no room for more".to_owned())
        }
        1.. if fds.len() > MAX_MESSAGE_FDS => {
            Received::Broken(format!("{} descriptors came at once; at most {MAX_MESSAGE_FDS} may", fds.len()))
        }
        1.. => Received::Message(buffer[..count as usize].to_vec(), fds),
        _ => match Errno::last() {
            Errno::EAGAIN | Errno::EINTR => Received::Nothing,
            _ => Received::Closed,
        },
    }
}

/// Owns every descriptor that came, whatever else is wrong with the message.
fn take_fds(header: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the header and its control buffer are as recvmsg(2) left them.
    let mut cmsg = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !cmsg.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR give pointers to complete headers inside of the control buffer.
        let found = unsafe { &*cmsg };
        if found.cmsg_level == libc::SOL_SOCKET && found.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: no memory is accessed.
            let head = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = (found.cmsg_len as usize).saturating_sub(head) / size_of::<i32>();
            // SAFETY: the data of this message follow its header.
            let data = unsafe { libc::CMSG_DATA(cmsg) }.cast::<i32>();
            for index in 0..count {
                // SAFETY: `index` is below the number of descriptors that fit into cmsg_len.
                let place = unsafe { data.add(index) };
                // SAFETY: the kernel wrote a descriptor there; the place may be unaligned.
                let raw = unsafe { place.read_unaligned() };
                // SAFETY: the kernel has just installed this descriptor for us; nobody else knows it.
                fds.push(unsafe { OwnedFd::from_raw_fd(raw) });
            }
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        cmsg = unsafe { libc::CMSG_NXTHDR(header, cmsg) };
    }
    fds
}

/// What every version of a request has.
#[derive(Deserialize)]
struct Envelope {
    v: u32,
    #[serde(default)]
    id: u64,
}

fn bad_request(message: impl Into<String>) -> Refusal {
    Refusal { code: "bad-request".to_owned(), message: message.into() }
}

/// Reads a request: its id, and the command or why there is none.
pub(crate) fn parse(bytes: &[u8]) -> (u64, Result<Command, Refusal>) {
    let envelope: Envelope = match serde_json::from_slice(bytes) {
        Ok(envelope) => envelope,
        Err(error) => return (0, Err(bad_request(format!("not a request: {error}")))),
    };
    if !(OLDEST_VERSION..=VERSION).contains(&envelope.v) {
        let message =
            format!("protocol version {}; this monitor speaks {OLDEST_VERSION} to {VERSION}", envelope.v);
        return (envelope.id, Err(Refusal { code: "unsupported-version".to_owned(), message }));
    }
    let request = serde_json::from_slice::<Request>(bytes);
    (envelope.id, request.map(|r| r.command).map_err(|e| bad_request(e.to_string())))
}

/// See the module.
pub struct Server {
    monitor: Monitor,
    listener: Option<OwnedFd>,
    clients: Vec<Client>,
    signals: SignalFd,
    buffer: Vec<u8>,
    /// Told of every event, whether or not there are clients.
    tell: fn(&Event),
}

impl Server {
    /// Serves `monitor` on `listener`, a listening `SOCK_SEQPACKET` socket, if there is one. SIGTERM and SIGINT are blocked from
    /// now on and end the machine.
    ///
    /// # Errors
    /// When signals cannot be taken over.
    pub fn new(monitor: Monitor, listener: Option<OwnedFd>) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGTERM);
        mask.add(Signal::SIGINT);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let buffer = vec![0; MAX_MESSAGE_BYTES];
        Ok(Self { monitor, listener, clients: Vec::new(), signals, buffer, tell: |_| {} })
    }

    /// Calls `tell` with every event before clients hear of it.
    #[must_use]
    pub fn telling(self, tell: fn(&Event)) -> Self {
        Self { tell, ..self }
    }

    /// Carries a command out as if a client had sent it.
    ///
    /// # Errors
    /// Why not.
    pub fn execute(&mut self, command: Command, fds: Vec<OwnedFd>) -> Result<Answer, Refusal> {
        self.monitor.execute(command, fds)
    }

    /// Serves until the machine is over.
    ///
    /// # Errors
    /// When poll(2) fails.
    pub fn run(mut self) -> io::Result<ExitReason> {
        loop {
            self.publish();
            if let (Phase::Ended, Some(reason)) = (self.monitor.phase(), self.monitor.exit().cloned()) {
                self.farewell();
                return Ok(reason);
            }
            // Rounded up: a wait that ends too early would be one for nothing.
            let due = self.monitor.notices().due().map(|due| due + Duration::from_millis(1));
            self.wait(due.map_or(PollTimeout::NONE, |due| due.try_into().unwrap_or(PollTimeout::MAX)))?;
        }
    }

    fn publish(&mut self) {
        for event in self.monitor.take_events() {
            (self.tell)(&event);
            let message = Message::Event(event);
            self.clients.iter_mut().for_each(|client| client.queue(&message));
        }
        self.clients.retain(|client| !client.gone);
    }

    /// Gives clients a moment to take what is left.
    fn farewell(&mut self) {
        let deadline = Instant::now() + FAREWELL;
        while self.clients.iter().any(|c| !c.outbox.is_empty() && !c.gone) && Instant::now() < deadline {
            let mut polled: Vec<PollFd<'_>> =
                self.clients.iter().map(|c| PollFd::new(c.socket.as_fd(), PollFlags::POLLOUT)).collect();
            if poll(&mut polled, 100u16).is_err() {
                return;
            }
            self.clients.iter_mut().for_each(Client::flush);
        }
    }

    /// Waits for something to happen and does what it asks for.
    fn wait(&mut self, timeout: PollTimeout) -> io::Result<()> {
        let notices = self.monitor.notices().as_fd();
        let mut polled = vec![
            PollFd::new(notices, PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        for client in &self.clients {
            let out = if client.outbox.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
            polled.push(PollFd::new(client.socket.as_fd(), PollFlags::POLLIN | out));
        }
        if let Some(listener) = self.listener.as_ref().filter(|_| self.clients.len() < MAX_CLIENTS) {
            polled.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut polled, timeout) {
            Err(Errno::EINTR) => return Ok(()),
            other => other?,
        };
        let ready: Vec<bool> = polled.iter().map(|p| p.any().unwrap_or(false)).collect();
        drop(polled);
        if ready[0] || self.monitor.notices().due() == Some(Duration::ZERO) {
            self.monitor.on_notices();
        }
        if ready[1] && matches!(self.signals.read_signal(), Ok(Some(_))) {
            // Quit is allowed in every phase.
            let _ = self.monitor.execute(Command::Quit {}, Vec::new());
        }
        let count = self.clients.len();
        for (index, _) in ready[2..2 + count].iter().enumerate().filter(|(_, ready)| **ready) {
            self.serve(index);
        }
        if ready.get(2 + count) == Some(&true) {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: accept4 with null pointers takes no address.
        let raw =
            unsafe { libc::accept4(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) };
        if raw >= 0 {
            // SAFETY: accept4 has just made this descriptor for us.
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            self.clients.push(Client { socket, outbox: VecDeque::new(), gone: false });
        }
    }

    fn serve(&mut self, index: usize) {
        for _ in 0..REQUESTS_PER_TURN {
            let Some(client) = self.clients.get_mut(index) else { return };
            client.flush();
            let (id, result) = match receive(&client.socket, &mut self.buffer) {
                Received::Nothing => return,
                Received::Closed => {
                    client.gone = true;
                    return;
                }
                Received::Broken(message) => (0, Err(bad_request(message))),
                Received::Message(bytes, fds) => {
                    let (id, command) = parse(&bytes);
                    (id, command.and_then(|command| self.monitor.execute(command, fds)))
                }
            };
            let reply = Message::Reply(Reply { v: VERSION, id, result });
            self.clients[index].queue(&reply);
            // The reply first, then what it caused.
            for event in self.monitor.take_events() {
                (self.tell)(&event);
                let message = Message::Event(event);
                self.clients.iter_mut().for_each(|client| client.queue(&message));
            }
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
