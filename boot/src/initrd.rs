//! The initial RAM disk.

use std::fs::File;
use std::io::{self, Seek};

use bantam_arch::layout;
use bantam_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::image_file::{ImageFileError, mib, regular_file_length};
use crate::kernel::LoadedKernel;

const PAGE_SIZE: u64 = 4096;

/// Highest address that an initrd may occupy if the kernel gives none: the value in every 64-bit
/// kernel's setup header (Linux Documentation/arch/x86/boot.rst, `initrd_addr_max`).
const DEFAULT_INITRD_ADDRESS_MAX: u64 = 0x7fff_ffff;

/// The location of an initrd in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// First byte, page-aligned.
    pub address: GuestAddress,
    /// Size in bytes, that of the file.
    pub size: u64,
}

/// Why an initrd cannot be loaded. Reads well after `cannot load initrd 'PATH': `.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// The file cannot be an image.
    #[error(transparent)]
    File(#[from] ImageFileError),
    /// It would fit into more guest memory.
    #[error(
        "it takes {} MiB but only {} MiB are free above the kernel: \
         give the machine at least {} MiB of memory", mib(*size), free >> 20, mib(*needed)
    )]
    NotEnoughMemory {
        /// Size of the initrd in bytes.
        size: u64,
        /// Bytes free between the end of the kernel and the end of usable memory.
        free: u64,
        /// Least guest memory in bytes that would hold both.
        needed: u64,
    },
    /// It would not fit into any amount of guest memory.
    #[error(
        "it takes {} MiB but only {} MiB lie between the kernel and {limit:#x}, the highest \
         address for an initrd: use a smaller one, or a disk", mib(*size), free >> 20
    )]
    TooLarge {
        /// Size of the initrd in bytes.
        size: u64,
        /// Bytes between the end of the kernel and the limit.
        free: u64,
        /// First address that the initrd may not use.
        limit: u64,
    },
    /// The file could not be read into guest memory.
    #[error("cannot read it into guest memory at {address:#x}: {source}")]
    ReadIntoMemory {
        /// Guest-physical address of its first byte.
        address: u64,
        /// What failed.
        source: GuestMemoryError,
    },
}

impl From<io::Error> for InitrdError {
    fn from(error: io::Error) -> Self {
        Self::File(ImageFileError::Read(error))
    }
}

/// Loads `initrd` into `memory`, page-aligned and as high as the kernel allows, away from the
/// memory that the kernel uses above its own end.
///
/// # Errors
///
/// If the file cannot be read, or does not fit between the kernel and the device hole (or the limit
/// in the kernel's setup header).
pub fn load_initrd(
    memory: &GuestMemory,
    initrd: &mut File,
    kernel: &LoadedKernel,
) -> Result<Initrd, InitrdError> {
    let size = regular_file_length(initrd)?;
    let address = initrd_address(memory, size, kernel)?;
    initrd.rewind()?;
    memory
        .read_exact_volatile_from(address, initrd, size as usize)
        .map_err(|source| InitrdError::ReadIntoMemory {
            address: address.0,
            source,
        })?;
    Ok(Initrd { address, size })
}

fn initrd_address(
    memory: &GuestMemory,
    size: u64,
    kernel: &LoadedKernel,
) -> Result<GuestAddress, InitrdError> {
    let highest_address = kernel
        .setup_header
        .map_or(DEFAULT_INITRD_ADDRESS_MAX, |header| {
            u64::from(header.initrd_addr_max)
        });
    let limit = layout::DEVICE_HOLE.min(highest_address + 1);
    let memory_end = memory
        .regions()
        .map(|region| region.end())
        .filter(|end| *end <= layout::DEVICE_HOLE)
        .max()
        .unwrap_or(0);
    let lowest = kernel.end.0.next_multiple_of(PAGE_SIZE);
    let top = memory_end.min(limit);

    let address = top
        .checked_sub(size)
        .map(|address| address - address % PAGE_SIZE)
        .filter(|address| *address >= lowest);
    if let Some(address) = address {
        return Ok(GuestAddress(address));
    }
    match size.checked_next_multiple_of(PAGE_SIZE) {
        Some(pages) if lowest.saturating_add(pages) <= limit => Err(InitrdError::NotEnoughMemory {
            size,
            free: top.saturating_sub(lowest),
            needed: lowest + pages,
        }),
        _ => Err(InitrdError::TooLarge {
            size,
            free: limit.saturating_sub(lowest),
            limit,
        }),
    }
}

#[cfg(test)]
mod tests {
    use linux_loader::loader::bootparam::setup_header;
    use proptest::prelude::*;

    use super::*;
    use crate::test_images::{MIB, file, loaded_kernel, memory};

    #[test]
    fn initrd_is_put_at_the_top_of_memory() {
        let memory = memory(16 * MIB);
        let content: Vec<u8> = (0..10_000_u32).map(|index| index as u8).collect();
        let kernel = loaded_kernel(4 * MIB + 1, None);
        let initrd = load_initrd(&memory, &mut file(&content), &kernel).unwrap();
        assert_eq!(
            initrd,
            Initrd {
                address: GuestAddress(16 * MIB - 3 * 4096),
                size: 10_000
            }
        );
        let mut loaded = vec![0; content.len()];
        memory.read_slice(&mut loaded, initrd.address).unwrap();
        assert_eq!(loaded, content);
    }

    #[test]
    fn initrd_stays_below_the_limit_of_the_kernel() {
        let memory = memory(64 * MIB);
        let mut header = setup_header {
            initrd_addr_max: 0x1ff_ffff,
            ..Default::default()
        };
        let kernel = loaded_kernel(4 * MIB, Some(header));
        let initrd = load_initrd(&memory, &mut file(&[1; 4096]), &kernel).unwrap();
        assert_eq!(initrd.address, GuestAddress(0x200_0000 - 4096));

        header.initrd_addr_max = 0;
        let kernel = loaded_kernel(4 * MIB, Some(header));
        assert!(matches!(
            load_initrd(&memory, &mut file(&[1; 4096]), &kernel),
            Err(InitrdError::TooLarge { .. })
        ));
    }

    #[test]
    fn initrd_stays_below_2_gib_and_the_device_hole() {
        let memory = GuestMemory::from_ranges(&[
            (GuestAddress(0), layout::DEVICE_HOLE as usize),
            (GuestAddress(layout::DEVICE_HOLE_END), 1 << 30),
        ])
        .unwrap();
        let mut kernel = loaded_kernel(4 * MIB, None);
        let initrd = load_initrd(&memory, &mut file(&[1]), &kernel).unwrap();
        assert_eq!(initrd.address, GuestAddress(0x8000_0000 - 4096));

        kernel.setup_header = Some(setup_header {
            initrd_addr_max: u32::MAX,
            ..Default::default()
        });
        let initrd = load_initrd(&memory, &mut file(&[1]), &kernel).unwrap();
        assert_eq!(initrd.address, GuestAddress(layout::DEVICE_HOLE - 4096));
    }

    #[test]
    fn initrd_that_does_not_fit_says_what_is_needed() {
        let initrd = file(&[]);
        initrd.set_len(13 * MIB).unwrap();
        let error = load_initrd(
            &memory(16 * MIB),
            &mut initrd.try_clone().unwrap(),
            &loaded_kernel(4 * MIB, None),
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "it takes 13 MiB but only 12 MiB are free above the kernel: \
             give the machine at least 17 MiB of memory"
        );
        initrd.set_len(3 << 30).unwrap();
        let error = load_initrd(
            &memory(16 * MIB),
            &mut initrd.try_clone().unwrap(),
            &loaded_kernel(4 * MIB, None),
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "it takes 3072 MiB but only 2044 MiB lie between the kernel and 0x80000000, the \
             highest address for an initrd: use a smaller one, or a disk"
        );
    }

    #[test]
    fn files_that_are_not_initrds_are_refused() {
        let kernel = loaded_kernel(4 * MIB, None);
        let memory = memory(16 * MIB);
        let load = |file: &mut File| load_initrd(&memory, file, &kernel).unwrap_err().to_string();
        assert_eq!(load(&mut file(&[])), "the file is empty");
        assert_eq!(
            load(&mut File::open("/").unwrap()),
            "it is a directory, not a file"
        );
    }

    proptest! {
        #[test]
        fn initrd_never_overlaps_the_kernel(
            size in 1..20 * MIB,
            kernel_end in MIB..16 * MIB,
            initrd_addr_max in prop::option::of(0..32 * MIB as u32),
        ) {
            let memory = memory(16 * MIB);
            let header = initrd_addr_max.map(|initrd_addr_max| setup_header {
                initrd_addr_max,
                ..Default::default()
            });
            let kernel = loaded_kernel(kernel_end, header);
            let highest = initrd_addr_max.map_or(u64::MAX, u64::from);
            match initrd_address(&memory, size, &kernel) {
                Ok(address) => {
                    prop_assert_eq!(address.0 % PAGE_SIZE, 0);
                    prop_assert!(address.0 >= kernel_end);
                    prop_assert!(address.0 + size <= 16 * MIB);
                    prop_assert!(address.0 + size - 1 <= highest);
                }
                Err(_) => {
                    let end = (highest.saturating_add(1)).min(16 * MIB);
                    prop_assert!(
                        kernel_end.next_multiple_of(PAGE_SIZE) + size > end / PAGE_SIZE * PAGE_SIZE
                    );
                }
            }
        }
    }
}
