//! Where accesses of the guest outside of its memory go: I/O ports and memory-mapped registers.
//!
//! ```text
//! port 0x3f8..0x400 console · 0x505 panic · 0x600..0x608 power · 0x640..0x688 vCPUs · 0x6a0..0x6ac PCI slots
//! ports 0x64, 0xcf9 reset by other means
//! ports 0xcf8..0xd00 and ECAM ─▶ PCI configuration · BAR window ─▶ PCI functions
//! ```
//!
//! What nothing answers reads as ones and swallows writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::arch::x86_64::layout;
use crate::console::Console;
use crate::cpu_hotplug::{self, CpuHotplug};
use crate::notices::Notices;
use crate::panic;
use crate::pci::{PciBus, hotplug};
use crate::power::{self, PowerAction, PowerRegisters};

/// Keyboard controller's command port, and the command that pulses the reset line.
const I8042_COMMAND: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// Reset control of PC chipsets: bit 2 resets.
const RESET_CONTROL: u16 = 0xcf9;
const RESET_CONTROL_CPU: u8 = 1 << 2;
/// PCI configuration mechanism 1 (PCI local bus 3.0, section 3.2.2.3.2): an address register and a window. Linux before 6.2 accepts
/// an ECAM early only where this works too.
const PCI_ADDRESS: u16 = 0xcf8;
const PCI_DATA: u16 = 0xcfc;
const PCI_DATA_END: u16 = 0xd00;
const PCI_ENABLE: u32 = 1 << 31;
const SERIAL_END: u16 = layout::SERIAL_PORT + 8;
const POWER_END: u16 = layout::POWER_PORT + power::LENGTH;
const CPU_END: u16 = layout::CPU_PORT + cpu_hotplug::LENGTH;
const SLOT_END: u16 = layout::SLOT_PORT + hotplug::LENGTH;

/// See the module.
pub struct Bus {
    /// The serial console.
    pub console: Arc<Console>,
    /// Power and event registers.
    pub power: Arc<PowerRegisters>,
    /// vCPUs that come and go.
    pub cpus: CpuHotplug,
    /// PCI.
    pub pci: PciBus,
    /// Address register of configuration mechanism 1.
    pub pci_address: AtomicU32,
    /// To the main thread.
    pub notices: Arc<Notices>,
}

impl Bus {
    /// The guest writes to an I/O port; more than one byte is a string instruction or a wide access, which the byte-wide
    /// devices here take byte by byte at the same port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PowerAction {
        match port {
            layout::SERIAL_PORT..SERIAL_END => self.console.write((port - layout::SERIAL_PORT) as u8, data),
            layout::POWER_PORT..POWER_END => {
                if let Some(&first) = data.first() {
                    return self.power.write(port - layout::POWER_PORT, first);
                }
            }
            layout::CPU_PORT..CPU_END => self.cpus.write(port - layout::CPU_PORT, data),
            layout::PANIC_PORT => {
                return data.first().map_or(PowerAction::None, |event| panic::write(*event));
            }
            layout::SLOT_PORT..SLOT_END if self.pci.write_slots(port - layout::SLOT_PORT, data) => {
                self.notices.devices_changed();
            }
            I8042_COMMAND if data.first() == Some(&I8042_RESET) => return PowerAction::Reset,
            RESET_CONTROL if data.first().is_some_and(|v| v & RESET_CONTROL_CPU != 0) => {
                return PowerAction::Reset;
            }
            PCI_ADDRESS => {
                if let Ok(address) = <[u8; 4]>::try_from(data) {
                    self.pci_address.store(u32::from_le_bytes(address), Ordering::Release);
                }
            }
            PCI_DATA..PCI_DATA_END => {
                if let Some(offset) = self.pci_offset(port) {
                    self.pci.write_ecam(offset, data);
                }
            }
            _ => {}
        }
        PowerAction::None
    }

    /// The place in the ECAM that an access to the window means.
    fn pci_offset(&self, port: u16) -> Option<u64> {
        let address = self.pci_address.load(Ordering::Acquire);
        let (bus, function, register) = ((address >> 16) & 0xff, (address >> 8) & 0xff, address & 0xfc);
        let offset = (u64::from(function) << 12) | u64::from(register) | u64::from(port - PCI_DATA);
        (address & PCI_ENABLE != 0 && bus == 0).then_some(offset)
    }

    /// The guest reads an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port {
            layout::SERIAL_PORT..SERIAL_END => {
                data.iter_mut().for_each(|b| *b = self.console.read((port - layout::SERIAL_PORT) as u8));
            }
            layout::POWER_PORT..POWER_END => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.power.read(port - layout::POWER_PORT);
                }
            }
            layout::CPU_PORT..CPU_END => self.cpus.read(port - layout::CPU_PORT, data),
            layout::SLOT_PORT..SLOT_END => self.pci.read_slots(port - layout::SLOT_PORT, data),
            layout::PANIC_PORT => data.fill(panic::read()),
            PCI_ADDRESS if data.len() == 4 => {
                data.copy_from_slice(&self.pci_address.load(Ordering::Acquire).to_le_bytes());
            }
            PCI_DATA..PCI_DATA_END => {
                if let Some(offset) = self.pci_offset(port) {
                    self.pci.read_ecam(offset, data);
                }
            }
            // Nothing in the keyboard controller's buffers: a driver that waits for them does not.
            I8042_COMMAND => data.fill(0),
            _ => {}
        }
    }

    /// The guest writes to an address outside of its memory.
    pub fn memory_write(&self, address: u64, data: &[u8]) {
        match address {
            layout::ECAM..0xe010_0000 => self.pci.write_ecam(address - layout::ECAM, data),
            _ => self.pci.write_memory(address, data),
        }
    }

    /// The guest reads an address outside of its memory.
    pub fn memory_read(&self, address: u64, data: &mut [u8]) {
        match address {
            layout::ECAM..0xe010_0000 => self.pci.read_ecam(address - layout::ECAM, data),
            _ => self.pci.read_memory(address, data),
        }
    }
}

const _: () = assert!(layout::ECAM + layout::ECAM_SIZE == 0xe010_0000, "the range patterns above");
