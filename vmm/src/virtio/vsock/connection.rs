//! One stream between a Unix socket of the host and a socket of the guest.
//!
//! ```text
//! Greeting ─ CONNECT line ─▶ Requested ─ RESPONSE ─▶ Open ─▶ (both directions shut, RST or time-out) gone
//!  host client                        guest client ──▶ Open
//! ```
//! Flow control (5.10.6.3): each side tells how large its buffer is and how much has ever left it, modulo 2^32; the other
//! sends no more than fits. What the socket does not take at once waits in a buffer of at most [`BUFFER_BYTES`]; what the
//! guest cannot take stays in the socket.

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use super::super::iovecs::IoVecs;
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

/// Buffer for what the host's side does not take, in bytes: the credit that the guest gets.
pub const BUFFER_BYTES: u32 = 64 * 1024;
/// Bytes taken by the host after which the guest is told unasked.
const UPDATE_AFTER_BYTES: u32 = BUFFER_BYTES / 4;
/// Most bytes in one packet.
pub const MAX_PACKET_BYTES: u32 = 64 * 1024;
/// Longest `CONNECT <port>\n`, in bytes.
pub const MAX_GREETING_BYTES: usize = 32;
/// Ticks within which the client must have said where to, and the guest must have answered.
pub const ANSWER_TICKS: u8 = 5;
/// Ticks within which a closed connection must be over (Linux waits 8 s as well).
pub const CLOSE_TICKS: u8 = 8;

/// Where a connection is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host's client has not said yet which port it wants.
    Greeting,
    /// The guest has not answered yet.
    Requested,
    /// Both sides are there.
    Open,
    /// The guest is gone; the host's side still takes what it sent before.
    Draining,
}

/// Host's and guest's port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports {
    /// At CID 2.
    pub host: u32,
    /// At the guest.
    pub guest: u32,
}

/// The connection cannot go on: both sides are told that it is over.
#[derive(Debug)]
pub struct Broken;

/// What goes to the guest next.
pub enum Outgoing {
    /// A packet without data.
    Control(Op, u32),
    /// Data of the socket, at most so many bytes.
    Data(u32),
}

/// A connection.
pub struct Connection {
    /// The host's side, non-blocking.
    pub socket: UnixStream,
    /// Its state.
    pub state: State,
    /// Its ports; meaningless while it is [`State::Greeting`].
    pub ports: Ports,
    /// Ticks until it is given up, if it must not stay as it is.
    pub ticks_left: Option<u8>,
    /// It stands in the list of those that have something for the guest.
    pub listed: bool,
    /// REQUEST or RESPONSE still to be sent.
    handshake: Option<Op>,

    /// From the guest, not yet taken by the socket.
    buffer: Vec<u8>,
    /// Bytes of `buffer` that the socket has taken.
    taken: usize,
    /// Bytes ever taken by the socket.
    forwarded: u32,
    /// What the guest knows of `forwarded`.
    told: u32,
    update_wanted: bool,

    /// The socket may have data.
    readable: bool,
    /// Bytes ever sent to the guest.
    sent: u32,
    peer_buffer: u32,
    peer_forwarded: u32,
    credit_asked: bool,

    /// Directions that ended here, and what the guest knows of it.
    ended: u32,
    ended_told: u32,
    /// Directions that the guest ended.
    peer_ended: u32,
    /// The client has been told that the guest sends no more.
    closed_towards_client: bool,
}

impl Connection {
    /// Around a non-blocking socket.
    pub fn new(socket: UnixStream, state: State, ports: Ports) -> Self {
        Self {
            socket,
            state,
            ports,
            ticks_left: (state != State::Open).then_some(ANSWER_TICKS),
            listed: false,
            handshake: (state == State::Open).then_some(Op::Response),
            buffer: Vec::new(),
            taken: 0,
            forwarded: 0,
            told: 0,
            update_wanted: false,
            readable: false,
            sent: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            credit_asked: false,
            ended: 0,
            ended_told: 0,
            peer_ended: 0,
            closed_towards_client: false,
        }
    }

    /// Reads the client's `CONNECT <port>\n` and nothing behind it; `None` while the line is incomplete.
    ///
    /// # Errors
    /// When it is something else, or the client is gone.
    pub fn greeting(&mut self) -> Result<Option<u32>, Broken> {
        let mut line = [0u8; MAX_GREETING_BYTES];
        let Some(count) = self.receive(&mut line, libc::MSG_PEEK)? else { return Ok(None) };
        let Some(end) = line[..count].iter().position(|byte| *byte == b'\n') else {
            return if count == 0 || count == line.len() { Err(Broken) } else { Ok(None) };
        };
        self.receive(&mut line[..=end], 0)?;
        let text = std::str::from_utf8(&line[..end]).map_err(|_| Broken)?;
        let port = text.strip_prefix("CONNECT ").ok_or(Broken)?;
        // The parser would take a sign as well.
        let port =
            if port.starts_with('+') { return Err(Broken) } else { port.parse().map_err(|_| Broken)? };
        Ok(Some(port))
    }

    /// `None` if there is nothing now.
    fn receive(&self, data: &mut [u8], flags: i32) -> Result<Option<usize>, Broken> {
        // SAFETY: pointer and length are those of a live slice of ours.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), flags) };
        match usize::try_from(got) {
            Ok(count) => Ok(Some(count)),
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(_) => Err(Broken),
        }
    }

    /// The client wants this port: asks the guest.
    pub fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.state = State::Requested;
        self.ticks_left = Some(ANSWER_TICKS);
        self.handshake = Some(Op::Request);
        // What came behind the line, if anything, is not announced again.
        self.readable = true;
    }

    /// The guest accepted: tells the client.
    ///
    /// # Errors
    /// When the client is gone.
    pub fn accepted(&mut self) -> Result<(), Broken> {
        if self.state != State::Requested || self.handshake.is_some() {
            return Err(Broken);
        }
        self.state = State::Open;
        self.ticks_left = None;
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes on an empty socket fit, or the client is gone.
        if send(&self.socket, &[slice(line.as_bytes())]).ok() == Some(line.len()) {
            Ok(())
        } else {
            Err(Broken)
        }
    }

    /// The socket can be read (or its end seen).
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The client is gone altogether. What it wrote before can still be read.
    pub fn hung_up(&mut self) {
        self.readable = true;
        self.discard();
        if self.peer_ended & SHUTDOWN_RECEIVE != 0 {
            self.ended = SHUTDOWN_BOTH;
        }
    }

    /// Nobody takes what the guest sends.
    fn discard(&mut self) {
        self.ended |= SHUTDOWN_RECEIVE;
        self.forwarded = self.forwarded.wrapping_add(self.buffered());
        (self.buffer, self.taken) = (Vec::new(), 0);
    }

    /// Panics unless its buffer is within bounds.
    #[cfg(any(test, fuzzing))]
    pub fn check(&self) {
        assert!(self.taken <= self.buffer.len() && self.buffered() <= BUFFER_BYTES);
    }

    fn buffered(&self) -> u32 {
        (self.buffer.len() - self.taken) as u32
    }

    /// Takes over what the guest says of its buffer.
    ///
    /// # Errors
    /// When it claims to have taken what was never sent, or less than it said before.
    pub fn update_credit(&mut self, header: &Header) -> Result<(), Broken> {
        let outstanding = self.sent.wrapping_sub(header.fwd_cnt);
        if outstanding > self.sent.wrapping_sub(self.peer_forwarded) {
            return Err(Broken);
        }
        (self.peer_buffer, self.peer_forwarded) = (header.buf_alloc, header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        Ok(())
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The guest asks how much it may send.
    pub fn want_update(&mut self) {
        self.update_wanted = true;
    }

    /// Data from the guest.
    ///
    /// # Errors
    /// When it is more than the guest was allowed to send, or after it said that no more would come.
    pub fn push(&mut self, pieces: &mut IoVecs, len: u32) -> Result<(), Broken> {
        let room = BUFFER_BYTES - self.buffered();
        if self.state != State::Open || len > room || self.peer_ended & SHUTDOWN_SEND != 0 {
            return Err(Broken);
        }
        let mut left = len as usize;
        if self.buffer.is_empty() && self.ended & SHUTDOWN_RECEIVE == 0 {
            let taken = self.forward(send(&self.socket, pieces.as_slice()));
            pieces.advance(taken);
            left -= taken.min(left);
        }
        if self.ended & SHUTDOWN_RECEIVE != 0 {
            self.forwarded = self.forwarded.wrapping_add(left as u32);
        } else if left > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
            let start = self.buffer.len();
            self.buffer.resize(start + left, 0);
            pieces.gather(&mut self.buffer[start..]);
        }
        Ok(())
    }

    /// Accounts for what the socket took.
    fn forward(&mut self, result: io::Result<usize>) -> usize {
        let taken = match result {
            Ok(count) => count,
            // An interrupted or full socket announces itself again.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(_) => {
                self.discard();
                0
            }
        };
        self.forwarded = self.forwarded.wrapping_add(taken as u32);
        taken
    }

    /// The socket takes data again.
    pub fn flush(&mut self) {
        while self.buffered() > 0 {
            let taken = self.forward(send(&self.socket, &[slice(&self.buffer[self.taken..])]));
            if taken == 0 {
                return;
            }
            self.taken += taken;
        }
        (self.buffer, self.taken) = (Vec::new(), 0);
        if self.peer_ended & SHUTDOWN_SEND != 0 && !self.closed_towards_client {
            self.closed_towards_client = true;
            // Once: each call would announce the socket as ready. Fails only if the client is gone, and then nobody cares.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// The guest ended directions.
    pub fn guest_ended(&mut self, flags: u32) {
        self.peer_ended |= flags & SHUTDOWN_BOTH;
        if flags & SHUTDOWN_RECEIVE != 0 {
            let _ = self.socket.shutdown(Shutdown::Read);
            self.readable = false;
        }
        self.flush();
    }

    /// The guest wants nothing more, and everything that it sent is delivered.
    pub fn finished(&self) -> bool {
        self.buffered() == 0 && (self.peer_ended == SHUTDOWN_BOTH || self.state == State::Draining)
    }

    /// The guest's side is gone. Whether it is worth keeping for what the client has yet to take: only after an orderly end.
    pub fn guest_gone(&mut self) -> bool {
        let keep = self.state == State::Open && self.peer_ended & SHUTDOWN_SEND != 0 && self.buffered() > 0;
        if keep {
            self.state = State::Draining;
            self.ticks_left = None;
        }
        keep
    }

    fn update_due(&self) -> bool {
        self.update_wanted || self.forwarded.wrapping_sub(self.told) >= UPDATE_AFTER_BYTES
    }

    /// An end of which the guest does not know. That we receive no more need not be said to a guest that sends no more.
    fn end_due(&self) -> bool {
        let idle = self.ended == SHUTDOWN_RECEIVE && self.peer_ended & SHUTDOWN_SEND != 0;
        self.ended != self.ended_told && !idle
    }

    fn data_waits(&self) -> bool {
        self.readable && self.ended & SHUTDOWN_SEND == 0 && self.peer_ended & SHUTDOWN_RECEIVE == 0
    }

    /// Whether [`Connection::next`] has something.
    pub fn has_outgoing(&self) -> bool {
        match self.state {
            State::Greeting | State::Draining => false,
            State::Requested => self.handshake.is_some(),
            State::Open => {
                let data = self.data_waits() && (self.credit() > 0 || !self.credit_asked);
                self.handshake.is_some() || self.update_due() || self.end_due() || data
            }
        }
    }

    /// What the guest gets next.
    pub fn next(&mut self) -> Option<Outgoing> {
        if matches!(self.state, State::Greeting | State::Draining) {
            return None;
        }
        if let Some(op) = self.handshake.take() {
            return Some(Outgoing::Control(op, 0));
        }
        if self.state == State::Requested {
            return None;
        }
        if self.update_due() {
            return Some(Outgoing::Control(Op::CreditUpdate, 0));
        }
        if self.end_due() {
            self.ended_told = self.ended;
            if self.ended == SHUTDOWN_BOTH {
                self.ticks_left = Some(CLOSE_TICKS);
            }
            return Some(Outgoing::Control(Op::Shutdown, self.ended));
        }
        match self.credit() {
            _ if !self.data_waits() => None,
            0 if self.credit_asked => None,
            0 => {
                self.credit_asked = true;
                Some(Outgoing::Control(Op::CreditRequest, 0))
            }
            credit => Some(Outgoing::Data(credit.min(MAX_PACKET_BYTES))),
        }
    }

    /// Reads data of the client into guest memory; 0 if there is none now or none will come.
    pub fn read(&mut self, pieces: &IoVecs) -> u32 {
        let pieces = pieces.as_slice();
        let fd = self.socket.as_raw_fd();
        // SAFETY: the pieces are guest memory (invariant of the list) that its driver offered for writing.
        let got = unsafe { libc::readv(fd, pieces.as_ptr(), pieces.len() as libc::c_int) };
        match u32::try_from(got) {
            Ok(0) => {
                self.readable = false;
                self.ended |= SHUTDOWN_SEND;
                0
            }
            Ok(count) => {
                self.sent = self.sent.wrapping_add(count);
                count
            }
            Err(_) => {
                self.readable = false;
                match io::Error::last_os_error().kind() {
                    io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::Interrupted => self.readable = true,
                    _ => {
                        self.discard();
                        self.ended = SHUTDOWN_BOTH;
                    }
                }
                0
            }
        }
    }

    /// A packet's header, with the present credit in it.
    pub fn header(&mut self, guest_cid: u64, op: Op, flags: u32, len: u32) -> Header {
        self.told = self.forwarded;
        self.update_wanted = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        }
    }
}

fn slice(data: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() }
}

/// Without SIGPIPE, unlike writev(2).
fn send(socket: &UnixStream, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: zeroed bytes are a valid msghdr: no address, no data, no control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len();
    // SAFETY: the message points to pieces that the kernel only reads, all mapped until the call returns.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
