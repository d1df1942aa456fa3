//! Guest memory as a whole.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult,
    GuestRegionCollection, GuestRegionMmap, Permissions,
};

use crate::dirty_log::{DirtyLog, RegionLog};
use crate::{Backing, GuestRange, MapError, PageSet, Word};

/// The memory of a guest: one or more regions of its physical address space.
///
/// It is accessed through [`GuestBuffers`](crate::GuestBuffers) and [`GuestRange`], and by
/// `vm_memory::Bytes`, all of which mark what they write in the dirty log.
#[derive(Debug)]
pub struct GuestMemory {
    regions: GuestRegionCollection<GuestRegionMmap<RegionLog>>,
    backing: Backing,
    /// The file of a private mapping, and where each region begins in it.
    file: Option<(Arc<File>, Vec<u64>)>,
    log: Arc<DirtyLog>,
}

/// A region of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its first guest-physical address.
    pub start: GuestAddress,
    /// Size in bytes.
    pub len: u64,
    /// Address of its mapping, for the host's kernel to use.
    pub host_address: u64,
}

impl Region {
    /// Returns the first address after it.
    pub fn end(&self) -> u64 {
        self.start.0 + self.len
    }
}

impl GuestMemory {
    /// Maps memory that is all zero. `ranges` has the first address and the size in bytes of each
    /// region, in ascending order.
    ///
    /// # Errors
    /// If the host refuses to map it, `ranges` are not valid regions, or the backing is a file.
    pub fn new(ranges: &[(GuestAddress, usize)], backing: Backing) -> Result<Self, MapError> {
        if backing == Backing::PrivateFile {
            return Err(MapError::Regions("a file has content".to_string()));
        }
        GuestMemory::map(ranges, backing, None)
    }

    /// Maps `file` privately: the memory has the file's content until it is written, and takes memory of its own only
    /// for pages that were. The regions, given as for [`GuestMemory::new`], are one after another in the file.
    ///
    /// # Errors
    /// If the file is shorter than the regions, the host refuses to map it, or `ranges` are not valid regions.
    pub fn from_file(ranges: &[(GuestAddress, usize)], file: Arc<File>) -> Result<Self, MapError> {
        let mut next = 0;
        let offsets = ranges.iter().map(|&(_, size)| {
            let offset = next;
            next += size as u64;
            offset
        });
        let offsets = offsets.collect();
        // An access past the end of the file would end the process.
        let len = file.metadata().map_err(MapError::Map)?.len();
        if len < next {
            let reason = format!("the file has {len} of {next} bytes");
            return Err(MapError::Regions(reason));
        }
        GuestMemory::map(ranges, Backing::PrivateFile, Some((file, offsets)))
    }

    fn map(
        ranges: &[(GuestAddress, usize)],
        backing: Backing,
        file: Option<(Arc<File>, Vec<u64>)>,
    ) -> Result<Self, MapError> {
        let log = Arc::new(DirtyLog::new(ranges.iter().copied()));
        let regions: Result<Vec<_>, MapError> = ranges
            .iter()
            .enumerate()
            .map(|(index, &(start, size))| {
                let file = file
                    .as_ref()
                    .map(|(file, offsets)| FileOffset::from_arc(file.clone(), offsets[index]));
                let mapping = backing.map(size, file, RegionLog::new(log.clone(), index))?;
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
            file,
            log,
        })
    }

    /// Maps anonymous memory of these regions; see [`GuestMemory::new`].
    ///
    /// # Errors
    /// Those of [`GuestMemory::new`].
    pub fn from_ranges(ranges: &[(GuestAddress, usize)]) -> Result<Self, MapError> {
        GuestMemory::new(ranges, Backing::Anonymous)
    }

    /// Returns what the memory is made of.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Returns the file of [`GuestMemory::from_file`].
    pub(crate) fn file(&self) -> Option<&File> {
        self.file.as_ref().map(|(file, _)| &**file)
    }

    /// Returns where each region begins in the file.
    pub(crate) fn file_offsets(&self) -> impl Iterator<Item = u64> {
        self.file.iter().flat_map(|(_, offsets)| offsets).copied()
    }

    /// Returns the regions, in ascending order.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.regions.iter().map(|region| Region {
            start: region.start_addr(),
            len: region.len(),
            host_address: region.as_ptr().addr() as u64,
        })
    }

    /// Returns the size of all regions in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Returns whether the `len` bytes at `address` are all guest memory.
    pub fn contains(&self, address: GuestAddress, len: usize) -> bool {
        GuestMemoryBackend::check_range(&self.regions, address, len)
    }

    /// Returns the `len` words at `address` if they are aligned and all in one region.
    pub fn range<T: Word>(
        &self,
        address: GuestAddress,
        len: usize,
    ) -> Option<GuestRange<T, &GuestMemory>> {
        GuestRange::new(self, address, len)
    }

    /// Returns the host address of the `len` bytes at `address`, if they are all in one region. It
    /// is valid as long as `self`. After writing there, the caller calls
    /// [`GuestMemory::mark_host`].
    #[inline]
    pub(crate) fn host_range(&self, address: GuestAddress, len: usize) -> Option<NonNull<u8>> {
        let region = self.regions.find_region(address)?;
        // Does not underflow: the region was found by this address.
        let offset = address.0 - region.start_addr().0;
        let end = offset.checked_add(len as u64)?;
        if end > region.len() {
            return None;
        }
        // SAFETY: the offset is within the region, all of which is mapped from this pointer on.
        NonNull::new(unsafe { region.as_ptr().add(offset as usize) })
    }

    /// Starts the dirty log, empty: from now on it records the pages that the monitor writes. KVM's
    /// log has those that vCPUs write. The log may be started while the machine runs. When this
    /// returns, all that the monitor wrote to pages that are not in the log is visible to the
    /// caller.
    ///
    /// # Errors
    /// If the host's kernel lacks `membarrier` (Linux 4.14 has it) or forbids it.
    pub fn start_dirty_log(&self) -> io::Result<()> {
        self.log.start()
    }

    /// Stops the dirty log. Its pages can still be taken.
    pub fn stop_dirty_log(&self) {
        self.log.stop();
    }

    /// Removes from the log the pages that the monitor has written since the log was started, or
    /// since the last call, and returns them. What was written to them before they were marked is
    /// visible to the caller.
    ///
    /// A page is marked after it was written. Thus a page that a device writes meanwhile is either
    /// in this result or in the next; if no device is running, the next result is empty.
    pub fn take_dirty(&self) -> PageSet {
        self.log.take()
    }

    /// Marks the `len` bytes at `address`, which have been written by an access that does not mark
    /// them.
    pub fn mark_written(&self, address: GuestAddress, len: usize) {
        if self.log.is_on()
            && let Some(pointer) = self.host_range(address, len)
        {
            self.mark_logged(pointer.as_ptr(), len);
        }
    }

    /// Returns whether the caller has to mark what it just wrote.
    #[inline]
    pub(crate) fn is_logging(&self) -> bool {
        self.log.is_on()
    }

    /// Marks `len` bytes of one region, which have been written. `pointer` is their host address.
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

    /// Returns the index of the region that has the `len` bytes at the host address `pointer`, and
    /// their offset in it.
    fn find_host(&self, pointer: *const u8, len: usize) -> Option<(usize, usize)> {
        // There are three regions at most.
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let offset = pointer.addr().checked_sub(region.as_ptr().addr())?;
            let end = offset.checked_add(len)?;
            (end as u64 <= region.len()).then_some((index, offset))
        })
    }

    /// Gives the whole pages of `len` bytes of one region back to the host, which makes them zero.
    /// Returns how many bytes those are.
    ///
    /// # Errors
    /// Those of `madvise`, or if the bytes are not in guest memory.
    pub(crate) fn discard_host(&self, pointer: *mut u8, len: usize) -> io::Result<usize> {
        if self.find_host(pointer, len).is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let start = pointer.addr();
        let Some(pages) = self.backing.whole_pages(&(start..start + len)) else {
            return Ok(0);
        };
        let (pointer, len) = (pointer.wrapping_add(pages.start - start), pages.len());
        // SAFETY: the pages are within a region, which is mapped as this backing is. Nothing
        // borrows the bytes of guest memory, and the guest could make them zero at any time too.
        let result = unsafe { self.backing.discard(pointer, len) };
        // The call may have failed after some of the pages.
        self.mark_host(pointer, len);
        result.map(|()| len)
    }
}

/// The basis for the traits of `vm-memory`: `Bytes` reads and writes guest memory, and marks what
/// it writes.
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
