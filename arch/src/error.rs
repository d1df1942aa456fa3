use bantam_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout::{ACPI_TABLES_MAX_SIZE, DEVICE_HOLE, DEVICE_HOLE_END, MAX_VCPUS};

/// Why a machine cannot be described to its guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ACPI tables do not fit in the area reserved for them.
    #[error(
        "cannot describe the machine in ACPI tables: they exceed {ACPI_TABLES_MAX_SIZE} bytes; \
         use fewer devices"
    )]
    AcpiTablesTooLarge,
    /// KVM does not accept a CPUID table of this length.
    #[error("cannot build the CPUID table of vCPU {vcpu_index}: KVM refuses {count} entries")]
    CpuidTooLong {
        /// Which vCPU the table is for.
        vcpu_index: u8,
        /// How many entries it would have.
        count: usize,
    },
    /// A virtio-mmio register window lies outside the device hole.
    #[error(
        "cannot describe the virtio device at {address:#x} to the guest: its {size} bytes of \
         registers must lie between {DEVICE_HOLE:#x} and {DEVICE_HOLE_END:#x}"
    )]
    DeviceWindow {
        /// Guest-physical address of the window.
        address: u64,
        /// Size of the window in bytes.
        size: u64,
    },
    /// The vCPU does not have a leaf that should be changed.
    #[error(
        "cannot change CPUID leaf {leaf:#x}, subleaf {subleaf:#x}: KVM does not offer it on this \
         host; leave out what changes it"
    )]
    NoCpuidLeaf {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
    },
    /// vCPUs should share cores in pairs, and one is left.
    #[error("cannot pair {count} vCPUs into cores of two threads: use 1 or an even number")]
    UnpairedVcpu {
        /// The number of vCPUs asked for.
        count: u8,
    },
    /// The number of vCPUs is zero, or more than the tables can describe.
    #[error("cannot describe {count} vCPUs to the guest: use 1 to {MAX_VCPUS}")]
    VcpuCount {
        /// The number of vCPUs asked for.
        count: u8,
    },
    /// A vCPU that the machine does not have.
    #[error("cannot build the CPUID table of vCPU {index}: the machine has {count} vCPUs, from 0")]
    VcpuIndex {
        /// The vCPU asked for.
        index: u8,
        /// The number of vCPUs.
        count: u8,
    },
    /// The guest has no memory where a boot structure belongs.
    #[error("cannot write the {what} at guest address {address:#x}: {source}")]
    WriteMemory {
        /// Which structure.
        what: &'static str,
        /// Guest-physical address of the structure.
        address: u64,
        /// The error of that memory.
        source: GuestMemoryError,
    },
}

/// A result whose error says why a machine cannot be described to its guest.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn check_vcpu_count(count: u8) -> Result<()> {
    if (1..=MAX_VCPUS).contains(&count) {
        Ok(())
    } else {
        Err(Error::VcpuCount { count })
    }
}

pub(crate) fn write_memory(
    memory: &GuestMemory,
    what: &'static str,
    address: u64,
    bytes: &[u8],
) -> Result<()> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| Error::WriteMemory {
            what,
            address,
            source,
        })
}
