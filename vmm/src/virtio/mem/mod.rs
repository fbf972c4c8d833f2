//! Memory device (virtio 1.2, section 5.15): the guest plugs and unplugs blocks of a region, as far as it is asked to.
//!
//! ```text
//! set_requested ─▶ configuration interrupt ─▶ driver ─▶ PLUG, UNPLUG … ─▶ Region ─▶ ACK
//! ```
//!
//! - VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE is demanded, since the region really is: Linux has it since 5.16. A driver without is not
//!   served. VIRTIO_MEM_F_ACPI_PXM is not offered: there is one NUMA node.
//! - All of the region is usable always. Growing `usable_region_size` with each request, as QEMU does, keeps blocks together, but Linux
//!   takes the lowest ones anyhow, and a size that never changes has no races.
//! - After a change of what is requested the driver may be in a run for an earlier size. Until it has read the new one (`Unread`) it unplugs
//!   nothing below it: BUSY, which is allowed at any time (5.15.6.4.2). Afterwards it may unplug as it likes: Linux does so with blocks that
//!   it has plugged and cannot use after all, and would do nothing else any more if that was refused. UNPLUG ALL is never refused.
//! - A reset by the driver unplugs nothing (5.15.5.2): the next driver asks for the state, or unplugs all. A restart of the machine
//!   unplugs all and keeps what is requested, so that the next boot plugs as much again.

use std::ops::Range;
use std::sync::Arc;

use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::chain::{Chain, ChainError};
use super::served::ServedQueue;
use super::{
    ActivateError, Activation, DeviceKind, Interrupt, Memory, MemoryReport, Unread, VIRTIO_F_RING_EVENT_IDX,
    VirtioDevice,
};
use crate::hotmem::{BLOCK_BYTES, Plugged, Refused, Region};

const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// One queue; the Linux driver has one request outstanding.
const QUEUE_SIZES: [u16; 1] = [16];
const CONFIG_BYTES: usize = 56;
/// `requested_size` of `struct virtio_mem_config` (5.15.4).
const CONFIG_REQUESTED: u64 = 48;
/// `struct virtio_mem_req` and `struct virtio_mem_resp` (5.15.6).
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: usize = 10;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// First word of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Reply {
    /// Done.
    Ack = 0,
    /// More than is requested: the driver waits for a change of the configuration.
    Nack = 1,
    /// Not now: the driver tries again later, and when its configuration changes.
    Busy = 2,
    /// The request makes no sense.
    Error = 3,
}

struct Running {
    queue: ServedQueue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
}

/// The device.
pub struct MemDevice {
    region: Region,
    /// Guest address of the region.
    start: u64,
    /// Most that may be requested; the region may be larger, because it ends with a whole memory block of the guest.
    limit: u64,
    requested: u64,
    unread: Unread,
    running: Option<Running>,
    chain: Chain,
    report: Arc<dyn MemoryReport>,
}

/// What of a [`MemDevice`] there is to see, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemState {
    /// Most that may be requested.
    pub limit: u64,
    /// What is requested.
    pub requested: u64,
    /// What is plugged.
    pub plugged: u64,
    /// A driver is there.
    pub driver: bool,
    /// What is requested has changed since it read that.
    pub unread: bool,
}

impl MemDevice {
    /// A device for `region` at guest address `start`, of which `limit` bytes may be plugged.
    pub fn new(region: Region, start: u64, limit: u64, report: Arc<dyn MemoryReport>) -> Self {
        let (unread, chain) = (Unread::default(), Chain::default());
        Self { region, start, limit, requested: 0, unread, running: None, chain, report }
    }

    /// What there is to see.
    pub fn state(&self) -> MemState {
        MemState {
            limit: self.limit,
            requested: self.requested,
            plugged: self.region.plugged_bytes(),
            driver: self.running.is_some(),
            unread: self.running.is_some() && self.unread.get(),
        }
    }

    /// Asks the guest to have `bytes` plugged; without a driver it is remembered.
    ///
    /// # Errors
    /// A sentence, when it is no multiple of a block or too much.
    pub fn set_requested(&mut self, bytes: u64) -> Result<(), String> {
        if bytes > self.limit || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(format!(
                "{bytes} bytes of pluggable memory; a multiple of {BLOCK_BYTES} up to {} is possible",
                self.limit
            ));
        }
        // The same again is a reminder: Linux retries by itself, but less and less often.
        let before = std::mem::replace(&mut self.requested, bytes);
        if let Some(running) = &self.running {
            self.unread.set(self.unread.get() || before != bytes);
            running.interrupt.config();
        }
        Ok(())
    }

    /// Takes all memory back without asking. The device must have been reset and the guest must stand still.
    ///
    /// # Errors
    /// What the host says.
    pub fn withdraw(&mut self) -> Result<(), Refused> {
        self.region.unplug_all()
    }

    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let bytes = self.region.bytes();
        let words = [(0, BLOCK_BYTES), (16, self.start), (24, bytes), (32, bytes)];
        let changing = [(40, self.region.plugged_bytes()), (48, self.requested)];
        for (at, value) in words.into_iter().chain(changing) {
            config[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        config
    }

    /// The blocks that a request names, if they are blocks of the region.
    fn blocks(&self, request: &[u8; REQUEST_BYTES]) -> Option<Range<u64>> {
        let address = u64::from_le_bytes(*request[8..].first_chunk()?);
        let count = u64::from(u16::from_le_bytes(*request[16..].first_chunk()?));
        let start = address.checked_sub(self.start)?;
        let end = start.checked_add(count * BLOCK_BYTES)?;
        (count > 0 && start.is_multiple_of(BLOCK_BYTES) && end <= self.region.bytes()).then_some(start..end)
    }

    /// A driver that does not know yet what is requested would go below it with blocks that it has.
    fn goes_astray(&self, blocks: &Range<u64>) -> bool {
        let left = self.region.plugged_bytes().saturating_sub(blocks.end - blocks.start);
        left < self.requested && self.unread.get() && self.region.state(blocks) == Plugged::All
    }

    /// Carries a request out: the answer and, if it was asked for, the state.
    fn handle(&mut self, request: &[u8; REQUEST_BYTES]) -> (Reply, u16) {
        let kind = u16::from_le_bytes([request[0], request[1]]);
        if kind == UNPLUG_ALL {
            let result = self.region.unplug_all();
            return (self.reply(result), 0);
        }
        let Some(blocks) = self.blocks(request) else { return (Reply::Error, 0) };
        let result = match kind {
            PLUG if self.region.plugged_bytes() + (blocks.end - blocks.start) > self.requested => {
                return (Reply::Nack, 0);
            }
            PLUG => self.region.plug(blocks),
            UNPLUG if self.goes_astray(&blocks) => return (Reply::Busy, 0),
            UNPLUG => self.region.unplug(&blocks),
            STATE => {
                let state = match self.region.state(&blocks) {
                    Plugged::All => STATE_PLUGGED,
                    Plugged::Nothing => STATE_UNPLUGGED,
                    Plugged::Some => STATE_MIXED,
                };
                return (Reply::Ack, state);
            }
            _ => return (Reply::Error, 0),
        };
        (self.reply(result), 0)
    }

    fn reply(&self, result: Result<(), Refused>) -> Reply {
        match result {
            Ok(()) => {
                self.report.memory_changed();
                Reply::Ack
            }
            Err(Refused::State) => Reply::Error,
            Err(Refused::Busy(_)) => Reply::Busy,
            Err(lost @ Refused::Lost { .. }) => {
                self.report.memory_lost(&lost.to_string());
                Reply::Busy
            }
        }
    }

    fn answer(&mut self, memory: &GuestMemoryMmap) -> Result<(), ChainError> {
        let mut request = [0; REQUEST_BYTES];
        self.chain.read(memory, 0, &mut request)?;
        let room = self.chain.writable_bytes();
        if room < RESPONSE_BYTES as u64 {
            // Nothing may happen that cannot be answered.
            return Err(ChainError::Short { have: room, need: RESPONSE_BYTES as u64 });
        }
        let (reply, state) = self.handle(&request);
        let mut response = [0; RESPONSE_BYTES];
        response[..2].copy_from_slice(&(reply as u16).to_le_bytes());
        response[8..].copy_from_slice(&state.to_le_bytes());
        let Some(running) = &mut self.running else { return Ok(()) };
        // The map may be another one by now.
        let memory = running.memory.memory();
        self.chain.write(&memory, 0, &response)?;
        running.queue.push(&memory, self.chain.head(), RESPONSE_BYTES as u32)
    }

    fn serve(&mut self) -> Result<(), ChainError> {
        let rounds = self.running.as_ref().map_or(0, |running| running.queue.size());
        for _ in 0..rounds {
            let Some(running) = &mut self.running else { return Ok(()) };
            let memory = running.memory.memory().into_inner();
            if !running.queue.pop(&memory, &mut self.chain)? {
                if running.queue.enable_notification(&memory)? {
                    continue;
                }
                return running.queue.signal(&memory);
            }
            self.answer(&memory)?;
        }
        let Some(running) = &mut self.running else { return Ok(()) };
        running.queue.look_again();
        running.queue.signal(&running.memory.memory())
    }
}

impl VirtioDevice for MemDevice {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Mem
    }

    fn name(&self) -> &str {
        "mem"
    }

    fn features(&self) -> u64 {
        VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE | VIRTIO_F_RING_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config(), offset, data);
        let news = self.unread.read(offset, data, CONFIG_REQUESTED);
        // Otherwise it will soon be told with what the driver does about it.
        if news && self.region.plugged_bytes() == self.requested {
            self.report.memory_changed();
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt, watcher } = activation;
        if features & VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE == 0 {
            let message = "mem: the driver would touch unplugged memory; Linux does not from 5.16 on";
            return Err(ActivateError::Backend(message.to_owned()));
        }
        let queue = ServedQueue::new(queues.into_iter().next().flatten(), 0, &watcher, &interrupt)?;
        self.running = Some(Running { queue, memory, interrupt });
        self.report.memory_changed();
        Ok(())
    }

    fn reset(&mut self) {
        self.unread.set(false);
        if self.running.take().is_some() {
            self.report.memory_changed();
        }
    }

    fn on_event(&mut self, _token: u32, _events: EventSet) {
        let Some(running) = &self.running else { return };
        running.queue.take_notification();
        if let Err(error) = self.serve()
            && let Some(running) = self.running.take()
        {
            running.interrupt.needs_reset(&error.to_string());
            self.report.memory_changed();
        }
    }
}

#[cfg(test)]
mod tests;
