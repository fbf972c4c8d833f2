//! A watchdog that Linux knows: the timer of Intel's 6300ESB (datasheet 300641, section 17; driver `i6300esb`).
//!
//! ```text
//! configuration 0x60  CONFIG   bit 2: ticks of 0.96 µs instead of 983 µs; bit 5: expiry does nothing
//!               0x68  LOCK     bit 1: runs; bit 0: cannot be stopped until the next reset
//! BAR 0         0x00  TIMER1   20 bits ┐ the time allowed is the sum of both
//!               0x04  TIMER2   20 bits ┘
//!               0x0c  RELOAD   0x80, 0x86 open it for one write; then bit 8: begin again, bit 9: forget that it expired
//! ```
//! The interrupt of the first stage, which Linux does not use, does not exist: both stages are one time. It is kept by [`Notices`], where
//! the main thread looks when it expires. Registers here; no guest code can make the monitor wait or wake more often than it exits.

use std::sync::Arc;
use std::time::Duration;

use super::config::{ConfigSpace, Identity};
use super::{BAR_SIZE, PciFunction};
use crate::notices::Notices;

const VENDOR_INTEL: u16 = 0x8086;
const DEVICE_6300ESB_WATCHDOG: u16 = 0x25ab;
const CLASS_SYSTEM_OTHER: u32 = 0x08_8000;

const CONFIG: u16 = 0x60;
const CONFIG_FAST: u8 = 1 << 2;
const CONFIG_NO_REBOOT: u8 = 1 << 5;
const LOCK: u16 = 0x68;
const LOCK_LOCKED: u8 = 1;
const LOCK_ENABLED: u8 = 1 << 1;

const TIMER1: u64 = 0x00;
const TIMER2: u64 = 0x04;
const RELOAD: u64 = 0x0c;
const RELOAD_BEGIN: u16 = 1 << 8;
const RELOAD_EXPIRED: u16 = 1 << 9;
const UNLOCK: [u16; 2] = [0x80, 0x86];
const TIMER_MASK: u32 = (1 << 20) - 1;

/// A tick is 2^15 or 2^5 cycles of 30 ns (33 MHz).
const SLOW_TICK_NSEC: u64 = 30 << 15;
const FAST_TICK_NSEC: u64 = 30 << 5;
/// The least that Linux asks for, and that a guest gets.
const LEAST: Duration = Duration::from_secs(1);

/// What the guest has written, until the next reset.
#[derive(Clone, Copy, Default)]
struct Registers {
    config: u8,
    lock: u8,
    timers: [u32; 2],
    /// How much of the sequence that opens it for a write was seen.
    opened: usize,
}

/// See the module.
pub struct Watchdog {
    space: ConfigSpace,
    registers: Registers,
    notices: Arc<Notices>,
}

impl Watchdog {
    /// With BAR 0 placed at `bar`.
    pub fn new(bar: u32, notices: Arc<Notices>) -> Self {
        let mut space = ConfigSpace::new(&Identity {
            vendor: VENDOR_INTEL,
            device: DEVICE_6300ESB_WATCHDOG,
            class: CLASS_SYSTEM_OTHER,
            revision: 0,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        space.set_bar0(bar, BAR_SIZE as u32);
        space.seal();
        Self { space, registers: Registers { timers: [TIMER_MASK; 2], ..Registers::default() }, notices }
    }

    /// No less than [`LEAST`]: each expiry is told to everybody who listens, and nobody has to hear that a thousand times a second.
    fn allowed(&self) -> Duration {
        let ticks = self.registers.timers.iter().map(|ticks| u64::from(*ticks)).sum::<u64>();
        let fast = self.registers.config & CONFIG_FAST != 0;
        Duration::from_nanos(ticks * if fast { FAST_TICK_NSEC } else { SLOW_TICK_NSEC }).max(LEAST)
    }

    /// Starts the time anew if it runs, or stops it.
    fn begin(&self) {
        let counts = self.registers.lock & LOCK_ENABLED != 0 && self.registers.config & CONFIG_NO_REBOOT == 0;
        self.notices.watch(counts.then(|| self.allowed()));
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let word = value as u16;
        match (offset, self.registers.opened) {
            (RELOAD, opened) if UNLOCK.get(opened) == Some(&word) => self.registers.opened = opened + 1,
            (TIMER1, 2) => (self.registers.timers[0], self.registers.opened) = (value & TIMER_MASK, 0),
            (TIMER2, 2) => (self.registers.timers[1], self.registers.opened) = (value & TIMER_MASK, 0),
            (RELOAD, 2) => {
                self.registers.opened = 0;
                if word & RELOAD_EXPIRED != 0 {
                    self.notices.forget_expiry();
                }
                if word & RELOAD_BEGIN != 0 {
                    self.begin();
                }
            }
            _ => self.registers.opened = 0,
        }
    }

    fn write_config_byte(&mut self, offset: u16, byte: u8) {
        let locked = self.registers.lock & LOCK_LOCKED != 0;
        let runs = self.registers.lock & LOCK_ENABLED;
        match offset {
            CONFIG => self.registers.config = byte & (CONFIG_FAST | CONFIG_NO_REBOOT | 3),
            LOCK if !locked => {
                self.registers.lock = byte & 7;
                if runs != byte & LOCK_ENABLED {
                    self.begin();
                }
            }
            _ => {}
        }
    }
}

impl PciFunction for Watchdog {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.space.read(offset, data);
        for (byte, at) in data.iter_mut().zip(offset..) {
            match at {
                CONFIG => *byte = self.registers.config,
                LOCK => *byte = self.registers.lock,
                _ => {}
            }
        }
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.space.write(offset, data);
        data.iter().zip(offset..).for_each(|(byte, at)| self.write_config_byte(at, *byte));
    }

    fn bar(&self) -> Option<u64> {
        self.space.bar0()
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == RELOAD && self.notices.has_expired() {
            let word = RELOAD_EXPIRED.to_le_bytes();
            data.iter_mut().zip(word).for_each(|(to, from)| *to = from);
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        let mut value = [0; 4];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        self.write_register(offset, u32::from_le_bytes(value));
    }

    fn reset(&mut self) {
        self.space.reset();
        self.registers = Registers { timers: [TIMER_MASK; 2], ..Registers::default() };
        self.notices.watch(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Guest {
        device: Watchdog,
        notices: Arc<Notices>,
    }

    impl Guest {
        fn new() -> Self {
            let notices = Arc::new(Notices::new().unwrap());
            Self { device: Watchdog::new(0xc000_0000, notices.clone()), notices }
        }

        fn open(&mut self) {
            for word in UNLOCK {
                self.device.write_bar(RELOAD, &word.to_le_bytes());
            }
        }

        fn reload(&mut self, bits: u16) {
            self.open();
            self.device.write_bar(RELOAD, &bits.to_le_bytes());
        }

        /// As Linux: half of the time in each stage, at a little more than a tick a millisecond.
        fn set(&mut self, msec: u32) {
            for timer in [TIMER1, TIMER2] {
                self.open();
                self.device.write_bar(timer, &(msec / 2).to_le_bytes());
            }
            self.reload(RELOAD_BEGIN);
        }

        fn due_msec(&self) -> Option<u128> {
            self.notices.due().map(|due| due.as_millis())
        }
    }

    #[test]
    fn it_counts_from_the_last_sign_of_life_and_only_while_it_runs() {
        let mut guest = Guest::new();
        guest.device.write_config(CONFIG, &3u16.to_le_bytes());
        guest.set(30_000);
        assert_eq!(guest.due_msec(), None, "not switched on");
        guest.device.write_config(LOCK, &[LOCK_ENABLED]);
        assert!((29_000..=30_000).contains(&guest.due_msec().unwrap()));
        guest.set(60_000);
        assert!((58_000..=60_000).contains(&guest.due_msec().unwrap()));
        guest.device.write_bar(RELOAD, &RELOAD_BEGIN.to_le_bytes());
        guest.device.write_bar(TIMER1, &[0; 4]);
        assert!((58_000..=60_000).contains(&guest.due_msec().unwrap()), "nothing is open");
        guest.device.write_config(LOCK, &[0]);
        assert_eq!(guest.due_msec(), None);
    }

    #[test]
    fn it_cannot_be_stopped_once_it_is_locked_but_by_a_reset() {
        let mut guest = Guest::new();
        guest.device.write_config(LOCK, &[LOCK_ENABLED | LOCK_LOCKED]);
        guest.device.write_config(LOCK, &[0]);
        assert!(guest.due_msec().is_some());
        guest.device.reset();
        assert_eq!(guest.due_msec(), None);
        let mut lock = [0xff];
        guest.device.read_config(LOCK, &mut lock);
        assert_eq!(lock, [0]);
    }

    #[test]
    fn expiry_is_told_once_and_remembered_until_it_is_forgotten() {
        let mut guest = Guest::new();
        guest.device.write_config(CONFIG, &[CONFIG_FAST]);
        guest.set(2);
        guest.device.write_config(LOCK, &[LOCK_ENABLED]);
        assert!(
            guest.due_msec().unwrap() > 900,
            "however little it asks for, it expires once a second at most"
        );
        while !guest.notices.take().expired {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!guest.notices.take().expired);
        guest.device.reset();
        let mut reload = [0; 2];
        guest.device.read_bar(RELOAD, &mut reload);
        assert_eq!(u16::from_le_bytes(reload), RELOAD_EXPIRED);
        guest.reload(RELOAD_EXPIRED);
        guest.device.read_bar(RELOAD, &mut reload);
        assert_eq!(reload, [0; 2]);
    }

    #[test]
    fn a_paused_guest_keeps_what_was_left() {
        let mut guest = Guest::new();
        guest.set(30_000);
        guest.device.write_config(LOCK, &[LOCK_ENABLED]);
        guest.notices.hold_watch();
        assert_eq!(guest.due_msec(), None);
        guest.notices.release_watch();
        guest.notices.release_watch();
        assert!((28_000..=30_000).contains(&guest.due_msec().unwrap()));
        guest.notices.hold_watch();
        guest.device.reset();
        guest.notices.release_watch();
        assert_eq!(guest.due_msec(), None);
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((any::<bool>(), any::<u8>(), proptest::collection::vec(any::<u8>(), 1..9)), 0..64)) {
            let mut guest = Guest::new();
            for (config, offset, mut data) in accesses {
                if config {
                    guest.device.write_config(u16::from(offset), &data);
                    guest.device.read_config(u16::from(offset), &mut data);
                } else {
                    guest.device.write_bar(u64::from(offset), &data);
                    guest.device.read_bar(u64::from(offset), &mut data);
                }
            }
        }
    }
}
