//! ELF kernels: vmlinux, and anything else for x86-64 with fixed physical addresses.

use std::io::{Read, Seek, SeekFrom};

use bantam_arch::EntryProtocol;
use bantam_memory::GuestMemory;
use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS32, ELFDATA2LSB, EM_386, EM_AARCH64, EM_ARM, EM_LOONGARCH, EM_MIPS,
    EM_PPC64, EM_RISCV, EM_S390, EM_X86_64, ET_CORE, ET_DYN, ET_EXEC, ET_REL, Elf64_Ehdr,
    Elf64_Nhdr, Elf64_Phdr, PT_INTERP, PT_LOAD, PT_NOTE,
};
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestAddress, ReadVolatile};

use super::{BootProtocol, KernelError, KernelFormat, LoadedKernel, placement, seek_within};

/// First bytes of every ELF file.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// Note that holds the 32-bit PVH entry point (Xen public/elfnote.h, `PHYS32_ENTRY`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Owner of the notes by which Linux identifies itself (include/linux/build-salt.h), since 4.19.
const LINUX_NOTE_OWNER: &[u8] = b"Linux\0";

/// Size of the part of the ELF header that is the same in 32-bit and 64-bit files and says which
/// it is.
const COMMON_HEADER_SIZE: usize = 20;

/// Most bytes of notes that are read from one segment; a kernel has less than one KiB.
const MAX_NOTES_SIZE: u64 = 1 << 20;

/// Most program headers accepted; a kernel has about five.
const MAX_PROGRAM_HEADERS: u16 = 128;

/// A part of the image that is loaded into guest memory.
struct Segment {
    file_offset: u64,
    file_size: u64,
    address: u64,
    memory_size: u64,
}

/// The content of an ELF kernel's headers.
pub(super) struct ElfKernel {
    segments: Vec<Segment>,
    linux64_entry: u64,
    notes: Notes,
}

/// The content of an ELF kernel's notes.
#[derive(Default)]
struct Notes {
    pvh_entry: Option<u64>,
    is_linux: bool,
}

impl ElfKernel {
    /// Reads and checks the headers and notes of `image`, which has `length` bytes.
    pub(super) fn parse(image: &mut (impl Read + Seek), length: u64) -> Result<Self, KernelError> {
        let header = read_header(image, length)?;
        let mut kernel = Self {
            segments: Vec::new(),
            linux64_entry: header.e_entry,
            notes: Notes::default(),
        };
        for program_header in read_program_headers(image, length, &header)? {
            let (offset, size) = (program_header.p_offset, program_header.p_filesz);
            match program_header.p_type {
                PT_LOAD if program_header.p_memsz > 0 => {
                    if size > program_header.p_memsz {
                        return Err(KernelError::MalformedElf(
                            "a segment is larger in the file than in memory",
                        ));
                    }
                    seek_within(image, length, "a segment", offset, size)?;
                    kernel.segments.push(Segment {
                        file_offset: offset,
                        file_size: size,
                        address: program_header.p_paddr,
                        memory_size: program_header.p_memsz,
                    });
                }
                PT_NOTE => {
                    seek_within(image, length, "the note segment", offset, size)?;
                    if size > MAX_NOTES_SIZE {
                        return Err(KernelError::MalformedElf("a note segment exceeds 1 MiB"));
                    }
                    let mut notes = vec![0; size as usize];
                    image.read_exact(&mut notes)?;
                    kernel.notes.read(&notes, program_header.p_align)?;
                }
                PT_INTERP => {
                    return Err(KernelError::NotExecutableImage {
                        found: "a dynamically linked program",
                    });
                }
                _ => {}
            }
        }
        if kernel.segments.is_empty() {
            return Err(KernelError::MalformedElf("it has no segment to load"));
        }
        Ok(kernel)
    }

    /// Loads the segments of `image`, the file that was parsed, into `memory`.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        image: &mut (impl Read + Seek + ReadVolatile),
        wanted: BootProtocol,
        format: KernelFormat,
        setup_header: Option<setup_header>,
    ) -> Result<LoadedKernel, KernelError> {
        let preferred = match wanted {
            BootProtocol::Auto if self.notes.is_linux => BootProtocol::Linux64,
            _ => wanted,
        };
        let (protocol, entry) = match (preferred, self.notes.pvh_entry) {
            (BootProtocol::Auto | BootProtocol::Pvh, Some(entry)) => (EntryProtocol::Pvh, entry),
            (BootProtocol::Pvh, None) => return Err(KernelError::NoPvhEntry),
            (BootProtocol::Auto, None) | (BootProtocol::Linux64, _) => {
                (EntryProtocol::Linux64, self.linux64_entry)
            }
        };
        let holds_entry = |segment: &Segment| {
            entry
                .checked_sub(segment.address)
                .is_some_and(|offset| offset < segment.file_size)
        };
        if !self.segments.iter().any(holds_entry) {
            return Err(KernelError::EntryOutsideImage { protocol, entry });
        }

        // All segments are checked before the first is written.
        let (mut start, mut end) = (u64::MAX, 0);
        for segment in &self.segments {
            start = segment.address.min(start);
            end = placement::check_address(segment.address, segment.memory_size)?.max(end);
        }
        placement::check_memory(memory, end)?;
        for segment in &self.segments {
            image.seek(SeekFrom::Start(segment.file_offset))?;
            placement::read_into_memory(memory, segment.address, image, segment.file_size)?;
        }
        Ok(LoadedKernel {
            entry: GuestAddress(entry),
            protocol,
            start: GuestAddress(start),
            end: GuestAddress(end),
            setup_header,
            format,
        })
    }
}

fn read_header(image: &mut (impl Read + Seek), length: u64) -> Result<Elf64_Ehdr, KernelError> {
    const WHAT: &str = "the ELF header";
    seek_within(image, length, WHAT, 0, COMMON_HEADER_SIZE as u64)?;
    let mut common = [0; COMMON_HEADER_SIZE];
    image.read_exact(&mut common)?;
    if !common.starts_with(MAGIC) {
        return Err(KernelError::MalformedElf(
            "it does not start with the ELF magic",
        ));
    }
    let machine = u16::from_le_bytes([common[18], common[19]]);
    let is_32_bit = common[EI_CLASS] == ELFCLASS32;
    if common[EI_DATA] != ELFDATA2LSB || is_32_bit || machine != EM_X86_64 {
        return Err(KernelError::WrongMachine {
            machine: machine_name(common[EI_DATA] == ELFDATA2LSB, is_32_bit, machine),
        });
    }

    seek_within(image, length, WHAT, 0, size_of::<Elf64_Ehdr>() as u64)?;
    let mut header = Elf64_Ehdr::default();
    image.read_exact(header.as_mut_slice())?;
    match header.e_type {
        ET_EXEC | ET_DYN => Ok(header),
        ET_REL => Err(KernelError::NotExecutableImage {
            found: "an object file",
        }),
        ET_CORE => Err(KernelError::NotExecutableImage {
            found: "a core dump",
        }),
        _ => Err(KernelError::MalformedElf("its type is unknown")),
    }
}

fn read_program_headers(
    image: &mut (impl Read + Seek),
    length: u64,
    header: &Elf64_Ehdr,
) -> Result<Vec<Elf64_Phdr>, KernelError> {
    if header.e_phnum > 0 && usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(KernelError::MalformedElf(
            "its program headers are of unknown size",
        ));
    }
    if header.e_phnum > MAX_PROGRAM_HEADERS {
        return Err(KernelError::MalformedElf(
            "it has more than 128 program headers",
        ));
    }
    let size = u64::from(header.e_phnum) * size_of::<Elf64_Phdr>() as u64;
    seek_within(
        image,
        length,
        "the program header table",
        header.e_phoff,
        size,
    )?;
    (0..header.e_phnum)
        .map(|_| {
            let mut program_header = Elf64_Phdr::default();
            image.read_exact(program_header.as_mut_slice())?;
            Ok(program_header)
        })
        .collect()
}

fn machine_name(is_little_endian: bool, is_32_bit: bool, machine: u16) -> String {
    let name = match machine {
        _ if !is_little_endian => "a big-endian machine",
        EM_386 => "32-bit x86 (i386)",
        EM_X86_64 => "the x32 ABI of x86-64",
        EM_AARCH64 => "64-bit Arm (aarch64)",
        EM_ARM => "32-bit Arm",
        EM_RISCV if is_32_bit => "32-bit RISC-V",
        EM_RISCV => "64-bit RISC-V",
        EM_PPC64 => "64-bit PowerPC",
        EM_S390 => "s390",
        EM_MIPS => "MIPS",
        EM_LOONGARCH => "LoongArch",
        _ => return format!("machine number {machine}"),
    };
    name.to_owned()
}

impl Notes {
    /// Reads the notes of one segment, among them the PVH entry point (Xen docs/misc/pvh, "Entry
    /// point"). The first entry point counts.
    fn read(&mut self, notes: &[u8], segment_alignment: u64) -> Result<(), KernelError> {
        const MALFORMED: KernelError = KernelError::MalformedElf("a note runs past its segment");
        let alignment = if segment_alignment == 8 { 8 } else { 4 };
        let mut rest = notes;
        while !rest.is_empty() {
            let mut header = Elf64_Nhdr::default();
            let (bytes, after) = rest
                .split_at_checked(size_of::<Elf64_Nhdr>())
                .ok_or(MALFORMED)?;
            header.as_mut_slice().copy_from_slice(bytes);
            let name_size = header.n_namesz as usize;
            let descriptor_size = header.n_descsz as usize;

            let name = after.get(..name_size).ok_or(MALFORMED)?;
            // Padding is counted from the start of the note; the segment may end without the last.
            let header_and_name = size_of::<Elf64_Nhdr>() + name_size;
            let descriptor_start = header_and_name.next_multiple_of(alignment);
            let descriptor_end = descriptor_start + descriptor_size;
            let descriptor = rest
                .get(descriptor_start..descriptor_end)
                .ok_or(MALFORMED)?;

            if name == LINUX_NOTE_OWNER {
                self.is_linux = true;
            }
            if header.n_type == XEN_ELFNOTE_PHYS32_ENTRY
                && name == b"Xen\0"
                && self.pvh_entry.is_none()
            {
                // Linux wrote the address in eight bytes before it wrote it in four.
                self.pvh_entry = match *descriptor {
                    [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => {
                        Some(u32::from_le_bytes([a, b, c, d]).into())
                    }
                    _ => {
                        return Err(KernelError::MalformedElf(
                            "its PVH note holds no 32-bit entry point",
                        ));
                    }
                };
            }
            rest = rest
                .get(descriptor_end.next_multiple_of(alignment)..)
                .unwrap_or_default();
        }
        Ok(())
    }
}
