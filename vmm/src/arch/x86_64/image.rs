//! Reads kernels (bzImage and ELF) and initial RAM disks from descriptors straight into guest memory.
//!
//! Every number in a header is checked against the file's size and the guest's memory before it is used: an image is
//! refused with a sentence, never half loaded by surprise. Nothing is kept of the file but the descriptor, which is read again
//! when the guest reboots.
//!
//! Formats: Linux `Documentation/arch/x86/boot.rst` (protocol 2.12 and later, 64-bit entry), System V ABI ELF-64.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::layout;

/// Program headers that an ELF kernel may have; Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Bytes moved at once between file and guest memory.
const COPY_STEP: u64 = 16 * layout::MIB;
const ELF_HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const HDRS: u32 = 0x5372_6448;
const XLF_KERNEL_64: u16 = 1;
const LOADED_HIGH: u8 = 1;
const SECTOR: u64 = 512;
/// The 64-bit entry lies this far into the protected-mode part of a bzImage.
const ENTRY_64_OFFSET: u64 = 0x200;
/// Highest address of an initial RAM disk for a kernel that does not say (ELF).
const DEFAULT_INITRD_MAX: u64 = 0x7fff_ffff;

/// Why an image was refused.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The descriptor cannot be read.
    #[error("{what} cannot be read: {source}")]
    Read {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// What pread(2) or fstat(2) said.
        source: io::Error,
    },
    /// Neither of the two formats.
    #[error("kernel is neither a bzImage nor an ELF file (it begins with {0:02x?})")]
    UnknownFormat([u8; 4]),
    /// A header makes no sense.
    #[error("kernel is corrupt: {0}")]
    Corrupt(String),
    /// The format is right, but this kernel cannot be booted here.
    #[error("kernel is not supported: {0}")]
    Unsupported(String),
    /// The machine's memory is too small for it.
    #[error("{what} of {need} bytes does not fit into the {have} bytes of guest memory below 3 GiB")]
    TooBig {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Bytes needed.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
}

/// A kernel in guest memory.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Address of the 64-bit entry.
    pub entry: u64,
    /// First byte after everything that the kernel occupies before it manages memory itself.
    pub end: u64,
    /// Highest address that the initial RAM disk may have (inclusive).
    pub initrd_max: u64,
    /// Setup header to start the zero page from.
    pub header: setup_header,
}

fn corrupt(message: impl Into<String>) -> ImageError {
    ImageError::Corrupt(message.into())
}

fn size_of(file: &File, what: &'static str) -> Result<u64, ImageError> {
    file.metadata().map(|m| m.len()).map_err(|source| ImageError::Read { what, source })
}

fn read_exact(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), ImageError> {
    file.read_exact_at(buffer, offset).map_err(|source| ImageError::Read { what: "kernel", source })
}

/// Moves `length` bytes at `offset` of the file to the guest address; the ranges have been checked.
fn copy(
    memory: &GuestMemoryMmap,
    file: &File,
    what: &'static str,
    offset: u64,
    to: u64,
    length: u64,
) -> Result<(), ImageError> {
    let failed = |source| ImageError::Read { what, source };
    let mut done = 0;
    while done < length {
        let step = (length - done).min(COPY_STEP);
        let slice = memory
            .get_slice(GuestAddress(to + done), step as usize)
            .map_err(|e| failed(io::Error::other(e.to_string())))?;
        let guard = slice.ptr_guard_mut();
        // SAFETY: the slice is valid guest memory of exactly `step` bytes for as long as `guard` lives; no vCPU runs while
        // images are loaded, and every bit pattern is a valid u8.
        let buffer = unsafe { std::slice::from_raw_parts_mut(guard.as_ptr(), step as usize) };
        file.read_exact_at(buffer, offset + done).map_err(failed)?;
        done += step;
    }
    Ok(())
}

/// Loads the kernel in `file`, of either format, into a memory with `memory_bytes` bytes.
///
/// # Errors
/// When the image is corrupt, unsupported, cannot be read or does not fit.
pub fn load_kernel(memory: &GuestMemoryMmap, memory_bytes: u64, file: &File) -> Result<Kernel, ImageError> {
    let size = size_of(file, "kernel")?;
    if size < 0x1000 {
        return Err(corrupt(format!("the file has only {size} bytes")));
    }
    let mut magic = [0; 4];
    read_exact(file, &mut magic, 0)?;
    if magic == *b"\x7fELF" {
        return load_elf(memory, memory_bytes, file, size);
    }
    let mut header = setup_header::default();
    read_exact(file, header.as_mut_slice(), SETUP_HEADER_OFFSET)?;
    if { header.header } == HDRS {
        return load_bzimage(memory, memory_bytes, file, size, header);
    }
    Err(ImageError::UnknownFormat(magic))
}

fn check_fits(start: u64, length: u64, memory_bytes: u64) -> Result<u64, ImageError> {
    let have = layout::low_ram_end(memory_bytes).min(layout::BOOT_MAPPED);
    let end = start.checked_add(length).ok_or_else(|| corrupt(format!("a size of {length} bytes")))?;
    if end > have {
        return Err(ImageError::TooBig { what: "kernel", need: end, have });
    }
    Ok(end)
}

fn load_bzimage(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    file: &File,
    size: u64,
    header: setup_header,
) -> Result<Kernel, ImageError> {
    let version = header.version;
    if version < 0x20c || header.xloadflags & XLF_KERNEL_64 == 0 || header.loadflags & LOADED_HIGH == 0 {
        return Err(ImageError::Unsupported(format!(
            "boot protocol {}.{:02} without a 64-bit entry; 2.12 or later is needed",
            version >> 8,
            version & 0xff
        )));
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let payload = (setup_sectors + 1) * SECTOR;
    let length = u64::from(header.syssize) * 16;
    // syssize is rounded up to 16 bytes, so the last few may be missing.
    let in_file = size.saturating_sub(payload);
    if length == 0 || in_file + 15 < length {
        return Err(corrupt(format!(
            "truncated: its header promises {length} bytes after the setup code, the file has {in_file}"
        )));
    }
    if length <= ENTRY_64_OFFSET {
        return Err(corrupt(format!(
            "{length} bytes after the setup code, the 64-bit entry is at {ENTRY_64_OFFSET}"
        )));
    }
    let start = header.pref_address;
    if !(layout::HIGH_RAM_START..layout::BOOT_MAPPED).contains(&start) {
        return Err(ImageError::Unsupported(format!("its preferred address {start:#x}")));
    }
    let needed = u64::from(header.init_size).max(length);
    let end = check_fits(start, needed, memory_bytes)?;
    copy(memory, file, "kernel", payload, start, length.min(in_file))?;
    Ok(Kernel { entry: start + ENTRY_64_OFFSET, end, initrd_max: u64::from(header.initrd_addr_max), header })
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

fn load_elf(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    file: &File,
    size: u64,
) -> Result<Kernel, ImageError> {
    let mut ehdr = [0; ELF_HEADER_BYTES];
    read_exact(file, &mut ehdr, 0)?;
    let machine = u16::from_le_bytes(field(&ehdr, 18));
    if ehdr[4] != 2 || ehdr[5] != 1 || machine != 62 {
        return Err(ImageError::Unsupported(format!(
            "an ELF file of class {}, data {}, machine {machine}; 2, 1, 62 (x86_64) is needed",
            ehdr[4], ehdr[5]
        )));
    }
    let entry = u64::from_le_bytes(field(&ehdr, 24));
    let table = u64::from_le_bytes(field(&ehdr, 32));
    let entry_bytes = usize::from(u16::from_le_bytes(field(&ehdr, 54)));
    let count = u16::from_le_bytes(field(&ehdr, 56));
    if entry_bytes != PROGRAM_HEADER_BYTES || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(corrupt(format!("{count} program headers of {entry_bytes} bytes")));
    }
    let mut kernel =
        Kernel { entry, end: 0, initrd_max: DEFAULT_INITRD_MAX, header: setup_header::default() };
    let mut entry_loaded = false;
    for index in 0..u64::from(count) {
        let at = table
            .checked_add(index * PROGRAM_HEADER_BYTES as u64)
            .filter(|at| at.checked_add(PROGRAM_HEADER_BYTES as u64).is_some_and(|end| end <= size))
            .ok_or_else(|| corrupt(format!("program header {index} lies beyond its {size} bytes")))?;
        let mut phdr = [0; PROGRAM_HEADER_BYTES];
        read_exact(file, &mut phdr, at)?;
        if u32::from_le_bytes(field(&phdr, 0)) != 1 {
            continue;
        }
        let (start, end) = load_segment(memory, memory_bytes, file, size, &phdr)?;
        entry_loaded |= (start..end).contains(&entry);
        kernel.end = kernel.end.max(end);
    }
    if !entry_loaded {
        return Err(corrupt(format!("its entry {entry:#x} lies in no segment")));
    }
    kernel.header.header = HDRS;
    kernel.header.version = 0x20f;
    kernel.header.boot_flag = 0xaa55;
    kernel.header.loadflags = LOADED_HIGH;
    kernel.header.kernel_alignment = 0x100_0000;
    Ok(kernel)
}

/// Loads one `PT_LOAD` segment and returns the guest addresses that it occupies.
fn load_segment(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    file: &File,
    size: u64,
    phdr: &[u8; PROGRAM_HEADER_BYTES],
) -> Result<(u64, u64), ImageError> {
    let offset = u64::from_le_bytes(field(phdr, 8));
    let start = u64::from_le_bytes(field(phdr, 24));
    let in_file = u64::from_le_bytes(field(phdr, 32));
    let in_memory = u64::from_le_bytes(field(phdr, 40));
    if in_file > in_memory || offset.checked_add(in_file).is_none_or(|end| end > size) {
        return Err(corrupt(format!(
            "truncated: a segment of {in_file} bytes at {offset}, the file has {size}"
        )));
    }
    if start < layout::HIGH_RAM_START {
        return Err(ImageError::Unsupported(format!("a segment at {start:#x}, below 1 MiB")));
    }
    let end = check_fits(start, in_memory, memory_bytes)?;
    copy(memory, file, "kernel", offset, start, in_file)?;
    Ok((start, end))
}

/// Loads the initial RAM disk as high as the kernel allows and returns (address, size).
///
/// # Errors
/// When it cannot be read or does not fit between the kernel and the end of low memory.
pub fn load_initrd(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    kernel: &Kernel,
    file: &File,
) -> Result<(u64, u64), ImageError> {
    let size = size_of(file, "initrd")?;
    let top = layout::low_ram_end(memory_bytes).min(kernel.initrd_max.saturating_add(1));
    let too_big = ImageError::TooBig { what: "initrd", need: size, have: top.saturating_sub(kernel.end) };
    let Some(address) = top.checked_sub(size).map(|a| a & !0xfff) else { return Err(too_big) };
    if address < kernel.end {
        return Err(too_big);
    }
    copy(memory, file, "initrd", 0, address, size)?;
    Ok((address, size))
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
