//! All connections of one guest: who has something to say, who is meant, who is given up.
//!
//! It knows no queues: [`Muxer::receive`] takes the guest's packets, [`Muxer::next_packet`] makes the next one for it.
//! Whatever a connection does wrong ends that connection with RST, never the device.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::super::Watcher;
use super::super::chain::{Chain, ChainError, Half, MAX_SEGMENTS};
use super::super::iovecs::IoVecs;
use super::arrival;
use super::connection::{Broken, Connection, Outgoing, Ports, State};
use super::packet::{HEADER_BYTES, HOST_CID, Header, Op, TYPE_STREAM};

/// Most connections at once; the next one is refused.
pub const MAX_CONNECTIONS: usize = 1023;
/// Most refusals that wait for the guest to take them; further ones are not said.
const MAX_REFUSALS: usize = 1024;
/// Most pieces of host memory in one packet.
const MAX_PIECES: usize = 2 * MAX_SEGMENTS;
/// Connections accepted per event.
const ACCEPT_BUDGET: usize = 64;
/// Host ports of connections that the host's clients make: out of the way of those that services listen on.
const EPHEMERAL_PORTS: std::ops::Range<u32> = 1 << 30..1 << 31;

/// What may be left in the listener's backlog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backlog {
    /// Nothing; whoever comes is announced.
    Empty,
    /// More, to be accepted after others had their turn.
    Now,
    /// More, but descriptors or memory must come back first.
    Later,
}

/// The sockets that take the guest's connections, by host port.
pub type Listeners = HashMap<u32, OwnedFd>;

/// The connections.
pub struct Muxer {
    guest_cid: u64,
    watcher: Watcher,
    first_token: u32,
    table: Vec<Option<Connection>>,
    free: Vec<usize>,
    by_ports: HashMap<Ports, usize>,
    refusals: VecDeque<Header>,
    /// Connections with something for the guest, each at most once, served in turn.
    speakers: VecDeque<usize>,
    next_port: u32,
    pieces: IoVecs,
}

impl Muxer {
    /// Without connections. Those to come are watched with tokens from `first_token` on.
    pub fn new(guest_cid: u64, watcher: Watcher, first_token: u32) -> Self {
        Self {
            guest_cid,
            watcher,
            first_token,
            table: Vec::new(),
            free: Vec::new(),
            by_ports: HashMap::new(),
            refusals: VecDeque::new(),
            speakers: VecDeque::new(),
            next_port: EPHEMERAL_PORTS.start,
            pieces: IoVecs::default(),
        }
    }

    /// Number of connections.
    pub fn count(&self) -> usize {
        self.table.len() - self.free.len()
    }

    /// Panics unless everything is within its bounds and consistent.
    #[cfg(any(test, fuzzing))]
    pub fn check(&self) {
        assert!(self.count() <= MAX_CONNECTIONS && self.refusals.len() <= MAX_REFUSALS);
        assert!(self.free.iter().all(|index| self.table[*index].is_none()), "a free place is taken");
        let mut speakers: Vec<_> = self.speakers.iter().collect();
        speakers.sort_unstable();
        speakers.dedup();
        assert_eq!(speakers.len(), self.speakers.len(), "a connection is listed twice");
        for (ports, index) in &self.by_ports {
            let connection = self.table[*index].as_ref();
            assert_eq!(connection.map(|connection| connection.ports), Some(*ports), "ports of nobody");
        }
        self.table.iter().flatten().for_each(Connection::check);
    }

    fn insert(&mut self, connection: Connection) -> Option<usize> {
        if self.count() >= MAX_CONNECTIONS {
            return None;
        }
        let index = self.free.pop().unwrap_or(self.table.len());
        if index == self.table.len() {
            self.table.push(None);
        }
        let token = self.first_token + index as u32;
        // Edge-triggered: readiness is remembered, so nothing spins while the guest has no room.
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if self.watcher.add(connection.socket.as_raw_fd(), token, events).is_err() {
            self.free.push(index);
            return None;
        }
        if connection.state != State::Greeting {
            self.by_ports.insert(connection.ports, index);
        }
        self.table[index] = Some(connection);
        self.speak(index);
        Some(index)
    }

    fn get(&mut self, index: usize) -> Option<&mut Connection> {
        self.table.get_mut(index)?.as_mut()
    }

    /// Forgets a connection; its socket closes, which also ends its watch.
    fn remove(&mut self, index: usize) {
        if let Some(connection) = self.table.get_mut(index).and_then(Option::take) {
            if self.by_ports.get(&connection.ports) == Some(&index) {
                self.by_ports.remove(&connection.ports);
            }
            if connection.listed {
                // Or the next one at this place would be listed twice, and the list grow with every connection that the guest
                // makes and resets.
                self.speakers.retain(|speaker| *speaker != index);
            }
            self.free.push(index);
        }
    }

    fn refuse(&mut self, header: Header) {
        if self.refusals.len() < MAX_REFUSALS {
            self.refusals.push_back(header);
        }
    }

    /// Ends a connection at once, and says so to the guest if it knows of it.
    fn abort(&mut self, index: usize) {
        let guest_cid = self.guest_cid;
        if let Some(connection) = self.get(index)
            && matches!(connection.state, State::Requested | State::Open)
        {
            let header = connection.header(guest_cid, Op::Reset, 0, 0);
            self.refuse(header);
        }
        self.remove(index);
    }

    /// Lists a connection if it has something for the guest.
    fn speak(&mut self, index: usize) {
        if let Some(connection) = self.get(index)
            && connection.has_outgoing()
            && !connection.listed
        {
            connection.listed = true;
            self.speakers.push_back(index);
        }
    }

    /// Whether [`Muxer::next_packet`] may have something.
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.speakers.is_empty()
    }

    /// Whether some connection must not stay as it is for ever.
    pub fn has_deadlines(&self) -> bool {
        self.table.iter().flatten().any(|connection| connection.ticks_left.is_some())
    }

    /// A tick has passed: gives up what has waited too long.
    pub fn tick(&mut self) {
        for index in 0..self.table.len() {
            let Some(connection) = self.get(index) else { continue };
            match connection.ticks_left {
                Some(0) => self.abort(index),
                Some(left) => connection.ticks_left = Some(left - 1),
                None => {}
            }
        }
    }

    /// Accepts clients of the host, within [`ACCEPT_BUDGET`].
    pub fn accept(&mut self, listener: RawFd) -> Backlog {
        for _ in 0..ACCEPT_BUDGET {
            let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            // SAFETY: no address is asked for, so both pointers may be null.
            let fd = unsafe { libc::accept4(listener, std::ptr::null_mut(), std::ptr::null_mut(), flags) };
            if fd < 0 {
                return match Errno::last() {
                    Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM => Backlog::Later,
                    _ => Backlog::Empty,
                };
            }
            // SAFETY: accept4 has just made this descriptor; nobody else owns it.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            let connection = Connection::new(UnixStream::from(owned), State::Greeting, Ports::default());
            // If there is no room it is closed, which the client sees as the end of the file.
            if let Some(index) = self.insert(connection) {
                self.greet(index);
            }
        }
        Backlog::Now
    }

    fn greet(&mut self, index: usize) {
        let Some(connection) = self.get(index) else { return };
        match connection.greeting() {
            Ok(None) => {}
            Err(Broken) => self.remove(index),
            Ok(Some(guest)) => {
                let ports = Ports { host: self.free_port(guest), guest };
                self.by_ports.insert(ports, index);
                if let Some(connection) = self.get(index) {
                    connection.request(ports);
                }
                self.speak(index);
            }
        }
    }

    /// A host port that is in no connection to this guest port. There are more ports than connections, so one is found.
    fn free_port(&mut self, guest: u32) -> u32 {
        for _ in 0..=MAX_CONNECTIONS {
            let host = self.next_port;
            self.next_port = if host + 1 < EPHEMERAL_PORTS.end { host + 1 } else { EPHEMERAL_PORTS.start };
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
        self.next_port
    }

    /// A connection's socket is ready.
    pub fn ready(&mut self, index: usize, events: EventSet) {
        let Some(connection) = self.get(index) else { return };
        if connection.state == State::Greeting {
            self.greet(index);
            return;
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            connection.set_readable();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hung_up();
        }
        let gone = connection.state == State::Requested && events.contains(EventSet::HANG_UP);
        if events.contains(EventSet::OUT) {
            connection.flush();
        }
        if gone || connection.finished() {
            self.abort(index);
        } else {
            self.speak(index);
        }
    }

    /// A packet from the guest; `chain` holds its data behind the header.
    ///
    /// # Errors
    /// When the chain's data is not what the header says.
    pub fn receive(
        &mut self,
        header: &Header,
        chain: &Chain,
        memory: &GuestMemoryMmap,
        listeners: &mut Listeners,
    ) -> Result<(), ChainError> {
        if header.src_cid != self.guest_cid {
            // An address that is not the guest's cannot be answered.
            return Ok(());
        }
        let op = Op::from_wire(header.op);
        let ours = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let found = if ours { self.by_ports.get(&ports).copied() } else { None };
        match (op, found) {
            (Some(Op::Reset), None) => {}
            (Some(Op::Request), None) if ours => self.arrive(header, ports, listeners),
            (_, None) => self.refuse(header.refusal()),
            (Some(Op::Reset), Some(index)) => self.reset_by_guest(index),
            (Some(op), Some(index)) => {
                self.pieces.clear(MAX_PIECES);
                if op == Op::ReadWrite {
                    let range = (HEADER_BYTES as u64, u64::from(header.len));
                    chain.iovecs(memory, Half::Readable, range, MAX_PIECES, self.pieces.entries())?;
                }
                if self.dispatch(index, op, header).is_err() {
                    self.abort(index);
                } else {
                    self.speak(index);
                }
            }
            (None, Some(index)) => self.abort(index),
        }
        Ok(())
    }

    fn reset_by_guest(&mut self, index: usize) {
        let Some(connection) = self.get(index) else { return };
        let ports = connection.ports;
        if connection.guest_gone() {
            self.by_ports.remove(&ports);
        } else {
            self.remove(index);
        }
    }

    /// A packet of a known connection.
    fn dispatch(&mut self, index: usize, op: Op, header: &Header) -> Result<(), Broken> {
        let Some(connection) = self.table.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        connection.update_credit(header)?;
        match op {
            Op::Response => connection.accepted()?,
            Op::ReadWrite => connection.push(&mut self.pieces, header.len)?,
            Op::Shutdown => {
                connection.guest_ended(header.flags);
                if connection.finished() {
                    // The answer to an orderly end is RST as well (5.10.6.5).
                    return Err(Broken);
                }
            }
            Op::CreditRequest => connection.want_update(),
            Op::CreditUpdate => {}
            // A second connection under the same ports, and RST, which is handled before.
            Op::Request | Op::Reset => return Err(Broken),
        }
        Ok(())
    }

    /// The guest connects to a port of the host.
    fn arrive(&mut self, header: &Header, ports: Ports, listeners: &mut Listeners) {
        let accepted = listeners.get(&ports.host).map(|socket| arrival::announce(socket, ports));
        match accepted {
            Some(Ok(stream)) => {
                let mut connection = Connection::new(stream, State::Open, ports);
                let believed = connection.update_credit(header);
                if believed.is_err() || self.insert(connection).is_none() {
                    self.refuse(header.refusal());
                }
            }
            Some(Err(arrival::Refused::Gone)) => {
                listeners.remove(&ports.host);
                self.refuse(header.refusal());
            }
            Some(Err(arrival::Refused::Busy)) | None => self.refuse(header.refusal()),
        }
    }

    /// Makes the next packet for the guest: its data is already in `chain`, behind room for the header.
    ///
    /// # Errors
    /// When the chain is not good memory.
    pub fn next_packet(
        &mut self,
        chain: &Chain,
        memory: &GuestMemoryMmap,
    ) -> Result<Option<Header>, ChainError> {
        if let Some(header) = self.refusals.pop_front() {
            return Ok(Some(header));
        }
        let room = chain.writable_bytes().saturating_sub(HEADER_BYTES as u64);
        while let Some(index) = self.speakers.pop_front() {
            let guest_cid = self.guest_cid;
            let Some(connection) = self.table.get_mut(index).and_then(Option::as_mut) else { continue };
            connection.listed = false;
            let header = match connection.next() {
                None => continue,
                Some(Outgoing::Control(op, flags)) => connection.header(guest_cid, op, flags, 0),
                // Room for a header only: that much the guest gets.
                Some(Outgoing::Data(_)) if room == 0 => connection.header(guest_cid, Op::CreditUpdate, 0, 0),
                Some(Outgoing::Data(most)) => {
                    let range = (HEADER_BYTES as u64, u64::from(most).min(room));
                    self.pieces.clear(MAX_PIECES);
                    chain.iovecs(memory, Half::Writable, range, MAX_PIECES, self.pieces.entries())?;
                    match connection.read(&self.pieces) {
                        0 => {
                            self.speak(index);
                            continue;
                        }
                        count => connection.header(guest_cid, Op::ReadWrite, 0, count),
                    }
                }
            };
            self.speak(index);
            return Ok(Some(header));
        }
        Ok(None)
    }
}
