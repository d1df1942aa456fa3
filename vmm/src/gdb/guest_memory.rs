//! Guest memory by the virtual addresses of a vCPU.

use bantam_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::SoftwareBreakpoints;
use crate::vcpu::ParkedVcpu;

const PAGE_SIZE: u64 = 0x1000;

/// Bit of CR0 that enables paging (PG), of CR4 that enables page tables of five levels (LA57), and of EFER that
/// says that the processor is in 64-bit or compatibility mode (LMA).
const CR0_PAGING: u64 = 1 << 31;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE: u64 = 1 << 10;

/// Returns the physical address to which the page tables of `vcpu` map `address`; `None` if they do not. An access
/// by the debugger may do what the kernel may.
pub(super) fn translate(vcpu: &ParkedVcpu<'_>, address: u64) -> Option<u64> {
    if !is_canonical(vcpu, address) {
        return None;
    }
    let translation = vcpu.fd.translate_gva(address).ok()?;
    (translation.valid != 0).then_some(translation.physical_address)
}

/// Whether the processor accepts `address`. KVM ignores the bits that it does not use to find a page.
fn is_canonical(vcpu: &ParkedVcpu<'_>, address: u64) -> bool {
    let Ok(sregs) = vcpu.fd.get_sregs() else {
        return false;
    };
    let bits = match sregs.cr4 & CR4_FIVE_LEVELS {
        0 => 48,
        _ => 57,
    };
    match (sregs.efer & EFER_LONG_MODE, sregs.cr0 & CR0_PAGING) {
        (0, _) | (_, 0) => u32::try_from(address).is_ok(),
        _ => is_sign_extended(address, bits),
    }
}

fn is_sign_extended(address: u64, bits: u32) -> bool {
    let unused = u64::BITS - bits;
    ((address << unused) as i64 >> unused) as u64 == address
}

/// Returns the parts of the range that are in one page each: the address, and the length of the part.
fn parts(address: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let start = address.checked_add(done as u64)?;
        let room = (PAGE_SIZE - start % PAGE_SIZE) as usize;
        let part = room.min(len - done);
        done += part;
        (part > 0).then_some((start, part))
    })
}

/// Reads into `bytes` what `vcpu` has from `address` on, without breakpoints, and returns how many bytes there are.
pub(super) fn read(
    vcpu: &ParkedVcpu<'_>,
    memory: &GuestMemory,
    breakpoints: &SoftwareBreakpoints,
    address: u64,
    bytes: &mut [u8],
) -> usize {
    let mut done = 0;
    for (start, len) in parts(address, bytes.len()) {
        let part = &mut bytes[done..done + len];
        let physical = translate(vcpu, start);
        let Some(physical) = physical.filter(|&physical| {
            let from = GuestAddress(physical);
            memory.read_slice(part, from).is_ok()
        }) else {
            break;
        };
        breakpoints.hide(physical, part);
        done += len;
    }
    done
}

/// Writes `bytes` to the memory that `vcpu` has from `address` on, whether or not the guest may write there, and
/// leaves breakpoints in place. Writes nothing and returns `false` if there is not as much memory.
pub(super) fn write(
    vcpu: &ParkedVcpu<'_>,
    memory: &GuestMemory,
    breakpoints: &mut SoftwareBreakpoints,
    address: u64,
    bytes: &mut [u8],
) -> bool {
    let mut places = Vec::new();
    for (start, len) in parts(address, bytes.len()) {
        match translate(vcpu, start) {
            Some(physical) if memory.contains(GuestAddress(physical), len) => {
                places.push((physical, len));
            }
            _ => return false,
        }
    }
    let mut rest = bytes;
    for (physical, len) in places {
        let (part, after) = rest.split_at_mut(len);
        rest = after;
        breakpoints.keep(physical, part);
        if let Err(error) = memory.write_slice(part, GuestAddress(physical)) {
            tracing::error!("cannot write to guest memory at {physical:#x}: {error}");
            return false;
        }
    }
    // The range wraps around if some bytes are left.
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_split_at_pages() {
        let split = |address, len| parts(address, len).collect::<Vec<_>>();
        assert_eq!(split(0x1ffe, 3), [(0x1ffe, 2), (0x2000, 1)]);
        assert_eq!(split(0x1000, 0x1000), [(0x1000, 0x1000)]);
        assert_eq!(split(0x1000, 0), []);
        assert_eq!(split(u64::MAX, 2), [(u64::MAX, 1)]);
    }

    #[test]
    fn canonical_addresses_repeat_their_highest_bit() {
        for address in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(is_sign_extended(address, 48), "{address:#x}");
        }
        for address in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!is_sign_extended(address, 48), "{address:#x}");
        }
        assert!(is_sign_extended(0x8000_0000_0000, 57));
    }
}
