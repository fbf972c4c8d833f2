//! The guest physical address space.
//!
//! ```text
//! 0x0000_0500  GDT, page tables, zero page, command line (see the constants)
//! 0x0009_fc00  reserved up to 1 MiB; ACPI tables from 0x000e_0000
//! 0x0100_0000  kernel
//!     …        initial RAM disk at the upper end of low memory
//! 0xc000_0000  end of low memory; window of PCI BARs
//! 0xe000_0000  PCI ECAM, one bus
//! 0xfec0_0000  IOAPIC, 0xfee0_0000 LAPIC, 0xfffb_c000 KVM's own pages (Intel)
//! 0x1_0000_0000 the rest of memory
//!     …        memory that can be plugged in (virtio-mem), at a multiple of the guest's memory blocks
//! ```
//!
//! Pluggable memory is announced by its device only. In the memory map it would be there from the start; and an ACPI SRAT, which other
//! monitors give for it, makes Linux reserve 64 MiB of bounce buffers for a 32-bit DMA that no device here does. Linux leaves room
//! for it without: with address space randomisation its direct map has 10 TiB to spare for hot-plugged memory
//! (`CONFIG_RANDOMIZE_MEMORY_PHYSICAL_PADDING`).

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Four descriptors, 8 bytes each.
pub const GDT: u64 = 0x500;
/// An empty interrupt descriptor table, 8 bytes.
pub const IDT: u64 = 0x520;
/// The zero page (`struct boot_params`), 4 KiB.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer, growing down.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4 of the boot page tables, 4 KiB; the next two levels follow.
pub const PML4: u64 = 0x9000;
/// Page directory pointer table, 4 KiB.
pub const PDPT: u64 = 0xa000;
/// Page directory: 512 pages of 2 MiB map the first GiB onto itself.
pub const PD: u64 = 0xb000;
/// What the boot page tables map.
pub const BOOT_MAPPED: u64 = GIB;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Longest command line in bytes, without its NUL (x86's `COMMAND_LINE_SIZE` is 2048).
pub const CMDLINE_MAX: usize = 2047;
/// End of conventional memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, the RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// End of the ACPI tables.
pub const ACPI_TABLES_END: u64 = RESET_VECTOR;
/// Where a guest in real mode jumps to when it wants to reset by way of its firmware.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Memory from here on belongs to the kernel.
pub const HIGH_RAM_START: u64 = MIB;

/// End of low memory and start of the window that PCI BARs lie in.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the window of PCI BARs (exclusive).
pub const PCI_WINDOW_END: u64 = 0xe000_0000;
/// PCI Express configuration space of segment 0.
pub const ECAM: u64 = 0xe000_0000;
/// One bus: 32 devices of 8 functions, 4 KiB each.
pub const ECAM_SIZE: u64 = MIB;
/// IOAPIC registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// LAPIC registers.
pub const LAPIC: u32 = 0xfee0_0000;
/// KVM's three pages for real mode on Intel processors without unrestricted guest.
pub const KVM_TSS: usize = 0xfffb_d000;
/// KVM's identity map page, likewise.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// End of the hole and start of high memory.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// First I/O port of the 16550.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt of the generic event device.
pub const GED_IRQ: u32 = 5;
/// I/O port of pvpanic, the one that QEMU has it at.
pub const PANIC_PORT: u16 = 0x505;
/// First I/O port of the power registers (see `crate::power`).
pub const POWER_PORT: u16 = 0x600;
/// First I/O port of the vCPU registers (see `crate::cpu_hotplug`).
pub const CPU_PORT: u16 = 0x640;
/// First I/O port of the slot registers (see `crate::pci::hotplug`).
pub const SLOT_PORT: u16 = 0x6a0;
/// Pins of KVM's IOAPIC; message-signalled interrupts have the GSIs from here on.
pub const IOAPIC_PINS: u32 = 24;

/// Where `memory_bytes` of guest memory lie: (guest address, size) of one or two ranges.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    if memory_bytes <= HOLE_START {
        vec![(0, memory_bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, memory_bytes - HOLE_START)]
    }
}

/// Size of Linux's memory blocks, by which it adds memory: 128 MiB, and up to 2 GiB in guests of 64 GiB and more
/// (`probe_memory_block_size` in arch/x86/mm/init_64.c).
fn memory_block(ram_end: u64) -> u64 {
    if ram_end < 64 * GIB { 128 * MIB } else { 2 * GIB }
}

/// Where up to `pluggable_bytes` lie that a machine with `memory_bytes` can get while it runs: (guest address, size). It begins and
/// ends with a memory block of the guest, for of one that is cut the guest could use nothing.
pub fn pluggable_range(memory_bytes: u64, pluggable_bytes: u64) -> (u64, u64) {
    let ram_end = ram_ranges(memory_bytes).last().map_or(0, |(start, size)| start + size);
    let block = memory_block(ram_end);
    (ram_end.max(HOLE_END).next_multiple_of(block), pluggable_bytes.next_multiple_of(block))
}

/// End of the memory below the hole.
pub fn low_ram_end(memory_bytes: u64) -> u64 {
    memory_bytes.min(HOLE_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_split_around_the_hole_and_adds_up() {
        for bytes in [64 * MIB, 3 * GIB, 3 * GIB + 2 * MIB, 64 * GIB] {
            let ranges = ram_ranges(bytes);
            assert_eq!(ranges.iter().map(|r| r.1).sum::<u64>(), bytes);
            for (start, size) in ranges {
                assert!(start + size <= HOLE_START || start >= HOLE_END);
            }
        }
    }

    #[test]
    fn pluggable_memory_lies_above_all_else_in_whole_memory_blocks() {
        for (boot, more, start, size) in [
            (64 * MIB, 2 * MIB, HOLE_END, 128 * MIB),
            (3 * GIB, 256 * MIB, HOLE_END, 256 * MIB),
            (3 * GIB + 2 * MIB, GIB, HOLE_END + 128 * MIB, GIB),
            (62 * GIB, 130 * MIB, 63 * GIB, 256 * MIB),
            (63 * GIB, 130 * MIB, 64 * GIB, 2 * GIB),
            (64 * GIB, 3 * GIB, 66 * GIB, 4 * GIB),
        ] {
            assert_eq!(pluggable_range(boot, more), (start, size), "{boot} {more}");
        }
    }
}
