//! What a driver can ask of a disk (virtio 1.2, section 5.2.6), decided without touching anything.

use vm_memory::GuestMemoryMmap;

use super::super::chain::{Chain, ChainError};
use super::SECTOR_BYTES;

/// Bytes of the header: type, reserved, sector.
pub const HEADER_BYTES: u64 = 16;
/// Bytes of one range of a discard.
const RANGE_BYTES: u64 = 16;
/// Most sectors that one discard or write-zeroes covers: 256 MiB. A device that has to be asked by ioctl blocks for as long.
pub const MAX_RANGE_SECTORS: u32 = (256 << 20) / SECTOR_BYTES as u32;
/// Ranges in one discard.
pub const MAX_RANGES: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// Answers, as the driver reads them in the last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed, or the request makes no sense.
    IoError = 1,
    /// The device does not do this.
    Unsupported = 2,
}

/// A valid request; offsets and lengths in bytes, within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// From the disk into the writable part, from its start.
    Read {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// From the readable part behind the header to the disk.
    Write {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// What has been acknowledged becomes durable.
    Flush,
    /// The serial.
    GetId,
    /// The range is no longer needed.
    Discard {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
    },
    /// The range shall read as zeroes.
    WriteZeroes {
        /// Position on the disk.
        offset: u64,
        /// Length.
        len: u64,
        /// Its space may be given back.
        unmap: bool,
    },
}

impl Request {
    /// Bytes that count for a rate: what is read and written, zeroes too, which the storage may have to write. A discard moves none.
    pub fn moved_bytes(&self) -> u64 {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } | Self::WriteZeroes { len, .. } => *len,
            Self::Flush | Self::GetId | Self::Discard { .. } => 0,
        }
    }
}

/// What the rules depend on.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Size of the disk in bytes.
    pub disk_bytes: u64,
    /// Unit of access in bytes.
    pub block_bytes: u32,
    /// Nothing may be changed.
    pub read_only: bool,
}

impl Limits {
    fn range(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        let aligned = (offset | len) & (u64::from(self.block_bytes) - 1) == 0;
        if end > self.disk_bytes || !aligned { Err(Status::IoError) } else { Ok(offset) }
    }
}

/// Reads the request at the head of a chain: a request, or the answer that it gets at once.
///
/// # Errors
/// When the chain has no room for a header and an answer: nothing can be answered then.
pub fn parse(
    chain: &Chain,
    memory: &GuestMemoryMmap,
    limits: &Limits,
) -> Result<Result<Request, Status>, ChainError> {
    if chain.writable_bytes() == 0 {
        return Err(ChainError::Short { have: 0, need: 1 });
    }
    let mut header = [0u8; HEADER_BYTES as usize];
    chain.read(memory, 0, &mut header)?;
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    let given = chain.readable_bytes() - HEADER_BYTES;
    let room = chain.writable_bytes() - 1;
    let kind = u32::from_le_bytes([t0, t1, t2, t3]);
    let changes = matches!(kind, T_OUT | T_DISCARD | T_WRITE_ZEROES);
    if changes && limits.read_only {
        return Ok(Err(Status::IoError));
    }
    Ok(match kind {
        T_IN => limits.range(sector, room).map(|offset| Request::Read { offset, len: room }),
        T_OUT => limits.range(sector, given).map(|offset| Request::Write { offset, len: given }),
        T_FLUSH => Ok(Request::Flush),
        T_GET_ID => Ok(Request::GetId),
        T_DISCARD | T_WRITE_ZEROES if given != RANGE_BYTES * u64::from(MAX_RANGES) => Err(Status::IoError),
        T_DISCARD | T_WRITE_ZEROES => {
            let mut range = [0u8; RANGE_BYTES as usize];
            chain.read(memory, HEADER_BYTES, &mut range)?;
            parse_range(kind == T_DISCARD, range, limits)
        }
        _ => Err(Status::Unsupported),
    })
}

fn parse_range(discard: bool, range: [u8; RANGE_BYTES as usize], limits: &Limits) -> Result<Request, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    // 5.2.6.2: unknown flags, and unmap in a discard, are not supported.
    if flags > 1 || (discard && flags != 0) {
        return Err(Status::Unsupported);
    }
    if sectors > MAX_RANGE_SECTORS {
        return Err(Status::IoError);
    }
    let len = u64::from(sectors) * SECTOR_BYTES;
    let offset = limits.range(sector, len)?;
    Ok(match discard {
        true => Request::Discard { offset, len },
        false => Request::WriteZeroes { offset, len, unmap: flags & 1 != 0 },
    })
}
