//! Accesses to device registers, each by one plain instruction that KVM's emulator knows.

use core::arch::asm;

/// A page where no monitor has memory or a device: the last below the I/O APIC.
pub const UNUSED_PAGE: u64 = 0xfebf_f000;

macro_rules! accessors {
    ($($read:ident, $write:ident, $type:ty, $register:ident, $move_in:literal, $move_out:literal;)*) => {$(
        /// Reads a register of this size at a guest-physical address.
        ///
        /// # Safety
        ///
        /// The address is mapped, and reading it has no effect on memory that Rust code relies on.
        #[inline]
        pub unsafe fn $read(address: u64) -> $type {
            let value;
            // SAFETY: the caller vouches for the address.
            unsafe {
                asm!($move_in, in(reg) address, out($register) value,
                     options(nostack, preserves_flags));
            }
            value
        }

        /// Writes a register of this size at a guest-physical address.
        ///
        /// # Safety
        ///
        /// The address is mapped, and writing it has no effect on memory that Rust code relies on.
        #[inline]
        pub unsafe fn $write(address: u64, value: $type) {
            // SAFETY: the caller vouches for the address.
            unsafe {
                asm!($move_out, in(reg) address, in($register) value,
                     options(nostack, preserves_flags));
            }
        }
    )*};
}

accessors! {
    read_8, write_8, u8, reg_byte, "mov {1}, [{0}]", "mov [{0}], {1}";
    read_16, write_16, u16, reg, "mov {1:x}, [{0}]", "mov [{0}], {1:x}";
    read_32, write_32, u32, reg, "mov {1:e}, [{0}]", "mov [{0}], {1:e}";
    read_64, write_64, u64, reg, "mov {1}, [{0}]", "mov [{0}], {1}";
}
