//! Kernel images: their formats, how they get into guest memory, and how they are entered.

mod bzimage;
mod elf;
mod error;
mod lzo;
mod parameters;
mod payload;
mod placement;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use bantam_arch::{EntryProtocol, layout};
use bantam_memory::GuestMemory;
use linux_loader::loader::bootparam::setup_header;
use memchr::memmem;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

pub use error::KernelError;
pub use parameters::InitOverflow;
pub use payload::{Compression, PayloadError};

use crate::command_line::LINUX_COMMAND_LINE_LIMIT;
use crate::image_file::regular_file_length;

/// ACPI hardware id of a virtio-mmio device.
const VIRTIO_MMIO_ACPI_ID: &[u8] = b"LNRO0005";
/// Bytes of the kernel that one step of a search reads.
const SEARCH_CHUNK_SIZE: usize = 64 << 10;

/// How the user wants the kernel to be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BootProtocol {
    /// Linux by its 64-bit entry, so that it gets a random seed. Any other kernel by PVH if it has
    /// an entry point for it, otherwise by the 64-bit entry.
    #[default]
    Auto,
    /// By PVH only.
    Pvh,
    /// By the 64-bit Linux entry only.
    Linux64,
}

/// What the kernel file turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// An ELF file (vmlinux).
    Elf,
    /// A bzImage whose ELF was decompressed by the monitor.
    BzImage(Compression),
    /// A bzImage that decompresses itself in the guest, because the monitor could not.
    SelfExtractingBzImage,
}

impl fmt::Display for KernelFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elf => formatter.write_str("ELF"),
            Self::BzImage(compression) => write!(formatter, "bzImage ({compression})"),
            Self::SelfExtractingBzImage => formatter.write_str("bzImage (self-extracting)"),
        }
    }
}

/// A kernel in guest memory.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedKernel {
    /// Where the boot vCPU starts.
    pub entry: GuestAddress,
    /// How it must be entered.
    pub protocol: EntryProtocol,
    /// First address of the kernel.
    pub start: GuestAddress,
    /// First address after the kernel, with its `.bss` and what it needs to unpack itself.
    pub end: GuestAddress,
    /// The setup header, if the kernel came from a bzImage. Fields that its version of the boot
    /// protocol does not have are zero.
    pub setup_header: Option<setup_header>,
    /// What the file was, for the log.
    pub format: KernelFormat,
}

impl LoadedKernel {
    /// Returns whether the kernel, as it was loaded into `memory`, finds virtio-mmio devices in the
    /// ACPI tables. Then its command line must not name them as well, or it would register each
    /// twice. A kernel contains the ACPI id of such devices exactly if its driver is built in and
    /// uses ACPI (Linux drivers/virtio/virtio_mmio.c).
    ///
    /// # Errors
    ///
    /// The kernel is not in `memory`.
    pub fn finds_virtio_mmio_by_acpi(
        &self,
        memory: &GuestMemory,
    ) -> Result<bool, GuestMemoryError> {
        self.contains(memory, VIRTIO_MMIO_ACPI_ID)
    }

    /// Returns whether the image, as it was loaded into `memory`, contains `pattern`.
    fn contains(&self, memory: &GuestMemory, pattern: &[u8]) -> Result<bool, GuestMemoryError> {
        let finder = memmem::Finder::new(pattern);
        let overlap = pattern.len() - 1;
        let mut chunk = vec![0; SEARCH_CHUNK_SIZE];
        let mut address = self.start;
        while address < self.end {
            let size = self
                .end
                .unchecked_offset_from(address)
                .min(SEARCH_CHUNK_SIZE as u64);
            let bytes = &mut chunk[..size as usize];
            memory.read_slice(bytes, address)?;
            if finder.find(bytes).is_some() {
                return Ok(true);
            }
            if size < SEARCH_CHUNK_SIZE as u64 {
                break;
            }
            address = address.unchecked_add(size - overlap as u64);
        }
        Ok(false)
    }

    /// Returns the longest command line that the kernel takes, in bytes without the NUL.
    pub(crate) fn command_line_limit(&self) -> usize {
        match self.setup_header {
            Some(header) if header.cmdline_size != 0 => {
                (header.cmdline_size as usize).min(layout::COMMAND_LINE_MAX_SIZE - 1)
            }
            _ => LINUX_COMMAND_LINE_LIMIT,
        }
    }
}

/// Loads the kernel image `kernel` (an x86-64 ELF or a bzImage) into `memory`.
///
/// An ELF is read directly into guest memory. A bzImage is decompressed here, which is far faster
/// than in the guest, and the ELF inside is loaded; if that is impossible, the bzImage itself is
/// loaded and decompresses itself in the guest, with a warning in the log.
///
/// # Errors
///
/// If the file is not a kernel that this machine can boot, does not fit into guest memory, or lacks
/// the entry point that `wanted` asks for. Guest memory may then hold a part of the kernel.
pub fn load_kernel(
    memory: &GuestMemory,
    kernel: &mut File,
    wanted: BootProtocol,
) -> Result<LoadedKernel, KernelError> {
    let length = regular_file_length(kernel)?;
    let mut head = Vec::with_capacity(bzimage::HEAD_SIZE);
    kernel.rewind()?;
    kernel
        .by_ref()
        .take(bzimage::HEAD_SIZE as u64)
        .read_to_end(&mut head)?;

    if head.starts_with(elf::MAGIC) {
        elf::ElfKernel::parse(kernel, length)?.load(memory, kernel, wanted, KernelFormat::Elf, None)
    } else if bzimage::has_magic(&head) {
        bzimage::BzImage::parse(&head, length)?.load(memory, kernel, wanted)
    } else {
        Err(KernelError::UnknownFormat {
            found: describe_unknown(&head),
        })
    }
}

/// Guesses from its first bytes what a file that is not a kernel is.
fn describe_unknown(head: &[u8]) -> &'static str {
    const KNOWN: [(&[u8], &str); 10] = [
        (b"\x1f\x8b", "a gzip-compressed file (decompress it first)"),
        (b"\xfd7zXZ\0", "an xz-compressed file (decompress it first)"),
        (
            b"\x28\xb5\x2f\xfd",
            "a zstd-compressed file (decompress it first)",
        ),
        (b"BZh", "a bzip2-compressed file (decompress it first)"),
        (
            b"MZ",
            "an EFI program without a kernel's setup header (extract its .linux section)",
        ),
        (b"!<arch>\n", "an archive (a .deb or .a file)"),
        (b"\xed\xab\xee\xdb", "an RPM package"),
        (b"QFI\xfb", "a qcow2 disk image"),
        (b"070701", "a cpio archive (an initrd?)"),
        (b"\x7fEL", "a damaged ELF file"),
    ];
    if let Some((_, name)) = KNOWN.iter().find(|(magic, _)| head.starts_with(magic)) {
        return name;
    }
    let is_text = |byte: &u8| matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r');
    if head.iter().all(is_text) {
        "a text file"
    } else if head.iter().all(|byte| *byte == 0) {
        "a file that starts with zeros"
    } else {
        "a file of unknown format"
    }
}

/// Moves the position of `image` to `offset`. The `size` bytes there, called `what` in errors, must
/// lie within its `length`.
fn seek_within(
    image: &mut impl Seek,
    length: u64,
    what: &'static str,
    offset: u64,
    size: u64,
) -> Result<(), KernelError> {
    let needed = offset.saturating_add(size);
    if needed > length {
        return Err(KernelError::Truncated {
            what,
            needed,
            length,
        });
    }
    image.seek(SeekFrom::Start(offset))?;
    Ok(())
}
