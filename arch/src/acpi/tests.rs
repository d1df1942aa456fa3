use super::*;
use crate::layout::{
    DEVICE_HOLE_END, FIRST_VIRTIO_GSI, HIGH_MEMORY, MAX_VCPUS, MAX_VIRTIO_DEVICES, VIRTIO_MMIO,
    VIRTIO_MMIO_WINDOW_SIZE,
};
use proptest::prelude::*;
use vm_memory::Bytes;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
}

fn windows(count: usize) -> Vec<VirtioMmioWindow> {
    (0..count)
        .map(|index| VirtioMmioWindow {
            address: VIRTIO_MMIO + index as u64 * VIRTIO_MMIO_WINDOW_SIZE,
            size: VIRTIO_MMIO_WINDOW_SIZE,
            gsi: FIRST_VIRTIO_GSI + index as u32,
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The tables as a guest finds them, each checked on the way.
struct Tables {
    dsdt: Vec<u8>,
    fadt: Vec<u8>,
    madt: Vec<u8>,
}

impl Tables {
    fn write(devices: &AcpiDevices<'_>) -> Self {
        let memory = memory();
        let rsdp_address = write_acpi_tables(&memory, devices).unwrap();
        assert_eq!(rsdp_address, GuestAddress(0xe_0000));
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, rsdp_address).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        assert_eq!(rsdp[15], 2);
        assert_eq!(u32_at(&rsdp, 20), 36);

        let mut extents = vec![(rsdp_address.0, 36)];
        let mut table = |address, signature| {
            let table = read_table(&memory, address, signature);
            extents.push((address, table.len() as u64));
            table
        };
        let xsdt = table(u64_at(&rsdp, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(u64_at(&xsdt, 36), b"FACP");
        let madt = table(u64_at(&xsdt, 44), b"APIC");
        let dsdt = table(u64_at(&fadt, 140), b"DSDT");

        extents.sort_unstable();
        for pair in extents.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "tables overlap");
        }
        let (last, size) = extents[extents.len() - 1];
        assert!(last + size <= HIGH_MEMORY);
        assert_eq!(
            memory.read_obj::<u64>(GuestAddress(HIGH_MEMORY)).unwrap(),
            0
        );
        Self { dsdt, fadt, madt }
    }
}

fn read_table(memory: &GuestMemory, address: u64, signature: &[u8; 4]) -> Vec<u8> {
    let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
    let mut table = vec![0; length as usize];
    memory
        .read_slice(&mut table, GuestAddress(address))
        .unwrap();
    assert_eq!(&table[..4], signature);
    assert_eq!(sum(&table), 0, "checksum of {}", signature.escape_ascii());
    table
}

/// Numbers on both sides of the limits for addresses and sizes of windows.
fn edges() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0..=2_u64,
        0xbfff_ffff..=0xc000_0001_u64,
        0xffff_fffe..=0x1_0000_0001_u64,
    ]
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

proptest! {
    #[test]
    fn tables_are_whole_for_every_machine(
        vcpu_count in 1..=MAX_VCPUS,
        device_count in 0..=MAX_VIRTIO_DEVICES,
        serial: bool,
    ) {
        let windows = windows(device_count);
        let tables = Tables::write(&AcpiDevices { vcpu_count, virtio_mmio: &windows, serial });

        let cpus: Vec<_> = tables.madt[44..].chunks_exact(8).take(vcpu_count.into()).collect();
        for (id, cpu) in (0..).zip(cpus) {
            prop_assert_eq!(cpu, [0, 8, id, id, 1, 0, 0, 0]);
        }
        let io_apic = &tables.madt[44 + 8 * usize::from(vcpu_count)..];
        prop_assert_eq!(io_apic, [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);

        prop_assert_eq!(contains(&tables.dsdt, b"COM1"), serial);
        let names = tables.dsdt.windows(8).filter(|name| name == b"LNRO0005").count();
        prop_assert_eq!(names, device_count);
        for window in &windows {
            let mut resources = vec![0x86, 9, 0, 1];
            resources.extend((window.address as u32).to_le_bytes());
            resources.extend((window.size as u32).to_le_bytes());
            resources.extend([0x89, 6, 0, 0b0011, 1]);
            resources.extend(window.gsi.to_le_bytes());
            prop_assert!(contains(&tables.dsdt, &resources));
        }
    }

    #[test]
    fn any_device_list_is_written_or_refused(
        windows in prop::collection::vec((edges(), edges(), any::<u32>()), 0..3),
        count in 0..MAX_VCPUS + 2,
    ) {
        let windows: Vec<_> = windows
            .into_iter()
            .map(|(address, size, gsi)| VirtioMmioWindow { address, size, gsi })
            .collect();
        let devices = AcpiDevices { vcpu_count: count, virtio_mmio: &windows, serial: false };
        let inside = windows.iter().all(|window| {
            window.address >= 0xc000_0000
                && window.size > 0
                && window.size <= DEVICE_HOLE_END.saturating_sub(window.address)
        });
        let possible = inside && (1..=MAX_VCPUS).contains(&count);
        prop_assert_eq!(write_acpi_tables(&memory(), &devices).is_ok(), possible);
    }
}

#[test]
fn fixed_description_is_hardware_reduced() {
    let tables = Tables::write(&AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &[],
        serial: true,
    });
    let fadt = tables.fadt;
    assert_eq!(fadt.len(), 276);
    assert_eq!((fadt[8], fadt[131]), (6, 5), "revision");
    assert_eq!(u32_at(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1);
    assert_eq!(fadt[109], 0b00_0111, "boot architecture");
    let register = |port: u16| {
        let [low, high] = port.to_le_bytes();
        [1, 8, 0, 1, low, high, 0, 0, 0, 0, 0, 0]
    };
    assert_eq!(fadt[116..128], register(0x602));
    assert_eq!(fadt[128], ACPI_RESET_VALUE);
    assert_eq!(fadt[129..131], [0, 0], "Arm boot architecture");
    assert_eq!(fadt[244..256], register(0x600));
    assert_eq!(fadt[256..268], register(0x601));
    assert_eq!(u32_at(&fadt, 36), 0, "no firmware control structure");
    assert_eq!(u32_at(&tables.madt, 40), 1, "8259 pair");
}

#[test]
fn power_button_and_soft_off_are_defined() {
    let tables = Tables::write(&AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &[],
        serial: false,
    });
    // Method _EVT of one argument: If (Arg0 == 5) { Notify (PWRB, 0x80) }
    let event = [
        &b"_EVT\x01"[..],
        b"\xa0\x0c\x93\x68\x0a\x05",
        b"\x86PWRB\x0a\x80",
    ];
    assert!(contains(&tables.dsdt, &event.concat()));
    // Name _S5 of a package of two elements: 5, 0
    let soft_off = b"\x08_S5_\x12\x05\x02\x0a\x05\x00";
    assert!(contains(&tables.dsdt, soft_off));
}

#[test]
fn the_devices_that_tell_of_a_restore_are_defined() {
    let tables = Tables::write(&AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &[],
        serial: false,
    });
    // Name ADDR of a package of two elements: 0xde040, 0
    let counter = [
        &b"VGEN\x08_HID\x0dBNTM0001\0"[..],
        b"\x08_CID\x0dVM_Gen_Counter\0",
        b"\x08_DDN\x0dVM_Gen_Counter\0",
        b"\x08ADDR\x12\x08\x02\x0c\x40\xe0\x0d\x00\x00",
    ];
    assert!(contains(&tables.dsdt, &counter.concat()));
    let clock = b"VCLK\x08_HID\x0dAMZNC10C\0\x08_CID\x0dVMCLOCK\0";
    assert!(contains(&tables.dsdt, clock));
    // Fixed memory that is only read, 0x1000 bytes at 0xdf000
    let page = b"\x86\x09\x00\x00\x00\xf0\x0d\x00\x00\x10\x00\x00";
    assert!(contains(&tables.dsdt, page));
    // If (Arg0 == 3) { Notify (VGEN, 0x80) Notify (VCLK, 0x80) }
    let event = b"\xa0\x13\x93\x68\x0a\x03\x86VGEN\x0a\x80\x86VCLK\x0a\x80";
    assert!(contains(&tables.dsdt, event));
    // Interrupts 5 and 3 of the generic event device, edge-triggered, active high
    let interrupts = [
        &b"\x89\x06\x00\x03\x01\x05\x00\x00\x00"[..],
        b"\x89\x06\x00\x03\x01\x03\x00\x00\x00",
    ];
    assert!(contains(&tables.dsdt, &interrupts.concat()));
}

#[test]
fn the_keyboard_is_defined() {
    let tables = Tables::write(&AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &[],
        serial: false,
    });
    // _HID is the compressed form of PNP0303.
    assert!(contains(&tables.dsdt, b"KBD_\x08_HID\x0c\x41\xd0\x03\x03"));
    let resources = [
        // I/O ports decoded by 16 bits: 0x60 and 0x64
        &b"\x47\x01\x60\x00\x60\x00\x01\x01"[..],
        b"\x47\x01\x64\x00\x64\x00\x01\x01",
        // Interrupt 1, edge-triggered, active high
        b"\x89\x06\x00\x03\x01\x01\x00\x00\x00",
    ];
    assert!(contains(&tables.dsdt, &resources.concat()));
}

#[test]
fn the_panic_device_is_defined() {
    let tables = Tables::write(&AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &[],
        serial: false,
    });
    assert!(contains(&tables.dsdt, b"PEVT\x08_HID\x0dQEMU0001\0"));
    // One I/O port decoded by 16 bits: 0x505
    let resources = b"\x47\x01\x05\x05\x05\x05\x01\x01\x79\x00";
    assert!(contains(&tables.dsdt, resources));
}

#[test]
fn too_many_devices_are_refused() {
    let windows = windows(0x1001);
    let devices = AcpiDevices {
        vcpu_count: 1,
        virtio_mmio: &windows,
        serial: false,
    };
    let error = write_acpi_tables(&memory(), &devices).unwrap_err();
    assert!(matches!(error, Error::AcpiTablesTooLarge));
    let devices = AcpiDevices {
        virtio_mmio: &windows[..0x1000],
        ..devices
    };
    let error = write_acpi_tables(&memory(), &devices).unwrap_err();
    assert!(matches!(error, Error::AcpiTablesTooLarge));
}
