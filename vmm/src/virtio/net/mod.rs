//! Network card (virtio 1.2, section 5.1) on a tap queue: one pair of queues, no control queue.
//!
//! ```text
//! tx queue ─▶ Chain ─▶ writev ─▶ tap          (the frame and its vnet header as the guest wrote them)
//! rx queue ─▶ held buffers ─▶ readv ◀─ tap    (what does not fit lands in a spill buffer and is copied)
//! ```
//! Frames and headers travel straight between guest memory and the tap; the kernel checks headers. Receive buffers are
//! taken from the ring ahead of time, enough for the largest frame where that can be had. While there are none, the tap is
//! not watched: its own queue drops then, and nothing here spins.
//!
//! Offloads: the tap may hand over what the driver said it can take (`TUNSETOFFLOAD` by the GUEST features), and takes
//! whatever the driver sends with the HOST features. UFO is not offered: nobody sends it any more.

mod rx;
mod tap;
#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use self::rx::Receiver;
pub use self::tap::NetError;
use self::tap::Tap;
use super::chain::{Chain, ChainError, Half, MAX_SEGMENTS};
use super::iovecs::IoVecs;
use super::served::ServedQueue;
use super::{
    ActivateError, Activation, DeviceKind, DeviceStats, Interrupt, Memory, VIRTIO_F_RING_EVENT_IDX,
    VirtioDevice, Watcher,
};
use crate::control::wire::NicStats;

/// Bytes of the vnet header in front of each frame (`struct virtio_net_hdr_v1`).
pub const HEADER_BYTES: usize = 12;
/// Longest frame that anyone may send, with its header: what TSO produces, and a VLAN tag.
pub const MAX_FRAME_BYTES: usize = HEADER_BYTES + 18 + 65535;
/// Receive and transmit queue.
const QUEUE_SIZES: [u16; 2] = [256, 256];
/// Frames received per event, so that a flood leaves the thread to others too.
const RX_BUDGET: usize = 64;
/// Most pieces of host memory in one frame: a buffer may span two memory regions.
const MAX_PIECES: usize = 2 * MAX_SEGMENTS;

/// Feature bits of 5.1.3.
mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;
    /// Those by which frames longer than the MTU reach the driver.
    pub const GUEST_LARGE: u64 = GUEST_TSO4 | GUEST_TSO6 | GUEST_USO4 | GUEST_USO6;
}

/// Tokens of the two queues (their indices) and of the tap.
const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// What is watched on the tap; ends when dropped.
struct TapWatch {
    fd: RawFd,
    watcher: Watcher,
    events: EventSet,
}

impl TapWatch {
    fn new(fd: RawFd, watcher: Watcher) -> std::io::Result<Self> {
        watcher.add(fd, TAP, EventSet::empty())?;
        Ok(Self { fd, watcher, events: EventSet::empty() })
    }

    /// Watches for frames, or only for the tap's end.
    fn frames(&mut self, wanted: bool) {
        let events = if wanted { EventSet::IN } else { EventSet::empty() };
        // Modifying a registered descriptor fails only for lack of kernel memory; the next event tries again.
        if events != self.events && self.watcher.modify(self.fd, TAP, events).is_ok() {
            self.events = events;
        }
    }
}

impl Drop for TapWatch {
    fn drop(&mut self) {
        let _ = self.watcher.remove(self.fd);
    }
}

struct Running {
    rx: ServedQueue,
    tx: ServedQueue,
    receiver: Receiver,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    /// `None` once the tap is gone.
    watch: Option<TapWatch>,
}

/// The device.
pub struct Net {
    name: String,
    tap: Tap,
    mac: [u8; 6],
    mtu: Option<u16>,
    link_up: bool,
    running: Option<Running>,
    chain: Chain,
    pieces: IoVecs,
    stats: NicStats,
}

impl Net {
    /// A card on `tap`, a queue of a tap interface with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Sets the vnet header's size to 12
    /// and the descriptor non-blocking. `mtu` is told to the driver, 68..=65535.
    ///
    /// # Errors
    /// When the descriptor is no such queue, or `mac` or `mtu` are out of range.
    pub fn new(name: &str, tap: OwnedFd, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        Self::with(name, Tap::new(name, tap)?, mac, mtu)
    }

    /// A card on a datagram socket that stands in for the tap.
    ///
    /// # Errors
    /// As [`Net::new`].
    #[cfg(any(test, fuzzing))]
    pub(crate) fn on_socket(socket: OwnedFd, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        Self::with("net0", Tap::stand_in(socket), mac, mtu)
    }

    fn with(name: &str, tap: Tap, mac: [u8; 6], mtu: Option<u16>) -> Result<Self, NetError> {
        let name = name.to_owned();
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NetError::Mac { device: name, mac });
        }
        if let Some(mtu @ ..68) = mtu {
            return Err(NetError::Mtu { device: name, mtu });
        }
        let (running, chain, stats) = (None, Chain::default(), NicStats::default());
        Ok(Self { name, tap, mac, mtu, link_up: true, running, chain, pieces: IoVecs::default(), stats })
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&(if self.link_up { LINK_UP } else { 0 }).to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        config
    }

    /// Sends what is available, within a queue's size of frames.
    fn transmit(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let memory = running.memory.memory();
        for _ in 0..running.tx.size() {
            if !running.tx.pop(&memory, &mut self.chain)? {
                if running.tx.enable_notification(&memory)? {
                    continue;
                }
                return running.tx.signal(&memory);
            }
            self.transmit_one(&memory)?;
            running.tx.push(&memory, self.chain.head(), 0)?;
        }
        running.tx.look_again();
        running.tx.signal(&memory)
    }

    fn transmit_one(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let bytes = self.chain.readable_bytes();
        if bytes < HEADER_BYTES as u64 {
            return Err(ChainError::Short { have: bytes, need: HEADER_BYTES as u64 });
        }
        if bytes > MAX_FRAME_BYTES as u64 {
            self.stats.tx_dropped += 1;
            return Ok(());
        }
        self.pieces.clear(MAX_PIECES);
        self.chain.iovecs(memory, Half::Readable, (0, bytes), MAX_PIECES, self.pieces.entries())?;
        // A tap that is down or full refuses, as does the kernel a header that makes no sense.
        match self.tap.write(&self.pieces) {
            Ok(()) => {
                self.stats.tx_packets += 1;
                self.stats.tx_bytes += bytes - HEADER_BYTES as u64;
            }
            Err(_) => self.stats.tx_dropped += 1,
        }
        Ok(())
    }

    /// Receives while there are frames and buffers, within [`RX_BUDGET`].
    fn receive(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let memory = running.memory.memory().into_inner();
        running.receiver.remap(&mut running.rx, &memory);
        let mut ready = running.receiver.prepare(&mut running.rx, &mut self.chain, &mut self.stats)?;
        for _ in 0..RX_BUDGET {
            if !ready || running.watch.is_none() {
                break;
            }
            match running.receiver.read(&self.tap) {
                Ok(()) => {
                    ready = running.receiver.prepare(&mut running.rx, &mut self.chain, &mut self.stats)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => {
                    self.tap_gone(running);
                    break;
                }
            }
        }
        let Running { rx, watch, .. } = running;
        if let Some(watch) = watch {
            watch.frames(ready);
        }
        rx.signal(&memory)
    }

    /// The interface was deleted: the driver loses its link. Watching on would announce that for ever.
    fn tap_gone(&mut self, running: &mut Running) {
        running.watch = None;
        self.link_up = false;
        running.interrupt.config();
    }

    fn work(&mut self, running: &mut Running, token: u32, events: EventSet) -> Result<(), ChainError> {
        match token {
            RX => {
                running.rx.take_notification();
                self.receive(running)
            }
            TAP if events.intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                self.tap_gone(running);
                Ok(())
            }
            TAP => self.receive(running),
            TX => {
                running.tx.take_notification();
                self.transmit(running)
            }
            _ => Ok(()),
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        use feature::*;
        let both = CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
        let uso = if self.tap.has_uso() { GUEST_USO4 | GUEST_USO6 | HOST_USO } else { 0 };
        let mtu = if self.mtu.is_some() { MTU } else { 0 };
        both | uso | mtu | MAC | STATUS | MRG_RXBUF | VIRTIO_F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt, watcher } = activation;
        self.tap.set_offload(features).map_err(|error| {
            ActivateError::Backend(format!("{}: TUNSETOFFLOAD failed: {error}", self.name))
        })?;
        let mut queues = queues.into_iter();
        let rx = ServedQueue::new(queues.next().flatten(), 0, &watcher, &interrupt)?;
        let tx = ServedQueue::new(queues.next().flatten(), 1, &watcher, &interrupt)?;
        let frame_bytes = match features & feature::GUEST_LARGE {
            0 => HEADER_BYTES + 18 + usize::from(self.mtu.unwrap_or(1500)),
            _ => MAX_FRAME_BYTES,
        };
        let mergeable = features & feature::MRG_RXBUF != 0;
        let receiver = Receiver::new(memory.memory().into_inner(), frame_bytes, mergeable);
        let watch = TapWatch::new(self.tap.as_raw_fd(), watcher).map_err(ActivateError::Watch)?;
        self.running = Some(Running { rx, tx, receiver, memory, interrupt, watch: Some(watch) });
        Ok(())
    }

    fn reset(&mut self) {
        self.running = None;
    }

    fn on_event(&mut self, token: u32, events: EventSet) {
        let Some(mut running) = self.running.take() else { return };
        match self.work(&mut running, token, events) {
            Ok(()) => self.running = Some(running),
            Err(error) => running.interrupt.needs_reset(&error.to_string()),
        }
    }

    fn stats(&self) -> DeviceStats {
        DeviceStats::Nic(self.stats)
    }
}
