//! Guest memory between zones that nobody may touch.
//!
//! ```text
//! host:  ▒▒▒▒│ 4 MiB │▒▒▒▒│      11 MiB      │▒▒▒▒      ▒ = 64 KiB of a pattern
//! guest:     0       4 MiB 5 MiB             16 MiB
//! ```

use std::sync::OnceLock;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::virtio::Memory;

/// Guest address and size of what there is, in bytes.
pub const REGIONS: [(u64, usize); 2] = [(0, 4 << 20), (5 << 20, 11 << 20)];
const ZONE: usize = 64 << 10;
const PATTERN: u8 = 0xa5;
static UNTOUCHED: [u8; ZONE] = [PATTERN; ZONE];
const TOTAL: usize = REGIONS[0].1 + REGIONS[1].1 + 3 * ZONE;

thread_local! {
    /// One per thread, for ever: mapping anew for each input would take most of the time.
    static BASE: OnceLock<usize> = const { OnceLock::new() };
}

fn map() -> usize {
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no existing memory.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), TOTAL, protection, flags, -1, 0) };
    assert!(base != libc::MAP_FAILED, "no address space for guest memory");
    for zone in zones(base.addr()) {
        // SAFETY: the zone lies in the mapping just made, to which nothing refers yet.
        unsafe { std::ptr::write_bytes(std::ptr::with_exposed_provenance_mut::<u8>(zone), PATTERN, ZONE) };
    }
    base.expose_provenance()
}

fn base() -> usize {
    BASE.with(|base| *base.get_or_init(map))
}

fn region(index: usize) -> usize {
    base() + ZONE + index * (REGIONS[0].1 + ZONE)
}

fn zones(base: usize) -> [usize; 3] {
    [base, base + ZONE + REGIONS[0].1, base + TOTAL - ZONE]
}

/// Guest memory of this thread, empty. What was made of it before must not be used any more.
pub fn fresh() -> Memory {
    let regions = REGIONS.iter().enumerate().map(|(index, (address, bytes))| {
        let pointer = std::ptr::with_exposed_provenance_mut::<u8>(region(index));
        // SAFETY: the range is a part of this thread's mapping that nobody else uses any more.
        let result = unsafe { libc::madvise(pointer.cast(), *bytes, libc::MADV_DONTNEED) };
        assert_eq!(result, 0, "guest memory cannot be emptied");
        let builder = MmapRegionBuilder::<()>::new(*bytes)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: `pointer` is a mapping of `bytes` bytes that is never unmapped.
        let region = unsafe { builder.with_raw_mmap_pointer(pointer) }.build().unwrap();
        GuestRegionMmap::new(region, GuestAddress(*address)).unwrap()
    });
    Memory::new(GuestMemoryMmap::from_regions(regions.collect()).unwrap())
}

/// Nothing was written beside guest memory.
pub fn check() {
    for zone in zones(base()) {
        // SAFETY: the zone is mapped for ever and nothing writes to it, which is what is checked here.
        let bytes =
            unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance::<u8>(zone), ZONE) };
        // As slices: byte by byte it would take most of the time in builds without optimisation.
        assert!(*bytes == UNTOUCHED, "something was written beside guest memory");
    }
}
