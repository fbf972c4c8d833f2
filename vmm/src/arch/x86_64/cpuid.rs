//! What CPUID says to a guest: what KVM supports, with topology, APIC id and clock features set per vCPU.
//!
//! Every vCPU is a core of one package with one thread. The performance monitoring unit is hidden: it costs boot time and
//! ties a machine to one processor model.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const TSC_DEADLINE: u32 = 1 << 24;
const X2APIC: u32 = 1 << 21;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;

/// What all vCPUs of a machine have in common.
#[derive(Clone)]
pub struct Template {
    supported: CpuId,
    cpus: u32,
}

/// Bits that an APIC id needs for `cpus` cores.
fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

impl Template {
    /// Asks KVM what it supports.
    ///
    /// # Errors
    /// What KVM_GET_SUPPORTED_CPUID says.
    pub fn new(kvm: &Kvm, cpus: u32) -> Result<Self, kvm_ioctls::Error> {
        let mut supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        for entry in supported.as_mut_slice() {
            if entry.function == 1 && deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        Ok(Self { supported, cpus })
    }

    /// CPUID of vCPU number `id`, which is its APIC id too.
    pub fn for_vcpu(&self, id: u32) -> CpuId {
        let mut cpuid = self.supported.clone();
        for entry in cpuid.as_mut_slice() {
            adjust(entry, id, self.cpus);
        }
        cpuid
    }
}

/// Bits of a guest physical address, by what KVM supports; the least that a processor in 64-bit mode has if it does not say.
///
/// # Errors
/// What KVM_GET_SUPPORTED_CPUID says.
pub fn physical_address_bits(kvm: &Kvm) -> Result<u32, kvm_ioctls::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let leaf = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    Ok(leaf.map_or(36, |entry| (entry.eax & 0xff).clamp(36, 52)))
}

fn adjust(entry: &mut kvm_cpuid_entry2, id: u32, cpus: u32) {
    let bits = id_bits(cpus);
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ebx = (entry.ebx & 0xffff) | (id << 24) | (cpus.min(255) << 16);
            entry.ecx |= HYPERVISOR | X2APIC;
            entry.edx = if cpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Intel caches: each core has its own but for the third level, which all share.
        (0x4, _) if entry.eax & 0x1f != 0 => {
            let shared = if (entry.eax >> 5) & 7 >= 3 { (1 << bits) - 1 } else { 0 };
            let cores = ((1u32 << bits) - 1).min(0x3f);
            entry.eax = (entry.eax & 0x3fff) | (cores << 26) | (shared << 14);
        }
        (0xa, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0xb | 0x1f, 0) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, 1 << 8, id),
        (0xb | 0x1f, 1) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (bits, cpus, (2 << 8) | 1, id),
        (0xb | 0x1f, index) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, index & 0xff, id),
        (0x8000_0008, _) => entry.ecx = (bits << 12) | (cpus - 1),
        // AMD caches, likewise.
        (0x8000_001d, _) if entry.eax & 0x1f != 0 => {
            let shared = if (entry.eax >> 5) & 7 >= 3 { (1 << bits) - 1 } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | (shared << 14);
        }
        (0x8000_001e, _) => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ..Default::default() }
    }

    #[test]
    fn apic_id_and_core_count_agree_in_every_leaf() {
        let mut one = entry(1, 0);
        adjust(&mut one, 5, 6);
        assert_eq!((one.ebx >> 24, (one.ebx >> 16) & 0xff), (5, 6));
        let mut topology = entry(0xb, 1);
        adjust(&mut topology, 5, 6);
        assert_eq!((topology.eax, topology.ebx, topology.edx), (3, 6, 5));
        let mut amd = entry(0x8000_0008, 0);
        adjust(&mut amd, 5, 6);
        assert_eq!(amd.ecx, (3 << 12) | 5);
    }

    #[test]
    fn performance_counters_are_hidden() {
        let mut pmu = kvm_cpuid_entry2 { eax: 0x0730_0402, ebx: 1, ecx: 2, edx: 3, ..entry(0xa, 0) };
        adjust(&mut pmu, 0, 1);
        assert_eq!((pmu.eax, pmu.ebx, pmu.ecx, pmu.edx), (0, 0, 0, 0));
    }
}
