//! Guest memory as a whole.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryResult, GuestRegionCollection,
    GuestRegionMmap, Permissions,
};

use crate::backing::map_over;
use crate::dirty_log::{DirtyLog, RegionLog};
use crate::layers::{Layer, Layers};
use crate::{Backing, GuestRange, MapError, PAGE_SIZE, PageSet, Word};

/// The memory of a guest: one or more regions of its physical address space.
///
/// It is accessed through [`GuestBuffers`](crate::GuestBuffers) and [`GuestRange`], and by
/// `vm_memory::Bytes`, all of which mark what they write in the dirty log.
#[derive(Debug)]
pub struct GuestMemory {
    regions: GuestRegionCollection<GuestRegionMmap<RegionLog>>,
    /// What it was made of at first.
    backing: Backing,
    /// Whether it is mapped from files now.
    is_of_files: AtomicBool,
    /// Whether pages may be missing until a program fills them.
    is_missing_pages: AtomicBool,
    /// Whether pages have been given up whose content could not be had.
    is_lost: AtomicBool,
    files: Mutex<Option<Files>>,
    log: Arc<DirtyLog>,
}

/// The files that guest memory is mapped or filled from.
#[derive(Debug)]
struct Files {
    /// Empty if a program fills the memory whose files are not known.
    layers: Layers,
    /// Pages that are zero instead, until they are written.
    discarded: PageSet,
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
        GuestMemory::map(ranges, backing)
    }

    /// Maps `file` privately: the memory has the file's content until it is written, and takes memory of its own only
    /// for pages that were. The regions, given as for [`GuestMemory::new`], are one after another in the file.
    ///
    /// # Errors
    /// If the file is shorter than the regions, the host refuses to map it, or `ranges` are not valid regions.
    pub fn from_file(ranges: &[(GuestAddress, usize)], file: Arc<File>) -> Result<Self, MapError> {
        let mut next = 0;
        let layers = ranges.iter().map(|&(start, size)| {
            let offset = next;
            next += size as u64;
            Layer {
                start,
                len: size as u64,
                file: file.clone(),
                offset,
            }
        });
        let layers: Vec<_> = layers.collect();
        GuestMemory::from_layers(ranges, &layers)
    }

    /// Maps files privately: the memory has their content until it is written. Parts that no layer covers are zero. The
    /// layers are in ascending order.
    ///
    /// # Errors
    /// If a file is shorter than its layer, a layer is not in one of the regions, the host refuses to map it, or `ranges`
    /// are not valid regions.
    pub fn from_layers(
        ranges: &[(GuestAddress, usize)],
        layers: &[Layer],
    ) -> Result<Self, MapError> {
        let memory = GuestMemory::map(ranges, Backing::PrivateFile)?;
        memory.put_layers(layers).map_err(MapError::Map)?;
        Ok(memory)
    }

    fn map(ranges: &[(GuestAddress, usize)], backing: Backing) -> Result<Self, MapError> {
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
            files: Mutex::new(None),
            is_of_files: AtomicBool::new(backing == Backing::PrivateFile),
            is_missing_pages: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            log,
        })
    }

    /// Maps files privately in the place of parts of the memory. The layers are in ascending order.
    ///
    /// If the files have the content that the parts have, this changes nothing but where pages are kept: the memory takes
    /// no memory of its own for these parts until they are written again. The caller makes sure that neither the guest nor a
    /// device accesses the memory meanwhile.
    ///
    /// # Errors
    /// If a file is shorter than its layer, a layer is not in one of the regions, memory consists of huge pages, or the
    /// host refuses. Some layers may have been mapped by then.
    pub fn put_layers(&self, layers: &[Layer]) -> io::Result<()> {
        if self.backing == Backing::HugePages {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mut files = self.files();
        let files = files.get_or_insert_with(|| self.no_files());
        for layer in layers {
            let pages = self.host_range(layer.start, layer.len as usize);
            let pages = pages.ok_or(io::ErrorKind::InvalidInput)?;
            // An access past the end of the file would end the process.
            let size = layer.file.metadata()?.len();
            let end = layer.offset.checked_add(layer.len);
            if end.is_none_or(|end| end > size) {
                let reason = "a file is shorter than the memory that it is for";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
            let file = Some((&*layer.file, layer.offset));
            // SAFETY: the pages are within a region, and of private mappings. Nothing borrows the bytes of guest memory.
            unsafe { map_over(pages.as_ptr(), layer.len as usize, file) }?;
        }
        files.layers.put(layers);
        for layer in layers {
            files.discarded.remove(layer.start, layer.len);
        }
        let len: u64 = files.layers.as_slice().iter().map(|layer| layer.len).sum();
        if len == self.size() {
            self.note_complete();
        }
        self.is_of_files.store(true, Ordering::Release);
        Ok(())
    }

    fn no_files(&self) -> Files {
        let regions = self.regions().map(|region| (region.start, region.len));
        Files {
            layers: Layers::default(),
            discarded: PageSet::empty(regions),
        }
    }

    /// Notes that all pages are missing until they are filled, from these files if they are known.
    pub(crate) fn note_missing(&self, content: &[Layer]) {
        let mut files = self.no_files();
        files.layers.put(content);
        *self.files() = Some(files);
        self.is_missing_pages.store(true, Ordering::Release);
    }

    /// Notes that no page is missing any more.
    pub(crate) fn note_complete(&self) {
        self.is_missing_pages.store(false, Ordering::Release);
    }

    /// Notes that pages that are missing will be zero instead of what they should be.
    pub(crate) fn note_lost(&self) {
        // Before any page is: who finds a zero page sees this.
        self.is_lost.store(true, Ordering::SeqCst);
    }

    /// Returns whether a thread that touches a page may have to wait until a program fills it
    /// ([`MissingPages`](crate::MissingPages)).
    #[inline]
    pub fn is_missing_pages(&self) -> bool {
        self.is_missing_pages.load(Ordering::Relaxed)
    }

    /// Returns whether pages may be zero because their content could not be had. What is read after that, and what was read
    /// before this returns, is not what the guest has written.
    #[inline]
    pub fn is_lost(&self) -> bool {
        self.is_lost.load(Ordering::SeqCst)
    }

    /// Reads `len` bytes from `address` on, whole pages of one region, into memory, so that nobody has to wait who touches them.
    ///
    /// # Errors
    /// If they cannot be read, or the host's kernel does not offer this (Linux 5.14 has it).
    pub fn populate(&self, address: GuestAddress, len: usize) -> io::Result<()> {
        self.advise(address, len, libc::MADV_POPULATE_READ)
    }

    /// Has the host allocate `len` bytes from `address` on, whole pages of one region, at once. If they are written next, there is no
    /// page fault for each of them.
    ///
    /// # Errors
    /// If the host has no memory, or its kernel does not offer this (Linux 5.14 has it).
    pub fn allocate(&self, address: GuestAddress, len: usize) -> io::Result<()> {
        self.advise(address, len, libc::MADV_POPULATE_WRITE)
    }

    fn advise(&self, address: GuestAddress, len: usize, advice: libc::c_int) -> io::Result<()> {
        let pages = self.host_range(address, len);
        let pages = pages.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the pages are within a region. The advice is one that changes no content.
        match unsafe { libc::madvise(pages.as_ptr().cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the files that the memory is mapped or filled from, in ascending order of their addresses.
    pub fn layers(&self) -> Vec<Layer> {
        let files = self.files();
        let layers = files.as_ref().map(|files| files.layers.as_slice().to_vec());
        layers.unwrap_or_default()
    }

    /// Returns whether it was mapped from files or filled by a program, so that
    /// [`written_pages`](GuestMemory::written_pages) are known.
    pub fn knows_written_pages(&self) -> bool {
        self.files().is_some()
    }

    /// Returns the pages that were discarded since files were mapped there.
    pub(crate) fn discarded(&self) -> Option<PageSet> {
        self.files().as_ref().map(|files| files.discarded.clone())
    }

    fn files(&self) -> MutexGuard<'_, Option<Files>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
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
        match self.is_of_files.load(Ordering::Acquire) {
            true => Backing::PrivateFile,
            false => self.backing,
        }
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
    ///
    /// # Errors
    /// If the host's kernel has no memory for `membarrier`. The pages are lost then.
    pub fn take_dirty(&self) -> io::Result<PageSet> {
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
        let backing = self.backing();
        let Some(pages) = backing.whole_pages(&(start..start + len)) else {
            return Ok(0);
        };
        let (pointer, len) = (pointer.wrapping_add(pages.start - start), pages.len());
        // SAFETY: the pages are within a region, which is mapped as this backing is. Nothing
        // borrows the bytes of guest memory, and the guest could make them zero at any time too.
        let result = unsafe { backing.discard(pointer, len) };
        self.note_discarded(pointer, len);
        // The call may have failed after some of the pages.
        self.mark_host(pointer, len);
        result.map(|()| len)
    }
}

impl GuestMemory {
    /// Notes that `len` bytes at a host address do not have the content of their file any more.
    fn note_discarded(&self, pointer: *const u8, len: usize) {
        let Some(files) = &mut *self.files() else {
            return;
        };
        let place = self.find_host(pointer, len);
        let place = place.and_then(|(index, offset)| Some((self.regions().nth(index)?, offset)));
        if let Some((region, offset)) = place {
            let start = region.start.0 + offset as u64;
            for address in (start..start + len as u64).step_by(PAGE_SIZE) {
                files.discarded.insert(GuestAddress(address));
            }
        }
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
