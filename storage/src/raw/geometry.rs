//! Sizes of disk images and of their storage.

use std::fs::{File, FileType};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::bounce::Alignment;
use super::{DiskOptions, SECTOR_SIZE};

/// Largest physical block size that is passed on to the guest.
const MAX_BLOCK_SIZE: u32 = 64 << 10;
/// Physical block size if the host does not report one: a page.
const DEFAULT_PHYSICAL_BLOCK_SIZE: u32 = 4096;

pub(crate) mod block_device {
    //! Requests to block devices (`linux/fs.h`).
    nix::ioctl_read!(size_in_bytes, 0x12, 114, u64);
    nix::ioctl_read_bad!(
        logical_block_size,
        nix::request_code_none!(0x12, 104),
        libc::c_int
    );
    nix::ioctl_read_bad!(
        physical_block_size,
        nix::request_code_none!(0x12, 123),
        libc::c_uint
    );
    // These two are numbered without a size, so nix's "bad" form is the right one.
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
    nix::ioctl_write_ptr_bad!(zero_out, nix::request_code_none!(0x12, 127), [u64; 2]);
}

/// Size in bytes of an open image of this kind.
pub(super) fn measure(file: &File, kind: FileType) -> io::Result<u64> {
    if kind.is_file() {
        return Ok(file.metadata()?.len());
    }
    let mut size = 0;
    // SAFETY: the request writes one u64 to the place it is given.
    unsafe { block_device::size_in_bytes(file.as_raw_fd(), &mut size) }?;
    Ok(size)
}

/// Returns the size in bytes of the disk in an image of `len` bytes, a multiple of `block`; or why it cannot
/// be a disk.
///
/// In a read-only image, the missing part of the last block reads as zeroes. In a writable image, the guest
/// would lose what it writes there.
pub(crate) fn disk_size(
    len: u64,
    block: u32,
    is_block_device: bool,
    options: &DiskOptions,
) -> Result<u64, String> {
    let block = u64::from(block);
    if len == 0 && !options.any_size {
        let reason = "there is nothing in it; 'truncate --size=1G FILE' makes it an empty disk";
        return Err(reason.to_string());
    }
    if len.is_multiple_of(block) {
        return Ok(len);
    }
    if options.read_only {
        return Ok(len.next_multiple_of(block));
    }
    if options.any_size {
        return Ok(len - len % block);
    }
    Err(if is_block_device {
        format!("that is not a multiple of its block size of {block}; 'block-size=512' fits")
    } else {
        format!(
            "a disk that is written has a multiple of {block} bytes; 'truncate --size=%{block} \
             FILE' rounds it up, and ',ro' takes it as it is"
        )
    })
}

/// Logical and physical block size, in bytes.
pub(super) fn block_sizes(file: &File, kind: FileType) -> io::Result<(u32, u32)> {
    if kind.is_file() {
        let preferred = file.metadata()?.blksize();
        let physical = match u32::try_from(preferred) {
            Ok(size @ 512..=MAX_BLOCK_SIZE) if size.is_power_of_two() => size,
            _ => DEFAULT_PHYSICAL_BLOCK_SIZE,
        };
        return Ok((SECTOR_SIZE as u32, physical));
    }
    let (mut logical, mut physical) = (0, 0);
    // SAFETY: the requests each write one integer of the type that they are declared with.
    unsafe {
        block_device::logical_block_size(file.as_raw_fd(), &mut logical)?;
        block_device::physical_block_size(file.as_raw_fd(), &mut physical)?;
    }
    Ok((logical as u32, physical))
}

/// Returns the alignment that `O_DIRECT` requires of requests to `file`: the one that the kernel reports, or
/// else one that suits any storage of that block size.
pub(super) fn direct_alignment(
    file: &File,
    is_block_device: bool,
    logical_block_size: u32,
) -> Alignment {
    const SAFE: u32 = 4096;
    // SAFETY: all-zero bytes are a valid `struct statx`, which is plain numbers.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty string with its NUL, and the call writes one `struct statx`.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut status,
        )
    };
    let known = result == 0
        && status.stx_mask & libc::STATX_DIOALIGN != 0
        && status.stx_dio_offset_align.is_power_of_two()
        && status.stx_dio_mem_align.is_power_of_two();
    let (offset, memory) = if known {
        (status.stx_dio_offset_align, status.stx_dio_mem_align)
    } else if is_block_device {
        // The kernel requires no more for block devices.
        (logical_block_size, SAFE)
    } else {
        (SAFE.max(logical_block_size), SAFE)
    };
    Alignment {
        // Requests are in sectors.
        offset: u64::from(offset).max(SECTOR_SIZE),
        memory: memory as usize,
    }
}
