//! bzImage kernels (Linux Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{Cursor, Read};

use bantam_arch::EntryProtocol;
use bantam_memory::GuestMemory;
use linux_loader::loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::{ByteValued, GuestAddress};

use super::elf::ElfKernel;
use super::payload::{self, PayloadError};
use super::{BootProtocol, KernelError, KernelFormat, LoadedKernel, placement, seek_within};

/// Where the setup header starts in the file ("The Real-Mode Kernel Header").
const SETUP_HEADER_OFFSET: usize = 0x1f1;
/// Where `boot_flag` is in the file.
const BOOT_FLAG_OFFSET: usize = 0x1fe;
/// Where `header`, the magic "HdrS", is in the file. The byte before it is the operand of a jump
/// over the setup header, and so gives the end of that header.
const MAGIC_OFFSET: usize = 0x202;
/// The part of the file that holds the setup header.
pub(super) const HEAD_SIZE: usize = SETUP_HEADER_OFFSET + size_of::<setup_header>();

const SECTOR_SIZE: u64 = 512;
/// What `setup_sects` means when it is zero.
const DEFAULT_SETUP_SECTORS: u8 = 4;
/// `syssize` counts paragraphs of 16 bytes.
const PARAGRAPH_SIZE: u64 = 16;
/// First boot protocol with `payload_offset` and `payload_length`.
const VERSION_WITH_PAYLOAD: u16 = 0x0208;
/// First boot protocol with `xloadflags`.
const VERSION_WITH_XLOADFLAGS: u16 = 0x020c;
/// Offset of the 64-bit entry point from the load address of the protected-mode code.
const LINUX64_ENTRY_OFFSET: u64 = 0x200;

/// Returns whether `head`, the start of a file, is that of a bzImage.
pub(super) fn has_magic(head: &[u8]) -> bool {
    head.get(BOOT_FLAG_OFFSET..BOOT_FLAG_OFFSET + 2) == Some(b"\x55\xaa")
        && head.get(MAGIC_OFFSET..MAGIC_OFFSET + 4) == Some(b"HdrS")
}

/// The setup header of a bzImage.
pub(super) struct BzImage {
    header: setup_header,
    /// Length of the file in bytes.
    length: u64,
    /// Where the protected-mode code starts in the file; it extends to the end.
    protected_mode_offset: u64,
}

impl BzImage {
    /// Reads and checks the setup header in `head`, the first [`HEAD_SIZE`] bytes (or all) of a
    /// file of `length` bytes.
    pub(super) fn parse(head: &[u8], length: u64) -> Result<Self, KernelError> {
        let header = read_setup_header(head, length)?;
        let (version, loadflags) = (header.version, header.loadflags);
        if version < VERSION_WITH_PAYLOAD {
            return Err(KernelError::BzImageTooOld {
                major: version >> 8,
                minor: version & 0xff,
            });
        }
        if loadflags & LOADED_HIGH == 0 {
            return Err(KernelError::MalformedBzImage(
                "it wants to be loaded below 1 MiB, as a zImage",
            ));
        }
        let setup_sectors = match header.setup_sects {
            0 => DEFAULT_SETUP_SECTORS,
            sectors => sectors,
        };
        let protected_mode_offset = (u64::from(setup_sectors) + 1) * SECTOR_SIZE;
        let protected_mode_size = u64::from(header.syssize) * PARAGRAPH_SIZE;
        if protected_mode_size == 0 {
            return Err(KernelError::MalformedBzImage(
                "it has no protected-mode code",
            ));
        }
        let needed = protected_mode_offset + protected_mode_size;
        if needed > length {
            return Err(KernelError::Truncated {
                what: "the protected-mode code",
                needed,
                length,
            });
        }
        Ok(Self {
            header,
            length,
            protected_mode_offset,
        })
    }

    /// Loads the ELF inside or, if that fails, the bzImage itself.
    pub(super) fn load(
        &self,
        memory: &GuestMemory,
        image: &mut File,
        wanted: BootProtocol,
    ) -> Result<LoadedKernel, KernelError> {
        let available = memory.size();
        let payload = self.read_payload(image, available)?;
        match UnpackedKernel::from_payload(&payload, available) {
            Ok(UnpackedKernel {
                headers,
                mut image,
                format,
            }) => headers.load(memory, &mut image, wanted, format, Some(self.header)),
            Err(reason) if wanted == BootProtocol::Pvh => {
                Err(KernelError::NoPvhEntryInBzImage(reason))
            }
            Err(reason) => self.load_self_extracting(memory, image, reason),
        }
    }

    /// Reads the compressed kernel, which must not be larger than the `available` guest memory.
    fn read_payload(&self, image: &mut File, available: u64) -> Result<Vec<u8>, KernelError> {
        let size = u64::from(self.header.payload_length);
        let offset = self.protected_mode_offset + u64::from(self.header.payload_offset);
        seek_within(image, self.length, "the compressed kernel", offset, size)?;
        if size > available {
            return Err(KernelError::NotEnoughMemory {
                needed: size,
                available,
            });
        }
        let mut payload = vec![0; size as usize];
        image.read_exact(&mut payload)?;
        Ok(payload)
    }

    /// Loads the protected-mode code, which decompresses the kernel in the guest, because of
    /// `reason` ("64-bit Boot Protocol").
    fn load_self_extracting(
        &self,
        memory: &GuestMemory,
        image: &mut File,
        reason: PayloadError,
    ) -> Result<LoadedKernel, KernelError> {
        let header = &self.header;
        let (version, xloadflags) = (header.version, header.xloadflags);
        if version < VERSION_WITH_XLOADFLAGS || xloadflags & XLF_KERNEL_64 == 0 {
            return Err(KernelError::No64BitEntry(reason));
        }
        // A relocatable kernel runs where it is loaded, but never below `pref_address`; other
        // kernels have a fixed load address, and move themselves to `pref_address`.
        let runtime_address = header.pref_address;
        let load_address = if header.relocatable_kernel != 0 {
            runtime_address
        } else {
            u64::from(header.code32_start)
        };
        let size = self.length - self.protected_mode_offset;
        if size <= LINUX64_ENTRY_OFFSET {
            return Err(KernelError::MalformedBzImage(
                "it ends before its 64-bit entry point",
            ));
        }
        let end = placement::check_address(runtime_address, header.init_size.into())?
            .max(placement::check_address(load_address, size)?);
        placement::check_memory(memory, end)?;
        tracing::warn!(
            "{reason}; the kernel will decompress itself in the guest, which takes longer"
        );
        seek_within(
            image,
            self.length,
            "the protected-mode code",
            self.protected_mode_offset,
            size,
        )?;
        placement::read_into_memory(memory, load_address, image, size)?;
        Ok(LoadedKernel {
            entry: GuestAddress(load_address + LINUX64_ENTRY_OFFSET),
            protocol: EntryProtocol::Linux64,
            start: GuestAddress(load_address),
            end: GuestAddress(end),
            setup_header: Some(*header),
            format: KernelFormat::SelfExtractingBzImage,
        })
    }
}

/// The ELF kernel inside a bzImage.
struct UnpackedKernel {
    headers: ElfKernel,
    image: Cursor<Vec<u8>>,
    format: KernelFormat,
}

impl UnpackedKernel {
    fn from_payload(payload: &[u8], available: u64) -> Result<Self, PayloadError> {
        let (compression, elf) = payload::decompress(payload, available.min(payload::MAX_SIZE))?;
        let length = elf.len() as u64;
        let mut image = Cursor::new(elf);
        let headers = ElfKernel::parse(&mut image, length)
            .map_err(|error| PayloadError::NotAKernel(Box::new(error)))?;
        Ok(Self {
            headers,
            image,
            format: KernelFormat::BzImage(compression),
        })
    }
}

/// Copies the setup header out of `head`. Fields that this version of it does not have stay zero:
/// the bytes there are code.
fn read_setup_header(head: &[u8], length: u64) -> Result<setup_header, KernelError> {
    let after_jump = head.get(MAGIC_OFFSET - 1).copied().unwrap_or(0);
    let end = HEAD_SIZE.min(MAGIC_OFFSET + usize::from(after_jump));
    let present = head
        .get(SETUP_HEADER_OFFSET..end)
        .ok_or(KernelError::Truncated {
            what: "the setup header",
            needed: end as u64,
            length,
        })?;
    let mut header = setup_header::default();
    header
        .as_mut_slice()
        .iter_mut()
        .zip(present)
        .for_each(|(field, byte)| *field = *byte);
    Ok(header)
}
