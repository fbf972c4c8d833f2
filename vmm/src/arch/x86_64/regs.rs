//! The state of a vCPU at its first instruction, and how it gets back there when the guest reboots.
//!
//! vCPU 0 enters the kernel by the 64-bit boot protocol: long mode, the first GiB mapped onto itself, RSI pointing to the zero
//! page. The others wait in KVM for INIT and SIPI.

use kvm_bindings::{
    KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{layout, tsc};
use crate::power;

const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR0_ET: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

const LAPIC_LVT0: usize = 0x350;
const LAPIC_LVT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;

/// Model-specific registers and their values at reset; KVM's own clock registers stop with 0. Those that a processor does not
/// have are passed over.
const MSRS: &[(u32, u64)] = &[
    (0x3b, 0),                      // TSC_ADJUST
    (0x1a0, 1),                     // IA32_MISC_ENABLE: fast strings
    (0x174, 0),                     // SYSENTER_CS
    (0x175, 0),                     // SYSENTER_ESP
    (0x176, 0),                     // SYSENTER_EIP
    (0xc000_0081, 0),               // STAR
    (0xc000_0082, 0),               // LSTAR
    (0xc000_0083, 0),               // CSTAR
    (0xc000_0084, 0),               // SFMASK
    (0xc000_0102, 0),               // KERNEL_GS_BASE
    (0xc000_0103, 0),               // TSC_AUX
    (0x277, 0x0007_0406_0007_0406), // PAT
    (0x2ff, 0x806),                 // MTRR: enabled, write-back by default
    (0x6e0, 0),                     // TSC_DEADLINE
    (0x4b56_4d00, 0),               // KVM wall clock
    (0x4b56_4d01, 0),               // KVM system time
    (0x4b56_4d02, 0),               // KVM asynchronous page faults
    (0x4b56_4d03, 0),               // KVM steal time
    (0x4b56_4d04, 0),               // KVM end of interrupt
];

/// All the firmware there is: real-mode code that resets the machine.
///
/// Linux on hardware-reduced ACPI without EFI skips the reset register (it prefers EFI, which is not there, `reboot_init` in
/// arch/x86/kernel/reboot.c) and ends up jumping to the firmware's reset vector in real mode.
const FIRMWARE: [u8; 9] = {
    let port = (layout::POWER_PORT + power::RESET).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt; jmp to the hlt
    [0xba, port[0], port[1], 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
};

const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Writes the descriptor table and the page tables that vCPU 0 starts with, and the firmware's reset vector.
///
/// # Errors
/// When guest memory is smaller than the layout needs, which a validated configuration excludes.
pub fn write_boot_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    for (index, descriptor) in GDT.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    memory.write_obj(0u64, GuestAddress(layout::IDT))?;
    memory.write_slice(&FIRMWARE, GuestAddress(layout::RESET_VECTOR))?;
    memory.write_obj(layout::PDPT | PAGE_PRESENT_WRITABLE, GuestAddress(layout::PML4))?;
    memory.write_obj(layout::PD | PAGE_PRESENT_WRITABLE, GuestAddress(layout::PDPT))?;
    for index in 0..512u64 {
        let page = (index << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
        memory.write_obj(page, GuestAddress(layout::PD + 8 * index))?;
    }
    Ok(())
}

fn segment(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        s: 1,
        l: u8::from(code),
        db: u8::from(!code),
        g: 1,
        ..Default::default()
    }
}

/// Sets the special registers for long mode on top of what the vCPU has at reset.
fn long_mode(reset: &kvm_sregs) -> kvm_sregs {
    let mut sregs = *reset;
    sregs.cs = segment(0x10, true);
    let data = segment(0x18, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (GDT.len() * 8 - 1) as u16;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr3 = layout::PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_PG | CR0_ET;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

fn set_lapic_word(lapic: &mut kvm_lapic_state, offset: usize, delivery: u32) {
    for (byte, value) in lapic.regs[offset..offset + 4].iter_mut().zip(delivery.to_le_bytes()) {
        *byte = value as _;
    }
}

/// The state of one vCPU just after its creation: what a reset goes back to.
pub struct ResetState {
    boot: bool,
    regs: kvm_regs,
    sregs: kvm_sregs,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
    xcrs: Option<kvm_xcrs>,
}

impl ResetState {
    /// Reads it from a vCPU on which CPUID is set and no instruction has run.
    ///
    /// # Errors
    /// What KVM says.
    pub fn capture(vcpu: &VcpuFd, id: u32) -> Result<Self, kvm_ioctls::Error> {
        let mut lapic = vcpu.get_lapic()?;
        set_lapic_word(&mut lapic, LAPIC_LVT0, DELIVERY_EXTINT);
        set_lapic_word(&mut lapic, LAPIC_LVT1, DELIVERY_NMI);
        Ok(Self {
            boot: id == 0,
            regs: vcpu.get_regs()?,
            sregs: vcpu.get_sregs()?,
            lapic,
            events: vcpu.get_vcpu_events()?,
            debug: vcpu.get_debug_regs()?,
            xcrs: vcpu.get_xcrs().ok(),
        })
    }

    /// Puts the vCPU into the state at its first instruction; `entry` is where vCPU 0 begins, `tsc_offset` that of all vCPUs.
    ///
    /// # Errors
    /// What KVM says.
    pub fn apply(&self, vcpu: &VcpuFd, entry: u64, tsc_offset: Option<u64>) -> Result<(), kvm_ioctls::Error> {
        // A vCPU that waits for SIPI must be out of that state before its registers are set.
        vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })?;
        vcpu.set_sregs(&if self.boot { long_mode(&self.sregs) } else { self.sregs })?;
        let regs = if self.boot {
            kvm_regs {
                rip: entry,
                rsi: layout::ZERO_PAGE,
                rsp: layout::BOOT_STACK,
                rbp: layout::BOOT_STACK,
                rflags: 2,
                ..Default::default()
            }
        } else {
            self.regs
        };
        vcpu.set_regs(&regs)?;
        vcpu.set_fpu(&kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() })?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs)?;
        }
        set_msrs(vcpu)?;
        if let Some(offset) = tsc_offset {
            tsc::set_offset(vcpu, offset)?;
        }
        vcpu.set_lapic(&self.lapic)?;
        vcpu.set_debug_regs(&self.debug)?;
        vcpu.set_vcpu_events(&self.events)?;
        let mp_state = if self.boot { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        vcpu.set_mp_state(kvm_mp_state { mp_state })
    }
}

/// Sets [`MSRS`]. KVM stops at the first one that it does not know: that one is skipped.
fn set_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entries: Vec<kvm_msr_entry> =
        MSRS.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let Ok(msrs) = Msrs::from_entries(rest) else { break };
        // A failing first entry is reported as an error by some kernels and as 0 by others.
        let set = vcpu.set_msrs(&msrs).unwrap_or(0);
        rest = rest.get(set + 1..).unwrap_or_default();
    }
    Ok(())
}
