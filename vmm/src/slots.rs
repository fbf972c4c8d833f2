//! The machine's PCI slots: makes a virtio device into a function with KVM's help, and takes everything back when it goes.
//!
//! ```text
//! device ─▶ number in the device thread's table ─▶ vectors (GSI + eventfd each) ─▶ function ─▶ slot
//!    detach: asked ─▶ the guest ejects: out of reach and reset (vCPU) ─▶ collect (main thread): all of that given back
//! ```

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_ioctls::{NoDatamatch, VmFd};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::irq::{self, Message, Router};
use crate::device_thread::Table;
use crate::machine::MachineError;
use crate::notices::Notices;
use crate::pci::virtio::{FunctionParts, Host, VectorHost, VirtioFunction, vectors_of};
use crate::pci::watchdog::Watchdog;
use crate::pci::{HostBridge, PciBus, PciFunction, SLOTS};
use crate::virtio::{DeviceKind, Memory, VirtioDevice, Watcher};

type Device = Arc<Mutex<dyn VirtioDevice>>;

/// Where a device is.
#[derive(Clone, Copy, Debug)]
struct Place {
    slot: usize,
    /// In the device thread's table.
    number: u32,
}

/// See the module.
pub struct Slots {
    memory: Memory,
    epoll: Arc<Epoll>,
    router: Arc<Router>,
    host: Arc<dyn Host>,
    table: Arc<Table>,
    notices: Arc<Notices>,
    /// By the device's name.
    places: BTreeMap<String, Place>,
}

/// Slots of a machine with these devices, the first in slot 1, whose device can come and go: those of disks and nics, and
/// `spare` slots at the end. None at all without spare ones.
pub fn hot_mask(devices: &[Device], spare: u8) -> u32 {
    if spare == 0 {
        return 0;
    }
    let removable = |device: &Device| matches!(lock(device).kind(), DeviceKind::Block | DeviceKind::Net);
    let present = (1..SLOTS).zip(devices).filter(|(_, device)| removable(device)).map(|(slot, _)| slot);
    let first_spare = SLOTS.saturating_sub(usize::from(spare)).max(1);
    present.chain(first_spare..SLOTS).fold(0, |mask, slot| mask | 1 << slot)
}

fn lock(device: &Device) -> std::sync::MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    /// For a machine whose interrupt controllers exist; `epoll` is that of the device thread.
    pub fn new(vm: &Arc<VmFd>, memory: Memory, epoll: Arc<Epoll>, notices: &Arc<Notices>) -> Self {
        Self {
            memory,
            epoll,
            router: Arc::new(Router::new(vm.clone())),
            host: Arc::new(KvmHost { vm: vm.clone(), notices: notices.clone() }),
            table: Arc::default(),
            notices: notices.clone(),
            places: BTreeMap::new(),
        }
    }

    /// What the device thread serves.
    pub fn table(&self) -> Arc<Table> {
        self.table.clone()
    }

    /// The bus with the devices that are there from the start, from slot 1 on, and a watchdog behind them; see [`hot_mask`] for `hot`.
    ///
    /// # Errors
    /// As [`Slots::attach`].
    pub fn bus(&mut self, devices: Vec<Device>, watchdog: bool, hot: u32) -> Result<PciBus, MachineError> {
        let mut functions: Vec<Box<dyn PciFunction>> = vec![Box::new(HostBridge::default())];
        for device in devices {
            let function = self.function(functions.len(), device)?;
            functions.push(function);
        }
        if watchdog {
            let bar = PciBus::initial_bar(functions.len()) as u32;
            functions.push(Box::new(Watchdog::new(bar, self.notices.clone())));
        }
        Ok(PciBus::new(functions, hot))
    }

    /// Puts a device into a free slot. The guest is to be told by an event.
    ///
    /// # Errors
    /// [`MachineError::Impossible`] when no slot is free, others when interrupts or descriptors are used up.
    pub fn attach(&mut self, bus: &PciBus, device: Device) -> Result<(), MachineError> {
        let slot = bus.free_slot().ok_or_else(|| match bus.hot().count_ones() {
            0 => MachineError::Impossible(
                "the machine was defined without slots for devices that come later".to_owned(),
            ),
            all => MachineError::Impossible(format!(
                "all {all} slots that devices can come to are taken; detach one first"
            )),
        })?;
        let function = self.function(slot, device)?;
        bus.insert(slot, function);
        Ok(())
    }

    /// Asks for a device to go. The guest is to be told by an event.
    ///
    /// # Errors
    /// [`MachineError::Impossible`] when there is no such device, or it cannot go.
    pub fn ask(&self, bus: &PciBus, name: &str) -> Result<(), MachineError> {
        match self.places.get(name) {
            Some(place) if bus.hot() & (1 << place.slot) != 0 => {
                bus.ask(place.slot);
                Ok(())
            }
            Some(_) => Err(MachineError::Impossible(format!(
                "{name} belongs to the machine for good; disks and nics can go where the machine was defined with slots"
            ))),
            None => Err(MachineError::Impossible(format!("there is no device {name}"))),
        }
    }

    /// Takes back what functions had that the guest has ejected; returns their devices' names.
    pub fn collect(&mut self, bus: &PciBus) -> Vec<String> {
        let ejected = bus.collect();
        let mut names = Vec::with_capacity(ejected.len());
        for (slot, function) in ejected {
            // Notifications went with its reset; here go the vectors.
            drop(function);
            let found = self.places.iter().find(|(_, place)| place.slot == slot);
            let Some((name, place)) = found.map(|(name, place)| (name.clone(), *place)) else { continue };
            self.places.remove(&name);
            self.table.remove(place.number);
            names.push(name);
        }
        names
    }

    fn function(&mut self, slot: usize, device: Device) -> Result<Box<dyn PciFunction>, MachineError> {
        let (name, queues) = {
            let device = lock(&device);
            (device.name().to_owned(), device.queue_sizes().len())
        };
        let vectors = Box::new(KvmVectors::new(self.router.clone(), vectors_of(queues))?);
        let number = self
            .table
            .add(device.clone())
            .ok_or_else(|| MachineError::Device("no device can be added any more".to_owned()))?;
        self.places.insert(name, Place { slot, number });
        let parts = FunctionParts {
            device,
            memory: self.memory.clone(),
            watcher: Watcher::new(self.epoll.clone(), number),
            host: self.host.clone(),
            vectors,
            bar: PciBus::initial_bar(slot) as u32,
        };
        Ok(Box::new(VirtioFunction::new(parts)))
    }
}

/// KVM's side of the virtio functions.
struct KvmHost {
    vm: Arc<VmFd>,
    notices: Arc<Notices>,
}

impl Host for KvmHost {
    fn connect_notify(&self, fd: &EventFd, address: u64) -> io::Result<()> {
        let address = kvm_ioctls::IoEventAddress::Mmio(address);
        self.vm
            .register_ioevent(fd, &address, NoDatamatch)
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    fn disconnect_notify(&self, fd: &EventFd, address: u64) {
        // It was registered so; if KVM thinks otherwise there is nothing left to undo.
        let _ = self.vm.unregister_ioevent(fd, &kvm_ioctls::IoEventAddress::Mmio(address), NoDatamatch);
    }

    fn device_needs_reset(&self, device: &str, reason: &str) {
        self.notices.complain(device, reason);
    }
}

/// The vectors of one device: a GSI and an eventfd each.
struct KvmVectors {
    router: Arc<Router>,
    vectors: Vec<(u32, EventFd)>,
}

impl KvmVectors {
    fn new(router: Arc<Router>, count: u16) -> Result<Self, MachineError> {
        let mut made = Self { router, vectors: Vec::with_capacity(usize::from(count)) };
        for _ in 0..count {
            let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .map_err(|source| MachineError::Host { what: "make an eventfd", source })?;
            let gsi = made
                .router
                .allocate()
                .ok_or_else(|| MachineError::Device(format!("more than {} interrupts", irq::MAX_MSI)))?;
            made.vectors.push((gsi, fd));
        }
        Ok(made)
    }
}

impl Drop for KvmVectors {
    fn drop(&mut self) {
        for (gsi, fd) in &self.vectors {
            self.router.release(*gsi, fd);
        }
    }
}

impl VectorHost for KvmVectors {
    fn route(&self, vector: u16, message: Message) -> bool {
        let Some((gsi, fd)) = self.vectors.get(usize::from(vector)) else { return false };
        self.router.route(*gsi, message, fd).is_ok()
    }

    fn fire(&self, vector: u16) {
        if let Some((_, fd)) = self.vectors.get(usize::from(vector)) {
            // A full counter means that KVM has not yet taken the last one: the guest is interrupted anyhow.
            let _ = fd.write(1);
        }
    }
}
