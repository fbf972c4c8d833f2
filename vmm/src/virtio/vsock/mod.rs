//! Socket device (virtio 1.2, section 5.10): stream connections between the guest and Unix sockets of the host.
//!
//! ```text
//! host client ── CONNECT 1234\n ─▶ listener ─▶ Muxer ── REQUEST ─▶ guest       (OK <host port>\n, or the end of the file)
//! guest ── REQUEST ─▶ Muxer ── VsockArrival + stream ─▶ SOCK_SEQPACKET of that port
//! ```
//! Everything is non-blocking and bounded: connections, bytes buffered for each, refusals that wait. A client may connect
//! before the guest's driver is there; it then waits in the listener's backlog, and whoever waits should have a time-out.

mod arrival;
mod connection;
mod muxer;
pub(crate) mod packet;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use self::muxer::{Backlog, Listeners, Muxer};
use self::packet::{HEADER_BYTES, Header};
use super::chain::{Chain, ChainError};
use super::served::ServedQueue;
use super::{
    ActivateError, Activation, DeviceKind, Interrupt, Memory, VIRTIO_F_RING_EVENT_IDX, VirtioDevice, Watcher,
};

/// Receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// Ports that can be listened on at once.
pub const MAX_LISTENERS: usize = 64;
/// How often waiting connections are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Tokens: queues by their index, then these.
const RX: u32 = 0;
const TX: u32 = 1;
const LISTENER: u32 = 3;
const TIMER: u32 = 4;
const FIRST_CONNECTION: u32 = 16;

/// Why a socket device, or a port of it, cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// 0 to 2 and the last one have meanings of their own.
    #[error("vsock: context id {0} is not in 3..=4294967294")]
    Cid(u32),
    /// 0 and the last one are no ports.
    #[error("vsock: port {0} is not in 1..=4294967294")]
    Port(u32),
    /// The descriptor is something else.
    #[error("vsock: the descriptor for {purpose} is no {wanted} Unix socket")]
    Socket {
        /// What it is for.
        purpose: &'static str,
        /// What it should be.
        wanted: &'static str,
    },
    /// [`MAX_LISTENERS`] ports are taken.
    #[error("vsock: {MAX_LISTENERS} ports are being listened on, and no more than that is possible")]
    TooManyListeners,
    /// A system call failed.
    #[error("vsock: {call} failed: {source}")]
    Call {
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

struct Running {
    rx: ServedQueue,
    tx: ServedQueue,
    muxer: Muxer,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    watcher: Watcher,
    watched: Vec<RawFd>,
    ticking: bool,
    backlog: Backlog,
}

impl Drop for Running {
    fn drop(&mut self) {
        for fd in &self.watched {
            let _ = self.watcher.remove(*fd);
        }
    }
}

/// The device.
pub struct Vsock {
    cid: u32,
    listener: Option<OwnedFd>,
    listeners: Listeners,
    timer: TimerFd,
    tick: Duration,
    running: Option<Running>,
    chain: Chain,
}

fn is_unix_socket(fd: BorrowedFd, kind: SockType, listening: bool) -> bool {
    let family = getsockname::<SockaddrStorage>(fd.as_raw_fd()).ok().and_then(|address| address.family());
    family == Some(AddressFamily::Unix)
        && getsockopt(&fd, sockopt::SockType) == Ok(kind)
        && getsockopt(&fd, sockopt::AcceptConn) == Ok(listening)
}

impl Vsock {
    /// The device of guest `cid`, 3..=0xffff_fffe. Clients of the host come to `listener`, a listening Unix stream socket,
    /// which is made non-blocking.
    ///
    /// # Errors
    /// When the id is out of range or the listener something else.
    pub fn new(cid: u32, listener: Option<OwnedFd>) -> Result<Self, VsockError> {
        if !(3..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        if let Some(listener) = &listener {
            if !is_unix_socket(listener.as_fd(), SockType::Stream, true) {
                return Err(VsockError::Socket { purpose: "host clients", wanted: "listening stream" });
            }
            let set = super::set_nonblocking(listener);
            set.map_err(|source| VsockError::Call { call: "F_SETFL", source })?;
        }
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)
            .map_err(|source| VsockError::Call { call: "timerfd_create", source: source.into() })?;
        let (listeners, running, chain) = (Listeners::new(), None, Chain::default());
        Ok(Self { cid, listener, listeners, timer, tick: TICK, running, chain })
    }

    /// Sends connections that the guest makes to `port` over `socket`, a connected `SOCK_SEQPACKET` Unix socket: one packet of
    /// JSON [`crate::control::wire::VsockArrival`] each, with the stream by `SCM_RIGHTS`. Replaces an earlier one of the port.
    /// May be called at any time.
    ///
    /// # Errors
    /// When the port is out of range, the socket something else, or there are [`MAX_LISTENERS`] already.
    pub fn listen(&mut self, port: u32, socket: OwnedFd) -> Result<(), VsockError> {
        if !(1..u32::MAX).contains(&port) {
            return Err(VsockError::Port(port));
        }
        if !is_unix_socket(socket.as_fd(), SockType::SeqPacket, false) {
            return Err(VsockError::Socket { purpose: "guest connections", wanted: "seqpacket" });
        }
        if !self.listeners.contains_key(&port) && self.listeners.len() >= MAX_LISTENERS {
            return Err(VsockError::TooManyListeners);
        }
        self.listeners.insert(port, socket);
        Ok(())
    }

    /// Connections open or being opened.
    pub fn connections(&self) -> usize {
        self.running.as_ref().map_or(0, |running| running.muxer.count())
    }

    /// A tick passes that the timer knows nothing of.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn tick(&mut self) {
        if let Some(running) = &mut self.running {
            running.muxer.tick();
        }
    }

    /// Panics unless the connections are within their bounds and consistent.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn check(&self) {
        if let Some(running) = &self.running {
            running.muxer.check();
        }
    }

    /// Packets from the guest, at most a queue's size.
    fn transmit(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let memory = running.memory.memory();
        for _ in 0..running.tx.size() {
            if !running.tx.pop(&memory, &mut self.chain)? {
                if running.tx.enable_notification(&memory)? {
                    continue;
                }
                return running.tx.signal(&memory);
            }
            let mut bytes = [0; HEADER_BYTES];
            self.chain.read(&memory, 0, &mut bytes)?;
            let header = Header::decode(&bytes);
            let (have, need) = (self.chain.readable_bytes(), HEADER_BYTES as u64 + u64::from(header.len));
            if need > have {
                return Err(ChainError::Short { have, need });
            }
            running.muxer.receive(&header, &self.chain, &memory, &mut self.listeners)?;
            running.tx.push(&memory, self.chain.head(), 0)?;
        }
        running.tx.look_again();
        running.tx.signal(&memory)
    }

    /// Packets for the guest, at most a queue's size.
    fn deliver(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let memory = running.memory.memory();
        let Running { rx, muxer, .. } = running;
        for _ in 0..rx.size() {
            if !muxer.has_packets() {
                return rx.signal(&memory);
            }
            if !rx.pop(&memory, &mut self.chain)? {
                if rx.enable_notification(&memory)? {
                    continue;
                }
                return rx.signal(&memory);
            }
            let (have, need) = (self.chain.writable_bytes(), HEADER_BYTES as u64);
            if have < need {
                return Err(ChainError::Short { have, need });
            }
            match muxer.next_packet(&self.chain, &memory)? {
                Some(header) => {
                    self.chain.write(&memory, 0, &header.encode())?;
                    rx.push(&memory, self.chain.head(), HEADER_BYTES as u32 + header.len)?;
                }
                None => rx.unpop(1),
            }
        }
        rx.look_again();
        rx.signal(&memory)
    }

    fn work(&mut self, running: &mut Running, token: u32, events: EventSet) -> Result<(), ChainError> {
        match token {
            RX => running.rx.take_notification(),
            TX => {
                running.tx.take_notification();
                self.transmit(running)?;
            }
            LISTENER => running.backlog = Backlog::Now,
            TIMER => {
                // Reading a timer that has not expired does not block; only expirations count.
                let mut count = [0u8; 8];
                if nix::unistd::read(&self.timer, &mut count) == Ok(8) {
                    running.muxer.tick();
                }
            }
            token => {
                if let Some(index) = token.checked_sub(FIRST_CONNECTION) {
                    running.muxer.ready(index as usize, events);
                }
            }
        }
        if let (Some(listener), Backlog::Now | Backlog::Later) = (&self.listener, running.backlog) {
            running.backlog = running.muxer.accept(listener.as_raw_fd());
            if running.backlog == Backlog::Now {
                running.rx.look_again();
            }
        }
        self.deliver(running)?;
        self.set_timer(running);
        Ok(())
    }

    /// Lets the timer run while some connection has a deadline, or clients wait for descriptors.
    fn set_timer(&self, running: &mut Running) {
        let wanted = running.muxer.has_deadlines() || running.backlog == Backlog::Later;
        if wanted != running.ticking {
            let set = match wanted {
                true => {
                    let expiration = Expiration::Interval(self.tick.into());
                    self.timer.set(expiration, TimerSetTimeFlags::empty())
                }
                false => self.timer.unset(),
            };
            running.ticking = if set.is_ok() { wanted } else { running.ticking };
        }
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn name(&self) -> &str {
        "vsock"
    }

    fn features(&self) -> u64 {
        VIRTIO_F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, watcher, .. } = activation;
        let mut queues = queues.into_iter();
        let rx = ServedQueue::new(queues.next().flatten(), 0, &watcher, &interrupt)?;
        let tx = ServedQueue::new(queues.next().flatten(), 1, &watcher, &interrupt)?;
        // The event queue only ever announces a new context id, which a guest of ours never gets.
        let muxer = Muxer::new(u64::from(self.cid), watcher.clone(), FIRST_CONNECTION);
        let (watched, ticking, backlog) = (Vec::new(), false, Backlog::Now);
        let mut running = Running { rx, tx, muxer, memory, interrupt, watcher, watched, ticking, backlog };
        let mut watch = |fd: RawFd, token, events| {
            running.watcher.add(fd, token, events).map_err(ActivateError::Watch)?;
            running.watched.push(fd);
            Ok(())
        };
        watch(self.timer.as_fd().as_raw_fd(), TIMER, EventSet::IN)?;
        if let Some(listener) = &self.listener {
            // Edge-triggered: a backlog that cannot be accepted for lack of descriptors must not spin.
            watch(listener.as_raw_fd(), LISTENER, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        }
        self.running = Some(running);
        Ok(())
    }

    fn reset(&mut self) {
        // Dropping the muxer closes all connections.
        self.running = None;
        let _ = self.timer.unset();
    }

    fn on_event(&mut self, token: u32, events: EventSet) {
        let Some(mut running) = self.running.take() else { return };
        match self.work(&mut running, token, events) {
            Ok(()) => self.running = Some(running),
            Err(error) => running.interrupt.needs_reset(&error.to_string()),
        }
    }
}
