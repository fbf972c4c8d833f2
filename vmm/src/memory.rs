//! Guest memory: private anonymous mappings that cost the host nothing until they are touched.
//!
//! Ranges are aligned to 2 MiB on the host as in the guest, so that transparent huge pages back them: a guest then takes one
//! nested page fault where it would take 512. Mappings are never unmapped: a machine's memory lives as long as its process.

use std::io;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// Alignment of every range, the size of a huge page.
pub const ALIGNMENT: usize = 2 << 20;

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host gives no address space.
    #[error("cannot map {bytes} bytes of guest memory: {source}")]
    Map {
        /// Size of the range.
        bytes: u64,
        /// What mmap(2) said.
        source: io::Error,
    },
    /// The ranges make no guest memory.
    #[error("guest memory cannot be built: {0}")]
    Build(String),
    /// KVM refuses the range.
    #[error("KVM refuses {bytes} bytes of guest memory at {address:#x}: {source}")]
    Register {
        /// Guest address.
        address: u64,
        /// Size of the range.
        bytes: u64,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// Maps `size` bytes, a multiple of [`ALIGNMENT`], at an aligned address.
fn map_aligned(size: usize, protection: libc::c_int) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let length = size.checked_add(ALIGNMENT).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = (base as usize).next_multiple_of(ALIGNMENT);
    let head = start - base as usize;
    let tail = ALIGNMENT - head;
    if head > 0 {
        // SAFETY: the `head` bytes before `start` belong to the mapping just made, and nothing refers to them.
        unsafe { libc::munmap(base, head) };
    }
    if tail > 0 {
        // SAFETY: the `tail` bytes after `start + size` belong to the mapping just made, and nothing refers to them.
        unsafe { libc::munmap((start + size) as *mut libc::c_void, tail) };
    }
    // SAFETY: advice on our own mapping changes no content; that the kernel may refuse it does not matter.
    unsafe { libc::madvise(start as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
    // SAFETY: likewise; guest memory stays out of core dumps.
    unsafe { libc::madvise(start as *mut libc::c_void, size, libc::MADV_DONTDUMP) };
    Ok(start as *mut u8)
}

/// Makes guest memory from (guest address, size) ranges.
///
/// # Errors
/// When the host has no address space for it.
pub fn create(ranges: &[(u64, u64)]) -> Result<GuestMemoryMmap, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for &(address, bytes) in ranges {
        let size = bytes as usize;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let pointer = map_aligned(size, protection).map_err(|source| MemoryError::Map { bytes, source })?;
        let builder = MmapRegionBuilder::<()>::new(size)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: `pointer` is a mapping of exactly `size` bytes that is never unmapped.
        let builder = unsafe { builder.with_raw_mmap_pointer(pointer) };
        let region = builder.build().map_err(|e| MemoryError::Build(e.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(address))
            .ok_or_else(|| MemoryError::Build(format!("{bytes} bytes at {address:#x} overflow")))?;
        regions.push(region);
    }
    GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Build(e.to_string()))
}

/// Reserves aligned address space for `bytes` of memory, a multiple of [`ALIGNMENT`]: nobody can access it until it is opened. It
/// is never unmapped.
///
/// # Errors
/// When the host has none left.
pub fn reserve(bytes: u64) -> Result<*mut u8, MemoryError> {
    map_aligned(bytes as usize, libc::PROT_NONE).map_err(|source| MemoryError::Map { bytes, source })
}

/// Gives all of `memory` to the machine, one KVM slot per region.
///
/// # Errors
/// What KVM says.
pub fn register(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), MemoryError> {
    for (slot, region) in memory.iter().enumerate() {
        let (address, bytes) = (region.start_addr().raw_value(), region.len());
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is mapped for exactly `memory_size` bytes at `userspace_addr` and stays so for the life of the
        // process; slots do not overlap because regions do not.
        unsafe { vm.set_user_memory_region(slot) }.map_err(|source| MemoryError::Register {
            address,
            bytes,
            source,
        })?;
    }
    Ok(())
}

/// Throws all content away: it reads as zero afterwards, and the host has its pages back. Nothing may use the memory meanwhile.
///
/// # Errors
/// What madvise(2) says.
pub fn discard(memory: &GuestMemoryMmap) -> io::Result<()> {
    for region in memory.iter() {
        let pointer = region.as_ptr().cast();
        // SAFETY: the range is exactly one of our private anonymous mappings; vCPUs are stopped and devices are reset.
        let result = unsafe { libc::madvise(pointer, region.len() as usize, libc::MADV_DONTNEED) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn memory_is_aligned_and_zero_after_a_discard() {
        let memory = create(&[(0, 4 << 20), (1 << 32, 2 << 20)]).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as usize % ALIGNMENT, 0);
        }
        let at = GuestAddress((1 << 32) + 4096);
        memory.write_obj(42u64, at).unwrap();
        discard(&memory).unwrap();
        assert_eq!(memory.read_obj::<u64>(at).unwrap(), 0);
    }
}
