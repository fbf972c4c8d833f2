//! A virtio device as a PCI function (virtio 1.2, section 4.1, modern only).
//!
//! ```text
//! BAR 0, 32 KiB:  0x0000 common registers   0x1000 ISR         0x2000 device configuration
//!                 0x3000 notifications, 4 bytes per queue      0x4000 MSI-X table   0x5000 pending bits
//! ```
//!
//! Notifications reach the device thread by ioeventfd, interrupts the guest by irqfd; both are KVM's, behind [`Host`]. There is
//! no INTx. The queues are the driver's until DRIVER_OK, then the device's until reset.
//!
//! Taking bus mastering away (PCI local bus 3.0, 6.2.2, command bit 2) is a reset, too. It is how Linux stops devices before a kexec
//! (pci_device_shutdown), without a word to their drivers: a queue that lived on would be written to in the next kernel's memory. It is no
//! pause that ends with the bit: rings whose place the device has forgotten are of no use. A driver that never sets the bit is served, as
//! other monitors do.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::common::{CommonRegisters, Effect, LENGTH as COMMON_LENGTH, NO_VECTOR, QueueRegisters};
use super::config::{ConfigSpace, Identity};
use super::msix::{CONTROL_ENABLE, CONTROL_MASK_ALL, ENTRY_BYTES, MsiSink, Msix};
use super::{BAR_SIZE, PciFunction};
use crate::arch::x86_64::irq::Message;
use crate::virtio::{Activation, ActiveQueue, DeviceKind, Interrupt, Memory, VirtioDevice, Watcher};

const ISR: u64 = 0x1000;
const DEVICE_CONFIG: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;
const NOTIFY_STEP: u64 = 4;
/// Most queues of one device.
const MAX_QUEUES: usize = 64;

const VENDOR_VIRTIO: u16 = 0x1af4;
const FIRST_MODERN_DEVICE: u16 = 0x1040;
const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const FEATURE_EVENT_IDX: u64 = 1 << 29;
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the function needs of KVM and of the machine.
pub trait Host: Send + Sync {
    /// Lets a guest write anywhere in the 4 bytes at `address` signal `fd`.
    ///
    /// # Errors
    /// When KVM refuses.
    fn connect_notify(&self, fd: &EventFd, address: u64) -> std::io::Result<()>;
    /// Undoes [`Host::connect_notify`].
    fn disconnect_notify(&self, fd: &EventFd, address: u64);
    /// A device's driver broke the rules.
    fn device_needs_reset(&self, device: &str, reason: &str);
}

/// Connects one device's vectors to KVM. One per device.
pub trait VectorHost: Send {
    /// Connects `vector` to `message`; says whether that worked.
    fn route(&self, vector: u16, message: Message) -> bool;
    /// Raises the interrupt of a connected vector.
    fn fire(&self, vector: u16);
}

struct Sink(Box<dyn VectorHost>);
impl MsiSink for Sink {
    fn route(&self, vector: u16, message: Message) -> bool {
        self.0.route(vector, message)
    }

    fn fire(&self, vector: u16) {
        self.0.fire(vector);
    }
}

/// What the device thread and the vCPUs share of one function: the way from the device to the driver.
struct Line {
    name: String,
    isr: AtomicU8,
    needs_reset: AtomicBool,
    generation: AtomicU8,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    msix: Mutex<Msix<Sink>>,
    host: Arc<dyn Host>,
}

impl Line {
    fn raise(&self, cause: u8, vector: u16) {
        self.isr.fetch_or(cause, Ordering::AcqRel);
        if vector != NO_VECTOR {
            self.msix().raise(vector);
        }
    }

    fn msix(&self) -> std::sync::MutexGuard<'_, Msix<Sink>> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupt for Line {
    fn queue(&self, queue_index: u16) {
        let vector = self.queue_vectors.get(usize::from(queue_index));
        self.raise(ISR_QUEUE, vector.map_or(NO_VECTOR, |v| v.load(Ordering::Acquire)));
    }

    fn config(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.raise(ISR_CONFIG, self.config_vector.load(Ordering::Acquire));
    }

    fn needs_reset(&self, reason: &str) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.host.device_needs_reset(&self.name, reason);
            self.raise(ISR_CONFIG, self.config_vector.load(Ordering::Acquire));
        }
    }
}

/// Offsets of the capabilities that the guest writes to.
struct Offsets {
    msix: usize,
    window: usize,
}

/// See the module.
pub struct VirtioFunction {
    config: ConfigSpace,
    offsets: Offsets,
    common: CommonRegisters,
    line: Arc<Line>,
    device: Arc<Mutex<dyn VirtioDevice>>,
    memory: Memory,
    watcher: Watcher,
    /// Notification descriptors of the running device, with the address they are connected at.
    active: Vec<(EventFd, u64)>,
}

/// What [`VirtioFunction::new`] is made from.
pub struct FunctionParts {
    /// The device.
    pub device: Arc<Mutex<dyn VirtioDevice>>,
    /// Guest memory.
    pub memory: Memory,
    /// The device's door to the device thread.
    pub watcher: Watcher,
    /// The machine.
    pub host: Arc<dyn Host>,
    /// Makes the connection of the given number of vectors.
    pub vectors: Box<dyn VectorHost>,
    /// Where the BAR lies.
    pub bar: u32,
}

/// Vectors of a device with `queues` queues: one each and one for configuration changes.
pub fn vectors_of(queues: usize) -> u16 {
    queues.min(MAX_QUEUES) as u16 + 1
}

fn lock(device: &Mutex<dyn VirtioDevice>) -> std::sync::MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(kind: DeviceKind) -> Identity {
    let id = kind as u16;
    let class = match kind {
        DeviceKind::Net => 0x02_0000,
        DeviceKind::Block => 0x01_8000,
        DeviceKind::Rng | DeviceKind::Balloon | DeviceKind::Vsock | DeviceKind::Mem => 0xff_0000,
    };
    Identity {
        vendor: VENDOR_VIRTIO,
        device: FIRST_MODERN_DEVICE + id,
        class,
        revision: 1,
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: FIRST_MODERN_DEVICE + id,
    }
}

/// Body of a virtio capability after its two-byte header (section 4.1.4).
fn capability(kind: u8, offset: u64, length: u64, extra: Option<u32>) -> Vec<u8> {
    let total = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend((offset as u32).to_le_bytes());
    body.extend((length as u32).to_le_bytes());
    body.extend(extra.iter().flat_map(|e| e.to_le_bytes()));
    body
}

fn build_config(kind: DeviceKind, vectors: u16, bar: u32) -> (ConfigSpace, Offsets) {
    let mut config = ConfigSpace::new(&identity(kind));
    config.set_bar0(bar, BAR_SIZE as u32);
    let fixed = [
        capability(1, 0, COMMON_LENGTH, None),
        capability(3, ISR, 1, None),
        capability(4, DEVICE_CONFIG, REGION, None),
        capability(2, NOTIFY, REGION, Some(NOTIFY_STEP as u32)),
    ];
    for body in &fixed {
        config.add_capability(CAPABILITY_VENDOR, body, &[]);
    }
    // The window into the BAR (section 4.1.4.9): BAR number, offset, length and data may be written.
    let mut mask = vec![0, 0, 0xff, 0, 0, 0];
    mask.extend([0xff; 8]);
    let window =
        config.add_capability(CAPABILITY_VENDOR, &capability(5, 0, 0, Some(0)), &mask).unwrap_or_default();
    let mut msix = (vectors - 1).to_le_bytes().to_vec();
    msix.extend((MSIX_TABLE as u32).to_le_bytes());
    msix.extend((MSIX_PENDING as u32).to_le_bytes());
    let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes();
    let msix = config.add_capability(CAPABILITY_MSIX, &msix, &writable).unwrap_or_default();
    config.seal();
    (config, Offsets { msix, window })
}

impl VirtioFunction {
    /// Makes the function; nothing happens until the guest finds it.
    pub fn new(parts: FunctionParts) -> Self {
        let device = lock(&parts.device);
        let sizes: Vec<u16> = device.queue_sizes().iter().copied().take(MAX_QUEUES).collect();
        let vectors = vectors_of(sizes.len());
        let common = CommonRegisters::new(device.features(), &sizes, vectors);
        let (config, offsets) = build_config(device.kind(), vectors, parts.bar);
        let line = Arc::new(Line {
            name: device.name().to_owned(),
            isr: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            generation: AtomicU8::new(0),
            queue_vectors: sizes.iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            msix: Mutex::new(Msix::new(vectors, Sink(parts.vectors))),
            host: parts.host,
        });
        drop(device);
        Self {
            config,
            offsets,
            common,
            line,
            device: parts.device,
            memory: parts.memory,
            watcher: parts.watcher,
            active: Vec::new(),
        }
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Vectors => {
                for (vector, queue) in self.line.queue_vectors.iter().zip(self.common.queues()) {
                    vector.store(queue.vector, Ordering::Release);
                }
                self.line.config_vector.store(self.common.config_vector(), Ordering::Release);
            }
            Effect::Activate => {
                if let Err(reason) = self.activate() {
                    self.disconnect();
                    self.line.needs_reset(&reason);
                }
            }
            Effect::Reset => self.reset_device(),
        }
    }

    fn notify_address(&self, queue: usize) -> Option<u64> {
        Some(self.config.bar0()? + NOTIFY + NOTIFY_STEP * queue as u64)
    }

    fn activate(&mut self) -> Result<(), String> {
        let mut queues = Vec::with_capacity(self.common.queues().len());
        let event_idx = self.common.features() & FEATURE_EVENT_IDX != 0;
        let memory = self.memory.memory();
        for (index, registers) in self.common.queues().iter().enumerate() {
            if !registers.enabled {
                queues.push(None);
                continue;
            }
            let queue = checked_queue(registers, event_idx, &memory)
                .map_err(|reason| format!("queue {index}: {reason}"))?;
            let failed = |e: std::io::Error| format!("queue {index}: no notification: {e}");
            let notify = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed)?;
            let kept = notify.try_clone().map_err(failed)?;
            let address = self.notify_address(index).ok_or("memory decoding is off")?;
            self.line.host.connect_notify(&kept, address).map_err(failed)?;
            self.active.push((kept, address));
            queues.push(Some(ActiveQueue { queue, notify }));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            features: self.common.features(),
            interrupt: self.line.clone(),
            watcher: self.watcher.clone(),
        };
        lock(&self.device).activate(activation).map_err(|e| e.to_string())
    }

    fn disconnect(&mut self) {
        for (fd, address) in self.active.drain(..) {
            self.line.host.disconnect_notify(&fd, address);
        }
    }

    /// After a BAR has moved, notifications move with it. `active` holds the enabled queues in order.
    fn follow_bar(&mut self) {
        let enabled: Vec<usize> = (0..self.common.queues().len())
            .filter(|index| self.common.queues().get(*index).is_some_and(|q| q.enabled))
            .collect();
        for (slot, index) in enabled.into_iter().enumerate().take(self.active.len()) {
            let Some(address) = self.notify_address(index) else { return };
            let (fd, old) = &mut self.active[slot];
            if *old != address {
                self.line.host.disconnect_notify(fd, *old);
                if self.line.host.connect_notify(fd, address).is_err() {
                    self.line.needs_reset("its BAR was moved to where it cannot be notified");
                }
                *old = address;
            }
        }
    }

    fn reset_device(&mut self) {
        lock(&self.device).reset();
        self.disconnect();
        self.common.reset();
        self.line.isr.store(0, Ordering::Release);
        self.line.needs_reset.store(false, Ordering::Release);
        self.apply(Effect::Vectors);
    }

    /// The window of the PCI configuration access capability: (offset in the BAR, bytes), if the guest has set it up properly.
    fn window(&self, offset: u16, length: usize) -> Option<(u64, usize)> {
        let data = self.offsets.window + 16;
        if usize::from(offset) != data || self.config.byte(self.offsets.window + 4) != 0 {
            return None;
        }
        let at = u64::from(self.config.dword(self.offsets.window + 8));
        let want = self.config.dword(self.offsets.window + 12) as usize;
        (matches!(want, 1 | 2 | 4) && at % want as u64 == 0 && at < BAR_SIZE && length >= want)
            .then_some((at, want))
    }
}

/// Makes a queue from what the driver wrote, or says why not.
fn checked_queue(
    registers: &QueueRegisters,
    event_idx: bool,
    memory: &GuestMemoryMmap,
) -> Result<Queue, String> {
    let mut queue = Queue::new(registers.max_size).map_err(|e| e.to_string())?;
    let wrong = |e: virtio_queue::Error| e.to_string();
    queue.try_set_size(registers.size).map_err(|e| format!("{e}: {}", registers.size))?;
    queue.try_set_desc_table_address(GuestAddress(registers.descriptors)).map_err(wrong)?;
    queue.try_set_avail_ring_address(GuestAddress(registers.available)).map_err(wrong)?;
    queue.try_set_used_ring_address(GuestAddress(registers.used)).map_err(wrong)?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if queue.is_valid(memory) { Ok(queue) } else { Err("its rings lie outside of memory".to_owned()) }
}

impl PciFunction for VirtioFunction {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
        if let Some((at, length)) = self.window(offset, data.len()) {
            self.read_bar(at, &mut data[..length]);
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        let (bar, master) = (self.config.bar0(), self.config.is_bus_master());
        self.config.write(offset, data);
        if self.config.bar0() != bar {
            self.follow_bar();
        }
        if master && !self.config.is_bus_master() {
            self.reset_device();
        }
        if let Some((at, length)) = self.window(offset, data.len()) {
            self.write_bar(at, &data[..length]);
        }
        let control = self.offsets.msix + 2;
        let touched = usize::from(offset) < control + 2 && usize::from(offset) + data.len() > control;
        if touched {
            let value = u16::from_le_bytes([self.config.byte(control), self.config.byte(control + 1)]);
            self.line.msix().set_control(value);
        }
    }

    fn bar(&self) -> Option<u64> {
        self.config.bar0()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        let at = offset % REGION;
        match offset - at {
            0 => {
                let needs_reset = self.line.needs_reset.load(Ordering::Acquire);
                let generation = self.line.generation.load(Ordering::Acquire);
                self.common.read(at, data, needs_reset, generation);
            }
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    *first = self.line.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE_CONFIG => {
                data.fill(0);
                lock(&self.device).read_config(at, data);
            }
            MSIX_TABLE => self.line.msix().read_table(at, data),
            MSIX_PENDING => self.line.msix().read_pending(at, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let at = offset % REGION;
        match offset - at {
            0 => {
                let effect = self.common.write(at, data);
                self.apply(effect);
            }
            DEVICE_CONFIG => lock(&self.device).write_config(at, data),
            // Reached only by the window or before KVM takes notifications over.
            NOTIFY => {
                let address = self.config.bar0().map(|bar| bar + offset);
                if let Some((fd, _)) = self.active.iter().find(|(_, a)| Some(*a) == address) {
                    // A full counter means that the device has been told already.
                    let _ = fd.write(1);
                }
            }
            MSIX_TABLE if at < ENTRY_BYTES * u64::from(self.line.msix().vectors()) => {
                self.line.msix().write_table(at, data);
            }
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.line.msix().reset();
    }
}

#[cfg(test)]
#[path = "virtio_tests.rs"]
mod tests;
