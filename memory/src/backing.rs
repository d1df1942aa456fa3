//! The kinds of pages that guest memory is made of, and how they are mapped and given back.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};

use crate::PAGE_SIZE;
use crate::dirty_log::RegionLog;

/// Size of a huge page in bytes.
const HUGE_PAGE_SIZE: usize = 2 << 20;

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backing {
    /// Anonymous private memory, which takes memory of the host when it is touched.
    Anonymous,
    /// Anonymous private memory for which the host uses huge pages if it can.
    TransparentHugePages,
    /// Huge pages of 2 MiB that the host has set aside (hugetlbfs). They are reserved when the memory
    /// is mapped, so that no access finds none left.
    HugePages,
    /// A private mapping of a file, which has the file's content until it is written. Writes do not reach the file.
    /// The file must neither shrink nor change while it is mapped: an access past its end ends the process (`SIGBUS`),
    /// and the guest may see changes of pages that it has not written.
    PrivateFile,
}

/// Why guest memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The host refuses to map that much.
    #[error("{0}")]
    Map(#[source] io::Error),
    /// The host does not use huge pages for it.
    #[error("cannot use transparent huge pages: {0}")]
    TransparentHugePages(#[source] io::Error),
    /// The host has too few huge pages.
    #[error("cannot map huge pages: {0}")]
    HugePages(#[source] io::Error),
    /// The regions overlap, are not in ascending order, exceed the address space, or there is none.
    #[error("{0}")]
    Regions(String),
}

impl Backing {
    /// Maps `size` bytes of zeroes. Files are mapped over those of [`Backing::PrivateFile`].
    pub(crate) fn map(
        self,
        size: usize,
        log: RegionLog,
    ) -> Result<MmapRegion<RegionLog>, MapError> {
        let flags = match self {
            Backing::Anonymous | Backing::TransparentHugePages | Backing::PrivateFile => {
                libc::MAP_NORESERVE
            }
            // Without `MAP_NORESERVE` the kernel reserves all pages of the mapping.
            Backing::HugePages => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        };
        let region = MmapRegionBuilder::new_with_bitmap(size, log)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags)
            .with_hugetlbfs(self == Backing::HugePages)
            .build()
            .map_err(|error| match (error, self) {
                (MmapRegionError::Mmap(error), Backing::HugePages) => MapError::HugePages(error),
                (MmapRegionError::Mmap(error), _) => MapError::Map(error),
                (error, _) => MapError::Map(io::Error::other(error)),
            })?;
        if self == Backing::TransparentHugePages {
            // SAFETY: the range is one mapping of this size, whose content the advice leaves alone.
            let result =
                unsafe { libc::madvise(region.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
            if result != 0 {
                return Err(MapError::TransparentHugePages(io::Error::last_os_error()));
            }
        }
        // SAFETY: the range is one mapping of this size.
        unsafe { leave_out_of_dumps(region.as_ptr(), size) };
        Ok(region)
    }

    /// Returns the size in bytes of the pages that the host can take back, a power of two. It takes
    /// back a transparent huge page in parts.
    pub fn page_size(self) -> usize {
        match self {
            Backing::Anonymous | Backing::TransparentHugePages | Backing::PrivateFile => PAGE_SIZE,
            Backing::HugePages => HUGE_PAGE_SIZE,
        }
    }

    /// Returns the whole pages within a range of host addresses, if there are any.
    ///
    /// The kernel would refuse a range of huge pages that begins within one. Before Linux 6.1 it
    /// also discarded the whole of a huge page whose beginning is at the end of the range.
    pub(crate) fn whole_pages(self, range: &Range<usize>) -> Option<Range<usize>> {
        let page = self.page_size();
        let start = range.start.checked_next_multiple_of(page)?;
        let end = range.end & !(page - 1);
        (start < end).then_some(start..end)
    }

    /// Gives `len` bytes, whole pages, back to the host. They read as zero afterwards.
    ///
    /// # Errors
    /// Those of `madvise` and `mmap`.
    ///
    /// # Safety
    /// The bytes must be mapped as this backing is, and nothing may refer to them.
    pub(crate) unsafe fn discard(self, pages: *mut u8, len: usize) -> io::Result<()> {
        let advice = match self {
            // Dropped pages of private anonymous memory, huge pages included, are zero when they
            // are touched again. Those of shared memory would keep their content.
            Backing::Anonymous | Backing::TransparentHugePages | Backing::HugePages => {
                libc::MADV_DONTNEED
            }
            Backing::PrivateFile => {
                // Dropped pages would have the file's content again, so anonymous memory replaces the mapping.
                // SAFETY: the caller promises mapped pages that nothing refers to.
                return unsafe { map_over(pages, len, None) };
            }
        };
        // SAFETY: the caller promises mapped pages that nothing refers to; the advice changes only
        // their content.
        match unsafe { libc::madvise(pages.cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Maps the file from this offset on, or zeroes, privately in the place of `len` bytes, whole pages.
///
/// # Errors
/// Those of `mmap`.
///
/// # Safety
/// The bytes must be mapped, as one or more private mappings, and nothing may refer to them.
pub(crate) unsafe fn map_over(
    pages: *mut u8,
    len: usize,
    file: Option<(&File, u64)>,
) -> io::Result<()> {
    let (kind, fd, offset) = match file {
        Some((file, offset)) => (0, file.as_raw_fd(), offset),
        None => (libc::MAP_ANONYMOUS, -1, 0),
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | kind;
    let offset = offset as libc::off_t;
    // SAFETY: the caller promises mapped pages that nothing refers to, and they stay mapped.
    let mapped = unsafe { libc::mmap(pages.cast(), len, protection, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range was just mapped.
    unsafe { leave_out_of_dumps(pages, len) };
    Ok(())
}

/// Leaves `len` bytes, whole pages, out of core dumps of this process.
///
/// # Safety
/// The bytes must be mapped.
unsafe fn leave_out_of_dumps(pages: *mut u8, len: usize) {
    // SAFETY: the caller promises mapped pages; the advice changes neither their content nor their place. It fails for
    // memory that is in no dump anyway.
    unsafe { libc::madvise(pages.cast(), len, libc::MADV_DONTDUMP) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_are_only_partly_in_a_range_are_not_discarded() {
        let page = PAGE_SIZE;
        let ordinary = |range| Backing::Anonymous.whole_pages(&range);
        assert_eq!(ordinary(page..3 * page), Some(page..3 * page));
        assert_eq!(ordinary(page - 1..3 * page + 1), Some(page..3 * page));
        assert_eq!(ordinary(page + 1..2 * page), None);
        assert_eq!(ordinary(page + 1..2 * page - 1), None);
        assert_eq!(ordinary(usize::MAX - 1..usize::MAX), None);
        let huge = |range| Backing::HugePages.whole_pages(&range);
        assert_eq!(huge(HUGE_PAGE_SIZE..HUGE_PAGE_SIZE + page), None);
        assert_eq!(huge(page..2 * HUGE_PAGE_SIZE - page), None);
        assert_eq!(
            huge(page..3 * HUGE_PAGE_SIZE - page),
            Some(HUGE_PAGE_SIZE..2 * HUGE_PAGE_SIZE)
        );
    }
}
