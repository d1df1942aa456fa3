//! The time stamp counters of a machine's vCPUs.

use kvm_ioctls::VcpuFd;

use super::msrs::{IA32_TSC, read_one};
use super::tsc_offset::{set_tsc_offset, tsc_offset};

/// Largest difference, in parts per million, of two frequencies that count as the same: a host measures its
/// own anew at each boot, and a guest's measurement is no better.
const TOLERANCE_PPM: u64 = 250;

/// Whether a counter of `found` kHz is good enough for a guest that has measured `wanted` kHz.
pub(crate) fn is_same_frequency(wanted: u32, found: u32) -> bool {
    u64::from(wanted.abs_diff(found)) * 1_000_000 <= u64::from(wanted) * TOLERANCE_PPM
}

/// Sets the counters of all vCPUs of a machine so that they all go on from the same moment, with the same
/// differences between them as before.
///
/// Writing IA32_TSC cannot do that. The counters of the vCPUs were read at different moments, and KVM takes a
/// value close to what the counter already has for an attempt to synchronize vCPUs, and ignores it. A guest
/// whose counter is behind what it has seen stops until the counter has caught up. So, if KVM gives access
/// to them, the offsets from the host's counter are set instead, which are exact.
#[derive(Debug, Default)]
pub(crate) struct TscRestorer {
    /// The number of ticks, wrapping, that is added to each saved offset; known after the first vCPU.
    shift: Option<u64>,
}

impl TscRestorer {
    /// Sets the counter of one vCPU, which had the value `tsc` and the offset `offset` when it was saved.
    /// Returns `false` if the offset was not accessible then or is not now, so that IA32_TSC has to be
    /// written.
    pub(crate) fn restore(
        &mut self,
        fd: &VcpuFd,
        tsc: u64,
        offset: Option<u64>,
    ) -> Result<bool, kvm_ioctls::Error> {
        let (Some(offset), Some(present_offset)) = (offset, tsc_offset(fd)) else {
            return Ok(false);
        };
        let shift = match self.shift {
            Some(shift) => shift,
            None => {
                let Some(present_tsc) = read_one(fd, IA32_TSC)? else {
                    return Ok(false);
                };
                shift_between((tsc, offset), (present_tsc, present_offset))
            }
        };
        self.shift = Some(shift);
        set_tsc_offset(fd, offset.wrapping_add(shift))?;
        Ok(true)
    }
}

/// Returns what has to be added to the saved offset so that the counter would have had the saved value when
/// the new vCPU's was read. Both arguments are pairs of a value and an offset.
fn shift_between(saved: (u64, u64), present: (u64, u64)) -> u64 {
    let new_offset = present.1.wrapping_add(saved.0.wrapping_sub(present.0));
    new_offset.wrapping_sub(saved.1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn frequencies_within_the_tolerance_are_the_same() {
        assert!(is_same_frequency(2_600_000, 2_600_650));
        assert!(is_same_frequency(2_600_000, 2_599_350));
        assert!(!is_same_frequency(2_600_000, 2_600_651));
        assert!(!is_same_frequency(2_600_000, 0));
        assert!(!is_same_frequency(0, u32::MAX));
        assert!(is_same_frequency(u32::MAX, u32::MAX));
    }

    proptest! {
        /// A guest's counter is the host's plus the offset.
        #[test]
        fn counters_go_on_from_where_they_were(
            old_host: u64,
            new_host: u64,
            saved_offset: u64,
            present_offset: u64,
            apart: u64,
        ) {
            let saved = old_host.wrapping_add(saved_offset);
            let present = new_host.wrapping_add(present_offset);
            let shift = shift_between((saved, saved_offset), (present, present_offset));
            let counter = |offset: u64| new_host.wrapping_add(offset.wrapping_add(shift));
            prop_assert_eq!(counter(saved_offset), saved);
            let other = saved_offset.wrapping_add(apart);
            prop_assert_eq!(counter(other), saved.wrapping_add(apart));
        }
    }
}
