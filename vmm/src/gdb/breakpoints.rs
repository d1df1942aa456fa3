//! Breakpoints: instructions in guest memory, and debug registers.

use bantam_memory::GuestMemory;
use kvm_bindings::kvm_guest_debug_arch;
use vm_memory::{Bytes, GuestAddress};

/// The breakpoint instruction, `int3`.
const INT3: u8 = 0xcc;

/// Most software breakpoints: far more than a person sets, and few enough to look through at each stop.
const MAX_SOFTWARE: usize = 1024;

/// Number of debug registers that hold an address.
const MAX_HARDWARE: usize = 4;

/// Breakpoints that are instructions in guest memory.
///
/// They are known by guest-physical address too, as programs may share a page at different virtual addresses.
#[derive(Default)]
pub(super) struct SoftwareBreakpoints(Vec<SoftwareBreakpoint>);

struct SoftwareBreakpoint {
    address: u64,
    physical: u64,
    /// The byte in whose place the breakpoint instruction is.
    original: u8,
}

impl SoftwareBreakpoints {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a breakpoint at the virtual address `address`, which is mapped to `physical`. Returns `false` if
    /// there is no memory, or there are too many breakpoints.
    pub(super) fn add(&mut self, memory: &GuestMemory, address: u64, physical: u64) -> bool {
        if self.0.iter().any(|it| it.address == address) {
            return true;
        }
        let original = match self.at(physical) {
            Some(shared) => shared.original,
            None => match memory.read_obj(GuestAddress(physical)) {
                Ok(byte) => byte,
                Err(_) => return false,
            },
        };
        if self.0.len() >= MAX_SOFTWARE || memory.write_obj(INT3, GuestAddress(physical)).is_err() {
            return false;
        }
        self.0.push(SoftwareBreakpoint {
            address,
            physical,
            original,
        });
        true
    }

    /// Removes the breakpoint at the virtual address `address`. Returns `false` if there is none.
    pub(super) fn remove(&mut self, memory: &GuestMemory, address: u64) -> bool {
        let Some(place) = self.0.iter().position(|it| it.address == address) else {
            return false;
        };
        let removed = self.0.swap_remove(place);
        if self.at(removed.physical).is_none() {
            removed.restore(memory);
        }
        true
    }

    /// Removes all breakpoints.
    pub(super) fn clear(&mut self, memory: &GuestMemory) {
        for removed in self.0.drain(..) {
            removed.restore(memory);
        }
    }

    /// Whether the debugger has set a breakpoint at this virtual address.
    pub(super) fn is_at_virtual(&self, address: u64) -> bool {
        self.0.iter().any(|it| it.address == address)
    }

    /// Whether there is a breakpoint at this physical address, under any virtual one.
    pub(super) fn is_at_physical(&self, physical: u64) -> bool {
        self.at(physical).is_some()
    }

    fn at(&self, physical: u64) -> Option<&SoftwareBreakpoint> {
        self.0.iter().find(|it| it.physical == physical)
    }

    /// Replaces the breakpoint instructions in `bytes`, which were read from `physical`, by what the guest has there.
    pub(super) fn hide(&self, physical: u64, bytes: &mut [u8]) {
        for breakpoint in &self.0 {
            if let Some(byte) = byte_at(bytes, physical, breakpoint.physical) {
                *byte = breakpoint.original;
            }
        }
    }

    /// Keeps the breakpoints in `bytes`, which are about to be written to `physical`.
    pub(super) fn keep(&mut self, physical: u64, bytes: &mut [u8]) {
        // Several can share a byte, so all are told of it before it is replaced.
        for breakpoint in &mut self.0 {
            if let Some(byte) = byte_at(bytes, physical, breakpoint.physical) {
                breakpoint.original = *byte;
            }
        }
        for breakpoint in &self.0 {
            if let Some(byte) = byte_at(bytes, physical, breakpoint.physical) {
                *byte = INT3;
            }
        }
    }
}

impl SoftwareBreakpoint {
    /// Puts the original byte back, unless the guest has put something else in its place.
    fn restore(&self, memory: &GuestMemory) {
        let physical = GuestAddress(self.physical);
        if memory
            .read_obj::<u8>(physical)
            .is_ok_and(|byte| byte == INT3)
            && let Err(error) = memory.write_obj(self.original, physical)
        {
            tracing::error!(
                "cannot remove the breakpoint at {:#x}: {error}",
                self.address
            );
        }
    }
}

fn byte_at(bytes: &mut [u8], start: u64, address: u64) -> Option<&mut u8> {
    let offset = usize::try_from(address.checked_sub(start)?).ok()?;
    bytes.get_mut(offset)
}

/// What a debug register stops the vCPU for, as DR7 has it (Intel SDM, volume 3B, "Debug Control Register").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Execute = 0b00,
    Write = 0b01,
    ReadOrWrite = 0b11,
}

/// A debug register in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DebugRegister {
    pub(super) address: u64,
    /// 1, 2, 4 or 8 bytes, by which the address is a multiple.
    size: u8,
    pub(super) access: Access,
}

impl DebugRegister {
    /// Returns the bits of DR7 that enable this as register `number`.
    fn control(self, number: usize) -> u64 {
        let size = match self.size {
            1 => 0b00,
            2 => 0b01,
            8 => 0b10,
            _ => 0b11,
        };
        let bits = self.access as u64 | size << 2;
        // Enabled for all tasks (G).
        0b10 << (2 * number) | bits << (16 + 4 * number)
    }
}

/// The debug registers, which are the same on all vCPUs.
#[derive(Clone, Default)]
pub(super) struct DebugRegisters(Vec<DebugRegister>);

impl DebugRegisters {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Stops vCPUs at `access` to the `len` bytes at `address`; an instruction has one. Returns `false` if there
    /// are too few registers.
    pub(super) fn add(&mut self, address: u64, len: u64, access: Access) -> bool {
        let Some(pieces) = pieces(address, len, access) else {
            return false;
        };
        if self.0.len() + pieces.len() > MAX_HARDWARE {
            return false;
        }
        self.0.extend(pieces);
        true
    }

    /// Undoes [`DebugRegisters::add`]. Returns `false` if it was not called.
    pub(super) fn remove(&mut self, address: u64, len: u64, access: Access) -> bool {
        let Some(pieces) = pieces(address, len, access) else {
            return false;
        };
        for piece in pieces {
            match self.0.iter().position(|it| *it == piece) {
                Some(place) => self.0.remove(place),
                None => return false,
            };
        }
        true
    }

    /// Returns the register whose bit is set in `dr6`.
    pub(super) fn hit(&self, dr6: u64) -> Option<DebugRegister> {
        let mut registers = self.0.iter().enumerate();
        let hit = registers.find(|(number, _)| dr6 & (1 << number) != 0);
        hit.map(|(_, register)| *register)
    }

    /// Returns the registers as KVM takes them.
    pub(super) fn for_kvm(&self) -> kvm_guest_debug_arch {
        let mut arch = kvm_guest_debug_arch::default();
        // Exact (LE, GE), and a bit that always reads as 1.
        arch.debugreg[7] = 0x700;
        for (number, register) in self.0.iter().enumerate() {
            arch.debugreg[number] = register.address;
            arch.debugreg[7] |= register.control(number);
        }
        arch
    }
}

/// Splits a range into parts that one register can watch; `None` if there are more than registers.
fn pieces(mut address: u64, mut len: u64, access: Access) -> Option<Vec<DebugRegister>> {
    let mut pieces = Vec::new();
    while len > 0 {
        if pieces.len() == MAX_HARDWARE {
            return None;
        }
        let fits = [8, 4, 2, 1].into_iter();
        let size = fits
            .filter(|size| u64::from(*size) <= len && address.is_multiple_of((*size).into()))
            .max()
            .unwrap_or(1_u8);
        pieces.push(DebugRegister {
            address,
            size,
            access,
        });
        address = address.wrapping_add(size.into());
        len -= u64::from(size);
    }
    (!pieces.is_empty()).then_some(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 16)]).unwrap()
    }

    fn byte(memory: &GuestMemory, address: u64) -> u8 {
        memory.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn a_breakpoint_is_in_memory_until_the_last_address_of_it_is_removed() {
        let memory = memory();
        memory.write_obj(0x90_u8, GuestAddress(0x1000)).unwrap();
        let mut breakpoints = SoftwareBreakpoints::default();
        assert!(breakpoints.add(&memory, 0xffff_8000_0000_1000, 0x1000));
        assert!(breakpoints.add(&memory, 0x7000_1000, 0x1000));
        assert_eq!(byte(&memory, 0x1000), INT3);
        assert!(breakpoints.is_at_physical(0x1000) && breakpoints.is_at_virtual(0x7000_1000));
        assert!(!breakpoints.is_at_virtual(0x1000));
        assert!(breakpoints.remove(&memory, 0x7000_1000));
        assert!(!breakpoints.remove(&memory, 0x7000_1000));
        assert_eq!(byte(&memory, 0x1000), INT3);
        breakpoints.clear(&memory);
        assert_eq!(byte(&memory, 0x1000), 0x90);
        assert!(breakpoints.is_empty());
    }

    #[test]
    fn there_is_no_breakpoint_without_memory() {
        let memory = memory();
        let mut breakpoints = SoftwareBreakpoints::default();
        assert!(!breakpoints.add(&memory, 0, 1 << 16));
        for address in 0..MAX_SOFTWARE as u64 {
            assert!(breakpoints.add(&memory, address, address));
        }
        let next = MAX_SOFTWARE as u64;
        assert!(!breakpoints.add(&memory, next, next));
        assert_eq!(byte(&memory, next), 0);
    }

    #[test]
    fn code_that_the_guest_replaces_stays() {
        let memory = memory();
        let mut breakpoints = SoftwareBreakpoints::default();
        assert!(breakpoints.add(&memory, 0x1000, 0x1000));
        memory.write_obj(0x55_u8, GuestAddress(0x1000)).unwrap();
        assert!(breakpoints.remove(&memory, 0x1000));
        assert_eq!(byte(&memory, 0x1000), 0x55);
    }

    #[test]
    fn the_debugger_sees_and_writes_what_is_under_a_breakpoint() {
        let memory = memory();
        memory
            .write_slice(&[1, 2, 3, 4], GuestAddress(0x1000))
            .unwrap();
        let mut breakpoints = SoftwareBreakpoints::default();
        assert!(breakpoints.add(&memory, 0x1001, 0x1001));
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [1, INT3, 3, 4]);
        breakpoints.hide(0x1000, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);
        breakpoints.hide(0x1002, &mut bytes);
        assert_eq!(bytes, [1, 2, 3, 4]);

        let mut written = [5, 6];
        breakpoints.keep(0x1000, &mut written);
        assert_eq!(written, [5, INT3]);
        memory.write_slice(&written, GuestAddress(0x1000)).unwrap();
        breakpoints.clear(&memory);
        memory.read_slice(&mut bytes, GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, [5, 6, 3, 4]);
    }

    #[test]
    fn debug_registers_are_as_the_processor_has_them() {
        let mut registers = DebugRegisters::default();
        assert!(registers.add(0x1234, 1, Access::Execute));
        assert!(registers.add(0x2000, 8, Access::Write));
        assert!(registers.add(0x3004, 4, Access::ReadOrWrite));
        let arch = registers.for_kvm();
        assert_eq!(arch.debugreg[..3], [0x1234, 0x2000, 0x3004]);
        // For register 0 neither type nor length; for 1 write and 8 bytes; for 2 access and 4 bytes.
        assert_eq!(
            arch.debugreg[7],
            0x700 | 0b10_10_10 | 0b1111_1001_0000 << 16
        );
        assert_eq!(registers.hit(0xffff_0ff2).unwrap().address, 0x2000);
        assert_eq!(registers.hit(0xffff_4ff0), None);
        assert_eq!(registers.hit(0xffff_0ff8), None);
    }

    #[test]
    fn a_watched_range_takes_as_many_registers_as_its_alignment_needs() {
        let mut registers = DebugRegisters::default();
        assert!(registers.add(0x1001, 7, Access::Write));
        let parts: Vec<_> = registers.0.iter().map(|it| (it.address, it.size)).collect();
        assert_eq!(parts, [(0x1001, 1), (0x1002, 2), (0x1004, 4)]);
        assert!(!registers.add(0x2001, 2, Access::Write));
        assert!(registers.add(0x2000, 2, Access::Write));
        assert!(!registers.remove(0x3000, 2, Access::Write));
        assert!(registers.remove(0x1001, 7, Access::Write));
        assert_eq!(registers.0.len(), 1);
        assert!(!registers.add(0, 1 << 40, Access::Write));
        assert!(!registers.add(0, 0, Access::Write));
        assert!(registers.add(u64::MAX, 1, Access::Write));
    }
}
