//! PCI Express: one segment, one bus, configuration by ECAM only (PCIe base 5.0, section 7.2.2).
//!
//! ```text
//! vCPU ── MMIO in the ECAM ──▶ PciBus ──▶ Mutex<function> ──▶ config space
//!      ── MMIO in a BAR    ──▶ PciBus ──▶ Mutex<function> ──▶ registers
//! ```
//!
//! - [`config`]: a function's configuration space, pure
//! - [`msix`]: message-signalled interrupts, pure behind [`msix::MsiSink`]
//! - [`common`]: virtio's common configuration registers, pure
//! - [`virtio`]: a virtio device as a PCI function
//!
//! BARs are placed when the machine is built. A guest may move one: addresses are looked up as they are now, and where two
//! overlap the lower slot answers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::arch::x86_64::layout;

pub mod common;
pub mod config;
pub mod msix;
pub mod virtio;

/// Slots of a bus; the host bridge has the first.
pub const SLOTS: usize = 32;
/// Size of the one BAR that a function has, in bytes.
pub const BAR_SIZE: u64 = 0x8000;

/// One function on the bus. Accesses are 1, 2, 4 or 8 bytes long, of any alignment.
pub trait PciFunction: Send {
    /// Reads the configuration space; what does not exist reads as zero.
    fn read_config(&mut self, offset: u16, data: &mut [u8]);
    /// Writes the configuration space.
    fn write_config(&mut self, offset: u16, data: &[u8]);
    /// Where BAR 0 is decoded now, or `None`.
    fn bar(&self) -> Option<u64>;
    /// Reads BAR 0.
    fn read_bar(&mut self, offset: u64, data: &mut [u8]);
    /// Writes BAR 0.
    fn write_bar(&mut self, offset: u64, data: &[u8]);
    /// Back to the state at power-on. Idempotent.
    fn reset(&mut self);
}

/// Nothing is decoded here.
const NO_BAR: u64 = u64::MAX;

struct Slot {
    function: Mutex<Box<dyn PciFunction>>,
    bar: AtomicU64,
}

impl Slot {
    fn with<R>(&self, call: impl FnOnce(&mut dyn PciFunction) -> R) -> R {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        let result = call(function.as_mut());
        self.bar.store(function.bar().unwrap_or(NO_BAR), Ordering::Release);
        result
    }
}

/// The bus with its functions, the first of which should be a [`HostBridge`].
pub struct PciBus {
    slots: Vec<Slot>,
}

impl PciBus {
    /// At most [`SLOTS`] functions; more are not reachable.
    pub fn new(functions: Vec<Box<dyn PciFunction>>) -> Self {
        let slots = functions
            .into_iter()
            .map(|function| {
                let bar = AtomicU64::new(function.bar().unwrap_or(NO_BAR));
                Slot { function: Mutex::new(function), bar }
            })
            .collect();
        Self { slots }
    }

    /// Where the BAR of `slot` is placed at first.
    pub fn initial_bar(slot: usize) -> u64 {
        layout::HOLE_START + slot as u64 * BAR_SIZE
    }

    /// The slot and register that an address in the ECAM means; other functions than 0 do not exist.
    fn target(&self, offset: u64) -> Option<(&Slot, u16)> {
        let function = (offset >> 12) & 7;
        let slot = self.slots.get((offset >> 15) as usize)?;
        (function == 0).then_some((slot, (offset & 0xfff) as u16))
    }

    /// Reads configuration space at `offset` of the ECAM.
    pub fn read_ecam(&self, offset: u64, data: &mut [u8]) {
        match self.target(offset) {
            Some((slot, register)) => slot.with(|f| f.read_config(register, data)),
            None => data.fill(0xff),
        }
    }

    /// Writes configuration space at `offset` of the ECAM.
    pub fn write_ecam(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = self.target(offset) {
            slot.with(|f| f.write_config(register, data));
        }
    }

    fn bar_at(&self, address: u64) -> Option<(&Slot, u64)> {
        self.slots.iter().find_map(|slot| {
            let offset = address.checked_sub(slot.bar.load(Ordering::Acquire))?;
            (offset < BAR_SIZE).then_some((slot, offset))
        })
    }

    /// Reads memory outside of RAM; what no BAR answers reads as ones.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.bar_at(address) {
            Some((slot, offset)) => slot.with(|f| f.read_bar(offset, data)),
            None => data.fill(0xff),
        }
    }

    /// Writes memory outside of RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.bar_at(address) {
            slot.with(|f| f.write_bar(offset, data));
        }
    }

    /// Resets all functions.
    pub fn reset(&self) {
        for slot in &self.slots {
            slot.with(|f| f.reset());
        }
    }
}

/// The root of the bus: nothing but an identity.
pub struct HostBridge(config::ConfigSpace);

impl Default for HostBridge {
    fn default() -> Self {
        // Red Hat's generic PCIe host bridge, which Linux knows and does nothing with.
        Self(config::ConfigSpace::new(&config::Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_0000,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        }))
    }
}

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn bar(&self) -> Option<u64> {
        None
    }

    fn read_bar(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_bar(&mut self, _offset: u64, _data: &[u8]) {}

    fn reset(&mut self) {
        self.0.reset();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_existing_functions_answer_the_scan() {
        let bus = PciBus::new(vec![Box::new(HostBridge::default())]);
        let mut id = [0; 4];
        bus.read_ecam(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x0008_1b36);
        for elsewhere in [1 << 12, 1 << 15, 31 << 15] {
            bus.read_ecam(elsewhere, &mut id);
            assert_eq!(id, [0xff; 4]);
            bus.write_ecam(elsewhere, &id);
        }
        bus.read_memory(layout::HOLE_START, &mut id);
        assert_eq!(id, [0xff; 4]);
    }
}
