//! The statistics that KVM keeps of a vCPU, which any thread can read while the vCPU runs
//! (KVM API, `KVM_GET_STATS_FD`).

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Size in bytes of `struct kvm_stats_header`: six words of 32 bits.
const HEADER_SIZE: usize = 24;
/// Size in bytes of `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTOR_SIZE: usize = 16;
/// Most bytes of descriptors that are read: many times what KVM has.
const MAX_DESCRIPTORS_SIZE: usize = 1 << 20;

/// The statistics of one vCPU.
pub(crate) struct VcpuStatistics(File);

/// Offsets of two values in a vCPU's statistics. They are the same for all vCPUs of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HaltCounters {
    /// Offset of the flag that says that the vCPU waits in KVM.
    blocking: u64,
    /// Offset of the number of times that it has halted.
    halt_exits: u64,
}

impl VcpuStatistics {
    pub(crate) fn of(vcpu: &VcpuFd) -> io::Result<VcpuStatistics> {
        // SAFETY: the request takes no argument; it returns a new descriptor or an error.
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, so nothing else owns it.
        Ok(VcpuStatistics(unsafe { File::from_raw_fd(fd) }))
    }

    /// Finds the counters.
    ///
    /// # Errors
    /// If KVM does not have them; it has had them since Linux 5.16.
    pub(crate) fn halt_counters(&self) -> io::Result<HaltCounters> {
        let mut header = [0; HEADER_SIZE];
        self.0.read_exact_at(&mut header, 0)?;
        let size = descriptors_size(&header).filter(|&size| size <= MAX_DESCRIPTORS_SIZE);
        let mut descriptors = vec![0; size.ok_or(io::ErrorKind::InvalidData)?];
        let offset = word(&header, 16).unwrap_or_default();
        self.0.read_exact_at(&mut descriptors, offset.into())?;
        let find = |name| find_counter(&header, &descriptors, name).ok_or(io::ErrorKind::NotFound);
        Ok(HaltCounters {
            blocking: find("blocking")?,
            halt_exits: find("halt_exits")?,
        })
    }

    /// Returns how often the vCPU has halted so far, if it is waiting in KVM now.
    pub(crate) fn halts_if_waiting(&self, counters: HaltCounters) -> Option<u64> {
        // In this order: a vCPU that goes on and halts again in between has a higher count afterwards.
        let halts = self.read(counters.halt_exits)?;
        (self.read(counters.blocking)? != 0).then_some(halts)
    }

    fn read(&self, offset: u64) -> Option<u64> {
        let mut value = [0; 8];
        self.0.read_exact_at(&mut value, offset).ok()?;
        Some(u64::from_ne_bytes(value))
    }
}

/// Returns the word of 32 bits at `offset`.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let word = bytes.get(offset..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*word))
}

/// Returns the size in bytes of a descriptor with its name.
fn descriptor_size(header: &[u8]) -> Option<usize> {
    DESCRIPTOR_SIZE.checked_add(word(header, 4)? as usize)
}

/// Returns the size in bytes of all descriptors.
fn descriptors_size(header: &[u8]) -> Option<usize> {
    descriptor_size(header)?.checked_mul(word(header, 8)? as usize)
}

/// Returns the offset of the value of the counter called `name`.
fn find_counter(header: &[u8], descriptors: &[u8], name: &str) -> Option<u64> {
    let data = word(header, 20)?;
    let descriptor = descriptors
        .chunks_exact(descriptor_size(header)?)
        .find(|descriptor| {
            let text = descriptor.get(DESCRIPTOR_SIZE..).unwrap_or_default();
            text.split(|&byte| byte == 0).next() == Some(name.as_bytes())
        })?;
    Some(u64::from(data) + u64::from(word(descriptor, 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(name_size: u32, count: u32) -> Vec<u8> {
        [0, name_size, count, 24, 32, 1000]
            .iter()
            .flat_map(|word: &u32| word.to_ne_bytes())
            .collect()
    }

    fn descriptor(offset: u32, name: &str) -> Vec<u8> {
        let mut bytes = [0; 8].to_vec();
        bytes.extend(offset.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(name.as_bytes());
        bytes.resize(DESCRIPTOR_SIZE + 12, 0);
        bytes
    }

    #[test]
    fn counters_are_found_by_their_whole_name() {
        let header = header(12, 3);
        let descriptors = [
            descriptor(0, "halt_exits_x"),
            descriptor(8, "blocking"),
            descriptor(264, "halt_exits"),
        ]
        .concat();
        assert_eq!(descriptors_size(&header), Some(descriptors.len()));
        assert_eq!(find_counter(&header, &descriptors, "blocking"), Some(1008));
        assert_eq!(
            find_counter(&header, &descriptors, "halt_exits"),
            Some(1264)
        );
        assert_eq!(find_counter(&header, &descriptors, "halt"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(header: [u8; HEADER_SIZE], descriptors: Vec<u8>) {
            descriptors_size(&header);
            find_counter(&header, &descriptors, "blocking");
        }
    }
}
