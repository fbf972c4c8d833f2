//! Everything that a vCPU's exits reach: I/O ports and registers in memory, with real devices behind the PCI functions.
//!
//! KVM's part is played here: notifications are taken out of the writes, vectors are connected and fired, and the device thread's
//! loop is turned by hand.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::arena;
use super::devices::{disk, keep_disk};
use super::source::Source;
use crate::arch::x86_64::irq::Message;
use crate::arch::x86_64::layout;
use crate::bus::Bus;
use crate::console::{Console, RING_BYTES};
use crate::cpu_hotplug::{CpuHotplug, NEXT, NO_EVENT, Parts};
use crate::gate::{Gate, Wish, first};
use crate::hotmem::Region;
use crate::hotmem::testing::{BYTES, Fake};
use crate::notices::Notices;
use crate::pci::virtio::{FunctionParts, Host, VectorHost, VirtioFunction, vectors_of};
use crate::pci::watchdog::Watchdog;
use crate::pci::{BAR_SIZE, HostBridge, PciBus, PciFunction, SLOTS};
use crate::power::{self, PowerAction, PowerRegisters};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::mem::MemDevice;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::testing::FakeReport;
use crate::virtio::vsock::Vsock;
use crate::virtio::{Memory, VirtioDevice, Watcher};

/// Most steps of one input.
const MAX_STEPS: usize = 300;
const MAX_TURNS: usize = 500;
/// vCPUs that there can be, and that there are at boot.
const CPUS: (u32, u32) = (8, 3);
/// Slots whose devices come and go: those of disk and nic, and two spare ones.
const HOT: u32 = 0b110 | 0b11 << 30;

type Device = Arc<Mutex<dyn VirtioDevice>>;

/// KVM's side of notifications and vectors.
#[derive(Default)]
struct Kvm {
    notify: Mutex<BTreeMap<(u64, RawFd), EventFd>>,
    routed: Mutex<BTreeMap<(u32, u16), Message>>,
    /// Refuses everything.
    sulks: AtomicBool,
    next: AtomicU32,
}

impl Kvm {
    fn refuses(&self) -> bool {
        self.sulks.load(Ordering::Relaxed)
    }

    /// Signals whoever is connected there; says whether there is anybody.
    fn notified(&self, address: u64) -> bool {
        let table = self.notify.lock().unwrap();
        let near = table.range((address.saturating_sub(3), RawFd::MIN)..=(address, RawFd::MAX));
        near.fold(false, |_, (_, fd)| {
            fd.write(1).unwrap();
            true
        })
    }
}

impl Host for Kvm {
    fn connect_notify(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        let mut table = self.notify.lock().unwrap();
        let taken = table.keys().any(|(other, _)| *other == address);
        if taken || self.refuses() {
            return Err(io::Error::from_raw_os_error(libc::EEXIST));
        }
        table.insert((address, fd.as_raw_fd()), fd.try_clone()?);
        Ok(())
    }

    fn disconnect_notify(&self, fd: &EventFd, address: u64) {
        // What was refused is not there.
        self.notify.lock().unwrap().remove(&(address, fd.as_raw_fd()));
    }

    fn device_needs_reset(&self, device: &str, reason: &str) {
        assert!(!device.is_empty() && reason.len() < 400, "{device}: {reason}");
    }
}

struct Vectors {
    kvm: Arc<Kvm>,
    function: u32,
    count: u16,
}

impl VectorHost for Vectors {
    fn route(&self, vector: u16, message: Message) -> bool {
        assert!(vector < self.count);
        let connected = !self.kvm.refuses();
        if connected {
            self.kvm.routed.lock().unwrap().insert((self.function, vector), message);
        }
        connected
    }

    fn fire(&self, vector: u16) {
        let routed = self.kvm.routed.lock().unwrap();
        assert!(routed.contains_key(&(self.function, vector)), "vector {vector} fired without a route");
    }
}

/// A machine without KVM and vCPU threads.
struct Board {
    bus: Bus,
    kvm: Arc<Kvm>,
    memory: Memory,
    epoll: Arc<Epoll>,
    devices: BTreeMap<u32, Device>,
    disk: Arc<Mutex<Block>>,
    file: File,
    gate: Arc<Gate>,
    level: Arc<AtomicBool>,
    /// What the guest was asked to have last.
    target: u32,
    tap: UnixDatagram,
    terminal: UnixStream,
}

fn mem() -> MemDevice {
    let region = Region::new(BYTES, Box::new(Fake::new()));
    MemDevice::new(region, 1 << 32, BYTES / 2, Arc::new(FakeReport::default()))
}

impl Board {
    fn new() -> Self {
        let (ours, tap) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let (stream, terminal) = UnixStream::pair().unwrap();
        terminal.set_nonblocking(true).unwrap();
        let (disk, file) = disk(false);
        let disk = Arc::new(Mutex::new(disk));
        let net = Net::on_socket(ours.into(), [2, 0, 0, 0, 0, 1], None).unwrap();
        let devices: [Device; 6] = [
            disk.clone(),
            Arc::new(Mutex::new(net)),
            Arc::new(Mutex::new(Vsock::new(3, None).unwrap_or_else(|error| panic!("{error}")))),
            Arc::new(Mutex::new(Rng::new())),
            Arc::new(Mutex::new(mem())),
            Arc::new(Mutex::new(Balloon::new(Arc::new(FakeReport::default())).unwrap())),
        ];
        let level = Arc::new(AtomicBool::new(false));
        let line = level.clone();
        let power = Arc::new(PowerRegisters::new(Box::new(move |high| line.store(high, Ordering::Relaxed))));
        let (gate, notices) = (Arc::<Gate>::default(), Arc::new(Notices::new().unwrap()));
        gate.wish(Wish::Run);
        let parts = Parts {
            gate: gate.clone(),
            kicker: Arc::default(),
            power: power.clone(),
            notices: notices.clone(),
        };
        let console = Console::new(EventFd::new(EFD_NONBLOCK).unwrap(), Some(stream.into())).unwrap();
        let (kvm, memory, epoll) = (Arc::<Kvm>::default(), arena::fresh(), Arc::new(Epoll::new().unwrap()));
        let mut functions: Vec<Box<dyn PciFunction>> = vec![Box::new(HostBridge::default())];
        let mut numbered = BTreeMap::new();
        for device in devices {
            let slot = functions.len();
            functions.push(function(&kvm, &memory, &epoll, &device, slot));
            numbered.insert(slot as u32 - 1, device);
        }
        let bar = PciBus::initial_bar(functions.len()) as u32;
        functions.push(Box::new(Watchdog::new(bar, notices.clone())));
        let bus = Bus {
            console: Arc::new(console),
            power,
            cpus: CpuHotplug::new(parts, CPUS.1, CPUS.0),
            pci: PciBus::new(functions, HOT),
            pci_address: AtomicU32::new(0),
            notices,
        };
        let target = CPUS.1;
        Self { bus, kvm, memory, epoll, devices: numbered, disk, file, gate, level, target, tap, terminal }
    }

    /// Turns the device thread's loop until it rests.
    fn settle(&self) {
        let mut events = vec![EpollEvent::default(); 32];
        for _ in 0..MAX_TURNS {
            let count = self.epoll.wait(0, &mut events).unwrap_or(0);
            if count == 0 {
                return;
            }
            for event in &events[..count] {
                // A device that has gone gets no more events.
                if let Some(device) = self.devices.get(&((event.data() >> 32) as u32)) {
                    device.lock().unwrap().on_event(event.data() as u32, event.event_set());
                }
            }
        }
        panic!("the device thread is busy after {MAX_TURNS} rounds");
    }

    fn out(&self, port: u16, data: &[u8]) {
        let action = self.bus.port_write(port, data);
        assert!(action == PowerAction::None || matches!(port, 0x64 | 0xcf9 | 0x505 | 0x600..0x608));
    }

    fn read(&self, port: u16, length: usize) -> Vec<u8> {
        let mut data = vec![0xee; length];
        self.bus.port_read(port, &mut data);
        data
    }

    fn poke(&self, address: u64, data: &[u8]) {
        if !self.kvm.notified(address) {
            self.bus.memory_write(address, data);
        }
    }

    /// A port among those that answer, seldom any other.
    fn port(source: &mut Source) -> u16 {
        let (start, length) = source.pick(&[
            (layout::SERIAL_PORT, 8),
            (layout::POWER_PORT, 8),
            (layout::CPU_PORT, 0x48),
            (layout::CPU_PORT + 0x40, 8),
            (layout::SLOT_PORT, 12),
            (layout::PANIC_PORT, 1),
            (0xcf8, 8),
            (0x60, 8),
        ]);
        if source.once_in(32) { source.word() } else { start + u16::from(source.byte()) % length }
    }

    /// What the vCPUs' register accesses can do to ports.
    fn ports(&mut self, source: &mut Source) {
        let port = Self::port(source);
        let length = source.pick(&[1usize, 1, 4, 2, 8, 4]);
        let mut data = source.bytes(length).to_vec();
        data.resize(length, 0);
        if source.byte() & 1 == 0 {
            self.out(port, &data);
        } else {
            let before = self.bus.cpus.census().present;
            let data = self.read(port, length);
            if port == layout::CPU_PORT + NEXT && data[0] != NO_EVENT {
                let id = u32::from(data[0] & 0x3f);
                assert!(id < CPUS.0 && before & 1 << id != 0, "an event of vCPU {id}, which is absent");
            }
        }
    }

    /// An address in the PCI window, mostly one of a BAR as it was at first.
    fn window(source: &mut Source) -> u64 {
        let slot = source.below(8);
        let region = source.pick(&[0u64, 0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000]);
        let offset =
            if source.once_in(16) { source.number() % BAR_SIZE } else { u64::from(source.byte()) % 88 };
        PciBus::initial_bar(slot) + region + offset
    }

    fn registers(&mut self, source: &mut Source) {
        let address = match source.below(8) {
            0 => source.number(),
            1 | 2 => {
                let register =
                    if source.once_in(8) { source.word() & 0xfff } else { u16::from(source.byte()) };
                layout::ECAM + (source.below(SLOTS) as u64) * 0x8000 + u64::from(register)
            }
            3 => {
                let address = 1 << 31 | (source.below(SLOTS) as u32) << 11 | u32::from(source.byte() & 0xfc);
                self.out(0xcf8, &address.to_le_bytes());
                let length = source.pick(&[1usize, 2, 4]);
                let data = source.bytes(length).to_vec();
                self.out(0xcfc + u16::from(source.byte() & 3), &data);
                return;
            }
            _ => Self::window(source),
        };
        let length = source.pick(&[1usize, 2, 4, 8]);
        let mut data = source.bytes(length).to_vec();
        data.resize(length, 0);
        if source.once_in(3) {
            self.bus.memory_read(address, &mut data);
        } else {
            self.poke(address, &data);
        }
    }

    /// A driver that does nearly everything right.
    fn bring_up(&mut self, source: &mut Source) {
        let slot = source.below(6) + 1;
        let bar = PciBus::initial_bar(slot);
        self.poke(layout::ECAM + slot as u64 * 0x8000 + 4, &[6, 0]);
        // MSI-X enabled, all vectors unmasked, where the capability is (see `crate::pci::virtio`).
        self.poke(layout::ECAM + slot as u64 * 0x8000 + 0x98 + 2, &[0, 0x80]);
        for vector in 0..u64::from(source.byte() & 3) {
            self.poke(bar + 0x4000 + 16 * vector, &0xfee0_0000u32.to_le_bytes());
            self.poke(bar + 0x400c + 16 * vector, &0u32.to_le_bytes());
        }
        self.poke(bar + 0x14, &[0]);
        self.poke(bar + 0x14, &[3]);
        let refuse = if source.once_in(4) { source.dword() } else { 0 };
        for half in 0..2u32 {
            self.poke(bar, &half.to_le_bytes());
            let mut offered = [0; 4];
            self.bus.memory_read(bar + 4, &mut offered);
            self.poke(bar + 8, &half.to_le_bytes());
            let accepted = u32::from_le_bytes(offered) & if half == 0 { !refuse } else { u32::MAX };
            self.poke(bar + 12, &accepted.to_le_bytes());
        }
        self.poke(bar + 0x14, &[0xb]);
        let queues = source.below(6) as u16;
        for queue in 0..queues {
            let size = source.pick(&[16u16, 16, 8, 128, 256, 0, 3, 0x8000]);
            let at =
                if source.once_in(16) { source.number() } else { 0x1_0000 * u64::from(queue) + 0x10_0000 };
            self.poke(bar + 0x16, &queue.to_le_bytes());
            self.poke(bar + 0x18, &size.to_le_bytes());
            self.poke(bar + 0x1a, &u16::from(source.byte() & 3).to_le_bytes());
            self.poke(bar + 0x20, &at.to_le_bytes());
            self.poke(bar + 0x28, &at.wrapping_add(0x2000).to_le_bytes());
            self.poke(bar + 0x30, &at.wrapping_add(0x4000).to_le_bytes());
            self.poke(bar + 0x1c, &1u16.to_le_bytes());
        }
        self.poke(bar + 0x14, &[0xf]);
    }

    /// Writes a descriptor and offers it, on the rings that [`Board::bring_up`] makes.
    fn offer(&mut self, source: &mut Source) {
        let (slot, queue) = (source.below(6) + 1, source.below(5) as u64);
        let at = 0x1_0000 * queue + 0x10_0000;
        let map = self.memory.memory();
        let put = |address: u64, data: &[u8]| map.write_slice(data, GuestAddress(address)).unwrap();
        let index = source.byte() & 7;
        let flags = u16::from(source.byte() & 7);
        let data = 0x20_0000 + u64::from(source.word());
        let payload = source.bytes(16);
        put(data, payload);
        let (len, next) = (u32::from(source.word()) % 5000, u16::from(source.byte() & 7));
        let descriptor =
            [&data.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat();
        put(at + 16 * u64::from(index), &descriptor);
        let available: u16 = map.read_obj(GuestAddress(at + 0x2002)).unwrap();
        put(at + 0x2004 + 2 * u64::from(available % 16), &u16::from(index).to_le_bytes());
        put(at + 0x2002, &available.wrapping_add(1).to_le_bytes());
        self.poke(PciBus::initial_bar(slot) + 0x3000 + 4 * queue, &[0, 0]);
    }

    /// What the host does meanwhile.
    fn host(&mut self, source: &mut Source) {
        match source.below(16) {
            0 => self.bus.power.raise(power::EVENT_POWER_BUTTON),
            1 | 2 => {
                self.target = u32::from(source.byte()) % CPUS.0 + 1;
                self.bus.cpus.aim(self.target, source.qword() | 1);
            }
            3 => self.bus.cpus.plug(u64::MAX),
            4 => self.bus.pci.ask(source.below(SLOTS + 1)),
            5 => self.collect(),
            6 => self.come(),
            7 => self.restart(),
            8 => self.kvm.sulks.store(source.byte() & 1 != 0, Ordering::Relaxed),
            9 => {
                let count = source.below(200);
                // A terminal that has gone or is full takes nothing.
                let _ = io::Write::write(&mut self.terminal, source.bytes(count));
                self.bus.console.input();
            }
            10 => drop(self.bus.console.tick()),
            11 => {
                let _ = io::Read::read(&mut self.terminal, &mut [0; 5000]);
            }
            12 => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                theirs.set_nonblocking(true).unwrap();
                self.terminal = theirs;
                self.bus.console.attach(source.once_in(2).then(|| ours.into()));
            }
            13 => {
                // A full socket loses it.
                let _ = self.tap.send(&vec![0; 12 + source.below(200)]);
            }
            14 => {
                let taken = self.bus.notices.take();
                assert!(taken.complaints.len() <= 32);
            }
            _ => drop(self.disk.lock().unwrap().grow()),
        }
    }

    fn collect(&mut self) {
        for (slot, gone) in self.bus.pci.collect() {
            assert!(HOT & 1 << slot != 0, "slot {slot} let its device go");
            drop(gone);
            self.devices.remove(&(slot as u32 - 1));
        }
    }

    fn come(&mut self) {
        let Some(slot) = self.bus.pci.free_slot() else { return };
        let device: Device = Arc::new(Mutex::new(Rng::new()));
        self.bus.pci.insert(slot, function(&self.kvm, &self.memory, &self.epoll, &device, slot));
        self.devices.insert(slot as u32 - 1, device);
        self.bus.power.raise(power::EVENT_SLOTS);
    }

    /// As `Machine::restart` does.
    fn restart(&mut self) {
        self.bus.pci.eject_asked();
        self.bus.pci.reset();
        self.bus.power.reset();
        self.bus.cpus.adopt(self.bus.cpus.census().target);
        assert!(self.kvm.notify.lock().unwrap().is_empty(), "a reset leaves notifications connected");
    }

    fn check(&self) {
        let census = self.bus.cpus.census();
        assert_eq!(census.present & 1, 1, "vCPU 0 was ejected");
        assert_eq!(census.target, self.target);
        assert_eq!(census.present & !first(CPUS.0), 0, "a vCPU that cannot be");
        let running = (0..64).filter(|id| self.gate.runs(*id)).fold(0, |set, id| set | 1u64 << id);
        assert_eq!(running, census.present, "what the guest has is what runs");
        assert!(self.bus.console.tail().len() <= 3 * RING_BYTES);
    }

    fn end(mut self) {
        self.restart();
        self.check();
        // Read until nothing is left; then the interrupt is down.
        self.read(layout::POWER_PORT + power::EVENTS, 1);
        assert!(!self.level.load(Ordering::Relaxed), "the interrupt stays up without an event");
        let Self { bus, devices, disk, file, .. } = self;
        // Ejected ones keep their device.
        drop((bus, devices));
        let disk = Arc::into_inner(disk).expect("nobody else has the disk").into_inner().unwrap();
        keep_disk(disk, file, false);
        arena::check();
    }
}

fn function(
    kvm: &Arc<Kvm>,
    memory: &Memory,
    epoll: &Arc<Epoll>,
    device: &Device,
    slot: usize,
) -> Box<dyn PciFunction> {
    let count = vectors_of(device.lock().unwrap().queue_sizes().len());
    let function = kvm.next.fetch_add(1, Ordering::Relaxed);
    Box::new(VirtioFunction::new(FunctionParts {
        device: device.clone(),
        memory: memory.clone(),
        watcher: Watcher::new(epoll.clone(), slot as u32 - 1),
        host: kvm.clone(),
        vectors: Box::new(Vectors { kvm: kvm.clone(), function, count }),
        bar: PciBus::initial_bar(slot) as u32,
    }))
}

fn run(data: &[u8], step: fn(&mut Board, &mut Source)) {
    let source = &mut Source::new(data);
    let mut board = Board::new();
    for _ in 0..MAX_STEPS {
        if source.is_empty() {
            break;
        }
        step(&mut board, source);
        board.settle();
        board.check();
    }
    board.end();
}

/// I/O ports: serial console, power and events, vCPUs, slots, panic, PCI configuration by 0xcf8, other ways to reset.
pub fn ports(data: &[u8]) {
    run(data, |board, source| match source.below(4) {
        0 => board.host(source),
        _ => board.ports(source),
    });
}

/// PCI: configuration space by ECAM and 0xcf8, BARs with virtio's registers, MSI-X, and the devices behind them.
pub fn pci(data: &[u8]) {
    run(data, |board, source| match source.below(8) {
        0 => board.host(source),
        1 => board.bring_up(source),
        2 | 3 => board.offer(source),
        4 => board.ports(source),
        _ => board.registers(source),
    });
}
