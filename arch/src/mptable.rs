//! The MP table, which describes processors, the I/O APIC and its inputs to kernels without ACPI
//! (Intel MultiProcessor Specification 1.4, chapter 4).

use bantam_memory::GuestMemory;

use crate::error::{Result, check_vcpu_count, write_memory};
use crate::layout::{IO_APIC, IO_APIC_PIN_COUNT, LOCAL_APIC, MP_TABLE, TIMER_GSI};

/// Version 1.4 of the specification.
const SPECIFICATION_REVISION: u8 = 4;
const OEM_ID: &[u8; 8] = b"BANTAM  ";
const PRODUCT_ID: &[u8; 12] = b"MICROVM     ";

const FLOATING_POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IO_APIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

/// Version of integrated APICs, local and I/O, as reported by KVM's.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
const IO_APIC_ENABLED: u8 = 1;
const PROCESSOR_ENABLED: u8 = 1 << 0;
const PROCESSOR_IS_BOOT: u8 = 1 << 1;
/// Family 6, and the features that the specification names: floating point, `CMPXCHG8B`, local
/// APIC. The guest reads the rest from CPUID.
const PROCESSOR_SIGNATURE: u32 = 6 << 8;
const PROCESSOR_FEATURES: u32 = 1 << 0 | 1 << 8 | 1 << 9;

const ISA_BUS: u8 = 0;
const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
/// Active high, edge-triggered.
const FLAGS_EDGE_HIGH: u16 = 0b01 | 0b01 << 2;
/// As the bus defines it: the pins of the local APIC decide.
const FLAGS_CONFORMING: u16 = 0;
const ALL_LOCAL_APICS: u8 = 0xff;

/// Writes the MP table of a machine with `vcpu_count` vCPUs at [`MP_TABLE`].
///
/// Local APIC ids are vCPU indices, the I/O APIC takes the id after them, and each of its inputs is
/// the interrupt of the same number on an ISA bus, so the guest uses that number for it. All are
/// edge-triggered, and say so: an ISA bus has no interrupts from 16 on, so these have no default
/// trigger.
///
/// Only the inputs in `gsis`, which have a device, and the timer's, which kernels look for, are
/// listed: a guest sets up each input that it finds.
///
/// # Errors
/// If `vcpu_count` is zero or above [`MAX_VCPUS`](crate::layout::MAX_VCPUS), or the guest has no
/// memory at [`MP_TABLE`].
pub fn write_mp_table(memory: &GuestMemory, vcpu_count: u8, gsis: &[u32]) -> Result<()> {
    check_vcpu_count(vcpu_count)?;
    let mut bytes = floating_pointer();
    bytes.extend(configuration_table(vcpu_count, gsis));
    write_memory(memory, "MP table", MP_TABLE, &bytes)
}

/// Section 4.1. The configuration table follows immediately; interrupts go through the local APIC
/// from the start (no interrupt mode configuration register).
fn floating_pointer() -> Vec<u8> {
    let table = MP_TABLE as u32 + FLOATING_POINTER_SIZE as u32;
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    bytes.push((FLOATING_POINTER_SIZE / 16) as u8);
    bytes.push(SPECIFICATION_REVISION);
    bytes.resize(FLOATING_POINTER_SIZE, 0);
    bytes[10] = checksum(&bytes);
    bytes
}

/// Section 4.2: header and base entries.
fn configuration_table(vcpu_count: u8, gsis: &[u32]) -> Vec<u8> {
    let io_apic_id = vcpu_count;
    let mut entries = Entries::default();
    for apic_id in 0..vcpu_count {
        entries.processor(apic_id);
    }
    entries.isa_bus();
    entries.io_apic(io_apic_id);
    for gsi in 0..IO_APIC_PIN_COUNT {
        if gsi == TIMER_GSI || gsis.contains(&gsi) {
            let pin = gsi as u8;
            entries.interrupt(
                ENTRY_IO_INTERRUPT,
                INTERRUPT_VECTORED,
                FLAGS_EDGE_HIGH,
                pin,
                (io_apic_id, pin),
            );
        }
    }
    for (kind, apic_id, pin) in [
        (INTERRUPT_EXTERNAL, 0, 0),
        (INTERRUPT_NMI, ALL_LOCAL_APICS, 1),
    ] {
        entries.interrupt(
            ENTRY_LOCAL_INTERRUPT,
            kind,
            FLAGS_CONFORMING,
            0,
            (apic_id, pin),
        );
    }

    let mut bytes = b"PCMP".to_vec();
    bytes.extend(((HEADER_SIZE + entries.bytes.len()) as u16).to_le_bytes());
    bytes.push(SPECIFICATION_REVISION);
    bytes.push(0); // checksum
    bytes.extend(OEM_ID);
    bytes.extend(PRODUCT_ID);
    bytes.extend(0_u32.to_le_bytes()); // no table of the manufacturer's
    bytes.extend(0_u16.to_le_bytes()); // its size
    bytes.extend(entries.count.to_le_bytes());
    bytes.extend((LOCAL_APIC as u32).to_le_bytes());
    bytes.extend(0_u32.to_le_bytes()); // no extended entries
    bytes.extend(entries.bytes);
    bytes[7] = checksum(&bytes);
    bytes
}

/// Base entries of the configuration table (section 4.3).
#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn processor(&mut self, apic_id: u8) {
        let flags = match apic_id {
            0 => PROCESSOR_ENABLED | PROCESSOR_IS_BOOT,
            _ => PROCESSOR_ENABLED,
        };
        self.entry(ENTRY_PROCESSOR, [apic_id, LOCAL_APIC_VERSION, flags]);
        self.bytes.extend(PROCESSOR_SIGNATURE.to_le_bytes());
        self.bytes.extend(PROCESSOR_FEATURES.to_le_bytes());
        self.bytes.extend([0; 8]);
    }

    fn isa_bus(&mut self) {
        let [i, s, a, space] = *b"ISA ";
        self.entry(ENTRY_BUS, [ISA_BUS, i, s, a, space, space, space]);
    }

    fn io_apic(&mut self, apic_id: u8) {
        self.entry(ENTRY_IO_APIC, [apic_id, IO_APIC_VERSION, IO_APIC_ENABLED]);
        self.bytes.extend((IO_APIC as u32).to_le_bytes());
    }

    /// I/O and local interrupts have the same fields (sections 4.3.4 and 4.3.5).
    fn interrupt(
        &mut self,
        entry_type: u8,
        kind: u8,
        flags: u16,
        isa_interrupt: u8,
        (apic_id, pin): (u8, u8),
    ) {
        let [flags_low, flags_high] = flags.to_le_bytes();
        self.entry(
            entry_type,
            [
                kind,
                flags_low,
                flags_high,
                ISA_BUS,
                isa_interrupt,
                apic_id,
                pin,
            ],
        );
    }

    fn entry<const N: usize>(&mut self, entry_type: u8, fields: [u8; N]) {
        self.count += 1;
        self.bytes.push(entry_type);
        self.bytes.extend(fields);
    }
}

/// Returns the byte that makes all of `bytes` add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use crate::layout::{CONVENTIONAL_MEMORY_END, MAX_VCPUS, MP_TABLE_MAX_SIZE};
    use vm_memory::{Bytes, GuestAddress};

    /// The KiB that holds the table, followed by the bytes after it.
    fn written(vcpu_count: u8, gsis: &[u32]) -> (Vec<u8>, Vec<u8>) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        write_mp_table(&memory, vcpu_count, gsis).unwrap();
        let read = |address, size| {
            let mut bytes = vec![0; size];
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            bytes
        };
        (
            read(MP_TABLE, MP_TABLE_MAX_SIZE),
            read(CONVENTIONAL_MEMORY_END, 256),
        )
    }

    fn u16_at(bytes: &[u8], at: usize) -> u16 {
        u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn entries(table: &[u8]) -> Vec<&[u8]> {
        let mut rest = &table[44..];
        let mut entries = Vec::new();
        while let Some(&kind) = rest.first() {
            let (entry, after) = rest.split_at(if kind == 0 { 20 } else { 8 });
            entries.push(entry);
            rest = after;
        }
        entries
    }

    #[test]
    fn every_vcpu_count_gives_a_valid_table_in_its_kib() {
        let all: Vec<u32> = (0..IO_APIC_PIN_COUNT).collect();
        for vcpu_count in 1..=MAX_VCPUS {
            let (area, after) = written(vcpu_count, &all);
            assert!(after.iter().all(|&byte| byte == 0));

            let pointer = &area[..16];
            assert_eq!(&pointer[..4], b"_MP_");
            assert_eq!(u32_at(pointer, 4), 0x9_fc10);
            assert_eq!((pointer[8], pointer[9]), (1, 4));
            assert_eq!(checksum(pointer), 0);

            let length = usize::from(u16_at(&area, 16 + 4));
            let table = &area[16..16 + length];
            assert_eq!(&table[..4], b"PCMP");
            assert_eq!(checksum(table), 0);
            assert_eq!(u32_at(table, 36), 0xfee0_0000);
            let entries = entries(table);
            assert_eq!(usize::from(u16_at(table, 34)), entries.len());
            assert!(entries.is_sorted_by_key(|entry| entry[0]));
        }
    }

    #[test]
    fn entries_describe_processors_and_interrupts() {
        let (area, _) = written(3, &[4, 6, 23, 99]);
        let length = usize::from(u16_at(&area, 20));
        let entries = entries(&area[16..16 + length]);
        let of_type = |kind: u8| {
            entries
                .iter()
                .copied()
                .filter(move |entry| entry[0] == kind)
        };

        let processors: Vec<_> = of_type(0).map(|entry| (entry[1], entry[3])).collect();
        assert_eq!(processors, [(0, 3), (1, 1), (2, 1)]);
        assert_eq!(of_type(1).collect::<Vec<_>>(), [b"\x01\x00ISA   "]);
        let io_apic = of_type(2).next().unwrap();
        assert_eq!((io_apic[1], io_apic[3]), (3, 1));
        assert_eq!(u32_at(io_apic, 4), 0xfec0_0000);

        let interrupts: Vec<_> = of_type(3).collect();
        assert_eq!(
            interrupts,
            [0, 4, 6, 23].map(|pin| [3, 0, 0b0101, 0, 0, pin, 3, pin])
        );
        assert_eq!(
            of_type(4).collect::<Vec<_>>(),
            [[4, 3, 0, 0, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0xff, 1]]
        );
    }

    #[test]
    fn vcpus_it_cannot_hold_are_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        for count in [0, MAX_VCPUS + 1, u8::MAX] {
            let error = write_mp_table(&memory, count, &[]).unwrap_err();
            assert!(matches!(error, Error::VcpuCount { .. }));
        }
    }
}
