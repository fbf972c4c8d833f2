//! The zero page: how Linux is told about memory, command line, initial RAM disk and ACPI
//! (`Documentation/arch/x86/zero-page.rst`).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::image::Kernel;
use super::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "Undefined" boot loader: there is no number of our own.
const LOADER_UNDEFINED: u8 = 0xff;

/// The memory map given to the guest: (address, size, type).
fn e820(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let low_end = layout::low_ram_end(memory_bytes);
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM_START - layout::LOW_RAM_END, E820_RESERVED),
        (layout::HIGH_RAM_START, low_end - layout::HIGH_RAM_START, E820_RAM),
        // Linux accepts an ECAM only where the memory map or ACPI has it reserved.
        (layout::ECAM, layout::ECAM_SIZE, E820_RESERVED),
    ];
    for (start, size) in layout::ram_ranges(memory_bytes).into_iter().skip(1) {
        map.push((start, size, E820_RAM));
    }
    map
}

/// Writes command line and zero page.
///
/// # Errors
/// When guest memory is smaller than the layout needs, which a validated configuration excludes.
pub fn write(
    memory: &GuestMemoryMmap,
    memory_bytes: u64,
    kernel: &Kernel,
    initrd: Option<(u64, u64)>,
    cmdline: &str,
) -> Result<(), GuestMemoryError> {
    let mut params = boot_params { hdr: kernel.header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32 + 1;
    if let Some((address, size)) = initrd {
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    params.acpi_rsdp_addr = layout::ACPI_TABLES;
    let map = e820(memory_bytes);
    params.e820_entries = map.len() as u8;
    for (slot, (addr, size, kind)) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr, size, r#type: kind };
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE + cmdline.len() as u64))?;
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::x86_64::layout::{GIB, MIB};

    #[test]
    fn the_map_is_sorted_without_overlap_and_has_all_memory_but_the_reserved_hole() {
        for bytes in [64 * MIB, 3 * GIB, 5 * GIB] {
            let map = e820(bytes);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
            }
            let ram: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1).sum();
            assert_eq!(ram, bytes - (layout::HIGH_RAM_START - layout::LOW_RAM_END));
        }
    }
}
