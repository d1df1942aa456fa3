//! What an x86-64 guest CPU needs to start: the layout of memory, the state of its registers, and
//! the tables that describe the machine to it.
//!
//! Everything here is a pure function of its arguments or a write to guest memory. The caller talks
//! to KVM; this crate uses only the plain structures of its interface.

#![forbid(unsafe_code)]

pub mod acpi;
pub mod cpuid;
mod error;
pub mod lapic;
pub mod layout;
pub mod memory_map;
pub mod mptable;
pub mod msrs;
pub mod registers;
pub mod smbios;

use std::fmt;

pub use error::{Error, Result};

/// How the boot vCPU enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryProtocol {
    /// PVH: 32-bit protected mode without paging (Xen's `docs/misc/pvh`).
    Pvh,
    /// The 64-bit entry of the Linux boot protocol (`Documentation/arch/x86/boot.rst`).
    Linux64,
}

impl fmt::Display for EntryProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Linux64 => "the 64-bit Linux protocol",
        })
    }
}
