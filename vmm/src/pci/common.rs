//! virtio's common configuration registers (virtio 1.2, section 4.1.4.3) and the life of a device (section 3.1).
//!
//! Pure: it says what a write means ([`Effect`]), the transport does it. Accesses of another width or alignment than the field has
//! are ignored, as are changes to a queue while the device runs.

/// Length of the register block in bytes.
pub const LENGTH: u64 = 56;
/// No vector.
pub const NO_VECTOR: u16 = 0xffff;
/// VIRTIO_F_VERSION_1.
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// Status bits (section 2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Both agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device has given up until the next reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The guest has given up.
    pub const FAILED: u8 = 128;
}

/// One queue as the driver has set it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueRegisters {
    /// Largest size.
    pub max_size: u16,
    /// Size that the driver chose, unchecked.
    pub size: u16,
    /// Vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// The driver enabled it.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// What a write asks of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver is ready: activate the device.
    Activate,
    /// Reset the device.
    Reset,
    /// A vector changed.
    Vectors,
}

/// The register file.
#[derive(Debug)]
pub struct CommonRegisters {
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    config_vector: u16,
    vectors: u16,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
}

impl CommonRegisters {
    /// For a device that offers `features` (besides VERSION_1) with queues of these largest sizes, and as many vectors.
    pub fn new(features: u64, queue_sizes: &[u16], vectors: u16) -> Self {
        Self {
            offered: features | FEATURE_VERSION_1,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            config_vector: NO_VECTOR,
            vectors,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    /// Back to the state at power-on.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|q| q.max_size).collect();
        *self = Self::new(self.offered, &sizes, self.vectors);
    }

    /// Features that both sides have.
    pub fn features(&self) -> u64 {
        self.accepted
    }

    /// The queues.
    pub fn queues(&self) -> &[QueueRegisters] {
        &self.queues
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// The status without NEEDS_RESET, which the transport adds.
    pub fn status(&self) -> u8 {
        self.status
    }

    fn image(&self, needs_reset: bool, generation: u8) -> [u8; LENGTH as usize] {
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; LENGTH as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.driver_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status | if needs_reset { status::NEEDS_RESET } else { 0 }, generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.descriptors.to_le_bytes());
            put(0x28, &queue.available.to_le_bytes());
            put(0x30, &queue.used.to_le_bytes());
        }
        image
    }

    /// Reads; beyond the end there are zeroes.
    pub fn read(&self, offset: u64, data: &mut [u8], needs_reset: bool, generation: u8) {
        let image = self.image(needs_reset, generation);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = image.get((offset as usize).saturating_add(index)).copied().unwrap_or(0);
        }
    }

    /// Writes one field, or half of one that has 64 bits.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        match *data {
            [value] if offset == 0x14 => self.write_status(value),
            [a, b] => self.write_word(offset, u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.write_dword(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] if offset >= 0x20 && offset.is_multiple_of(8) => {
                self.write_dword(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_dword(offset + 4, u32::from_le_bytes([e, f, g, h]))
            }
            _ => Effect::None,
        }
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        // Bits are only ever added; NEEDS_RESET is the device's.
        let added = value & !self.status & !status::NEEDS_RESET;
        let mut accepted = added;
        let features_fine = self.accepted & !self.offered == 0 && self.accepted & FEATURE_VERSION_1 != 0;
        if added & status::FEATURES_OK != 0 && !features_fine {
            accepted &= !status::FEATURES_OK;
        }
        let ready = (self.status | accepted) & status::FEATURES_OK != 0;
        if added & status::DRIVER_OK != 0 && !ready {
            accepted &= !status::DRIVER_OK;
        }
        self.status |= accepted;
        if accepted & status::DRIVER_OK != 0 { Effect::Activate } else { Effect::None }
    }

    fn checked_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    fn queue(&mut self) -> Option<&mut QueueRegisters> {
        let running = self.status & status::DRIVER_OK != 0;
        self.queues.get_mut(usize::from(self.queue_select)).filter(|q| !running && !q.enabled)
    }

    fn write_word(&mut self, offset: u64, value: u16) -> Effect {
        let vector = self.checked_vector(value);
        match offset {
            0x10 => {
                self.config_vector = vector;
                return Effect::Vectors;
            }
            0x16 => self.queue_select = value,
            0x1a => {
                if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select)) {
                    queue.vector = vector;
                }
                return Effect::Vectors;
            }
            0x18 => {
                if let Some(queue) = self.queue() {
                    queue.size = value;
                }
            }
            0x1c => {
                if let Some(queue) = self.queue() {
                    queue.enabled = value == 1;
                }
            }
            _ => {}
        }
        Effect::None
    }

    fn write_dword(&mut self, offset: u64, value: u32) -> Effect {
        let set = |field: &mut u64, high: bool| {
            let shift = if high { 32 } else { 0 };
            *field = (*field & !(0xffff_ffff << shift)) | (u64::from(value) << shift);
        };
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            0x0c if self.status & status::FEATURES_OK == 0 && self.driver_select < 2 => {
                set(&mut self.accepted, self.driver_select == 1);
            }
            0x20..=0x34 if offset.is_multiple_of(4) => {
                if let Some(queue) = self.queue() {
                    let high = offset % 8 == 4;
                    match offset & !7 {
                        0x20 => set(&mut queue.descriptors, high),
                        0x28 => set(&mut queue.available, high),
                        _ => set(&mut queue.used, high),
                    }
                }
            }
            _ => {}
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn accept(registers: &mut CommonRegisters, features: u64) {
        for half in 0..2u32 {
            registers.write(0x08, &half.to_le_bytes());
            registers.write(0x0c, &((features >> (32 * half)) as u32).to_le_bytes());
        }
        registers.write(0x14, &[status::ACKNOWLEDGE | status::DRIVER]);
        registers.write(0x14, &[status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK]);
    }

    #[test]
    fn features_are_agreed_only_when_offered_and_modern() {
        for (features, fine) in [
            (FEATURE_VERSION_1 | 1, true),
            (FEATURE_VERSION_1, true),
            (1, false),
            (FEATURE_VERSION_1 | 2, false),
        ] {
            let mut registers = CommonRegisters::new(1, &[256], 2);
            accept(&mut registers, features);
            assert_eq!(registers.status() & status::FEATURES_OK != 0, fine, "{features:#x}");
        }
    }

    #[test]
    fn the_driver_brings_a_device_up_and_cannot_change_queues_then() {
        let mut registers = CommonRegisters::new(0, &[256, 128], 3);
        accept(&mut registers, FEATURE_VERSION_1);
        registers.write(0x16, &1u16.to_le_bytes());
        registers.write(0x18, &64u16.to_le_bytes());
        registers.write(0x20, &0x1_0000_2000u64.to_le_bytes());
        registers.write(0x1a, &9u16.to_le_bytes());
        registers.write(0x1c, &1u16.to_le_bytes());
        assert_eq!(registers.write(0x14, &[0x0f]), Effect::Activate);
        assert_eq!(registers.write(0x14, &[0x0f]), Effect::None, "twice");
        registers.write(0x18, &32u16.to_le_bytes());
        let queue = registers.queues()[1];
        assert_eq!((queue.size, queue.descriptors, queue.enabled), (64, 0x1_0000_2000, true));
        assert_eq!(queue.vector, NO_VECTOR, "a vector that does not exist");
        assert_eq!(registers.write(0x14, &[0]), Effect::Reset);
    }

    proptest! {
        #[test]
        fn random_accesses_keep_the_rules(
            steps in proptest::collection::vec((0u64..80, proptest::collection::vec(any::<u8>(), 1..9)), 0..300)
        ) {
            let mut registers = CommonRegisters::new(0b1010, &[256, 64], 3);
            for (offset, data) in steps {
                let before = registers.status();
                match registers.write(offset, &data) {
                    Effect::Reset => registers.reset(),
                    Effect::Activate => {
                        prop_assert!(before & status::DRIVER_OK == 0);
                        prop_assert!(registers.features() & !(0b1010 | FEATURE_VERSION_1) == 0);
                    }
                    _ => prop_assert!(registers.status() & before == before, "a status bit went away"),
                }
                registers.read(offset, &mut data.clone(), false, 0);
                prop_assert!(registers.queues().iter().all(|q| q.vector == NO_VECTOR || q.vector < 3));
            }
        }
    }
}
