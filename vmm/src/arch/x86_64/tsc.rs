//! The time stamp counter: what a vCPU's is ahead of the host's by.
//!
//! KVM gives a new vCPU the offset that it last saw the others agree on; a guest that has written the counter of one of them, or an
//! ejected vCPU that comes back, would be told apart by Linux's check at each CPU's start, which then gives the whole clock source
//! up ("Marking TSC unstable"). So all get the same offset, explicitly. Documentation/virt/kvm/devices/vcpu.rst, section 4
//! (KVM_VCPU_TSC_CTRL, first in Linux 5.16).

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

const KVM_SET_DEVICE_ATTR: libc::c_ulong = ioctl_iow::<kvm_device_attr>(0xe1);
const KVM_GET_DEVICE_ATTR: libc::c_ulong = ioctl_iow::<kvm_device_attr>(0xe2);

/// A request of KVM's that reads a `T` (_IOW of asm-generic/ioctl.h).
const fn ioctl_iow<T>(number: libc::c_ulong) -> libc::c_ulong {
    (1 << 30) | ((size_of::<T>() as libc::c_ulong) << 16) | ((KVMIO as libc::c_ulong) << 8) | number
}

fn attribute(value: *const u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// Reads the offset; `None` where KVM does not know the attribute.
pub fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut value = 0u64;
    let attribute = attribute(&raw mut value);
    // SAFETY: the request reads one kvm_device_attr, by whose address KVM writes the 8 bytes of `value`, which outlives the call.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR, &attribute) };
    (result == 0).then_some(value)
}

/// Sets the offset.
///
/// # Errors
/// What KVM says.
pub fn set_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = attribute(&raw const offset);
    // SAFETY: the request reads one kvm_device_attr, by whose address KVM reads the 8 bytes of `offset`, which outlives the call.
    match unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR, &attribute) } {
        0 => Ok(()),
        _ => Err(kvm_ioctls::Error::last()),
    }
}
