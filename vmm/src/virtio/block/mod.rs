//! Block device (virtio 1.2, section 5.2) on a raw file or a block device, through io_uring.
//!
//! ```text
//! queue ─▶ Chain ─▶ request::parse ─▶ engine (kernel) ─▶ status byte, used ring, interrupt
//!                        └─ refused ─────────────────────▶
//! ```
//! Reads and writes go straight between guest memory and the file; nothing is copied, except where O_DIRECT cannot use the
//! guest's buffers. A flush is fdatasync(2) and is answered when that has returned; without VIRTIO_BLK_F_FLUSH every write
//! is durable (RWF_DSYNC) before its answer (5.2.6.2). Requests may complete in any order.
//!
//! Where a machine has rates, a request is not taken from the queue before its slot in time (`pace`): meanwhile the queue is not looked
//! at, and a timer wakes the device. What waits is the driver's still, so that a reset has nothing to give back.
//!
//! A request that makes no sense gets an error as its answer; a chain in which no answer fits stops the device.

mod backend;
mod engine;
mod pace;
mod request;
#[cfg(test)]
mod tests;
mod throttle;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use self::backend::Backend;
pub use self::backend::BlockError;
pub use self::engine::{Engine, REGISTER_FILES_UPDATE};
use self::engine::{Finished, Job};
use self::request::{HEADER_BYTES, Limits, MAX_RANGE_SECTORS, MAX_RANGES, Request, Status};
use self::throttle::Place;
pub use self::throttle::Throttle;
use super::chain::{Chain, ChainError, Half};
use super::served::ServedQueue;
use super::{
    ActivateError, Activation, DeviceKind, DeviceStats, Interrupt, Memory, VIRTIO_F_RING_EVENT_IDX,
    VIRTIO_F_RING_INDIRECT_DESC, VirtioDevice, Watcher,
};
use crate::control::wire::DiskStats;

/// What virtio calls a sector, in bytes, whatever the disk's own block is.
pub const SECTOR_BYTES: u64 = 512;
/// Longest serial in bytes.
pub const SERIAL_BYTES: usize = 20;
/// One queue; also the most requests in flight.
const QUEUE_SIZE: u16 = 128;
/// Most data buffers in one request, as told to the driver.
const SEG_MAX: u32 = 126;
/// Most pieces of host memory for one request: a buffer may span two memory regions.
const MAX_PIECES: usize = 2 * super::chain::MAX_SEGMENTS;

const VIRTIO_BLK_F_SEG_MAX: u64 = 1 << 2;
const VIRTIO_BLK_F_RO: u64 = 1 << 5;
const VIRTIO_BLK_F_BLK_SIZE: u64 = 1 << 6;
const VIRTIO_BLK_F_FLUSH: u64 = 1 << 9;
const VIRTIO_BLK_F_TOPOLOGY: u64 = 1 << 10;
const VIRTIO_BLK_F_DISCARD: u64 = 1 << 13;
const VIRTIO_BLK_F_WRITE_ZEROES: u64 = 1 << 14;

/// Token of the queue's notifications (its index).
const TOKEN_QUEUE: u32 = 0;
/// Token of the completions.
const TOKEN_COMPLETED: u32 = 1;
/// Token of the timer that tells when the next request is due.
const TOKEN_DUE: u32 = 2;

const CONFIG_BYTES: usize = 60;

/// The watch on a descriptor; ends when dropped.
struct Watched {
    fd: RawFd,
    watcher: Watcher,
}

impl Watched {
    fn new(fd: RawFd, token: u32, watcher: &Watcher) -> std::io::Result<Self> {
        watcher.add(fd, token, EventSet::IN)?;
        Ok(Self { fd, watcher: watcher.clone() })
    }

    /// Completions and the timer.
    fn both(engine: &mut Engine, watcher: &Watcher) -> std::io::Result<[Self; 2]> {
        let (completed, alarm) = (engine.completed().as_raw_fd(), engine.alarm().fd());
        Ok([Self::new(completed, TOKEN_COMPLETED, watcher)?, Self::new(alarm, TOKEN_DUE, watcher)?])
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let _ = self.watcher.remove(self.fd);
    }
}

struct Running {
    engine: Engine,
    queue: ServedQueue,
    memory: Memory,
    interrupt: Arc<dyn Interrupt>,
    write_through: bool,
    /// Everything available had been taken at last look; otherwise completions make room for more.
    starved: bool,
    /// Where the rates of the machine are asked.
    place: Place,
    watched: [Watched; 2],
}

impl Running {
    /// Ends it; when it returns, nothing is in flight.
    fn end(self) -> Engine {
        let Self { mut engine, queue, place, watched, .. } = self;
        drop((queue, place, watched));
        engine.alarm().went_off();
        engine.alarm().rest();
        engine.drain();
        engine
    }
}

/// A ring for a disk that may come later.
///
/// # Errors
/// When the kernel gives us none.
pub fn spare_ring() -> std::io::Result<Engine> {
    Engine::new(QUEUE_SIZE)
}

/// The device.
pub struct Block {
    name: String,
    serial: [u8; SERIAL_BYTES],
    /// While it does not run; `None` for ever once the disk has been closed.
    idle: Option<Engine>,
    backend: Backend,
    limits: Limits,
    config: [u8; CONFIG_BYTES],
    running: Option<Running>,
    chain: Chain,
    throttle: Arc<Throttle>,
    stats: DiskStats,
}

impl Block {
    /// A disk on `file`, a raw regular file or a block device. O_DIRECT is respected, if set.
    ///
    /// # Errors
    /// When the descriptor cannot be a disk: neither file nor block device, opened the wrong way, empty, or not a whole number
    /// of blocks; when `serial` is no printable ASCII of at most [`SERIAL_BYTES`].
    pub fn new(name: &str, file: OwnedFd, read_only: bool, serial: &str) -> Result<Self, BlockError> {
        Self::with_ring(name, file, read_only, serial, None)
    }

    /// The same with one of these rings ([`spare_ring`], [`Block::close`]), for no other can be had any more.
    ///
    /// # Errors
    /// As [`Block::new`]; when there is none left.
    pub fn with_spare(
        name: &str,
        file: OwnedFd,
        read_only: bool,
        serial: &str,
        spares: &mut Vec<Engine>,
    ) -> Result<Self, BlockError> {
        Self::with_ring(name, file, read_only, serial, Some(spares))
    }

    fn with_ring(
        name: &str,
        file: OwnedFd,
        read_only: bool,
        serial: &str,
        spares: Option<&mut Vec<Engine>>,
    ) -> Result<Self, BlockError> {
        let mut padded = [0; SERIAL_BYTES];
        let printable = serial.bytes().all(|byte| (0x20..0x7f).contains(&byte));
        match padded.get_mut(..serial.len()) {
            Some(part) if printable => part.copy_from_slice(serial.as_bytes()),
            _ => return Err(BlockError::Serial { device: name.to_owned(), serial: serial.to_owned() }),
        }
        let backend = Backend::new(name, file, read_only)?;
        let limits = Limits { disk_bytes: backend.bytes, block_bytes: backend.block_bytes, read_only };
        let config = config_space(&backend);
        let no_ring = |source| BlockError::Ring { device: name.to_owned(), entries: QUEUE_SIZE, source };
        let mut engine = match spares {
            None => Engine::new(QUEUE_SIZE).map_err(no_ring)?,
            Some(spares) => spares.pop().ok_or_else(|| BlockError::NoSpare { device: name.to_owned() })?,
        };
        engine.open(backend.fd()).map_err(no_ring)?;
        Ok(Self {
            name: name.to_owned(),
            serial: padded,
            idle: Some(engine),
            backend,
            limits,
            config,
            running: None,
            chain: Chain::default(),
            throttle: Arc::default(),
            stats: DiskStats::default(),
        })
    }

    /// The same disk within the rates of `throttle`, which other disks may share. Before its driver starts it.
    #[must_use]
    pub fn within(self, throttle: &Arc<Throttle>) -> Self {
        Self { throttle: throttle.clone(), ..self }
    }

    /// The rates are others than before: what waits is looked at again.
    pub fn rates_changed(&self) {
        if let Some(running) = &self.running {
            running.queue.look_again();
        }
    }

    /// What the guest reads as its serial.
    pub fn serial(&self) -> String {
        self.serial.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect()
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.backend.bytes
    }

    /// Looks how large the file is now; when it has grown, the driver is told. Returns the new size in bytes.
    ///
    /// # Errors
    /// When it has become smaller, or is not a whole number of blocks: nothing was changed then.
    pub fn grow(&mut self) -> Result<u64, BlockError> {
        if self.backend.grow(&self.name)? {
            self.limits.disk_bytes = self.backend.bytes;
            self.config = config_space(&self.backend);
            if let Some(running) = &self.running {
                running.interrupt.config();
            }
        }
        Ok(self.backend.bytes)
    }

    /// Ends the disk for ever and gives its ring back, without a file; `None` when that is beyond use.
    pub fn close(&mut self) -> Option<Engine> {
        self.reset();
        self.idle.take()?.close()
    }

    /// Starts what is available, within a queue's size of chains.
    fn serve(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let memory = running.memory.memory().into_inner();
        running.starved = false;
        for _ in 0..running.queue.size() {
            if !running.engine.has_room() {
                running.starved = true;
                running.place.leave();
                break;
            }
            if let Err(at) = running.place.ask() {
                if !running.engine.alarm().set(at) {
                    running.queue.look_again();
                }
                return Ok(());
            }
            if !running.queue.pop(&memory, &mut self.chain)? {
                if running.queue.enable_notification(&memory)? {
                    continue;
                }
                return Ok(());
            }
            self.start(running, &memory)?;
        }
        if !running.starved {
            running.queue.look_again();
        }
        Ok(())
    }

    /// Starts the request in `self.chain`, or answers it at once.
    fn start(&mut self, running: &mut Running, memory: &Arc<GuestMemoryMmap>) -> Result<(), ChainError> {
        let chain = &self.chain;
        let refused = |status| (status, 0);
        let (status, written) = match request::parse(chain, memory, &self.limits)? {
            Err(status) => refused(status),
            Ok(Request::GetId) => {
                let len =
                    usize::try_from(chain.writable_bytes() - 1).unwrap_or(SERIAL_BYTES).min(SERIAL_BYTES);
                chain.write(memory, 0, &self.serial[..len])?;
                (Status::Ok, len as u64)
            }
            Ok(request) => {
                let status = chain.address_of(memory, Half::Writable, chain.writable_bytes() - 1)?;
                running.place.take(request.moved_bytes());
                let write_through = running.write_through;
                let job = Job { head: chain.head(), status, request, write_through, memory: memory.clone() };
                return running.engine.start(job, &self.backend, |pieces| match request {
                    Request::Read { len, .. } => {
                        chain.iovecs(memory, Half::Writable, (0, len), MAX_PIECES, pieces)
                    }
                    Request::Write { len, .. } => {
                        chain.iovecs(memory, Half::Readable, (HEADER_BYTES, len), MAX_PIECES, pieces)
                    }
                    _ => Ok(()),
                });
            }
        };
        if status != Status::Ok {
            self.stats.errors += 1;
        }
        chain.write(memory, chain.writable_bytes() - 1, &[status as u8])?;
        running.queue.push(memory, chain.head(), u32::try_from(written + 1).unwrap_or(u32::MAX))?;
        running.queue.signal(memory)
    }

    /// Answers what has completed.
    fn finish(&mut self, running: &mut Running) -> Result<(), ChainError> {
        let Running { engine, queue, .. } = running;
        let _ = engine.completed().read();
        let memory = running.memory.memory();
        let (stats, mut outcome) = (&mut self.stats, Ok(()));
        engine.reap(&self.backend, &memory, |finished| {
            if outcome.is_ok() {
                outcome = answer(finished, queue, &memory, stats);
            }
        });
        outcome?;
        queue.signal(&memory)
    }

    fn work(&mut self, running: &mut Running, token: u32) -> Result<(), ChainError> {
        match token {
            TOKEN_QUEUE => {
                running.queue.take_notification();
                self.serve(running)?;
            }
            TOKEN_COMPLETED => {
                self.finish(running)?;
                if running.starved {
                    self.serve(running)?;
                }
            }
            TOKEN_DUE => {
                running.engine.alarm().went_off();
                self.serve(running)?;
                running.engine.alarm().rest();
            }
            _ => return Ok(()),
        }
        if !running.engine.submit() {
            running.queue.look_again();
        }
        Ok(())
    }
}

/// Gives one chain back. `memory` is the map of now: what was there when the request began may be unplugged.
fn answer(
    finished: Finished,
    queue: &mut ServedQueue,
    memory: &GuestMemoryMmap,
    stats: &mut DiskStats,
) -> Result<(), ChainError> {
    let Finished { job, errno } = finished;
    let (mut status, mut written) = (Status::Ok, 0);
    match (errno, job.request) {
        (0, Request::Read { len, .. }) => {
            written = len;
            stats.reads += 1;
            stats.read_bytes += len;
        }
        (0, Request::Write { len, .. }) => {
            stats.writes += 1;
            stats.written_bytes += len;
        }
        (0, Request::Flush | Request::GetId) => stats.flushes += 1,
        (0, Request::Discard { .. } | Request::WriteZeroes { .. }) => stats.discards += 1,
        (_, request) => {
            stats.errors += 1;
            let optional = matches!(request, Request::Discard { .. } | Request::WriteZeroes { .. });
            status =
                if errno == libc::EOPNOTSUPP && optional { Status::Unsupported } else { Status::IoError };
        }
    }
    let outside = ChainError::Outside { addr: job.status.0, len: 1 };
    memory.write_obj(status as u8, job.status).map_err(|_| outside)?;
    queue.push(memory, job.head, u32::try_from(written + 1).unwrap_or(u32::MAX))
}

/// `struct virtio_blk_config` of 5.2.4.
fn config_space(backend: &Backend) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    let blocks_per_physical = backend.physical_bytes / backend.block_bytes;
    put(0, &(backend.bytes / SECTOR_BYTES).to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &backend.block_bytes.to_le_bytes());
    put(24, &[blocks_per_physical.trailing_zeros() as u8]);
    put(26, &u16::try_from(blocks_per_physical).unwrap_or(1).to_le_bytes());
    put(34, &1u16.to_le_bytes());
    put(36, &MAX_RANGE_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    put(44, &(backend.physical_bytes / SECTOR_BYTES as u32).to_le_bytes());
    put(48, &MAX_RANGE_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    put(56, &[1]);
    config
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let changes = match self.limits.read_only {
            true => VIRTIO_BLK_F_RO,
            false => VIRTIO_BLK_F_FLUSH | VIRTIO_BLK_F_DISCARD | VIRTIO_BLK_F_WRITE_ZEROES,
        };
        changes
            | VIRTIO_BLK_F_SEG_MAX
            | VIRTIO_BLK_F_BLK_SIZE
            | VIRTIO_BLK_F_TOPOLOGY
            | VIRTIO_F_RING_EVENT_IDX
            | VIRTIO_F_RING_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, features, interrupt, watcher } = activation;
        let queue = ServedQueue::new(queues.into_iter().next().flatten(), 0, &watcher, &interrupt)?;
        let write_through = features & VIRTIO_BLK_F_FLUSH == 0;
        let Some(mut engine) = self.idle.take() else {
            return Err(ActivateError::Backend("the disk has gone".to_owned()));
        };
        match Watched::both(&mut engine, &watcher) {
            Ok(watched) => {
                let (starved, place) = (false, self.throttle.place());
                let running =
                    Running { engine, queue, memory, interrupt, write_through, starved, place, watched };
                self.running = Some(running);
                Ok(())
            }
            Err(error) => {
                self.idle = Some(engine);
                Err(ActivateError::Watch(error))
            }
        }
    }

    fn reset(&mut self) {
        if let Some(running) = self.running.take() {
            self.idle = Some(running.end());
        }
    }

    fn on_event(&mut self, token: u32, _events: EventSet) {
        let Some(mut running) = self.running.take() else { return };
        match self.work(&mut running, token) {
            Ok(()) => self.running = Some(running),
            Err(error) => {
                running.interrupt.needs_reset(&error.to_string());
                self.idle = Some(running.end());
            }
        }
    }

    fn stats(&self) -> DeviceStats {
        DeviceStats::Disk(self.stats)
    }
}
