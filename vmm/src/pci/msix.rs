//! Message-signalled interrupts: table, pending bits and masks (PCI local bus 3.0, section 6.8.2).
//!
//! Pure but for [`MsiSink`], which connects a vector to KVM and fires it. A vector fires only while MSI-X is enabled and neither
//! the function nor the vector is masked; otherwise it is pending and fires when the mask goes.

use crate::arch::x86_64::irq::Message;

/// Bytes of one table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Message control: MSI-X is enabled.
pub const CONTROL_ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
pub const CONTROL_MASK_ALL: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// Where interrupts go.
pub trait MsiSink: Send {
    /// Connects `vector` to `message`; says whether that worked.
    fn route(&self, vector: u16, message: Message) -> bool;
    /// Raises the interrupt of a connected vector.
    fn fire(&self, vector: u16);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    message: Message,
    control: u32,
    /// What the sink was last told, if that worked.
    routed: Option<Message>,
    pending: bool,
}

const EMPTY: Entry =
    Entry { message: Message { address: 0, data: 0 }, control: VECTOR_MASKED, routed: None, pending: false };

/// The vectors of one function.
pub struct Msix<S> {
    control: u16,
    entries: Vec<Entry>,
    sink: S,
}

impl<S: MsiSink> Msix<S> {
    /// With `vectors` vectors.
    pub fn new(vectors: u16, sink: S) -> Self {
        Self { control: 0, entries: vec![EMPTY; usize::from(vectors)], sink }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// The guest wrote message control.
    pub fn set_control(&mut self, control: u16) {
        self.control = control & (CONTROL_ENABLE | CONTROL_MASK_ALL);
        for vector in 0..self.vectors() {
            self.update(vector);
        }
    }

    fn open(&self, entry: &Entry) -> bool {
        self.control == CONTROL_ENABLE && entry.control & VECTOR_MASKED == 0
    }

    /// Connects a vector that may fire, and fires it if it is pending.
    fn update(&mut self, vector: u16) {
        let Some(mut entry) = self.entries.get(usize::from(vector)).copied() else { return };
        if !self.open(&entry) {
            return;
        }
        if entry.routed != Some(entry.message) {
            entry.routed = self.sink.route(vector, entry.message).then_some(entry.message);
        }
        if entry.pending && entry.routed.is_some() {
            entry.pending = false;
            self.sink.fire(vector);
        }
        self.entries[usize::from(vector)] = entry;
    }

    /// The device interrupts. Vectors that do not exist (such as "none", 0xffff) are ignored.
    pub fn raise(&mut self, vector: u16) {
        let Some(entry) = self.entries.get(usize::from(vector)) else { return };
        if self.open(entry) && entry.routed == Some(entry.message) {
            self.sink.fire(vector);
        } else {
            self.entries[usize::from(vector)].pending = true;
            self.update(vector);
        }
    }

    fn dword(&self, offset: u64) -> u32 {
        let Some(entry) = self.entries.get((offset / ENTRY_BYTES) as usize) else { return 0 };
        match offset % ENTRY_BYTES / 4 {
            0 => entry.message.address as u32,
            1 => (entry.message.address >> 32) as u32,
            2 => entry.message.data,
            _ => entry.control,
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset + index as u64;
            *byte = self.dword(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    /// Writes the table; only whole aligned double words count, as the specification has it.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (index, word) in data.chunks_exact(4).enumerate() {
            let at = offset + 4 * index as u64;
            let vector = at / ENTRY_BYTES;
            let Some(entry) = self.entries.get_mut(vector as usize) else { return };
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let address = entry.message.address;
            match at % ENTRY_BYTES / 4 {
                0 => entry.message.address = (address & !0xffff_ffff) | u64::from(value & !3),
                1 => entry.message.address = (address & 0xffff_ffff) | (u64::from(value) << 32),
                2 => entry.message.data = value,
                _ => entry.control = value & VECTOR_MASKED,
            }
            self.update(vector as u16);
        }
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(index).saturating_mul(8);
            *byte = (0..8)
                .filter(|bit| self.entries.get(first.saturating_add(*bit)).is_some_and(|e| e.pending))
                .fold(0, |byte, bit| byte | (1 << bit));
        }
    }

    /// Back to the state at power-on; connections stay known, so that nothing is connected twice.
    pub fn reset(&mut self) {
        self.control = 0;
        for entry in &mut self.entries {
            *entry = Entry { routed: entry.routed, ..EMPTY };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Log {
        routed: RefCell<BTreeMap<u16, Message>>,
        fired: RefCell<Vec<u16>>,
    }

    impl MsiSink for Log {
        fn route(&self, vector: u16, message: Message) -> bool {
            self.routed.borrow_mut().insert(vector, message);
            true
        }

        fn fire(&self, vector: u16) {
            assert!(self.routed.borrow().contains_key(&vector), "fired without a route");
            self.fired.borrow_mut().push(vector);
        }
    }

    fn unmask(msix: &mut Msix<Log>, vector: u64, data: u32) {
        let at = vector * ENTRY_BYTES;
        msix.write_table(at, &0xfee0_0000u32.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &0u32.to_le_bytes());
    }

    #[test]
    fn a_masked_interrupt_waits_and_comes_once() {
        let mut msix = Msix::new(2, Log::default());
        msix.set_control(CONTROL_ENABLE);
        msix.raise(1);
        msix.raise(1);
        let mut pending = [0];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [2]);
        unmask(&mut msix, 1, 0x41);
        assert_eq!(*msix.sink.fired.borrow(), [1]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0]);
        msix.raise(1);
        msix.set_control(CONTROL_ENABLE | CONTROL_MASK_ALL);
        msix.raise(1);
        assert_eq!(*msix.sink.fired.borrow(), [1, 1]);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(*msix.sink.fired.borrow(), [1, 1, 1]);
    }

    proptest! {
        #[test]
        fn whatever_is_written_what_fires_has_the_route_of_the_table(
            steps in proptest::collection::vec((0u8..4, any::<u16>(), any::<u64>()), 0..200)
        ) {
            let mut msix = Msix::new(3, Log::default());
            for (kind, small, value) in steps {
                let offset = u64::from(small) % 80;
                match kind {
                    0 => msix.write_table(offset, &value.to_le_bytes()[..usize::from(small % 8) + 1]),
                    1 => msix.set_control(value as u16),
                    2 => msix.read_table(offset, &mut [0; 8]),
                    _ => {
                        let vector = small % 4;
                        let before = msix.sink.fired.borrow().len();
                        msix.raise(vector);
                        if msix.sink.fired.borrow().len() > before {
                            let entry = msix.entries[usize::from(vector)];
                            prop_assert_eq!(msix.sink.routed.borrow()[&vector], entry.message);
                            prop_assert_eq!((msix.control, entry.control), (CONTROL_ENABLE, 0));
                        }
                    }
                }
            }
        }
    }
}
