use std::fs::File;
use std::os::unix::net::UnixStream;

use bantam_arch::{EntryProtocol, layout};
use bantam_memory::GuestMemory;
use linux_loader::elf::{EM_386, EM_AARCH64, ET_REL, PT_INTERP};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::test_images::{MIB, TestBzImage, TestElf, compress, file, memory, note};

const COMPRESSIONS: [Compression; 7] = [
    Compression::Gzip,
    Compression::Bzip2,
    Compression::Lzma,
    Compression::Xz,
    Compression::Lzo,
    Compression::Lz4,
    Compression::Zstd,
];

fn load(image: &[u8], wanted: BootProtocol) -> Result<LoadedKernel, KernelError> {
    load_kernel(&memory(16 * MIB), &mut file(image), wanted)
}

fn error_of(image: &[u8]) -> String {
    load(image, BootProtocol::Auto).unwrap_err().to_string()
}

fn bytes_at(memory: &GuestMemory, address: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn assert_holds_test_elf(memory: &GuestMemory) {
    let elf = TestElf::without_pvh();
    let loaded = bytes_at(memory, elf.address, elf.memory_size as usize);
    let (code, bss) = loaded.split_at(elf.code.len());
    assert!(code == elf.code, "the code differs");
    assert!(bss.iter().all(|byte| *byte == 0));
}

#[test]
fn elf_is_entered_by_pvh_when_it_can_be() {
    let image = TestElf::with_pvh().build();
    let guest = memory(16 * MIB);
    let kernel = load_kernel(&guest, &mut file(&image), BootProtocol::Auto).unwrap();
    assert_holds_test_elf(&guest);
    assert_eq!(
        kernel,
        LoadedKernel {
            entry: GuestAddress(TestElf::PVH_ENTRY),
            protocol: EntryProtocol::Pvh,
            start: GuestAddress(TestElf::ADDRESS),
            end: GuestAddress(TestElf::ADDRESS + TestElf::MEMORY_SIZE),
            setup_header: None,
            format: KernelFormat::Elf,
        }
    );
    assert_eq!(load(&image, BootProtocol::Pvh).unwrap(), kernel);
}

#[test]
fn a_kernel_with_the_acpi_id_of_virtio_mmio_is_known() {
    let guest = memory(16 * MIB);
    let kernel = LoadedKernel {
        start: GuestAddress(MIB + 3),
        end: GuestAddress(MIB + 3 + 2 * SEARCH_CHUNK_SIZE as u64),
        ..load(&TestElf::with_pvh().build(), BootProtocol::Auto).unwrap()
    };
    let last = kernel.end.0 - VIRTIO_MMIO_ACPI_ID.len() as u64;
    let across_chunks = kernel.start.0 + SEARCH_CHUNK_SIZE as u64 - 1;
    for address in [kernel.start.0, across_chunks, last] {
        assert!(!kernel.finds_virtio_mmio_by_acpi(&guest).unwrap());
        let id = GuestAddress(address);
        guest.write_slice(VIRTIO_MMIO_ACPI_ID, id).unwrap();
        assert!(kernel.finds_virtio_mmio_by_acpi(&guest).unwrap());
        guest
            .write_slice(&[0; VIRTIO_MMIO_ACPI_ID.len()], id)
            .unwrap();
    }
    guest
        .write_slice(VIRTIO_MMIO_ACPI_ID, GuestAddress(last + 1))
        .unwrap();
    assert!(!kernel.finds_virtio_mmio_by_acpi(&guest).unwrap());
}

#[test]
fn elf_is_entered_in_64_bit_mode_when_asked_or_when_it_must_be() {
    for (elf, wanted) in [
        (TestElf::with_pvh(), BootProtocol::Linux64),
        (TestElf::without_pvh(), BootProtocol::Auto),
    ] {
        let kernel = load(&elf.build(), wanted).unwrap();
        assert_eq!(kernel.protocol, EntryProtocol::Linux64);
        assert_eq!(kernel.entry, GuestAddress(elf.entry));
    }
}

#[test]
fn linux_is_entered_in_64_bit_mode_unless_pvh_is_asked_for() {
    let mut elf = TestElf::with_pvh();
    elf.notes.extend(note(b"Linux\0", 0x101, &[0; 4]));
    let image = elf.build();
    let protocol = |wanted| load(&image, wanted).unwrap().protocol;
    assert_eq!(protocol(BootProtocol::Auto), EntryProtocol::Linux64);
    assert_eq!(protocol(BootProtocol::Linux64), EntryProtocol::Linux64);
    assert_eq!(protocol(BootProtocol::Pvh), EntryProtocol::Pvh);
}

#[test]
fn pvh_is_an_error_without_the_note() {
    let error = load(&TestElf::without_pvh().build(), BootProtocol::Pvh).unwrap_err();
    assert!(error.to_string().contains("CONFIG_PVH=y"), "{error}");
}

#[test]
fn pvh_note_is_found_in_every_form() {
    let address = TestElf::PVH_ENTRY.to_le_bytes();
    let mut elf = TestElf::without_pvh();
    elf.notes = note(b"GNU\0", 18, b"not this");
    elf.notes.extend(note(b"Xenon\0", 18, b"not this"));
    elf.notes.extend(note(b"Xen\0", 18, &address));
    let kernel = load(&elf.build(), BootProtocol::Pvh).unwrap();
    assert_eq!(kernel.entry, GuestAddress(TestElf::PVH_ENTRY));

    elf.notes_alignment = 8;
    elf.notes = note(b"Xen\0", 18, &address);
    assert!(load(&elf.build(), BootProtocol::Pvh).is_ok());
}

#[test]
fn damaged_notes_are_refused() {
    let mut elf = TestElf::without_pvh();
    for (notes, text) in [
        (note(b"Xen\0", 18, &[0; 2]), "no 32-bit entry point"),
        (note(b"Xen\0", 18, &[0xff; 8]), "no 32-bit entry point"),
        (vec![0xff; 40], "a note runs past its segment"),
        (vec![1; 5], "a note runs past its segment"),
        (vec![0; (1 << 20) + 1], "exceeds 1 MiB"),
    ] {
        elf.notes = notes;
        let error = error_of(&elf.build());
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn bzimage_of_each_compression_is_unpacked() {
    for compression in COMPRESSIONS {
        let elf = TestElf::with_pvh().build();
        let image = TestBzImage::new(compress(compression, &elf));
        let guest = memory(16 * MIB);
        let kernel = load_kernel(&guest, &mut file(&image.build()), BootProtocol::Auto).unwrap();
        assert_holds_test_elf(&guest);
        assert_eq!(kernel.format, KernelFormat::BzImage(compression));
        assert_eq!(kernel.protocol, EntryProtocol::Pvh);

        let kernel = load(&image.build(), BootProtocol::Linux64).unwrap();
        assert_eq!(kernel.entry, GuestAddress(TestElf::with_pvh().entry));
        let init_size = kernel.setup_header.unwrap().init_size;
        assert_eq!(init_size, TestBzImage::INIT_SIZE);
    }
}

#[test]
fn lz4_payload_of_several_blocks_is_unpacked() {
    let mut elf = TestElf::without_pvh();
    elf.code = (0..9 * MIB).map(|index| (index >> 10) as u8).collect();
    elf.memory_size = elf.code.len() as u64;
    let image = TestBzImage::new(compress(Compression::Lz4, &elf.build()));
    let guest = memory(32 * MIB);
    load_kernel(&guest, &mut file(&image.build()), BootProtocol::Auto).unwrap();
    assert!(bytes_at(&guest, elf.address, elf.code.len()) == elf.code);
}

fn assert_self_extracting(image: &TestBzImage) {
    let guest = memory(16 * MIB);
    let kernel = load_kernel(&guest, &mut file(&image.build()), BootProtocol::Auto).unwrap();
    let code = image.protected_mode_code();
    assert_eq!(kernel.format, KernelFormat::SelfExtractingBzImage);
    assert_eq!(kernel.protocol, EntryProtocol::Linux64);
    let address = TestBzImage::PREFERRED_ADDRESS;
    assert_eq!(kernel.entry, GuestAddress(address + 0x200));
    let init_size = u64::from(TestBzImage::INIT_SIZE);
    assert_eq!(kernel.end, GuestAddress(address + init_size));
    assert!(bytes_at(&guest, address, code.len()) == code);

    let error = load(&image.build(), BootProtocol::Pvh).unwrap_err();
    assert!(
        matches!(error, KernelError::NoPvhEntryInBzImage(_)),
        "{error}"
    );
}

#[test]
fn bzimage_decompresses_itself_if_the_monitor_cannot() {
    let elf = TestElf::with_pvh();
    for compression in COMPRESSIONS {
        let payload = compress(compression, &elf.build());

        let mut damaged = payload.clone();
        let middle = damaged.len() / 2;
        damaged.drain(middle..middle + 64);
        assert_self_extracting(&TestBzImage::new(damaged));

        let mut wrong_size = payload.clone();
        *wrong_size.iter_mut().nth_back(3).unwrap() ^= 1;
        assert_self_extracting(&TestBzImage::new(wrong_size));

        let mut huge = payload;
        *huge.last_mut().unwrap() = 0xff;
        assert_self_extracting(&TestBzImage::new(huge));

        let no_elf = compress(compression, &[7; 5000]);
        assert_self_extracting(&TestBzImage::new(no_elf));
    }
    assert_self_extracting(&TestBzImage::new(b"unknown format".to_vec()));
    assert_self_extracting(&TestBzImage::new(Vec::new()));
}

#[test]
fn fixed_bzimage_is_loaded_where_it_says() {
    let mut image = TestBzImage::new(b"unknown format".to_vec());
    image.header.relocatable_kernel = 0;
    let kernel = load(&image.build(), BootProtocol::Auto).unwrap();
    assert_eq!(kernel.entry, GuestAddress(MIB + 0x200));
    let end = TestBzImage::PREFERRED_ADDRESS + u64::from(TestBzImage::INIT_SIZE);
    assert_eq!(kernel.end, GuestAddress(end));
}

#[test]
fn bzimage_that_cannot_be_entered_is_refused() {
    let unknown = TestBzImage::new(b"unknown format".to_vec());

    let mut only_32_bit = unknown.clone();
    only_32_bit.header.xloadflags = 0;
    let error = error_of(&only_32_bit.build());
    assert!(error.contains("without a 64-bit entry point"), "{error}");

    let mut elf = TestElf::without_pvh();
    elf.is_32_bit = true;
    elf.machine = EM_386;
    only_32_bit = TestBzImage::new(compress(Compression::Gzip, &elf.build()));
    only_32_bit.header.xloadflags = 0;
    let error = error_of(&only_32_bit.build());
    assert!(error.contains("32-bit x86 (i386)"), "{error}");

    let mut old = unknown.clone();
    old.header.version = 0x0207;
    let error = error_of(&old.build());
    assert!(error.contains("boot protocol 2.07"), "{error}");

    let mut low = unknown.clone();
    low.header.loadflags = 0;
    let error = error_of(&low.build());
    assert!(error.contains("below 1 MiB"), "{error}");

    let mut low = unknown.clone();
    low.header.pref_address = 0x9000;
    assert!(matches!(
        load(&low.build(), BootProtocol::Auto),
        Err(KernelError::BelowHighMemory { address: 0x9000 })
    ));

    let mut greedy = unknown;
    greedy.header.init_size = 100 << 20;
    assert_eq!(
        error_of(&greedy.build()),
        "it needs at least 104 MiB of guest memory, but the machine has 16 MiB: give it more"
    );
}

#[test]
fn bytes_after_an_old_setup_header_are_not_taken_for_fields() {
    let mut image = TestBzImage::new(compress(Compression::Gzip, &TestElf::with_pvh().build()));
    image.header.version = 0x0209;
    // The header of 2.09 ends before `pref_address`, at 0x258.
    image.jump_distance = 0x56;
    let header = load(&image.build(), BootProtocol::Auto)
        .unwrap()
        .setup_header
        .unwrap();
    let (pref_address, payload_length) = (header.pref_address, header.payload_length);
    assert_eq!(pref_address, 0);
    assert_eq!(payload_length, image.payload.len() as u32);
}

#[test]
fn files_that_are_not_kernels_are_named() {
    for (image, text) in [
        (&b""[..], "the file is empty"),
        (
            b"#!/bin/sh\nexit\n",
            "it is a text file, not a Linux kernel",
        ),
        (b"\x1f\x8b\x08\0\0\0", "a gzip-compressed file"),
        (b"MZ\x90\0", "an EFI program"),
        (&[0; 4096], "a file that starts with zeros"),
        (&[0x80, 3, 7], "a file of unknown format"),
    ] {
        let error = error_of(image);
        assert!(error.contains(text), "{error}");
    }
    let mut directory = File::open("/").unwrap();
    let error = load_kernel(&memory(MIB), &mut directory, BootProtocol::Auto).unwrap_err();
    assert_eq!(error.to_string(), "it is a directory, not a file");

    let (socket, _peer) = UnixStream::pair().unwrap();
    let mut socket = File::from(std::os::fd::OwnedFd::from(socket));
    let error = load_kernel(&memory(MIB), &mut socket, BootProtocol::Auto).unwrap_err();
    assert!(
        error.to_string().contains("pipe, socket or device"),
        "{error}"
    );
}

#[test]
fn elf_files_that_are_not_kernels_are_named() {
    let kernel = TestElf::without_pvh();
    let mut elf = kernel.clone();
    elf.machine = EM_AARCH64;
    let error = error_of(&elf.build());
    assert!(error.contains("64-bit Arm (aarch64)"), "{error}");

    elf.machine = EM_386;
    elf.is_32_bit = true;
    let error = error_of(&elf.build());
    assert!(error.contains("32-bit x86 (i386)"), "{error}");

    elf = kernel.clone();
    elf.data_encoding = 2;
    let error = error_of(&elf.build());
    assert!(error.contains("a big-endian machine"), "{error}");

    elf = kernel.clone();
    elf.elf_type = ET_REL;
    let error = error_of(&elf.build());
    assert!(error.contains("an object file"), "{error}");

    elf = kernel.clone();
    elf.segment_type = PT_INTERP;
    let error = error_of(&elf.build());
    assert!(error.contains("a dynamically linked program"), "{error}");

    elf = kernel;
    elf.segment_type = 0;
    let error = error_of(&elf.build());
    assert!(error.contains("no segment to load"), "{error}");
}

#[test]
fn elf_that_does_not_fit_is_refused_before_anything_is_written() {
    let kernel = TestElf::without_pvh();
    let place = |address: u64, memory_size: u64| {
        let mut elf = kernel.clone();
        elf.address = address;
        elf.entry = address;
        elf.memory_size = memory_size;
        let guest = memory(16 * MIB);
        let error = load_kernel(&guest, &mut file(&elf.build()), BootProtocol::Auto).unwrap_err();
        assert!(bytes_at(&guest, 0, 16 << 20).iter().all(|byte| *byte == 0));
        error
    };
    assert!(matches!(
        place(layout::COMMAND_LINE, 0x8000),
        KernelError::BelowHighMemory {
            address: layout::COMMAND_LINE
        }
    ));
    assert!(matches!(
        place(layout::DEVICE_HOLE - 0x1000, 0x8000),
        KernelError::InDeviceHole { .. }
    ));
    assert!(matches!(
        place(u64::MAX - 0x9000, 0x9000),
        KernelError::InDeviceHole { .. }
    ));
    assert!(matches!(
        place(MIB, u64::MAX),
        KernelError::InDeviceHole { .. }
    ));
    assert_eq!(
        place(15 * MIB, 2 * MIB).to_string(),
        "it needs at least 17 MiB of guest memory, but the machine has 16 MiB: give it more"
    );
    assert!(matches!(
        place(2 * MIB, 0x100),
        KernelError::MalformedElf(_)
    ));
}

#[test]
fn entry_points_outside_the_image_are_refused() {
    let mut elf = TestElf::with_pvh();
    elf.entry = TestElf::ADDRESS + elf.code.len() as u64;
    assert!(matches!(
        load(&elf.build(), BootProtocol::Linux64),
        Err(KernelError::EntryOutsideImage {
            protocol: EntryProtocol::Linux64,
            ..
        })
    ));
    assert!(load(&elf.build(), BootProtocol::Pvh).is_ok());
    elf.entry = TestElf::ADDRESS - 1;
    assert!(load(&elf.build(), BootProtocol::Linux64).is_err());
}

#[test]
fn images_cut_short_anywhere_are_refused() {
    let elf = TestElf::with_pvh().build();
    let bzimage = TestBzImage::new(compress(Compression::Zstd, &elf)).build();
    for image in [&elf, &bzimage] {
        for length in (0..image.len()).filter(|length| *length < 1024 || length % 97 == 0) {
            let error = load(&image[..length], BootProtocol::Auto).unwrap_err();
            let message = error.to_string();
            assert!(
                length < 0x206 || message.contains("cut short"),
                "{length}: {error}"
            );
        }
        assert!(load(&image[..image.len() - 1], BootProtocol::Auto).is_err());
    }
}

/// Whatever an image contains, it must stay between the boot structures and its end.
fn assert_within_bounds(image: &[u8], wanted: BootProtocol) {
    let guest = memory(8 * MIB);
    let end = match load_kernel(&guest, &mut file(image), wanted) {
        Ok(kernel) => {
            assert!(kernel.entry.0 >= layout::HIGH_MEMORY && kernel.entry < kernel.end);
            assert!(kernel.end.0 <= 8 * MIB);
            kernel.end.0
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "{error}");
            8 * MIB
        }
    };
    for range in [0..layout::HIGH_MEMORY, end..8 * MIB] {
        let outside = bytes_at(&guest, range.start, (range.end - range.start) as usize);
        assert!(outside.iter().all(|byte| *byte == 0));
    }
}

fn any_wanted() -> impl Strategy<Value = BootProtocol> {
    prop_oneof![
        Just(BootProtocol::Auto),
        Just(BootProtocol::Pvh),
        Just(BootProtocol::Linux64)
    ]
}

fn any_image() -> impl Strategy<Value = Vec<u8>> {
    let elf = TestElf::with_pvh().build();
    let bzimages =
        COMPRESSIONS.map(|compression| TestBzImage::new(compress(compression, &elf)).build());
    prop_oneof![Just(elf), prop::sample::select(bzimages.to_vec())]
}

/// Offsets of ELF and program headers, notes and the setup header, or any offset.
fn any_offset() -> impl Strategy<Value = usize> {
    prop_oneof![
        0..0x100_usize,
        0x1f1..0x26c_usize,
        0x800..0xb80_usize,
        any::<usize>()
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn arbitrary_files_are_harmless(
        magic in prop::sample::select(vec![&b""[..], b"\x7fELF", b"\x7fELF\x02\x01\x01"]),
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let mut image = magic.to_vec();
        image.extend(bytes);
        assert_within_bounds(&image, BootProtocol::Auto);
    }

    #[test]
    fn mutated_images_are_harmless(
        mut image in any_image(),
        wanted in any_wanted(),
        bytes in prop::collection::vec((any_offset(), any::<u8>()), 0..6),
        words in prop::collection::vec((any_offset(), any::<u64>()), 0..2),
        length in prop::option::of(any::<prop::sample::Index>()),
    ) {
        for (offset, byte) in bytes {
            let offset = offset % image.len();
            image[offset] = byte;
        }
        for (offset, word) in words {
            let offset = offset % (image.len() - 8);
            image[offset..offset + 8].copy_from_slice(&word.to_le_bytes());
        }
        if let Some(length) = length {
            image.truncate(length.index(image.len()));
        }
        assert_within_bounds(&image, wanted);
    }

    #[test]
    fn arbitrary_payloads_are_harmless(
        compression in prop::sample::select(COMPRESSIONS.to_vec()),
        kept in 0..60_usize,
        bytes in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut payload = compress(compression, &TestElf::with_pvh().build());
        payload.truncate(kept);
        payload.extend(bytes);
        payload.extend(5000_u32.to_le_bytes());
        if let Ok((_, output)) = payload::decompress(&payload, 1 << 16) {
            prop_assert_eq!(output.len(), 5000);
        }
    }
}
