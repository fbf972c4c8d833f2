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
//! - [`watchdog`]: a timer that the guest has to keep from expiring
//! - [`hotplug`]: the registers by which devices are plugged in and out, pure
//!
//! A function comes into its slot by [`PciBus::insert`]. It goes when the guest ejects it, which must have been asked for: then
//! nothing reaches it any more and it is reset, but it stays in its slot until [`PciBus::collect`], for the vCPU whose exit that
//! was has no time for the rest.
//!
//! BARs are placed when the machine is built. A guest may move one: addresses are looked up as they are now, and where two
//! overlap the lower slot answers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::arch::x86_64::layout;

use self::hotplug::SlotRegisters;

pub mod common;
pub mod config;
pub mod hotplug;
pub mod msix;
pub mod virtio;
pub mod watchdog;

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

/// What a slot holds.
enum Content {
    Empty,
    /// The guest can reach it.
    Present(Box<dyn PciFunction>),
    /// It can no more.
    Ejected(Box<dyn PciFunction>),
}

struct Slot {
    content: Mutex<Content>,
    bar: AtomicU64,
}

impl Slot {
    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the function, if there is one.
    fn with<R>(&self, call: impl FnOnce(&mut dyn PciFunction) -> R) -> Option<R> {
        let mut content = self.lock();
        let Content::Present(function) = &mut *content else { return None };
        let result = call(function.as_mut());
        self.bar.store(function.bar().unwrap_or(NO_BAR), Ordering::Release);
        Some(result)
    }

    fn eject(&self) -> bool {
        let mut content = self.lock();
        let Content::Present(mut function) = std::mem::replace(&mut *content, Content::Empty) else {
            return false;
        };
        self.bar.store(NO_BAR, Ordering::Release);
        function.reset();
        *content = Content::Ejected(function);
        true
    }
}

/// The bus with its functions, the first of which should be a [`HostBridge`].
pub struct PciBus {
    slots: [Slot; SLOTS],
    registers: SlotRegisters,
}

impl PciBus {
    /// At most [`SLOTS`] functions; more are not reachable. Those in the slots of the mask `hot` can come and go.
    pub fn new(functions: Vec<Box<dyn PciFunction>>, hot: u32) -> Self {
        let mut functions = functions.into_iter();
        let slots = std::array::from_fn(|_| {
            let function = functions.next();
            let bar = function.as_ref().and_then(|f| f.bar()).unwrap_or(NO_BAR);
            Slot {
                content: Mutex::new(function.map_or(Content::Empty, Content::Present)),
                bar: AtomicU64::new(bar),
            }
        });
        Self { slots, registers: SlotRegisters::new(hot) }
    }

    /// Slots whose device can come and go, bit n for slot n.
    pub fn hot(&self) -> u32 {
        self.registers.hot()
    }

    /// A slot for a device that comes while the machine runs.
    pub fn free_slot(&self) -> Option<usize> {
        self.free().next()
    }

    /// How many slots are free for devices to come.
    pub fn free_slots(&self) -> usize {
        self.free().count()
    }

    fn free(&self) -> impl Iterator<Item = usize> {
        let hot = self.registers.hot();
        let slots = self.slots.iter().enumerate();
        let free =
            slots.filter(move |(n, slot)| hot & (1 << n) != 0 && matches!(*slot.lock(), Content::Empty));
        free.map(|(number, _)| number)
    }

    /// Puts a function into a slot from [`PciBus::free_slot`]. The guest is to be told by an event.
    pub fn insert(&self, slot: usize, function: Box<dyn PciFunction>) {
        let Some(place) = self.slots.get(slot) else { return };
        let mut content = place.lock();
        place.bar.store(function.bar().unwrap_or(NO_BAR), Ordering::Release);
        *content = Content::Present(function);
        drop(content);
        self.registers.plugged(slot);
    }

    /// Asks for the device of `slot` to go; the guest is to be told by an event.
    pub fn ask(&self, slot: usize) {
        self.registers.ask(slot);
    }

    /// Lets every device go that was asked to, without the guest's word. While no vCPU runs.
    pub fn eject_asked(&self) {
        let asked = self.registers.asked();
        self.eject(asked);
        (0..SLOTS).filter(|slot| asked & (1 << slot) != 0).for_each(|slot| self.registers.gone(slot));
    }

    /// Says whether anything was ejected.
    fn eject(&self, mask: u32) -> bool {
        let named = self.slots.iter().enumerate().filter(|(slot, _)| mask & (1 << slot) != 0);
        named.fold(false, |any, (_, slot)| slot.eject() || any)
    }

    /// Takes the functions out that were ejected, with their slots, which are free then.
    pub fn collect(&self) -> Vec<(usize, Box<dyn PciFunction>)> {
        let mut ejected = Vec::new();
        for (number, slot) in self.slots.iter().enumerate() {
            let mut content = slot.lock();
            match std::mem::replace(&mut *content, Content::Empty) {
                Content::Ejected(function) => ejected.push((number, function)),
                other => *content = other,
            }
        }
        ejected
    }

    /// Reads a register of [`hotplug`].
    pub fn read_slots(&self, offset: u16, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    /// Writes a register of [`hotplug`]; says whether there is something to [`PciBus::collect`].
    pub fn write_slots(&self, offset: u16, data: &[u8]) -> bool {
        let mask = self.registers.write(offset, data);
        self.eject(mask)
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
        data.fill(0xff);
        if let Some((slot, register)) = self.target(offset) {
            slot.with(|f| f.read_config(register, data));
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
        data.fill(0xff);
        if let Some((slot, offset)) = self.bar_at(address) {
            slot.with(|f| f.read_bar(offset, data));
        }
    }

    /// Writes memory outside of RAM.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.bar_at(address) {
            slot.with(|f| f.write_bar(offset, data));
        }
    }

    /// Resets all functions, and forgets what the guest has not read.
    pub fn reset(&self) {
        self.registers.reset();
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
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn only_existing_functions_answer_the_scan() {
        let bus = PciBus::new(vec![Box::new(HostBridge::default())], 0);
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

    /// Counts its resets, has an identity and a BAR.
    struct Probe(Arc<AtomicU32>);
    impl PciFunction for Probe {
        fn read_config(&mut self, _offset: u16, data: &mut [u8]) {
            data.fill(0x11);
        }
        fn write_config(&mut self, _offset: u16, _data: &[u8]) {}
        fn bar(&self) -> Option<u64> {
            Some(layout::HOLE_START)
        }
        fn read_bar(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(0x22);
        }
        fn write_bar(&mut self, _offset: u64, _data: &[u8]) {}
        fn reset(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn eject(bus: &PciBus, mask: u32) -> bool {
        bus.write_slots(hotplug::EJECT, &mask.to_le_bytes())
    }

    #[test]
    fn a_function_comes_and_is_out_of_reach_once_the_guest_has_ejected_it() {
        let bus = PciBus::new(vec![Box::new(HostBridge::default())], 0b1100);
        let resets = Arc::new(AtomicU32::new(0));
        let slot = bus.free_slot().unwrap();
        bus.insert(slot, Box::new(Probe(resets.clone())));
        assert_eq!((slot, bus.free_slot()), (2, Some(3)));
        let look = || {
            let (mut config, mut memory) = ([0], [0]);
            bus.read_ecam(2 << 15, &mut config);
            bus.read_memory(layout::HOLE_START, &mut memory);
            (config[0], memory[0])
        };
        assert_eq!(look(), (0x11, 0x22));
        assert!(!eject(&bus, u32::MAX), "nobody has asked");
        bus.ask(slot);
        assert!(eject(&bus, u32::MAX));
        assert_eq!((look(), resets.load(Ordering::Relaxed)), ((0xff, 0xff), 1));
        assert_eq!((bus.free_slot(), bus.free_slots()), (Some(3), 1), "not collected yet");
        assert_eq!(bus.collect().len(), 1);
        assert_eq!((bus.free_slot(), bus.collect().len()), (Some(2), 0));
    }

    #[test]
    fn what_was_asked_for_goes_without_the_guest_when_it_reboots() {
        let bus = PciBus::new(vec![Box::new(HostBridge::default())], 0b1100);
        for slot in [2, 3] {
            bus.insert(slot, Box::new(Probe(Arc::default())));
        }
        bus.ask(3);
        bus.eject_asked();
        assert_eq!(bus.collect().into_iter().map(|(slot, _)| slot).collect::<Vec<_>>(), [3]);
        bus.insert(3, Box::new(Probe(Arc::default())));
        assert!(!eject(&bus, u32::MAX), "the newcomer was not asked to go");
    }
}
