//! A driver and a device thread for tests of devices: real guest memory, real descriptors and epoll, no vCPU.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Activation, ActiveQueue, Interrupt, Memory, MemoryReport, VIRTIO_F_RING_EVENT_IDX, VirtioDevice, Watcher,
};

const RING_SPACE: u64 = 0x1_0000;
const DATA_START: u64 = 0x10_0000;
const DATA_SPACE: u64 = 0x10_0000;
/// How long a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(10);

/// Fresh guest memory: 16 MiB with a hole of 1 MiB at 4 MiB.
pub fn memory() -> Memory {
    let ranges = [(GuestAddress(0), 4 << 20), (GuestAddress(5 << 20), 11 << 20)];
    Memory::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

/// A buffer in guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub addr: u64,
    pub len: u32,
    pub writable: bool,
}

/// The driver's side of one queue.
pub struct Driver {
    pub memory: Memory,
    base: u64,
    size: u16,
    next_descriptor: u16,
    next_data: u64,
    available: u16,
    seen: u16,
}

impl Driver {
    pub fn new(memory: Memory, index: u16, size: u16) -> Self {
        let base = u64::from(index) * RING_SPACE;
        let driver = Self {
            memory,
            base,
            size,
            next_descriptor: 0,
            next_data: DATA_START + u64::from(index) * DATA_SPACE,
            available: 0,
            seen: 0,
        };
        driver.put(base, &vec![0u8; RING_SPACE as usize]);
        driver
    }

    fn put(&self, addr: u64, data: &[u8]) {
        self.memory.memory().write_slice(data, GuestAddress(addr)).unwrap();
    }

    fn available_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.available_ring() + 6 + 2 * u64::from(self.size) + 3) & !3
    }

    /// The device's side, as the transport would have set it up.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(self.base as u32), Some(0));
        queue.set_avail_ring_address(Some(self.available_ring() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used_ring() as u32), Some(0));
        queue.set_ready(true);
        assert!(queue.is_valid(&*self.memory.memory()));
        queue
    }

    fn allocate(&mut self, len: u32, writable: bool) -> Buffer {
        let buffer = Buffer { addr: self.next_data, len, writable };
        self.next_data += u64::from(len).next_multiple_of(16);
        buffer
    }

    /// All buffers may be used again.
    pub fn recycle(&mut self) {
        self.next_data = DATA_START + self.base / RING_SPACE * DATA_SPACE;
    }

    /// Data for the device.
    pub fn readable(&mut self, data: &[u8]) -> Buffer {
        let buffer = self.allocate(data.len() as u32, false);
        self.put(buffer.addr, data);
        buffer
    }

    /// Zeroed room for the device.
    pub fn writable(&mut self, len: u32) -> Buffer {
        let buffer = self.allocate(len, true);
        self.put(buffer.addr, &vec![0; len as usize]);
        buffer
    }

    /// What is in a buffer now.
    pub fn read(&self, buffer: Buffer) -> Vec<u8> {
        let mut data = vec![0; buffer.len as usize];
        self.memory.memory().read_slice(&mut data, GuestAddress(buffer.addr)).unwrap();
        data
    }

    fn descriptor(buffer: Buffer, flags: u16, next: u16) -> Vec<u8> {
        let flags = flags | if buffer.writable { 2 } else { 0 };
        [&buffer.addr.to_le_bytes()[..], &buffer.len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()]
            .concat()
    }

    /// Offers a chain of descriptors at fixed places: (buffer, extra flags, next). Returns the head.
    pub fn push_raw(&mut self, descriptors: &[(Buffer, u16, Option<u16>)]) -> u16 {
        let head = self.next_descriptor;
        for (buffer, flags, next) in descriptors {
            let bytes = Self::descriptor(*buffer, *flags, next.unwrap_or(0));
            self.put(self.base + 16 * u64::from(self.next_descriptor), &bytes);
            self.next_descriptor = (self.next_descriptor + 1) % self.size;
        }
        self.offer(head);
        head
    }

    /// Offers a chain by its head.
    pub fn offer(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + 2 * u64::from(self.available % self.size);
        self.put(slot, &head.to_le_bytes());
        self.set_available_index(self.available.wrapping_add(1));
    }

    /// Sets the available index.
    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.put(self.available_ring() + 2, &index.to_le_bytes());
    }

    /// The available index.
    pub fn available_index(&self) -> u16 {
        self.available
    }

    /// Wants to be interrupted once the used index passes `index` (VIRTIO_F_RING_EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.put(self.available_ring() + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
    }

    /// Offers a proper chain. Returns the head.
    pub fn push(&mut self, buffers: &[Buffer]) -> u16 {
        let (first, size) = (self.next_descriptor, self.size);
        let chain: Vec<_> = (1..=buffers.len() as u16)
            .map(|i| {
                let last = usize::from(i) == buffers.len();
                let next = (!last).then_some((first + i) % size);
                (buffers[usize::from(i) - 1], u16::from(!last), next)
            })
            .collect();
        self.push_raw(&chain)
    }

    /// Offers a chain by one descriptor and an indirect table.
    pub fn push_indirect(&mut self, buffers: &[Buffer]) -> u16 {
        let last = buffers.len() - 1;
        let table: Vec<u8> = buffers
            .iter()
            .enumerate()
            .flat_map(|(i, buffer)| Self::descriptor(*buffer, u16::from(i != last), (i + 1) as u16))
            .collect();
        let table = self.readable(&table);
        self.push_raw(&[(table, 4, None)])
    }

    /// Chains that the device has and that [`Driver::used`] has not reported back.
    pub fn outstanding(&self) -> u16 {
        self.available.wrapping_sub(self.seen)
    }

    /// What the device gave back since the last call: heads and lengths.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let mut out = Vec::new();
        let map = self.memory.memory();
        let index: u16 = map.read_obj(GuestAddress(self.used_ring() + 2)).unwrap();
        while self.seen != index {
            let slot = self.used_ring() + 4 + 8 * u64::from(self.seen % self.size);
            let (id, len) = (map.read_obj(GuestAddress(slot)), map.read_obj(GuestAddress(slot + 4)));
            out.push((id.unwrap(), len.unwrap()));
            self.seen = self.seen.wrapping_add(1);
        }
        out
    }
}

/// Records what the device said to its driver.
#[derive(Default)]
pub struct FakeInterrupt {
    queues: [AtomicU32; 5],
    configs: AtomicU32,
    broken: Mutex<Option<String>>,
}

impl FakeInterrupt {
    /// Notifications sent for a queue.
    pub fn queue_count(&self, index: usize) -> u32 {
        self.queues[index].load(Ordering::Relaxed)
    }

    /// Changes of the configuration announced.
    pub fn config_count(&self) -> u32 {
        self.configs.load(Ordering::Relaxed)
    }

    /// Why the device asked for a reset.
    pub fn broken(&self) -> Option<String> {
        self.broken.lock().unwrap().clone()
    }
}

impl Interrupt for FakeInterrupt {
    fn queue(&self, queue_index: u16) {
        self.queues[usize::from(queue_index)].fetch_add(1, Ordering::Relaxed);
    }

    fn config(&self) {
        self.configs.fetch_add(1, Ordering::Relaxed);
    }

    fn needs_reset(&self, reason: &str) {
        *self.broken.lock().unwrap() = Some(reason.to_owned());
    }
}

/// Counts what devices say of memory.
#[derive(Default)]
pub struct FakeReport {
    changes: AtomicU32,
}

impl FakeReport {
    /// Changes reported.
    pub fn changes(&self) -> u32 {
        self.changes.load(Ordering::Relaxed)
    }
}

impl MemoryReport for FakeReport {
    fn memory_changed(&self) {
        self.changes.fetch_add(1, Ordering::Relaxed);
    }

    fn memory_lost(&self, reason: &str) {
        panic!("{reason}");
    }
}

/// A device with its driver and its thread's loop, turned by hand.
pub struct Bench<D> {
    pub device: D,
    pub memory: Memory,
    pub queues: Vec<Driver>,
    pub interrupts: Arc<FakeInterrupt>,
    notify: Vec<EventFd>,
    epoll: Arc<Epoll>,
}

const DEVICE_NUMBER: u32 = 7;

impl<D: VirtioDevice> Bench<D> {
    /// Activates `device` with the given features.
    pub fn new(device: D, features: u64) -> Self {
        Self::on(memory(), device, features)
    }

    /// The same on memory that reaches as far as [`memory`]'s.
    pub fn on(memory: Memory, device: D, features: u64) -> Self {
        let mut bench = Self {
            device,
            memory,
            queues: Vec::new(),
            interrupts: Arc::default(),
            notify: Vec::new(),
            epoll: Arc::new(Epoll::new().unwrap()),
        };
        bench.start(features);
        bench
    }

    fn start(&mut self, features: u64) {
        let sizes = self.device.queue_sizes().to_vec();
        self.interrupts = Arc::default();
        self.notify = sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        self.queues =
            (0..).zip(&sizes).map(|(index, size)| Driver::new(self.memory.clone(), index, *size)).collect();
        let queues = self.queues.iter().zip(&self.notify).map(|(driver, notify)| {
            let mut queue = driver.queue();
            queue.set_event_idx(features & VIRTIO_F_RING_EVENT_IDX != 0);
            Some(ActiveQueue { queue, notify: notify.try_clone().unwrap() })
        });
        let activation = Activation {
            memory: self.memory.clone(),
            queues: queues.collect(),
            features,
            interrupt: self.interrupts.clone(),
            watcher: Watcher::new(self.epoll.clone(), DEVICE_NUMBER),
        };
        self.device.activate(activation).unwrap();
        self.turn();
    }

    /// Resets the device and activates it again with empty queues.
    pub fn restart(&mut self, features: u64) {
        self.device.reset();
        self.start(features);
    }

    /// Handles what is ready; returns how many events there were.
    pub fn turn(&mut self) -> usize {
        self.wait(0)
    }

    fn wait(&mut self, timeout_msec: i32) -> usize {
        let mut events = vec![EpollEvent::default(); 64];
        // Completions of io_uring are run in this thread and interrupt its waiting.
        let count = match self.epoll.wait(timeout_msec, &mut events) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => 0,
            result => result.unwrap(),
        };
        for event in &events[..count] {
            assert_eq!(event.data() >> 32, u64::from(DEVICE_NUMBER));
            self.device.on_event(event.data() as u32, event.event_set());
        }
        count
    }

    /// Notifies a queue.
    pub fn notify(&self, queue: usize) {
        self.notify[queue].write(1).unwrap();
    }

    /// Notifies a queue, then handles events until nothing is ready.
    pub fn kick(&mut self, queue: usize) {
        self.notify(queue);
        self.settle();
    }

    /// Handles events until nothing is ready.
    pub fn settle(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.turn() > 0 {
            assert!(Instant::now() < deadline, "the device is busy for ever");
        }
    }

    /// Handles events until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain for: {what}");
            self.wait(20);
        }
    }

    /// Waits until queue `index` has given back `count` chains.
    pub fn until_used(&mut self, index: usize, count: usize) -> Vec<(u32, u32)> {
        let mut all = Vec::new();
        self.until("used chains", |bench| {
            all.extend(bench.queues[index].used());
            all.len() >= count
        });
        all
    }
}
