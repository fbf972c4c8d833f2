//! The file behind a disk: what it is, how large, and how it wants to be accessed.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::SECTOR_BYTES;

/// Why a descriptor cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// A system call on the descriptor failed.
    #[error("{device}: {call} failed: {source}")]
    Call {
        /// Name of the device.
        device: String,
        /// Which call.
        call: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The kernel gives us no ring.
    #[error(
        "{device}: no restricted io_uring with {entries} entries: {source} (see the sysctl kernel.io_uring_disabled)"
    )]
    Ring {
        /// Name of the device.
        device: String,
        /// Entries asked for.
        entries: u16,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// All rings made for disks that come later are taken.
    #[error("{device}: no ring is left for it: as many disks were attached as can be; detach one first")]
    NoSpare {
        /// Name of the device.
        device: String,
    },
    /// Smaller than before.
    #[error("{device}: its file has {now} bytes and the disk {before}; a disk never shrinks")]
    Shrunk {
        /// Name of the device.
        device: String,
        /// Size of the disk in bytes.
        before: u64,
        /// Size of the file in bytes.
        now: u64,
    },
    /// Neither a regular file nor a block device.
    #[error("{device}: the descriptor is neither a regular file nor a block device (mode {mode:#o})")]
    Kind {
        /// Name of the device.
        device: String,
        /// `st_mode`.
        mode: u32,
    },
    /// The size does not divide into sectors, or there is nothing.
    #[error("{device}: its size of {bytes} bytes is not a positive multiple of {block} bytes")]
    Size {
        /// Name of the device.
        device: String,
        /// Size in bytes.
        bytes: u64,
        /// Smallest unit of access in bytes.
        block: u32,
    },
    /// Opened in a way that does not fit.
    #[error("{device}: the descriptor was opened {opened}, which does not suit a disk that is {wanted}")]
    Mode {
        /// Name of the device.
        device: String,
        /// How it was opened.
        opened: &'static str,
        /// What the disk is to be.
        wanted: &'static str,
    },
    /// The serial does not fit the protocol.
    #[error("{device}: the serial {serial:?} is not printable ASCII of at most {max} bytes", max = super::SERIAL_BYTES)]
    Serial {
        /// Name of the device.
        device: String,
        /// What was asked for.
        serial: String,
    },
}

/// A disk's file and its properties.
#[derive(Debug)]
pub struct Backend {
    file: OwnedFd,
    /// Size in bytes, a positive multiple of `block_bytes`.
    pub bytes: u64,
    /// Smallest unit of access in bytes: 512, or what O_DIRECT demands. A power of two.
    pub block_bytes: u32,
    /// Unit in which the storage works without reading first, in bytes.
    pub physical_bytes: u32,
    /// Alignment of buffers in memory; 1 without O_DIRECT.
    pub memory_align: usize,
    /// A block device rather than a file.
    pub is_device: bool,
}

// BLKGETSIZE64 and BLKDISCARD of linux/fs.h: libc has neither.
nix::ioctl_read!(blk_get_size64, 0x12, 114, usize);
nix::ioctl_write_ptr_bad!(blk_discard, nix::request_code_none!(0x12, 119), [u64; 2]);
nix::ioctl_read_bad!(blk_logical_bytes, libc::BLKSSZGET, libc::c_int);
nix::ioctl_read_bad!(blk_physical_bytes, libc::BLKPBSZGET, libc::c_uint);

/// O_DIRECT alignment assumed where the kernel (before 6.1) or the file system does not tell.
const CAUTIOUS_ALIGN: u32 = 4096;
/// Largest believable alignment.
const MAX_ALIGN: u32 = 1 << 16;

impl Backend {
    /// Examines `file`.
    ///
    /// # Errors
    /// When it cannot serve as a disk.
    pub fn new(device: &str, file: OwnedFd, read_only: bool) -> Result<Self, BlockError> {
        let failed = |call| {
            let device = device.to_owned();
            move |source: nix::Error| BlockError::Call { device, call, source: source.into() }
        };
        let direct = check_mode(device, &file, read_only)?;
        let stat = nix::sys::stat::fstat(&file).map_err(failed("fstat"))?;
        let mode = stat.st_mode;
        let fd = file.as_raw_fd();
        let backend = match mode & libc::S_IFMT {
            libc::S_IFREG => {
                let (memory_align, block_bytes) = if direct { direct_align(fd) } else { (1, 512) };
                let physical_bytes = u32::try_from(stat.st_blksize).unwrap_or(4096);
                let bytes = file_bytes(&stat);
                Self { file, bytes, block_bytes, physical_bytes, memory_align, is_device: false }
            }
            libc::S_IFBLK => {
                let (mut bytes, mut logical, mut physical) = (0usize, 0, 0);
                // SAFETY: the kernel writes one value of this type (u64, as usize is on x86_64) behind the pointer.
                unsafe { blk_get_size64(fd, &raw mut bytes) }.map_err(failed("BLKGETSIZE64"))?;
                // SAFETY: the kernel writes one int behind the pointer.
                unsafe { blk_logical_bytes(fd, &raw mut logical) }.map_err(failed("BLKSSZGET"))?;
                // SAFETY: the kernel writes one unsigned int behind the pointer.
                unsafe { blk_physical_bytes(fd, &raw mut physical) }.map_err(failed("BLKPBSZGET"))?;
                let block_bytes = u32::try_from(logical).unwrap_or(CAUTIOUS_ALIGN);
                let memory_align = if direct { direct_align(fd).0.max(4) } else { 1 };
                Self {
                    file,
                    bytes: bytes as u64,
                    block_bytes,
                    physical_bytes: physical,
                    memory_align,
                    is_device: true,
                }
            }
            _ => return Err(BlockError::Kind { device: device.to_owned(), mode }),
        };
        backend.checked(device)
    }

    fn checked(mut self, device: &str) -> Result<Self, BlockError> {
        let sane = |value: u32| value.is_power_of_two() && (SECTOR_BYTES as u32..=MAX_ALIGN).contains(&value);
        if !sane(self.block_bytes) {
            self.block_bytes = CAUTIOUS_ALIGN;
        }
        if !sane(self.physical_bytes) || self.physical_bytes < self.block_bytes {
            self.physical_bytes = self.block_bytes;
        }
        if self.bytes == 0 || !self.bytes.is_multiple_of(u64::from(self.block_bytes)) {
            return Err(BlockError::Size {
                device: device.to_owned(),
                bytes: self.bytes,
                block: self.block_bytes,
            });
        }
        Ok(self)
    }

    /// Looks at the size again; says whether it has grown.
    ///
    /// # Errors
    /// When it cannot be told, is smaller, or is not a whole number of blocks; nothing was changed then.
    pub fn grow(&mut self, device: &str) -> Result<bool, BlockError> {
        let failed = |call| {
            let device = device.to_owned();
            move |source: nix::Error| BlockError::Call { device, call, source: source.into() }
        };
        let now = if self.is_device {
            let mut bytes = 0usize;
            // SAFETY: the kernel writes one value of this type (u64, as usize is on x86_64) behind the pointer.
            unsafe { blk_get_size64(self.fd(), &raw mut bytes) }.map_err(failed("BLKGETSIZE64"))?;
            bytes as u64
        } else {
            file_bytes(&nix::sys::stat::fstat(&self.file).map_err(failed("fstat"))?)
        };
        let (device, before) = (device.to_owned(), self.bytes);
        if !now.is_multiple_of(u64::from(self.block_bytes)) {
            return Err(BlockError::Size { device, bytes: now, block: self.block_bytes });
        }
        if now < before {
            return Err(BlockError::Shrunk { device, before, now });
        }
        self.bytes = now;
        Ok(now > before)
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Blocks until the device has been told that a range is no longer needed. For devices only.
    ///
    /// # Errors
    /// What BLKDISCARD says.
    pub fn discard_now(&self, offset: u64, len: u64) -> nix::Result<()> {
        let range = [offset, len];
        // SAFETY: the kernel reads two u64 behind the pointer.
        unsafe { blk_discard(self.fd(), &raw const range) }.map(drop)
    }
}

fn file_bytes(stat: &libc::stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Checks access mode and flags; tells whether O_DIRECT is set.
fn check_mode(device: &str, file: &OwnedFd, read_only: bool) -> Result<bool, BlockError> {
    // SAFETY: F_GETFL only reads the flags of a descriptor number.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        let source = std::io::Error::last_os_error();
        return Err(BlockError::Call { device: device.to_owned(), call: "fcntl", source });
    }
    let wanted = if read_only { "read-only" } else { "writable" };
    let opened = match flags & libc::O_ACCMODE {
        _ if flags & libc::O_PATH != 0 => Some("with O_PATH"),
        _ if flags & libc::O_APPEND != 0 => Some("with O_APPEND"),
        libc::O_WRONLY => Some("for writing only"),
        libc::O_RDONLY if !read_only => Some("for reading only"),
        _ => None,
    };
    match opened {
        Some(opened) => Err(BlockError::Mode { device: device.to_owned(), opened, wanted }),
        None => Ok(flags & libc::O_DIRECT != 0),
    }
}

/// What O_DIRECT demands of buffers and offsets (statx(2), STATX_DIOALIGN, Linux 6.1).
fn direct_align(fd: RawFd) -> (usize, u32) {
    let mut data = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, and the kernel writes one statx behind the pointer.
    let result = unsafe {
        libc::statx(fd, c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, data.as_mut_ptr())
    };
    // SAFETY: zeroed bytes are a valid statx, and so is what the kernel wrote over them.
    let data = unsafe { data.assume_init() };
    let (memory, offset) = (data.stx_dio_mem_align, data.stx_dio_offset_align);
    let told =
        result == 0 && data.stx_mask & libc::STATX_DIOALIGN != 0 && memory.is_power_of_two() && offset > 0;
    if told { (memory as usize, offset.max(512)) } else { (CAUTIOUS_ALIGN as usize, CAUTIOUS_ALIGN) }
}
