//! x86_64: see the modules.
//!
//! - [`layout`]: the guest physical address space
//! - [`image`]: reads bzImage and ELF kernels and initial RAM disks from descriptors
//! - [`params`]: zero page, E820 map, command line (Linux `Documentation/arch/x86/boot.rst`, 64-bit protocol)
//! - [`acpi`], [`acpi_cpus`], [`acpi_slots`]: hardware-reduced ACPI tables (ACPI 6.5)
//! - [`cpuid`], [`regs`]: what a vCPU looks like to its guest, and its state at the first instruction; [`tsc`]: its clock
//! - [`irq`]: interrupt controllers and the routing of message-signalled interrupts

pub mod acpi;
pub mod acpi_cpus;
pub mod acpi_slots;
pub mod cpuid;
pub mod image;
pub mod irq;
pub mod layout;
pub mod params;
pub mod regs;
pub mod tsc;
