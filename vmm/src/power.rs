//! Power and event registers: sleep, reset, and the events that the guest is told of.
//!
//! Four bytes of I/O ports (ACPI 6.5, sections 4.8.3.7 and 5.6.9), from [`crate::arch::x86_64::layout::POWER_PORT`] on:
//!
//! ```text
//! +0  SLEEP_CONTROL  write: bit 5 SLP_EN, bits 2..4 SLP_TYP (5 = off)
//! +1  SLEEP_STATUS   reads 0; the wake bit is ignored
//! +2  RESET          write 1
//! +4  EVENTS         read and clear: bit 0 power button, bit 1 vCPUs, bit 2 PCI slots
//! ```
//!
//! The interrupt of the event device is a level: high from the first event until the guest has read EVENTS. An edge would be lost
//! on a guest that still boots, with the interrupt masked; a level waits for it.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Offset of SLEEP_CONTROL.
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of SLEEP_STATUS.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of RESET.
pub const RESET: u16 = 2;
/// Offset of EVENTS.
pub const EVENTS: u16 = 4;
/// Ports that the registers take.
pub const LENGTH: u16 = 8;
/// What is written to RESET.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the "off" state, as `_S5` says it.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// EVENTS: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// EVENTS: vCPUs were plugged in or are asked back (see `crate::cpu_hotplug`).
pub const EVENT_CPUS: u8 = 2;
/// EVENTS: a PCI slot has got a device, or its device shall go (see `crate::pci::hotplug`).
pub const EVENT_SLOTS: u8 = 4;

const SLEEP_ENABLE: u8 = 1 << 5;

/// What a write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerAction {
    /// Nothing.
    None,
    /// The guest switches itself off.
    PowerOff,
    /// The guest resets.
    Reset,
    /// The guest's kernel says that it has panicked; it runs on until it resets or is stopped.
    Panicked,
}

/// Sets the level of the interrupt.
pub type Line = Box<dyn Fn(bool) + Send + Sync>;

/// The registers; shared between vCPUs and whoever raises events.
pub struct PowerRegisters {
    /// What the guest has not read yet. The line is set under the lock, so that the two never disagree.
    events: Mutex<u8>,
    line: Line,
}

impl PowerRegisters {
    /// No event; `line` is the interrupt, low now.
    pub fn new(line: Line) -> Self {
        Self { events: Mutex::new(0), line }
    }

    fn events(&self) -> MutexGuard<'_, u8> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write of one byte at `offset`.
    pub fn write(&self, offset: u16, value: u8) -> PowerAction {
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && (value >> 2) & 7 == SLEEP_TYPE_OFF => {
                PowerAction::PowerOff
            }
            RESET if value == RESET_VALUE => PowerAction::Reset,
            _ => PowerAction::None,
        }
    }

    /// A read of one byte at `offset`.
    pub fn read(&self, offset: u16) -> u8 {
        match offset {
            EVENTS => self.fetch(),
            _ => 0,
        }
    }

    fn fetch(&self) -> u8 {
        let mut events = self.events();
        let fetched = std::mem::take(&mut *events);
        if fetched != 0 {
            (self.line)(false);
        }
        fetched
    }

    /// Notes an event (one of the `EVENT_` bits) and raises the interrupt.
    pub fn raise(&self, event: u8) {
        let mut events = self.events();
        if *events == 0 {
            (self.line)(true);
        }
        *events |= event;
    }

    /// Forgets what has not been fetched, when the guest resets.
    pub fn reset(&self) {
        self.fetch();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn only_the_off_state_with_enable_switches_off() {
        let registers = PowerRegisters::new(Box::new(|_| {}));
        for value in 0..=255u8 {
            let off = value & 0x20 != 0 && (value >> 2) & 7 == 5;
            assert_eq!(registers.write(SLEEP_CONTROL, value) == PowerAction::PowerOff, off, "{value:#x}");
        }
        assert_eq!(registers.write(RESET, 1), PowerAction::Reset);
        assert_eq!(registers.write(RESET, 2), PowerAction::None);
        assert_eq!(registers.write(7, 1), PowerAction::None);
    }

    #[test]
    fn an_event_is_read_once_and_the_line_is_high_until_then() {
        let level = Arc::new(AtomicBool::new(false));
        let line = level.clone();
        let registers = PowerRegisters::new(Box::new(move |high| line.store(high, Ordering::Relaxed)));
        let high = || level.load(Ordering::Relaxed);
        registers.raise(EVENT_POWER_BUTTON);
        registers.raise(EVENT_CPUS);
        assert!(high());
        assert_eq!(registers.read(EVENTS), EVENT_POWER_BUTTON | EVENT_CPUS);
        assert!(!high());
        assert_eq!(registers.read(EVENTS), 0);
        registers.raise(EVENT_CPUS);
        registers.reset();
        assert!(!high());
        assert_eq!(registers.read(EVENTS), 0);
    }
}
