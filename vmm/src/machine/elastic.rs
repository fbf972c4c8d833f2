//! Makes the devices by which memory comes and goes, and connects them to KVM and to the main thread.

use std::sync::Arc;

use kvm_bindings::{KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap};
use kvm_ioctls::{Kvm, VmFd};
use libc::c_ulong;

use super::{MachineError, host, kvm};
use crate::arch::x86_64::{cpuid, layout};
use crate::devices::MemoryDevices;
use crate::hotmem::{Mapping, Region};
use crate::notices::{Halt, Notices};
use crate::virtio::balloon::Balloon;
use crate::virtio::mem::MemDevice;
use crate::virtio::{Memory, MemoryReport};

impl MemoryReport for Notices {
    fn memory_changed(&self) {
        Self::memory_changed(self);
    }

    fn memory_lost(&self, reason: &str) {
        self.halt(Halt::Crash(reason.to_owned()));
    }
}

/// Asks KVM not to forget what all of the guest's memory is backed by whenever a slot goes, which would have the guest fault its whole
/// working set in again at each unplugging (KVM_X86_QUIRK_SLOT_ZAP_ALL, Linux 6.12). Older kernels do so, and nothing else differs.
fn keep_other_mappings(vm: &VmFd) {
    let known = vm.check_extension_raw(c_ulong::from(KVM_CAP_DISABLE_QUIRKS2));
    if u32::try_from(known).is_ok_and(|known| known & KVM_X86_QUIRK_SLOT_ZAP_ALL != 0) {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..kvm_enable_cap::default() };
        cap.args[0] = u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL);
        // It is known; if KVM says no after all, it is as with an older kernel.
        let _ = vm.enable_cap(&cap);
    }
}

/// What the devices are made from.
pub struct Parts<'a> {
    /// KVM.
    pub kvm: &'a Kvm,
    /// The machine.
    pub vm: &'a Arc<VmFd>,
    /// Boot memory.
    pub memory: &'a Memory,
    /// The way to the main thread.
    pub notices: &'a Arc<Notices>,
}

impl Parts<'_> {
    /// Makes the device for `pluggable` bytes above `memory_bytes` of boot memory, if there are any, and the balloon, if it is wanted.
    ///
    /// # Errors
    /// When the region does not fit into the guest's physical address space, or the host gives no address space or descriptor.
    pub fn devices(
        &self,
        memory_bytes: u64,
        pluggable: u64,
        balloon: bool,
    ) -> Result<MemoryDevices, MachineError> {
        let mem = if pluggable > 0 { Some(self.mem(memory_bytes, pluggable)?) } else { None };
        let balloon = if balloon {
            Some(Balloon::new(self.notices.clone()).map_err(host("make an eventfd"))?)
        } else {
            None
        };
        Ok(MemoryDevices { mem, balloon })
    }

    fn mem(&self, memory_bytes: u64, pluggable: u64) -> Result<MemDevice, MachineError> {
        let (start, bytes) = layout::pluggable_range(memory_bytes, pluggable);
        let bits = cpuid::physical_address_bits(self.kvm).map_err(kvm("say what CPUID it supports"))?;
        if start + bytes > 1 << bits {
            return Err(MachineError::Impossible(format!(
                "{pluggable} bytes of pluggable memory above {memory_bytes} bytes end at {:#x}; this host's guests can address \
                 {bits} bits",
                start + bytes
            )));
        }
        keep_other_mappings(self.vm);
        let mapping = Mapping::new(self.vm.clone(), self.memory.clone(), start, bytes)?;
        Ok(MemDevice::new(Region::new(bytes, Box::new(mapping)), start, pluggable, self.notices.clone()))
    }
}
