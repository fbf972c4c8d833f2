//! Descriptor chains, read once and checked before a device trusts them (virtio 1.2, section 2.7).
//!
//! `virtio_queue::DescriptorChain` ends quietly on a broken link: a loop, an index beyond the table, a table outside
//! memory. [`Chain::load`] tells these apart from a proper end, because a device that worked on half a chain would do
//! something that nobody asked for. The descriptors are copied out, so a guest that rewrites them meanwhile changes
//! nothing. Addresses are looked up when used; offsets run over the whole readable or writable part, as the
//! specification forbids to depend on how a driver cuts its buffers (2.7.4).
//!
//! It never allocates per chain: the vectors grow once, up to [`MAX_SEGMENTS`].

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// Most descriptors in one chain, direct and indirect ones together. Linux sends at most 19 for a network frame, and for
/// a disk what `seg_max` says plus two.
pub const MAX_SEGMENTS: usize = 258;

/// A driver broke the rules of section 2.7 in a way that leaves no sensible answer: the device must be reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The ring's index runs ahead by more than its size, or a ring left guest memory.
    #[error("a ring is broken: {0}")]
    Ring(&'static str),
    /// Not a single descriptor could be read.
    #[error("chain {head} has no readable descriptor")]
    Empty {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// The last descriptor promises another one that does not exist: a loop, a bad index or a bad indirect table.
    #[error("chain {head} loops or leaves its table after {count} descriptors")]
    Cut {
        /// Index of the chain's first descriptor.
        head: u16,
        /// Descriptors read up to there.
        count: usize,
    },
    /// More than [`MAX_SEGMENTS`].
    #[error("chain {head} has more than {MAX_SEGMENTS} descriptors")]
    TooLong {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A readable descriptor after a writable one.
    #[error("chain {head} has a readable descriptor after a writable one")]
    Order {
        /// Index of the chain's first descriptor.
        head: u16,
    },
    /// A buffer is not, or not wholly, guest memory.
    #[error("a buffer of {len} bytes at guest address {addr:#x} is outside memory")]
    Outside {
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
    /// A part of the chain is shorter than the device's protocol asks for.
    #[error("the chain has {have} bytes where at least {need} are needed")]
    Short {
        /// Bytes there.
        have: u64,
        /// Bytes needed.
        need: u64,
    },
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug)]
struct Segment {
    addr: GuestAddress,
    len: u32,
}

/// One descriptor chain, reusable for the next.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_bytes: u64,
    writable_bytes: u64,
}

/// Which half of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// What the driver wrote for the device.
    Readable,
    /// What the device may write.
    Writable,
}

impl Chain {
    /// Replaces the contents by those of `source`.
    ///
    /// # Errors
    /// When the chain breaks the rules; the contents are then unspecified.
    pub fn load(&mut self, mut source: DescriptorChain<&GuestMemoryMmap>) -> Result<(), ChainError> {
        let head = source.head_index();
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        (self.readable_bytes, self.writable_bytes) = (0, 0);
        let mut more = true;
        let mut count = 0;
        for descriptor in source.by_ref() {
            count += 1;
            if count > MAX_SEGMENTS {
                return Err(ChainError::TooLong { head });
            }
            more = descriptor.has_next();
            let segment = Segment { addr: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                self.writable_bytes += u64::from(segment.len);
                self.writable.push(segment);
            } else if self.writable.is_empty() {
                self.readable_bytes += u64::from(segment.len);
                self.readable.push(segment);
            } else {
                return Err(ChainError::Order { head });
            }
        }
        match (count, more) {
            (0, _) => Err(ChainError::Empty { head }),
            (_, true) => Err(ChainError::Cut { head, count }),
            _ => Ok(()),
        }
    }

    /// Index of the first descriptor, by which the chain is given back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Descriptors with a buffer.
    pub fn segments(&self) -> usize {
        self.readable.len() + self.writable.len()
    }

    /// Bytes that the driver wrote for the device.
    pub fn readable_bytes(&self) -> u64 {
        self.readable_bytes
    }

    /// Bytes that the device may write.
    pub fn writable_bytes(&self) -> u64 {
        self.writable_bytes
    }

    fn half(&self, half: Half) -> (&[Segment], u64) {
        match half {
            Half::Readable => (&self.readable, self.readable_bytes),
            Half::Writable => (&self.writable, self.writable_bytes),
        }
    }

    /// Address and length of each buffer of one half, unchecked.
    pub fn ranges(&self, half: Half) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.half(half).0.iter().map(|segment| (segment.addr, segment.len))
    }

    /// Calls `visit` with address, length and position (from `offset` on, 0 first) of each piece of `offset..offset+len`.
    fn pieces(
        &self,
        half: Half,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(GuestAddress, u32, usize) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        let (segments, have) = self.half(half);
        let need = offset.saturating_add(len);
        if need > have {
            return Err(ChainError::Short { have, need });
        }
        let (mut skip, mut left, mut done) = (offset, len, 0usize);
        for segment in segments {
            if left == 0 {
                break;
            }
            let length = u64::from(segment.len);
            if skip >= length {
                skip -= length;
                continue;
            }
            let take = (length - skip).min(left);
            let addr = segment.addr.0.checked_add(skip);
            let outside = ChainError::Outside { addr: segment.addr.0, len: segment.len };
            let piece = u32::try_from(take).map_err(|_| outside)?;
            visit(GuestAddress(addr.ok_or(outside)?), piece, done)?;
            done += piece as usize;
            left -= take;
            skip = 0;
        }
        Ok(())
    }

    /// Copies readable bytes from `offset` on into all of `data`.
    ///
    /// # Errors
    /// When there are fewer, or they lie outside memory.
    pub fn read(&self, memory: &GuestMemoryMmap, offset: u64, data: &mut [u8]) -> Result<(), ChainError> {
        let len = data.len() as u64;
        self.pieces(Half::Readable, offset, len, |addr, len, at| {
            let part = &mut data[at..at + len as usize];
            memory.read_slice(part, addr).map_err(|_| ChainError::Outside { addr: addr.0, len })
        })
    }

    /// Copies all of `data` into the writable bytes from `offset` on.
    ///
    /// # Errors
    /// When there are fewer, or they lie outside memory.
    pub fn write(&self, memory: &GuestMemoryMmap, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        self.pieces(Half::Writable, offset, data.len() as u64, |addr, len, at| {
            let part = &data[at..at + len as usize];
            memory.write_slice(part, addr).map_err(|_| ChainError::Outside { addr: addr.0, len })
        })
    }

    /// Guest address of one byte.
    ///
    /// # Errors
    /// When there are fewer bytes, or it lies outside memory.
    pub fn address_of(
        &self,
        memory: &GuestMemoryMmap,
        half: Half,
        offset: u64,
    ) -> Result<GuestAddress, ChainError> {
        let mut found = GuestAddress(0);
        self.pieces(half, offset, 1, |addr, len, _| {
            found = addr;
            let access = if half == Half::Readable { Permissions::Read } else { Permissions::Write };
            match GuestMemory::check_range(memory, addr, 1, access) {
                true => Ok(()),
                false => Err(ChainError::Outside { addr: addr.0, len }),
            }
        })?;
        Ok(found)
    }

    /// Appends the host addresses of `offset..offset+len` of one half to `out`, which ends up with at most `limit` entries.
    /// They are valid as long as `memory`'s map lives; the kernel may write to those of [`Half::Writable`] only.
    ///
    /// # Errors
    /// When there are fewer bytes, they lie outside memory, or more than `limit` entries were needed.
    pub fn iovecs(
        &self,
        memory: &GuestMemoryMmap,
        half: Half,
        range: (u64, u64),
        limit: usize,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), ChainError> {
        let access = if half == Half::Readable { Permissions::Read } else { Permissions::Write };
        let head = self.head;
        self.pieces(half, range.0, range.1, |addr, len, _| {
            let outside = ChainError::Outside { addr: addr.0, len };
            for slice in memory.get_slices(addr, len as usize, access).map_err(|_| outside)? {
                let slice = slice.map_err(|_| outside)?;
                if out.len() >= limit {
                    return Err(ChainError::TooLong { head });
                }
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                out.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Buffer, Driver, memory};
    use super::*;
    use virtio_queue::QueueOwnedT;
    use vm_memory::GuestAddressSpace;

    fn load(driver: &Driver) -> Result<Chain, ChainError> {
        let memory = driver.memory.memory();
        let mut queue = driver.queue();
        let source = queue.iter(&*memory).unwrap().next().unwrap();
        let mut chain = Chain::default();
        chain.load(source).map(|()| chain)
    }

    #[test]
    fn a_chain_is_read_and_written_across_its_cuts() {
        let mut driver = Driver::new(memory(), 0, 16);
        let readable = [driver.readable(b"hel"), driver.readable(b"lo ")];
        let writable = [driver.writable(2), driver.writable(5)];
        driver.push(&[readable, writable].concat());
        let chain = load(&driver).unwrap();
        let map = driver.memory.memory();
        let mut data = [0; 4];
        chain.read(&map, 1, &mut data).unwrap();
        assert_eq!(&data, b"ello");
        chain.write(&map, 1, b"xyz").unwrap();
        assert_eq!(driver.read(writable[0]), b"\0x");
        assert_eq!(driver.read(writable[1]), b"yz\0\0\0");
        assert_eq!(chain.read(&map, 4, &mut data), Err(ChainError::Short { have: 6, need: 8 }));
    }

    #[test]
    fn broken_links_are_told_from_ends() {
        let mut driver = Driver::new(memory(), 0, 16);
        let buffer = driver.readable(b"x");
        driver.push_raw(&[(buffer, 1, Some(1)), (buffer, 1, Some(0))]);
        assert!(matches!(load(&driver), Err(ChainError::Cut { count: 16, .. })), "loop");
        let mut driver = Driver::new(memory(), 0, 16);
        driver.push_raw(&[(buffer, 1, Some(99))]);
        assert_eq!(
            load(&driver).err(),
            Some(ChainError::Cut { head: 0, count: 1 }),
            "index beyond the table"
        );
        let mut driver = Driver::new(memory(), 0, 16);
        driver.push_raw(&[(Buffer { addr: u64::MAX - 64, len: 64, writable: false }, 4, None)]);
        assert_eq!(load(&driver).err(), Some(ChainError::Empty { head: 0 }), "indirect table outside memory");
        let mut driver = Driver::new(memory(), 0, 16);
        let (late, early) = (driver.readable(b"x"), driver.writable(1));
        driver.push(&[early, late]);
        assert_eq!(load(&driver).err(), Some(ChainError::Order { head: 0 }));
    }

    #[test]
    fn indirect_chains_are_bounded() {
        let mut driver = Driver::new(memory(), 0, 16);
        let buffer = driver.readable(b"x");
        driver.push_indirect(&vec![buffer; MAX_SEGMENTS]);
        assert_eq!(load(&driver).unwrap().readable_bytes(), MAX_SEGMENTS as u64);
        let mut driver = Driver::new(memory(), 0, 16);
        driver.push_indirect(&vec![buffer; MAX_SEGMENTS + 1]);
        assert_eq!(load(&driver).err(), Some(ChainError::TooLong { head: 0 }));
    }

    #[test]
    fn buffers_outside_memory_are_refused_when_used() {
        let mut driver = Driver::new(memory(), 0, 16);
        driver.push(&[Buffer { addr: u64::MAX - 1, len: 16, writable: true }]);
        let chain = load(&driver).unwrap();
        let map = driver.memory.memory();
        assert!(matches!(chain.write(&map, 8, b"x"), Err(ChainError::Outside { .. })));
        let mut out = Vec::new();
        assert!(chain.iovecs(&map, Half::Writable, (0, 16), 8, &mut out).is_err());
    }
}
