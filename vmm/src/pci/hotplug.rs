//! Plugging PCI devices in and out while the guest runs: the register block behind the slots' devices of the DSDT
//! (ACPI 6.5, sections 6.1.1 and 6.3; Linux `drivers/pci/hotplug/acpiphp_glue.c`).
//!
//! ```text
//! +0  UP     dword; reads the slots that have got a device, bit n for slot n, and forgets them
//! +4  DOWN   dword; reads the slots whose device shall go, and forgets them
//! +8  EJECT  dword; a write lets the devices of these slots go
//! ```
//!
//! Pure: it says which ejects count, `PciBus` carries them out. The guest is believed nothing: only a device that the
//! host has asked for goes, and it goes once. What is asked for stays so until then, also if the guest does not answer.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Offset of UP.
pub const UP: u16 = 0;
/// Offset of DOWN.
pub const DOWN: u16 = 4;
/// Offset of EJECT.
pub const EJECT: u16 = 8;
/// Ports that the registers take.
pub const LENGTH: u16 = 12;

#[derive(Debug, Default)]
struct State {
    /// To be read from UP.
    up: u32,
    /// To be read from DOWN.
    down: u32,
    /// Shall go, and has not gone yet.
    asked: u32,
}

/// The registers; shared between vCPUs and whoever plugs.
#[derive(Debug, Default)]
pub struct SlotRegisters {
    state: Mutex<State>,
    hot: u32,
}

fn bit(slot: usize) -> u32 {
    u32::try_from(slot).ok().and_then(|shift| 1u32.checked_shl(shift)).unwrap_or(0)
}

impl SlotRegisters {
    /// For the slots of the mask `hot`, bit n for slot n.
    pub fn new(hot: u32) -> Self {
        Self { state: Mutex::default(), hot }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Slots whose device can come and go.
    pub fn hot(&self) -> u32 {
        self.hot
    }

    /// `slot` has got a device: the guest shall look.
    pub fn plugged(&self, slot: usize) {
        let mut state = self.lock();
        let bit = bit(slot) & self.hot;
        (state.asked, state.down) = (state.asked & !bit, state.down & !bit);
        state.up |= bit;
    }

    /// The device of `slot` shall go; again, if it was asked before.
    pub fn ask(&self, slot: usize) {
        let mut state = self.lock();
        let bit = bit(slot) & self.hot;
        state.asked |= bit;
        state.down |= bit;
    }

    /// Slots whose device shall go.
    pub fn asked(&self) -> u32 {
        self.lock().asked
    }

    /// The device of `slot` has gone by other means than EJECT.
    pub fn gone(&self, slot: usize) {
        let mut state = self.lock();
        let keep = !bit(slot);
        *state = State { up: state.up & keep, down: state.down & keep, asked: state.asked & keep };
    }

    /// A read by the guest; accesses of another width or place read as zero and forget nothing.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let mut state = self.lock();
        let value = match offset {
            UP => std::mem::take(&mut state.up),
            DOWN => std::mem::take(&mut state.down),
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    /// A write by the guest: the slots whose device goes now, each of which was asked for.
    #[must_use]
    pub fn write(&self, offset: u16, data: &[u8]) -> u32 {
        let (EJECT, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) else { return 0 };
        let mut state = self.lock();
        let going = u32::from_le_bytes(value) & state.asked;
        let keep = !going;
        *state = State { up: state.up & keep, down: state.down & keep, asked: state.asked & keep };
        going
    }

    /// Forgets what has not been read, when the guest resets: it looks at all slots by itself.
    pub fn reset(&self) {
        *self.lock() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOT: u32 = 0xff00_0006;

    fn read(registers: &SlotRegisters, offset: u16) -> u32 {
        let mut data = [0xaa; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn eject(registers: &SlotRegisters, slots: u32) -> u32 {
        registers.write(EJECT, &slots.to_le_bytes())
    }

    #[test]
    fn a_device_comes_is_asked_to_go_and_goes_once() {
        let registers = SlotRegisters::new(HOT);
        registers.plugged(31);
        assert_eq!((read(&registers, UP), read(&registers, UP)), (1 << 31, 0));
        assert_eq!(eject(&registers, 1 << 31), 0, "nobody has asked");
        registers.ask(31);
        assert_eq!((read(&registers, DOWN), read(&registers, DOWN)), (1 << 31, 0));
        registers.ask(31);
        assert_eq!(read(&registers, DOWN), 1 << 31, "asked again");
        assert_eq!((eject(&registers, u32::MAX), eject(&registers, u32::MAX)), (1 << 31, 0));
    }

    #[test]
    fn slots_that_are_not_hot_and_slots_that_do_not_exist_stay() {
        let registers = SlotRegisters::new(HOT);
        for slot in [0, 3, 23, 32, usize::MAX] {
            registers.plugged(slot);
            registers.ask(slot);
        }
        assert_eq!((read(&registers, UP), read(&registers, DOWN), eject(&registers, u32::MAX)), (0, 0, 0));
    }

    #[test]
    fn a_device_that_replaced_another_was_not_asked_to_go() {
        let registers = SlotRegisters::new(HOT);
        registers.ask(1);
        registers.gone(1);
        registers.plugged(1);
        assert_eq!((eject(&registers, 2), read(&registers, DOWN)), (0, 0));
    }

    proptest! {
        /// Whatever the guest does, what goes was asked for by the host since it came, and each asking lets one device go.
        #[test]
        fn only_what_was_asked_for_goes(
            steps in prop::collection::vec((0u8..6, any::<u16>(), prop::collection::vec(any::<u8>(), 0..9), 0usize..40), 0..300)
        ) {
            let registers = SlotRegisters::new(HOT);
            let mut asked = 0u32;
            for (kind, offset, mut data, slot) in steps {
                let offset = if offset & 1 == 0 { offset % LENGTH } else { offset };
                match kind {
                    0 => {
                        registers.plugged(slot);
                        asked &= !bit(slot);
                    }
                    1 => {
                        registers.ask(slot);
                        asked |= bit(slot) & HOT;
                    }
                    2 => registers.read(offset, &mut data),
                    3 => {
                        registers.gone(slot);
                        asked &= !bit(slot);
                    }
                    _ => {
                        let going = registers.write(offset, &data);
                        prop_assert_eq!(going & !asked, 0);
                        asked &= !going;
                    }
                }
                prop_assert_eq!(registers.asked(), asked);
            }
        }
    }
}
