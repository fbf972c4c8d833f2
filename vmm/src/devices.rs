//! Makes the virtio devices of a machine from its definition, in PCI order: disks, nics, vsock, rng, mem, balloon. Disks and nics
//! also come and go while it runs.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::control::definition::{Devices, Disk, Nic};
use crate::control::wire::{DiskRates, DiskStatus, MemoryStatus, NicStatus};
use crate::hotmem::Refused;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{self, Block, BlockError, Engine, Throttle};
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
/// Rings made at the start for disks to come, at most: they cannot be made later (see `crate::sandbox`).
const SPARE_RINGS: u8 = 4;

/// The devices of a machine.
pub struct DeviceSet {
    all: Vec<Shared>,
    vsock: Option<Arc<Mutex<Vsock>>>,
    mem: Option<Arc<Mutex<MemDevice>>>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    disks: BTreeMap<String, Arc<Mutex<Block>>>,
    /// Their addresses.
    nics: BTreeMap<String, [u8; 6]>,
    /// What they may do together.
    throttle: Arc<Throttle>,
    /// Numbers of the next disk and nic. Names are not used again, so that an event is never about another device.
    next: (u32, u32),
    spares: Vec<Engine>,
    /// Why there are none.
    no_spares: Option<String>,
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
        let mut set = Self {
            all: Vec::new(),
            vsock: None,
            mem: memory.mem.map(|device| Arc::new(Mutex::new(device))),
            balloon: memory.balloon.map(|device| Arc::new(Mutex::new(device))),
            disks: BTreeMap::new(),
            nics: BTreeMap::new(),
            throttle: Arc::default(),
            next: (0, 0),
            spares: Vec::new(),
            no_spares: None,
        };
        set.throttle.set(devices.disk_rates);
        for disk in devices.disks {
            let name = set.next_disk();
            let block = Block::new(&name, disk.file.into(), disk.read_only, &disk.serial);
            set.keep_disk(name, block.map_err(|e| e.to_string())?);
        }
        for nic in devices.nics {
            set.add_nic(nic)?;
        }
        if let Some(definition) = devices.vsock {
            let device = Vsock::new(definition.cid, definition.listener).map_err(|e| e.to_string())?;
            let device = Arc::new(Mutex::new(device));
            set.all.push(device.clone());
            set.vsock = Some(device);
        }
        if devices.rng {
            set.all.push(Arc::new(Mutex::new(Rng::new())));
        }
        set.all.extend(set.mem.iter().map(|device| device.clone() as Shared));
        set.all.extend(set.balloon.iter().map(|device| device.clone() as Shared));
        Ok(set)
    }

    /// Fills in what the memory devices know.
    pub fn memory_status(&self, status: &mut MemoryStatus) {
        if let Some(mem) = &self.mem {
            let state = lock(mem).state();
            status.pluggable_bytes = state.limit;
            status.requested_bytes = state.requested;
            status.plugged_bytes = state.plugged;
            status.plug_driver = state.driver;
            status.plug_unread = state.unread;
        }
        if let Some(balloon) = &self.balloon {
            let state = lock(balloon).look();
            status.balloon_target_bytes = state.target;
            // The driver's account, which it cannot make larger than what it has.
            status.balloon_bytes = state.actual.min(status.boot_bytes + status.plugged_bytes);
            status.balloon_driver = state.driver;
            status.balloon_unread = state.unread;
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

    /// Prepares for disks that come when nothing but reading and writing is possible any more, into so many slots. A kernel that
    /// gives no rings is no reason not to start: whoever attaches a disk is told.
    pub fn prepare(&mut self, slots: u8) {
        for _ in 0..slots.min(SPARE_RINGS) {
            match block::spare_ring() {
                Ok(ring) => self.spares.push(ring),
                Err(error) => self.no_spares = Some(error.to_string()),
            }
        }
    }

    fn next_disk(&self) -> String {
        format!("block{}", self.next.0)
    }

    fn keep_disk(&mut self, name: String, block: Block) -> Shared {
        self.next.0 += 1;
        let device = Arc::new(Mutex::new(block.within(&self.throttle)));
        self.all.push(device.clone());
        self.disks.insert(name, device.clone());
        device
    }

    /// Makes one more disk; see [`DeviceSet::prepare`].
    ///
    /// # Errors
    /// A sentence with its name.
    pub fn add_disk(&mut self, disk: Disk) -> Result<Shared, String> {
        let name = self.next_disk();
        let block =
            Block::with_spare(&name, disk.file.into(), disk.read_only, &disk.serial, &mut self.spares);
        match (block, &self.no_spares) {
            (Ok(block), _) => Ok(self.keep_disk(name, block)),
            (Err(error @ BlockError::NoSpare { .. }), Some(reason)) => {
                Err(format!("{error} (at the start the kernel refused one: {reason})"))
            }
            (Err(error), _) => Err(error.to_string()),
        }
    }

    /// Makes one more nic.
    ///
    /// # Errors
    /// A sentence with its name.
    pub fn add_nic(&mut self, nic: Nic) -> Result<Shared, String> {
        let name = format!("net{}", self.next.1);
        let net = Net::new(&name, nic.tap, nic.mac, nic.mtu).map_err(|e| e.to_string())?;
        self.next.1 += 1;
        self.nics.insert(name, nic.mac);
        let device: Shared = Arc::new(Mutex::new(net));
        self.all.push(device.clone());
        Ok(device)
    }

    /// Ends a device that nobody reaches any more, and closes its descriptors.
    pub fn remove(&mut self, name: &str) {
        if let Some(disk) = self.disks.remove(name) {
            self.spares.extend(lock(&disk).close());
        }
        self.nics.remove(name);
        self.all.retain(|device| lock(device).name() != name);
    }

    /// Looks how large a disk's file is now, and tells the guest when it has grown. Returns the size in bytes.
    ///
    /// # Errors
    /// A sentence; the disk is as it was then.
    pub fn grow_disk(&self, name: &str) -> Result<u64, String> {
        let disk = self.disks.get(name).ok_or_else(|| format!("there is no disk {name}"))?;
        lock(disk).grow().map_err(|e| e.to_string())
    }

    /// Changes what all disks together may do, from the next request on.
    pub fn set_disk_rates(&self, rates: DiskRates) {
        self.throttle.set(rates);
        self.disks.values().for_each(|disk| lock(disk).rates_changed());
    }

    /// What all disks together may do.
    pub fn disk_rates(&self) -> DiskRates {
        self.throttle.rates()
    }

    /// Its disks in the order in which they came, and for how many more there are rings.
    pub fn disks_status(&self) -> (Vec<DiskStatus>, usize) {
        let disks = self.all.iter().filter_map(|device| self.disks.get(lock(device).name()));
        let status = |disk: &Arc<Mutex<Block>>| {
            let disk = lock(disk);
            let (device, serial) = (disk.name().to_owned(), disk.serial());
            DiskStatus { device, serial, bytes: disk.bytes() }
        };
        (disks.map(status).collect(), self.spares.len())
    }

    /// Its nics in the order in which they came.
    pub fn nics_status(&self) -> Vec<NicStatus> {
        let status = |device: &Shared| {
            let device = lock(device).name().to_owned();
            self.nics.get(&device).map(|mac| NicStatus { mac: *mac, device })
        };
        self.all.iter().filter_map(status).collect()
    }

    /// All of them, in the order in which they came.
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
