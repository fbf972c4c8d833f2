//! Makes the virtio devices of a machine from its definition, in PCI order: disks, nics, vsock, rng.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::control::definition::Devices;
use crate::virtio::block::Block;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;
use crate::virtio::{DeviceStats, VirtioDevice};

type Shared = Arc<Mutex<dyn VirtioDevice>>;

/// The devices of a machine.
pub struct DeviceSet {
    all: Vec<Shared>,
    vsock: Option<Arc<Mutex<Vsock>>>,
}

impl DeviceSet {
    /// Makes them.
    ///
    /// # Errors
    /// A sentence with the device's name.
    pub fn new(devices: Devices) -> Result<Self, String> {
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
        Ok(Self { all, vsock })
    }

    /// All of them, by number.
    pub fn all(&self) -> Vec<Shared> {
        self.all.clone()
    }

    /// Counters, in order.
    pub fn stats(&self) -> Vec<DeviceStats> {
        self.all.iter().map(|d| d.lock().unwrap_or_else(PoisonError::into_inner).stats()).collect()
    }

    /// Hands in where connections of the guest to `port` go.
    ///
    /// # Errors
    /// A sentence.
    pub fn listen(&self, port: u32, socket: OwnedFd) -> Result<(), String> {
        let vsock = self.vsock.as_ref().ok_or("the machine has no vsock")?;
        let mut vsock = vsock.lock().unwrap_or_else(PoisonError::into_inner);
        vsock.listen(port, socket).map_err(|e| e.to_string())
    }
}
