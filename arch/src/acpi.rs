//! ACPI tables: the machine as a hardware-reduced ACPI platform (ACPI 6.5 section 4.1).
//!
//! There is no fixed ACPI hardware. Power is controlled by three byte-wide registers at
//! [`ACPI_POWER_PORT`], [`ACPI_SLEEP_STATUS_PORT`] and [`ACPI_RESET_PORT`]. Interrupts of the generic
//! event device signal the power button, and that the machine has been restored from saved state.

mod dsdt;

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use bantam_memory::GuestMemory;
use vm_memory::GuestAddress;

use crate::error::{Error, Result, check_vcpu_count, write_memory};
use crate::layout::{
    ACPI_POWER_PORT, ACPI_RESET_PORT, ACPI_SLEEP_STATUS_PORT, ACPI_TABLES, ACPI_TABLES_MAX_SIZE,
    IO_APIC, LOCAL_APIC,
};

/// Sleep type of the soft-off state S5, in bits 2 to 4 of the sleep control register (ACPI 6.5
/// section 4.8.3.7).
pub const ACPI_SLEEP_TYPE_S5: u8 = 5;
/// Bit of the sleep control register that enters the sleep state.
pub const ACPI_SLEEP_ENABLE: u8 = 1 << 5;
/// What the guest writes to the reset register to reset the machine (ACPI 6.5 section 4.8.3.6).
pub const ACPI_RESET_VALUE: u8 = 1;

const OEM_ID: [u8; 6] = *b"BANTAM";
const OEM_TABLE_ID: [u8; 8] = *b"MICROVM ";
const OEM_REVISION: u32 = 1;

const TABLE_HEADER_SIZE: u32 = 36;
/// Revision from which integers in AML have 64 bits.
const DSDT_REVISION: u8 = 2;
const MADT_REVISION: u8 = 5;
/// Flag of the MADT: there is a pair of 8259 interrupt controllers, for the guest to mask.
const MADT_PCAT_COMPAT: u32 = 1 << 0;

/// Boot architecture flags of the FADT (ACPI 6.5 section 5.2.9.3).
const BOOT_ARCH_LEGACY_DEVICES: u16 = 1 << 0;
const BOOT_ARCH_8042: u16 = 1 << 1;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;

/// The machine that the tables describe.
#[derive(Clone, Copy, Debug)]
pub struct AcpiDevices<'a> {
    /// Number of vCPUs; their local APIC ids are their indices.
    pub vcpu_count: u8,
    /// The register windows of the virtio-mmio devices, in the order in which the guest finds them.
    pub virtio_mmio: &'a [VirtioMmioWindow],
    /// Whether there is a serial port at [`SERIAL_PORT`](crate::layout::SERIAL_PORT).
    pub serial: bool,
}

/// Location of a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmioWindow {
    /// Guest-physical address of its registers, in the device hole.
    pub address: u64,
    /// Size of its registers in bytes.
    pub size: u64,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

/// Writes the ACPI tables of a machine at [`ACPI_TABLES`], and returns the address of the root
/// system description pointer (ACPI 6.5 section 5.2.5), which guests also find by searching there.
///
/// # Errors
/// If the number of vCPUs is zero or above [`MAX_VCPUS`](crate::layout::MAX_VCPUS), a device
/// window is not in the device hole, the tables exceed [`ACPI_TABLES_MAX_SIZE`], or the guest has no
/// memory there.
pub fn write_acpi_tables(memory: &GuestMemory, devices: &AcpiDevices<'_>) -> Result<GuestAddress> {
    check_vcpu_count(devices.vcpu_count)?;
    let mut area = TableArea {
        memory,
        next: ACPI_TABLES + Rsdp::len() as u64,
    };
    let definition_block = dsdt::definition_block(devices)?;
    let dsdt = area.append(&table(*b"DSDT", DSDT_REVISION, &definition_block))?;
    let fadt = area.append(&fadt(dsdt, devices))?;
    let madt = area.append(&madt(devices))?;

    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.append(&bytes(&xsdt))?;

    let rsdp = bytes(&Rsdp::new(OEM_ID, xsdt));
    write_memory(memory, "ACPI root pointer", ACPI_TABLES, &rsdp)?;
    Ok(GuestAddress(ACPI_TABLES))
}

/// An area of guest memory that is filled with tables from its start.
struct TableArea<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl TableArea<'_> {
    /// Writes a table after the previous ones, and returns its address.
    fn append(&mut self, table: &[u8]) -> Result<u64> {
        let address = self.next.next_multiple_of(16);
        let end = address + table.len() as u64;
        if end > ACPI_TABLES + ACPI_TABLES_MAX_SIZE as u64 {
            return Err(Error::AcpiTablesTooLarge);
        }
        write_memory(self.memory, "ACPI tables", address, table)?;
        self.next = end;
        Ok(address)
    }
}

/// Fixed ACPI description table (ACPI 6.5 section 5.2.9).
fn fadt(dsdt: u64, devices: &AcpiDevices<'_>) -> Vec<u8> {
    let register = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    let mut boot_arch = BOOT_ARCH_8042 | BOOT_ARCH_NO_VGA;
    if devices.serial {
        boot_arch |= BOOT_ARCH_LEGACY_DEVICES;
    }
    fadt.iapc_boot_arch = boot_arch.into();
    fadt.reset_reg = register(ACPI_RESET_PORT);
    fadt.reset_value = ACPI_RESET_VALUE;
    fadt.sleep_control_reg = register(ACPI_POWER_PORT);
    fadt.sleep_status_reg = register(ACPI_SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"BANTAM\0\0").into();
    bytes(&fadt.finalize())
}

/// Multiple APIC description table (ACPI 6.5 section 5.2.12).
///
/// Interrupts need no source overrides: input `n` of the I/O APIC is interrupt `n`, and the
/// resources of each device give the trigger of its interrupt.
fn madt(devices: &AcpiDevices<'_>) -> Vec<u8> {
    let mut body = Vec::new();
    body.dword(LOCAL_APIC as u32);
    body.dword(MADT_PCAT_COMPAT);
    for id in 0..devices.vcpu_count {
        ProcessorLocalApic::new(id, id, EnabledStatus::Enabled).to_aml_bytes(&mut body);
    }
    IoApic::new(0, IO_APIC as u32, 0).to_aml_bytes(&mut body);
    table(*b"APIC", MADT_REVISION, &body)
}

/// A table with its header (ACPI 6.5 section 5.2.6).
fn table(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let mut table = Sdt::new(
        signature,
        TABLE_HEADER_SIZE,
        revision,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
