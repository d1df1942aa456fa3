//! Reads model-specific registers in batches, and sets them in an order that KVM accepts.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

pub(crate) const IA32_TSC: u32 = 0x10;
const KVM_WALL_CLOCK: u32 = 0x11;
const KVM_SYSTEM_TIME: u32 = 0x12;
const IA32_PERF_GLOBAL_CTRL: u32 = 0x38f;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Range of KVM's own MSRs (Linux, `Documentation/virt/kvm/x86/msr.rst`), and of those of hosts whose KVM
/// switches page tables.
const KVM_FIRST: u32 = 0x4b56_4d00;
const KVM_LAST: u32 = 0x4b56_4dff;

/// How many registers are read or set by one request; KVM takes fewer than 256.
const BATCH: usize = 128;

/// A register with its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Msr {
    pub(crate) index: u32,
    pub(crate) value: u64,
}

/// Why registers could not be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetMsrsError {
    #[error(transparent)]
    Kvm(#[from] kvm_ioctls::Error),
    #[error("KVM does not take {value:#x} for MSR {index:#x} on this host", index = .0.index, value = .0.value)]
    Refused(Msr),
}

/// Reads those of `indices` that KVM lets be read. KVM lists some that it refuses to read, because the
/// guest's CPUID determines which exist.
pub(crate) fn read(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, kvm_ioctls::Error> {
    let mut msrs = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let mut batch = entries(
            rest.iter()
                .take(BATCH)
                .map(|&index| Msr { index, value: 0 }),
        )?;
        let read = fd.get_msrs(&mut batch)?;
        msrs.extend(batch.as_slice().iter().take(read).map(|entry| Msr {
            index: entry.index,
            value: entry.data,
        }));
        // KVM stops at the first register that it refuses.
        rest = after_batch(rest, read);
    }
    Ok(msrs)
}

/// Reads one register; `None` if KVM refuses.
pub(crate) fn read_one(fd: &VcpuFd, index: u32) -> Result<Option<u64>, kvm_ioctls::Error> {
    Ok(read(fd, &[index])?.first().map(|msr| msr.value))
}

/// Sets `msrs`, each after those that it depends on.
///
/// KVM refuses some values that it has returned itself, such as those of registers that cannot be written.
/// That does no harm if the vCPU has the value anyway.
pub(crate) fn set(fd: &VcpuFd, mut msrs: Vec<Msr>) -> Result<(), SetMsrsError> {
    msrs.sort_by_key(|msr| rank(msr.index));
    let mut rest = msrs.as_slice();
    while !rest.is_empty() {
        let batch = entries(rest.iter().take(BATCH).copied())?;
        let set = fd.set_msrs(&batch)?;
        if let Some(&refused) = rest.get(set).filter(|_| set < batch.as_slice().len())
            && read_one(fd, refused.index)? != Some(refused.value)
        {
            return Err(SetMsrsError::Refused(refused));
        }
        rest = after_batch(rest, set);
    }
    Ok(())
}

/// Returns the rest of `all` after a batch in which KVM took the first `done` and refused the next, if the
/// batch had more.
fn after_batch<T>(all: &[T], done: usize) -> &[T] {
    let refused = usize::from(done < all.len().min(BATCH));
    all.get(done + refused..).unwrap_or_default()
}

/// Returns the rank of a register in the order of setting: lower ranks are set first.
fn rank(index: u32) -> u8 {
    match index {
        IA32_TSC => 1,
        // These name places in guest memory that KVM then writes to. One of the values it writes is the
        // time since the guest's start, by the counter above.
        KVM_WALL_CLOCK | KVM_SYSTEM_TIME | KVM_FIRST..=KVM_LAST => 2,
        // Until it is set, no performance counter counts, so none overflows while others are being set.
        IA32_PERF_GLOBAL_CTRL => 3,
        // KVM compares it with the guest's counter to start the timer. Before IA32_TSC is set, the timer
        // would run for an arbitrary time.
        IA32_TSC_DEADLINE => 4,
        _ => 0,
    }
}

fn entries(msrs: impl Iterator<Item = Msr>) -> Result<Msrs, kvm_ioctls::Error> {
    let entries: Vec<_> = msrs
        .map(|msr| kvm_msr_entry {
            index: msr.index,
            data: msr.value,
            ..Default::default()
        })
        .collect();
    // This fails only for more entries than a batch has.
    Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_depends_on_the_clock_comes_after_it() {
        let mut indices = [
            IA32_TSC_DEADLINE,
            IA32_PERF_GLOBAL_CTRL,
            0x4b56_4d01,
            KVM_SYSTEM_TIME,
            IA32_TSC,
            0x174,
            0xc000_0081,
        ];
        indices.sort_by_key(|&index| rank(index));
        assert_eq!(
            indices,
            [
                0x174,
                0xc000_0081,
                IA32_TSC,
                0x4b56_4d01,
                KVM_SYSTEM_TIME,
                IA32_PERF_GLOBAL_CTRL,
                IA32_TSC_DEADLINE
            ]
        );
    }

    #[test]
    fn a_batch_goes_on_after_what_was_refused() {
        let all: Vec<usize> = (0..300).collect();
        assert_eq!(after_batch(&all, BATCH)[0], BATCH);
        assert_eq!(after_batch(&all, 5)[0], 6);
        assert!(after_batch(&all[..3], 3).is_empty());
        assert!(after_batch(&all[..3], 2).is_empty());
        assert_eq!(after_batch(&all[..3], 0), [1, 2]);
    }

    #[test]
    fn registers_that_kvm_does_not_have_are_left_out() {
        let Ok(kvm) = crate::host::open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let unknown = |count| std::iter::repeat_n(0x1234_5678, count);
        let indices: Vec<u32> = unknown(2)
            .chain([0x175])
            .chain(unknown(BATCH))
            .chain([0x176])
            .chain(unknown(1))
            .collect();
        let msrs = read(&fd, &indices).unwrap();
        let found: Vec<u32> = msrs.iter().map(|msr| msr.index).collect();
        assert_eq!(found, [0x175, 0x176]);
    }

    #[test]
    fn a_value_that_kvm_refuses_is_an_error() {
        let Ok(kvm) = crate::host::open_kvm() else {
            eprintln!("skipped: there is no KVM here");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let msr = |index, value| Msr { index, value };
        let error = set(&fd, vec![msr(0x1234_5678, 1), msr(0x176, 7)]).unwrap_err();
        assert!(error.to_string().contains("0x12345678"), "{error}");
        set(&fd, vec![msr(0x176, 7), msr(0x175, 8)]).unwrap();
        assert_eq!(read_one(&fd, 0x175).unwrap(), Some(8));
        assert_eq!(read_one(&fd, 0x176).unwrap(), Some(7));
    }
}
