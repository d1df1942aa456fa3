//! The attribute of a vCPU that holds the offset of its time stamp counter (KVM API,
//! `Documentation/virt/kvm/devices/vcpu.rst`, section 4).

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// Returns the offset in ticks, wrapping; `None` if KVM is older than Linux 5.16.
pub(crate) fn tsc_offset(fd: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    let attribute = attribute(&raw mut offset);
    // SAFETY: KVM writes the 8 bytes of `offset`, as the attribute says, and nothing else.
    let result = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

/// Sets the offset.
pub(crate) fn set_tsc_offset(fd: &VcpuFd, mut offset: u64) -> Result<(), kvm_ioctls::Error> {
    let attribute = attribute(&raw mut offset);
    // SAFETY: KVM reads the 8 bytes of `offset`, as the attribute says, and nothing else.
    let result = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result != 0 {
        return Err(kvm_ioctls::Error::last());
    }
    Ok(())
}

fn attribute(offset: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: offset as u64,
    }
}
