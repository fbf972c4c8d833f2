//! Makes the virtio devices of a machine from its definition, in PCI order: disks, nics, vsock, rng, mem, balloon.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::definition::Devices;
use crate::control::wire::MemoryStatus;
use crate::hotmem::Refused;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::mem::MemDevice;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{DeviceStats, VirtioDevice};

type Shared = Arc<Mutex<dyn VirtioDevice>>;

/// The devices by which memory comes and goes; their definition is the machine's, not one of devices.
#[derive(Default)]
pub struct MemoryDevices {
    /// Plugs and unplugs.
    pub mem: Option<MemDevice>,
    /// Inflates and deflates.
    pub balloon: Option<Balloon>,
}

/// The devices of a machine.
pub struct DeviceSet {
    all: Vec<Shared>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    mem: Option<Arc<Mutex<MemDevice>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
}

fn lock<T: ?Sized>(device: &Mutex<T>) -> MutexGuard<'_, T> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

impl DeviceSet {
    /// Makes them.
    ///
    /// # Errors
    /// A sentence with the device's name.
    pub fn new(devices: Devices, memory: MemoryDevices) -> Result<Self, String> {
        let mut all: Vec<Shared> = Vec::new();
        for (number, disk) in devices.disks.into_iter().enumerate() {
            let name = format!("block{number}");
            let block = Block::new(&name, disk.file.into(), disk.read_only, &disk.serial);
            all.push(Arc::new(Mutex::new(block.map_err(|e| e.to_string())?)));
        }
        for (number, nic) in devices.nics.into_iter().enumerate() {
            let net = Net::new(&format!("net{number}"), nic.tap, nic.mac, nic.mtu);
            all.push(Arc::new(Mutex::new(net.map_err(|e| e.to_string())?)));
        }
        let mut vsock = None;
        if let Some(definition) = devices.vsock {
            let device = Vsock::new(definition.cid, definition.listener).map_err(|e| e.to_string())?;
            let device = Arc::new(Mutex::new(device));
            all.push(device.clone());
            vsock = Some(device);
        }
        if devices.rng {
            all.push(Arc::new(Mutex::new(Rng::new())));
        }
        let mem = memory.mem.map(|device| Arc::new(Mutex::new(device)));
        all.extend(mem.iter().map(|device| device.clone() as Shared));
        let balloon = memory.balloon.map(|device| Arc::new(Mutex::new(device)));
        all.extend(balloon.iter().map(|device| device.clone() as Shared));
        Ok(Self { all, vsock, mem, balloon })
    }

    /// Fills in what the memory devices know.
    pub fn memory_status(&self, status: &mut MemoryStatus) {
        if let Some(mem) = &self.mem {
            let state = lock(mem).state();
            status.pluggable_bytes = state.limit;
            status.requested_bytes = state.requested;
            status.plugged_bytes = state.plugged;
            status.plug_driver = state.driver;
        }
        if let Some(balloon) = &self.balloon {
            let state = lock(balloon).look();
            status.balloon_target_bytes = state.target;
            // The driver's account, which it cannot make larger than what it has.
            status.balloon_bytes = state.actual.min(status.boot_bytes + status.plugged_bytes);
            status.balloon_driver = state.driver;
            status.guest = state.guest;
        }
    }

    /// Asks the guest to plug this much.
    ///
    /// # Errors
    /// A sentence.
    pub fn set_plugged(&self, bytes: u64) -> Result<(), String> {
        match (&self.mem, bytes) {
            (Some(mem), _) => lock(mem).set_requested(bytes),
            (None, 0) => Ok(()),
            (None, _) => Err(format!("{bytes} bytes; the machine has no pluggable memory")),
        }
    }

    /// Asks the guest to put this much into its balloon.
    ///
    /// # Errors
    /// A sentence.
    pub fn set_balloon(&self, bytes: u64) -> Result<(), String> {
        match (&self.balloon, bytes) {
            (Some(balloon), _) => lock(balloon).set_target(bytes),
            (None, 0) => Ok(()),
            (None, _) => Err(format!("{bytes} bytes; the machine has no balloon")),
        }
    }

    /// Takes pluggable memory back and forgets the balloon, for a machine that starts anew. All devices must have been reset.
    ///
    /// # Errors
    /// What the host says.
    pub fn withdraw_memory(&self) -> Result<(), Refused> {
        if let Some(balloon) = &self.balloon {
            lock(balloon).forget();
        }
        self.mem.as_ref().map_or(Ok(()), |mem| lock(mem).withdraw())
    }

    /// All of them, by number.
    pub fn all(&self) -> Vec<Shared> {
        self.all.clone()
    }

    /// Counters, in order.
    pub fn stats(&self) -> Vec<DeviceStats> {
        self.all.iter().map(|device| lock(device).stats()).collect()
    }

    /// Hands in where connections of the guest to `port` go.
    ///
    /// # Errors
    /// A sentence.
    pub fn listen(&self, port: u32, socket: OwnedFd) -> Result<(), String> {
        let vsock = self.vsock.as_ref().ok_or("the machine has no vsock")?;
        lock(vsock).listen(port, socket).map_err(|e| e.to_string())
    }
}
