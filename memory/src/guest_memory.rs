//! Guest memory as a whole.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult, GuestRegionCollection,
    GuestRegionMmap, Permissions,
};

use crate::dirty_log::{DirtyLog, DirtyPages, RegionLog};
use crate::{Backing, GuestRange, MapError, Word};

/// The memory of a guest: one or more regions of its physical address space.
///
/// It is accessed through [`GuestBuffers`](crate::GuestBuffers) and [`GuestRange`], and by
/// `vm_memory::Bytes`, all of which mark what they write in the dirty log.
#[derive(Debug)]
pub struct GuestMemory {
    regions: GuestRegionCollection<GuestRegionMmap<RegionLog>>,
    backing: Backing,
    log: Arc<DirtyLog>,
}

/// A region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first guest-physical address.
    pub start: GuestAddress,
    /// Size in bytes.
    pub len: u64,
    /// Where it is mapped, for the host's kernel to use.
    pub host_address: u64,
}

impl Region {
    /// The first address behind it.
    pub fn end(&self) -> u64 {
        self.start.0 + self.len
    }
}

impl GuestMemory {
    /// Maps memory that is all zero: of each region in `ranges`, in ascending order, the first
    /// address and the size in bytes.
    ///
    /// # Errors
    /// When the host does not map it, or these cannot be regions.
    pub fn new(ranges: &[(GuestAddress, usize)], backing: Backing) -> Result<Self, MapError> {
        let log = Arc::new(DirtyLog::new(ranges.iter().copied()));
        let regions: Result<Vec<_>, MapError> = ranges
            .iter()
            .enumerate()
            .map(|(index, &(start, size))| {
                let mapping = backing.map(size, RegionLog::new(log.clone(), index))?;
                GuestRegionMmap::new(mapping, start).ok_or_else(|| {
                    MapError::Regions("it does not fit into the guest's address space".to_string())
                })
            })
            .collect();
        let regions = GuestRegionCollection::from_regions(regions?)
            .map_err(|error| MapError::Regions(error.to_string()))?;
        Ok(GuestMemory {
            regions,
            backing,
            log,
        })
    }

    /// Maps anonymous memory, as [`GuestMemory::new`] does.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, MapError> {
        GuestMemory::new(ranges, Backing::Anonymous)
    }

    /// What the memory is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The regions, in ascending order.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.regions.iter().map(|region| Region {
            start: region.start_addr(),
            len: region.len(),
            host_address: region.as_ptr().addr() as u64,
        })
    }

    /// Size of all regions in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Whether the `len` bytes at `address` are all guest memory.
    pub fn contains(&self, address: GuestAddress, len: usize) -> bool {
        GuestMemoryBackend::check_range(&self.regions, address, len)
    }

    /// The `len` words at `address`, if they are all in one region, and aligned.
    pub fn range<T: Word>(
        &self,
        address: GuestAddress,
        len: usize,
    ) -> Option<GuestRange<T, &GuestMemory>> {
        GuestRange::new(self, address, len)
    }

    /// Where the `len` bytes at `address` are in the host's memory, if they are all in one region.
    /// They are valid for as long as this is. Who writes there calls [`GuestMemory::mark_host`].
    #[inline]
    pub(crate) fn host_range(&self, address: GuestAddress, len: usize) -> Option<NonNull<u8>> {
        let region = self.regions.find_region(address)?;
        // No less than zero: the region was found by this address.
        let offset = address.0 - region.start_addr().0;
        let end = offset.checked_add(len as u64)?;
        if end > region.len() {
            return None;
        }
        // SAFETY: the offset is within the region, all of which is mapped from this pointer on.
        NonNull::new(unsafe { region.as_ptr().add(offset as usize) })
    }

    /// Starts the dirty log, with no page in it: from now on it has the pages that the monitor writes.
    /// Those that vCPUs write are in KVM's log. It may be started while the machine runs. Everything
    /// that the monitor writes to pages that are not in the log can be read when this returns.
    ///
    /// # Errors
    /// When the host's kernel lacks `membarrier` (Linux 4.14 has it) or forbids it.
    pub fn start_dirty_log(&self) -> io::Result<()> {
        self.log.start()
    }

    /// Stops the dirty log. What is in it can still be taken.
    pub fn stop_dirty_log(&self) {
        self.log.stop();
    }

    /// Takes the pages that the monitor has written since the log was started, or since they were last
    /// taken. All that was written to them before they were marked can be read when this returns.
    ///
    /// A page is marked after it was written. Thus a page that a device writes meanwhile is either
    /// among those or among the next; when no device is at work, there are no next ones.
    pub fn take_dirty(&self) -> DirtyPages {
        self.log.take()
    }

    /// Marks the `len` bytes at `address`, which have been written in a way that does not mark them.
    pub fn mark_written(&self, address: GuestAddress, len: usize) {
        if self.log.is_on()
            && let Some(pointer) = self.host_range(address, len)
        {
            self.mark_logged(pointer.as_ptr(), len);
        }
    }

    /// Whether what was just written is to be marked.
    #[inline]
    pub(crate) fn is_logging(&self) -> bool {
        self.log.is_on()
    }

    /// Marks `len` bytes of one region, which have been written. `pointer` is where they are in the
    /// host's memory.
    #[inline]
    pub(crate) fn mark_host(&self, pointer: *const u8, len: usize) {
        if self.log.is_on() {
            self.mark_logged(pointer, len);
        }
    }

    #[cold]
    #[inline(never)]
    fn mark_logged(&self, pointer: *const u8, len: usize) {
        if let Some((region, offset)) = self.find_host(pointer, len) {
            self.log.mark(region, offset, len);
        }
    }

    /// The index of the region that has the `len` bytes at `pointer`, and their offset in it.
    fn find_host(&self, pointer: *const u8, len: usize) -> Option<(usize, usize)> {
        // There are three regions at most.
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let offset = pointer.addr().checked_sub(region.as_ptr().addr())?;
            let end = offset.checked_add(len)?;
            (end as u64 <= region.len()).then_some((index, offset))
        })
    }

    /// Gives the whole pages of `len` bytes of one region back to the host: they become zero. The
    /// result is how many bytes those are.
    ///
    /// # Errors
    /// As `madvise`, or when the bytes are not in guest memory.
    pub(crate) fn discard_host(&self, pointer: *mut u8, len: usize) -> io::Result<usize> {
        if self.find_host(pointer, len).is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = pointer.addr();
        let Some(pages) = self.backing.whole_pages(&(start..start + len)) else {
            return Ok(0);
        };
        let (pointer, len) = (pointer.wrapping_add(pages.start - start), pages.len());
        // SAFETY: the pages are within a region, which is mapped as this backing is. Nothing borrows
        // the bytes of guest memory, and that they become zero is no more than the guest can do to
        // them at any time.
        let result = unsafe { self.backing.discard(pointer, len) };
        // A failure may have come after some of them.
        self.mark_host(pointer, len);
        result.map(|()| len)
    }
}

/// By this, the traits of `vm-memory` are implemented: `Bytes` reads and writes guest memory, and
/// marks what it writes.
impl vm_memory::GuestMemory for GuestMemory {
    type PhysicalMemory = GuestRegionCollection<GuestRegionMmap<RegionLog>>;
    type Bitmap = RegionLog;

    fn check_range(&self, address: GuestAddress, len: usize, _access: Permissions) -> bool {
        self.contains(address, len)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, RegionLog>>> {
        vm_memory::GuestMemory::get_slices(&self.regions, address, len, access)
    }
}

#[cfg(test)]
mod tests;
