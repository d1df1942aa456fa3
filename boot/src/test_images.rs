//! Kernel images made for tests.

use std::fs::File;
use std::io::{Read, Write};

use bantam_arch::EntryProtocol;
use bantam_memory::GuestMemory;
use linux_loader::elf::{EM_X86_64, ET_EXEC, PT_LOAD, PT_NOTE};
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use crate::kernel::{Compression, KernelFormat, LoadedKernel};

pub(crate) const MIB: u64 = 1 << 20;

/// Makes guest memory of `size` bytes from address zero.
pub(crate) fn memory(size: u64) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), size as usize)]).unwrap()
}

/// Returns an open file that holds `bytes`.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// Returns a kernel that occupies memory up to `end`.
pub(crate) fn loaded_kernel(end: u64, setup_header: Option<setup_header>) -> LoadedKernel {
    LoadedKernel {
        entry: GuestAddress(MIB),
        protocol: EntryProtocol::Linux64,
        start: GuestAddress(MIB),
        end: GuestAddress(end),
        setup_header,
        format: KernelFormat::Elf,
    }
}

/// A vmlinux with one segment of code and `.bss`, and a note segment.
#[derive(Clone)]
pub(crate) struct TestElf {
    pub is_32_bit: bool,
    pub data_encoding: u8,
    pub machine: u16,
    pub elf_type: u16,
    pub segment_type: u32,
    pub address: u64,
    pub code: Vec<u8>,
    pub memory_size: u64,
    pub entry: u64,
    pub notes: Vec<u8>,
    pub notes_alignment: u64,
}

impl TestElf {
    pub const ADDRESS: u64 = 2 * MIB;
    pub const PVH_ENTRY: u64 = Self::ADDRESS + 0x40;
    pub const MEMORY_SIZE: u64 = 0x8000;

    pub fn without_pvh() -> Self {
        Self {
            is_32_bit: false,
            data_encoding: 1,
            machine: EM_X86_64,
            elf_type: ET_EXEC,
            segment_type: PT_LOAD,
            address: Self::ADDRESS,
            code: (0..20_000_u32).map(|index| (index / 7) as u8 | 1).collect(),
            memory_size: Self::MEMORY_SIZE,
            entry: Self::ADDRESS + 0x10,
            notes: note(b"Xen\0", 6, b"linux\0"),
            notes_alignment: 4,
        }
    }

    pub fn with_pvh() -> Self {
        let mut elf = Self::without_pvh();
        elf.notes
            .extend(note(b"Xen\0", 18, &(Self::PVH_ENTRY as u32).to_le_bytes()));
        elf
    }

    pub fn build(&self) -> Vec<u8> {
        const HEADERS_SIZE: u64 = 64 + 2 * 56;
        let notes_offset = HEADERS_SIZE;
        let code_offset = (notes_offset + self.notes.len() as u64).next_multiple_of(16);

        let mut image = b"\x7fELF".to_vec();
        image.extend([if self.is_32_bit { 1 } else { 2 }, self.data_encoding, 1]);
        image.resize(16, 0);
        image.extend(self.elf_type.to_le_bytes());
        image.extend(self.machine.to_le_bytes());
        image.extend(1_u32.to_le_bytes());
        for address in [self.entry, 64, 0] {
            image.extend(address.to_le_bytes());
        }
        image.extend(0_u32.to_le_bytes());
        for number in [64_u16, 56, 2, 64, 0, 0] {
            image.extend(number.to_le_bytes());
        }

        let notes_size = self.notes.len() as u64;
        let notes = [
            notes_offset,
            0,
            0,
            notes_size,
            notes_size,
            self.notes_alignment,
        ];
        let code_size = self.code.len() as u64;
        let code = [
            code_offset,
            self.address | 0xffff_ffff_8000_0000,
            self.address,
            code_size,
            self.memory_size,
            0x1000,
        ];
        for (segment_type, fields) in [(self.segment_type, code), (PT_NOTE, notes)] {
            image.extend(segment_type.to_le_bytes());
            image.extend(7_u32.to_le_bytes());
            for field in fields {
                image.extend(field.to_le_bytes());
            }
        }
        image.extend(&self.notes);
        image.resize(code_offset as usize, 0);
        image.extend(&self.code);
        image
    }
}

/// One ELF note.
pub(crate) fn note(name: &[u8], note_type: u32, descriptor: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32, descriptor.len() as u32, note_type] {
        note.extend(word.to_le_bytes());
    }
    for field in [name, descriptor] {
        note.extend(field);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// A bzImage: the setup header, and protected-mode code that holds the payload.
#[derive(Clone)]
pub(crate) struct TestBzImage {
    pub header: setup_header,
    pub payload: Vec<u8>,
    /// Operand of the jump over the setup header.
    pub jump_distance: u8,
}

impl TestBzImage {
    pub const PREFERRED_ADDRESS: u64 = 4 * MIB;
    pub const INIT_SIZE: u32 = MIB as u32;
    /// Setup sectors, without the boot sector.
    const SETUP_SECTORS: u8 = 3;
    pub const PROTECTED_MODE_OFFSET: usize = (Self::SETUP_SECTORS as usize + 1) * 512;
    const PAYLOAD_OFFSET: usize = 0x300;

    pub fn new(payload: Vec<u8>) -> Self {
        Self {
            header: setup_header {
                setup_sects: Self::SETUP_SECTORS,
                boot_flag: 0xaa55,
                header: u32::from_le_bytes(*b"HdrS"),
                version: 0x020f,
                loadflags: LOADED_HIGH,
                code32_start: MIB as u32,
                initrd_addr_max: 0x7fff_ffff,
                relocatable_kernel: 1,
                xloadflags: XLF_KERNEL_64,
                cmdline_size: 2047,
                payload_offset: Self::PAYLOAD_OFFSET as u32,
                payload_length: payload.len() as u32,
                pref_address: Self::PREFERRED_ADDRESS,
                init_size: Self::INIT_SIZE,
                ..Default::default()
            },
            payload,
            jump_distance: 0x6a,
        }
    }

    /// The bytes from the start of the protected-mode code on.
    pub fn protected_mode_code(&self) -> Vec<u8> {
        let mut code: Vec<u8> = (0..Self::PAYLOAD_OFFSET).map(|byte| byte as u8).collect();
        code.extend(&self.payload);
        code.resize(code.len().next_multiple_of(16), 0);
        code
    }

    pub fn build(&self) -> Vec<u8> {
        let code = self.protected_mode_code();
        let mut header = self.header;
        header.syssize = (code.len() / 16) as u32;
        header.jump = 0xeb | u16::from(self.jump_distance) << 8;

        let mut image = vec![0; 0x1f1];
        image.extend(header.as_slice());
        image.resize(Self::PROTECTED_MODE_OFFSET, 0xcc);
        image.extend(code);
        image
    }
}

/// Compresses `data` as the kernel build does, with the size appended.
pub(crate) fn compress(compression: Compression, data: &[u8]) -> Vec<u8> {
    use liblzma::bufread::XzEncoder;
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};

    fn read_all(mut encoder: impl Read) -> Vec<u8> {
        let mut compressed = Vec::new();
        encoder.read_to_end(&mut compressed).unwrap();
        compressed
    }

    let options = LzmaOptions::new_preset(6).unwrap();
    let mut compressed = match compression {
        Compression::Gzip => {
            return read_all(flate2::bufread::GzEncoder::new(
                data,
                flate2::Compression::best(),
            ));
        }
        Compression::Bzip2 => read_all(bzip2::bufread::BzEncoder::new(
            data,
            bzip2::Compression::best(),
        )),
        Compression::Lzma => read_all(XzEncoder::new_stream(
            data,
            Stream::new_lzma_encoder(&options).unwrap(),
        )),
        Compression::Xz => {
            let mut filters = Filters::new();
            filters.x86().lzma2(&options);
            let stream = Stream::new_stream_encoder(&filters, Check::Crc32).unwrap();
            read_all(XzEncoder::new_stream(data, stream))
        }
        Compression::Lzo => lzop(data),
        Compression::Lz4 => {
            let mut compressed = 0x184c_2102_u32.to_le_bytes().to_vec();
            for block in data.chunks(8 << 20) {
                let block = lz4_flex::block::compress(block);
                compressed.extend((block.len() as u32).to_le_bytes());
                compressed.extend(block);
            }
            compressed
        }
        Compression::Zstd => zstd::bulk::compress(data, 19).unwrap(),
    };
    compressed.extend((data.len() as u32).to_le_bytes());
    compressed
}

/// Compresses `data` as `lzop -9` does, with all checksums zero.
fn lzop(data: &[u8]) -> Vec<u8> {
    const FLAGS: u32 = 0x0300_0001;
    let mut file = b"\x89LZO\0\r\n\x1a\n".to_vec();
    file.extend([0x10, 0x40, 0x20, 0xa0, 0x09, 0x40, 3, 9]);
    for word in [FLAGS, 0o100_644, 0, 0] {
        file.extend(word.to_be_bytes());
    }
    file.extend([1, b'v', 0, 0, 0, 0]);
    for block in data.chunks(256 << 10) {
        let compressed = lzokay_native::compress(block).unwrap();
        let stored = if compressed.len() < block.len() {
            &compressed
        } else {
            block
        };
        for word in [block.len() as u32, stored.len() as u32, 0] {
            file.extend(word.to_be_bytes());
        }
        file.extend(stored);
    }
    file.extend([0; 4]);
    file
}
