//! Why a kernel cannot be loaded.

use std::io;

use bantam_arch::EntryProtocol;
use vm_memory::GuestMemoryError;

use super::PayloadError;
use crate::image_file::{ImageFileError, mib};

/// Why a kernel cannot be loaded. Reads well after `cannot load kernel 'PATH': `.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file cannot be an image.
    #[error(transparent)]
    File(#[from] ImageFileError),
    /// The file starts with no magic of a kernel image.
    #[error("it is {found}, not a Linux kernel: give an ELF vmlinux or a bzImage for x86-64")]
    UnknownFormat {
        /// What it seems to be.
        found: &'static str,
    },
    /// The image refers to bytes that the file does not have.
    #[error(
        "it is cut short: {what} ends at byte {needed} but there are only {length} bytes: \
         copy or build it again"
    )]
    Truncated {
        /// The part of the image that is incomplete.
        what: &'static str,
        /// Bytes that the image must at least have.
        needed: u64,
        /// Bytes it has.
        length: u64,
    },
    /// An ELF file for another machine.
    #[error("it is an ELF file for {machine}, but this machine runs 64-bit x86 kernels (x86-64)")]
    WrongMachine {
        /// The machine it is for.
        machine: String,
    },
    /// An ELF file that is not an executable image.
    #[error("it is {found}, not a kernel: give the vmlinux that the kernel build links")]
    NotExecutableImage {
        /// What kind of ELF file it is.
        found: &'static str,
    },
    /// An ELF file whose headers contradict themselves.
    #[error("it is a damaged ELF file: {0}: copy or build it again")]
    MalformedElf(&'static str),
    /// A bzImage whose setup header contradicts itself.
    #[error("it is a damaged bzImage: {0}: copy or build it again")]
    MalformedBzImage(&'static str),
    /// A part of the kernel lies where the machine's boot structures are.
    #[error(
        "it wants to be at {address:#x}, below 1 MiB, where the boot structures are: \
         link it at 1 MiB (0x100000) or above"
    )]
    BelowHighMemory {
        /// Guest-physical address of that part.
        address: u64,
    },
    /// A part of the kernel lies where no machine has RAM.
    #[error(
        "it wants to be at {address:#x} to {end:#x}, but RAM for a kernel ends at {:#x}: \
         link it lower",
        bantam_arch::layout::DEVICE_HOLE
    )]
    InDeviceHole {
        /// Guest-physical address of that part.
        address: u64,
        /// First address after it.
        end: u64,
    },
    /// The machine has too little memory.
    #[error(
        "it needs at least {} MiB of guest memory, but the machine has {} MiB: give it more",
        mib(*needed), available >> 20
    )]
    NotEnoughMemory {
        /// Least guest memory in bytes.
        needed: u64,
        /// Guest memory of the machine in bytes.
        available: u64,
    },
    /// The entry point is not in the image.
    #[error("its {protocol:?} entry point {entry:#x} lies outside the segments it loads")]
    EntryOutsideImage {
        /// The protocol to be used.
        protocol: EntryProtocol,
        /// Guest-physical address of the entry point.
        entry: u64,
    },
    /// PVH was asked for and the kernel has no entry point for it.
    #[error(
        "it has no PVH entry point: build it with CONFIG_PVH=y, or choose the boot protocol \
         'auto' or 'linux64'"
    )]
    NoPvhEntry,
    /// PVH was asked for and the ELF inside the bzImage is out of reach.
    #[error(
        "PVH needs the ELF inside this bzImage, but {0}; if that cannot be helped, choose the \
         boot protocol 'auto' or 'linux64'"
    )]
    NoPvhEntryInBzImage(PayloadError),
    /// A bzImage of a boot protocol that does not yet give the place of the payload.
    #[error(
        "it is a bzImage of boot protocol {major}.{minor:02}, but 2.08 (Linux 2.6.26) is the \
         oldest supported: use a newer kernel"
    )]
    BzImageTooOld {
        /// Major version of the boot protocol.
        major: u16,
        /// Minor version.
        minor: u16,
    },
    /// The bzImage can be entered in 32-bit mode only and the ELF inside is out of reach.
    #[error("it is a bzImage without a 64-bit entry point, and {0}; use a 64-bit kernel")]
    No64BitEntry(PayloadError),
    /// A part of the file could not be read into guest memory.
    #[error("cannot read it into guest memory at {address:#x}: {source}")]
    ReadIntoMemory {
        /// Guest-physical address of that part.
        address: u64,
        /// What failed.
        source: GuestMemoryError,
    },
}

impl From<io::Error> for KernelError {
    fn from(error: io::Error) -> Self {
        Self::File(ImageFileError::Read(error))
    }
}
