//! Virtio devices, independent of how they are attached (virtio 1.2, <https://docs.oasis-open.org/virtio/virtio/v1.2/>).
//!
//! A device is a state machine behind [`VirtioDevice`]. The transport (`crate::pci::virtio`) owns the registers and the
//! queues until the driver sets DRIVER_OK, then hands everything over with [`VirtioDevice::activate`] and takes it back
//! with [`VirtioDevice::reset`]. One thread runs all devices: it waits on one epoll descriptor ([`Watcher`]) and calls
//! [`VirtioDevice::on_event`] under the device's mutex.
//!
//! ```text
//! vCPU thread ── config access, DRIVER_OK, reset ──▶ transport ──▶ Mutex<dyn VirtioDevice>
//!        guest ── notify ──▶ ioeventfd ──▶ epoll ──▶ device thread ──▶ on_event ──▶ irqfd ──▶ guest
//! ```
//!
//! The guest is hostile: a device never panics, never loops without a bound over what the guest controls, and answers a
//! broken rule with [`Interrupt::needs_reset`].

pub mod balloon;
pub mod block;
mod chain;
mod iovecs;
pub mod mem;
pub mod net;
pub mod rng;
mod served;
#[cfg(any(test, fuzzing))]
#[allow(clippy::unwrap_used, reason = "whatever fails here fails a test")]
#[cfg_attr(fuzzing, allow(dead_code, reason = "tests need more of it"))]
pub(crate) mod testing;
pub mod vsock;

use std::cell::Cell;
use std::os::fd::RawFd;
use std::sync::Arc;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Guest memory as devices see it; the map may be swapped while they run (memory hotplug).
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A chain may be a table of its own, taking one entry of the queue (virtio 1.2, 2.7.5.3). Every device can read such chains;
/// offered where requests have many pieces.
pub const VIRTIO_F_RING_INDIRECT_DESC: u64 = 1 << 28;
/// The driver says after which entry it wants to be interrupted, and the device likewise (virtio 1.2, 2.7.10).
pub const VIRTIO_F_RING_EVENT_IDX: u64 = 1 << 29;

/// Makes reads and writes of `fd` return instead of waiting.
fn set_nonblocking(fd: &impl std::os::fd::AsRawFd) -> std::io::Result<()> {
    // SAFETY: F_GETFL only reads the flags of a descriptor number.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(std::io::Error::last_os_error());
    }
    if flags & libc::O_NONBLOCK == 0 {
        // SAFETY: F_SETFL takes an integer and touches no memory of ours.
        let set = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        if set < 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Reads a configuration space; bytes beyond its end read as zero.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let known = (config.len() - start).min(data.len());
    data[..known].copy_from_slice(&config[start..start + known]);
    data[known..].fill(0);
}

/// Whether a target in the configuration space has changed under a driver that has not read it since.
///
/// Nothing in virtio acknowledges a change of the configuration. But a driver has to read a target before it can follow it, and Linux' reads
/// it between two runs, never within one (`virtio_mem_run_wq`, `update_balloon_size_func`): what it does until then may still be for an
/// earlier target, what it does afterwards is for this one.
#[derive(Default)]
struct Unread(Cell<bool>);

impl Unread {
    /// The driver has read its configuration space at `offset`, and the target begins at `target`. True when it is news to it.
    fn read(&self, offset: u64, data: &[u8], target: u64) -> bool {
        // A target in two halves is read from below: with its lowest byte the other half is as new.
        (offset..offset.saturating_add(data.len() as u64)).contains(&target) && self.0.replace(false)
    }

    fn set(&self, unread: bool) {
        self.0.set(unread);
    }

    fn get(&self) -> bool {
        self.0.get()
    }
}

/// Virtio device ids that Lathe has (virtio 1.2, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Memory balloon.
    Balloon = 5,
    /// Socket device.
    Vsock = 19,
    /// Memory device.
    Mem = 24,
}

/// How a device reaches its driver. Calls are cheap and may come from any thread.
pub trait Interrupt: Send + Sync {
    /// A used buffer notification for the queue, sent now (the device has asked `needs_notification` before).
    fn queue(&self, queue_index: u16);
    /// The configuration changed.
    fn config(&self);
    /// The driver broke a rule: sets DEVICE_NEEDS_RESET, interrupts, and reports `reason` to whoever runs the machine.
    fn needs_reset(&self, reason: &str);
}

/// How devices that give and take memory reach whoever runs the machine. Calls are cheap and may come from any thread.
pub trait MemoryReport: Send + Sync {
    /// The guest has more or less memory than before, its driver has noticed that this is what it shall have, or a driver came or went.
    fn memory_changed(&self);
    /// Nobody can say any more what memory the guest has: the machine must end.
    fn memory_lost(&self, reason: &str);
}

/// One device's door to the epoll descriptor of the device thread.
#[derive(Clone)]
pub struct Watcher {
    epoll: Arc<Epoll>,
    device: u32,
}

impl Watcher {
    /// For device number `device` (its place in the loop's table).
    pub fn new(epoll: Arc<Epoll>, device: u32) -> Self {
        Self { epoll, device }
    }

    fn control(&self, op: ControlOperation, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.epoll.ctl(op, fd, EpollEvent::new(events, (u64::from(self.device) << 32) | u64::from(token)))
    }

    /// Calls `on_event(token, …)` whenever `fd` is ready for `events`.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn add(&self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.control(ControlOperation::Add, fd, token, events)
    }

    /// Changes what is waited for.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn modify(&self, fd: RawFd, token: u32, events: EventSet) -> std::io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, events)
    }

    /// Stops watching. An event already taken from the kernel may still arrive: devices ignore tokens they do not know.
    ///
    /// # Errors
    /// What epoll_ctl(2) says.
    pub fn remove(&self, fd: RawFd) -> std::io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())
    }
}

/// One queue as the driver configured it (validated by the transport: `Queue::is_valid`), and the descriptor that its
/// notifications arrive on.
pub struct ActiveQueue {
    /// The queue.
    pub queue: Queue,
    /// Signalled by the guest's notification (ioeventfd). The device makes it non-blocking and may signal it itself.
    pub notify: EventFd,
}

/// What a device gets when its driver says DRIVER_OK.
pub struct Activation {
    /// Guest memory.
    pub memory: Memory,
    /// As many as [`VirtioDevice::queue_sizes`]; `None` for queues that the driver did not enable.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Features that both sides have.
    pub features: u64,
    /// Towards the driver.
    pub interrupt: Arc<dyn Interrupt>,
    /// Towards the device thread.
    pub watcher: Watcher,
}

/// A device refused to start.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot do without.
    #[error("queue {0} was not enabled")]
    MissingQueue(u16),
    /// A descriptor could not be watched.
    #[error("cannot watch a descriptor: {0}")]
    Watch(std::io::Error),
    /// The device's own resource failed.
    #[error("{0}")]
    Backend(String),
}

/// One virtio device. Methods are called under the device's mutex.
pub trait VirtioDevice: Send {
    /// Which device it is.
    fn kind(&self) -> DeviceKind;
    /// Name in events and logs: `block0`, `net0`, `vsock`, `rng`, `mem`, `balloon`.
    fn name(&self) -> &str;
    /// Feature bits offered, without those of the transport (VIRTIO_F_VERSION_1 is added there; VIRTIO_F_RING_EVENT_IDX is the
    /// device's choice and set on the queues by the transport when negotiated).
    fn features(&self) -> u64;
    /// Largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Reads the device's configuration space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device's configuration space; what is not writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// DRIVER_OK. On error the transport marks the device as needing a reset.
    ///
    /// # Errors
    /// When the device cannot work with what the driver set up; it stays inactive.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Back to the state before `activate`. When it returns, nothing of the device touches guest memory any more (requests in
    /// flight have completed or were cancelled). Idempotent.
    fn reset(&mut self);
    /// A watched descriptor is ready. Does a bounded amount of work (at most a queue's size of chains per call).
    fn on_event(&mut self, token: u32, events: EventSet);
    /// Counters, if the device has any.
    fn stats(&self) -> DeviceStats {
        DeviceStats::None
    }
}

/// What a device has counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceStats {
    /// Nothing.
    None,
    /// A disk.
    Disk(crate::control::wire::DiskStats),
    /// A nic.
    Nic(crate::control::wire::NicStats),
}
