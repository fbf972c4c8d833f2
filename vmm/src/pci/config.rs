//! The configuration space of a function of header type 0: 256 bytes with a mask of what may be written
//! (PCI local bus 3.0, section 6.1).
//!
//! Pure: reads and writes of any offset and length do something defined and change nothing outside of the mask.

/// Size of the space that exists; the extended space behind it reads as zero.
pub const SIZE: usize = 256;
/// Offset of the command register.
pub const COMMAND: usize = 0x04;
/// Command: the function decodes its memory BARs.
pub const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Class, subclass and programming interface, 24 bits.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// See the module.
pub struct ConfigSpace {
    data: [u8; SIZE],
    writable: [u8; SIZE],
    initial: Option<Box<[u8; SIZE]>>,
    last_capability: usize,
    next_capability: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            data: [0; SIZE],
            writable: [0; SIZE],
            initial: None,
            last_capability: CAPABILITIES,
            next_capability: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.data[0x08] = identity.revision;
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        space.writable[COMMAND + 1] = COMMAND_INTX_DISABLE;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.data[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Places BAR 0, 32-bit memory of `size` bytes (a power of two, at least 16), at `address`.
    pub fn set_bar0(&mut self, address: u32, size: u32) {
        self.put(BAR0, &address.to_le_bytes());
        self.writable[BAR0..BAR0 + 4].copy_from_slice(&(!(size - 1)).to_le_bytes());
    }

    /// Adds a capability with the bytes after its two-byte header, and which of their bits may be written; returns its offset.
    /// `None` when there is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<usize> {
        let at = self.next_capability;
        let end = at + 2 + body.len();
        if end > SIZE {
            return None;
        }
        self.data[self.last_capability + usize::from(self.last_capability != CAPABILITIES)] = at as u8;
        self.data[STATUS] |= STATUS_CAPABILITIES;
        self.data[at] = id;
        self.put(at + 2, body);
        let mask_end = at + 2 + writable.len().min(body.len());
        self.writable[at + 2..mask_end].copy_from_slice(&writable[..mask_end - at - 2]);
        self.last_capability = at;
        self.next_capability = end.next_multiple_of(4);
        Some(at)
    }

    /// Ends construction: [`ConfigSpace::reset`] comes back to what is set now.
    pub fn seal(&mut self) {
        self.initial = Some(Box::new(self.data));
    }

    /// Back to the state at power-on.
    pub fn reset(&mut self) {
        if let Some(initial) = &self.initial {
            self.data = **initial;
        }
    }

    /// Reads; beyond the end there are zeroes.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.data.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            let Some(&mask) = self.writable.get(at) else { return };
            self.data[at] = (self.data[at] & !mask) | (byte & mask);
        }
    }

    /// Where BAR 0 is decoded; `None` while memory decoding is off.
    pub fn bar0(&self) -> Option<u64> {
        let address = u32::from_le_bytes([
            self.data[BAR0],
            self.data[BAR0 + 1],
            self.data[BAR0 + 2],
            self.data[BAR0 + 3],
        ]);
        (self.data[COMMAND] & COMMAND_MEMORY != 0).then_some(u64::from(address & !0xf))
    }

    /// Whether the function may access memory and send interrupts by itself.
    pub fn is_bus_master(&self) -> bool {
        self.data[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    /// One byte, for those who look at their own capabilities.
    pub fn byte(&self, at: usize) -> u8 {
        self.data.get(at).copied().unwrap_or(0)
    }

    /// Four bytes as a number.
    pub fn dword(&self, at: usize) -> u32 {
        u32::from_le_bytes([self.byte(at), self.byte(at + 1), self.byte(at + 2), self.byte(at + 3)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            class: 0x02_0000,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1041,
        });
        space.set_bar0(0xc000_8000, 0x8000);
        space.add_capability(9, &[14, 1, 0, 0], &[]).unwrap();
        space.add_capability(0x11, &[3, 0, 0, 0], &[0, 0xc0]).unwrap();
        space.seal();
        space
    }

    #[test]
    fn sizing_a_bar_tells_its_size_and_decoding_follows_the_command() {
        let mut space = space();
        assert_eq!(space.bar0(), None);
        space.write(BAR0 as u16, &[0xff; 4]);
        let mut read = [0; 4];
        space.read(BAR0 as u16, &mut read);
        assert_eq!(u32::from_le_bytes(read), 0xffff_8000);
        space.write(BAR0 as u16, &0xd000_1234u32.to_le_bytes());
        space.write(COMMAND as u16, &[2]);
        assert_eq!(space.bar0(), Some(0xd000_0000));
    }

    #[test]
    fn capabilities_are_linked() {
        let space = space();
        assert_eq!((space.byte(0x34), space.byte(0x40), space.byte(0x41)), (0x40, 9, 0x48));
        assert_eq!((space.byte(0x48), space.byte(0x49)), (0x11, 0));
    }

    proptest! {
        #[test]
        fn no_access_panics_or_changes_what_is_read_only(
            accesses in proptest::collection::vec((any::<u16>(), proptest::collection::vec(any::<u8>(), 1..9)), 0..64)
        ) {
            let mut space = space();
            let before = space.data;
            for (offset, data) in accesses {
                space.write(offset, &data);
                space.read(offset, &mut data.clone());
            }
            for ((now, then), mask) in space.data.iter().zip(before).zip(space.writable) {
                prop_assert_eq!(now & !mask, then & !mask);
            }
            space.reset();
            prop_assert_eq!(space.data, before);
        }
    }
}
