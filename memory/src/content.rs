//! Which pages of guest memory have content, so that the others need not be read.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::GuestAddress;

use crate::{GuestMemory, PAGE_SIZE, PageSet};

/// The kernel's table of the pages of this process (Documentation/admin-guide/mm/pagemap.rst).
const PAGE_MAP: &str = "/proc/self/pagemap";
/// The page has memory.
const PRESENT: u64 = 1 << 63;
/// The page has been swapped out.
const SWAPPED: u64 = 1 << 62;
/// The page is one of a file's, or shared.
const OF_FILE: u64 = 1 << 61;

/// Entries of the table that are read at once.
const ENTRIES: usize = 8192;
const ENTRY_SIZE: usize = size_of::<u64>();

/// The table, once it is open.
static OPEN_PAGE_MAP: OnceLock<File> = OnceLock::new();

/// Opens the kernel's table of the pages of this process, which says what guest memory has content. Otherwise it is
/// opened when it is needed first: too late for a process that has hidden its memory (`PR_SET_DUMPABLE`).
///
/// # Errors
/// If it cannot be opened.
pub fn open_page_map() -> io::Result<()> {
    page_map().map(drop)
}

fn page_map() -> io::Result<&'static File> {
    if let Some(table) = OPEN_PAGE_MAP.get() {
        return Ok(table);
    }
    let table = File::open(PAGE_MAP)?;
    Ok(OPEN_PAGE_MAP.get_or_init(|| table))
}

impl GuestMemory {
    /// Returns the pages that can differ from zero. All others read as zero; most of those in the result do not, except
    /// without `/proc`: then these are all pages. While the guest or a device writes, pages may be missing.
    ///
    /// # Errors
    /// If the host does not say which pages have memory (`/proc/self/pagemap`).
    pub fn pages_with_content(&self) -> io::Result<PageSet> {
        if !self.knows_written_pages() {
            return self.or_all(self.present_pages());
        }
        let layers = self.layers();
        if layers.is_empty() {
            return Ok(self.all_pages());
        }
        let mut pages = self.written_pages()?;
        for layer in layers {
            pages.add_data(&layer.file, layer.start, layer.len, layer.offset)?;
        }
        Ok(pages)
    }

    /// Returns the pages that have been written or discarded since the memory was mapped from files. If a program fills the
    /// memory, these are all pages that it has filled, as they do not show whether they have been written. Without `/proc` these
    /// are all pages.
    ///
    /// # Errors
    /// If the memory was neither mapped from files nor filled by a program, or the host does not say which pages have memory.
    pub fn written_pages(&self) -> io::Result<PageSet> {
        if !self.knows_written_pages() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // A page that was only read is the file's.
        let pages = self.pages_by(|entry| entry & (PRESENT | SWAPPED) != 0 && entry & OF_FILE == 0);
        let mut pages = self.or_all(pages)?;
        if let Some(discarded) = self.discarded() {
            pages.add(&discarded);
        }
        Ok(pages)
    }

    /// Returns the pages that have memory of the host: those that were touched, and others that the kernel, or the program that
    /// fills them, has added at the same time.
    ///
    /// # Errors
    /// If the host does not say which pages have memory.
    pub fn present_pages(&self) -> io::Result<PageSet> {
        self.pages_by(|entry| entry & (PRESENT | SWAPPED) != 0)
    }

    fn all_pages(&self) -> PageSet {
        PageSet::from_words(self.regions().map(|region| {
            let words = (region.len as usize / PAGE_SIZE).div_ceil(u64::BITS as usize);
            (region.start, region.len, vec![u64::MAX; words])
        }))
    }

    /// Returns all pages in place of those that the kernel does not tell, as in a jail without `/proc`.
    fn or_all(&self, pages: io::Result<PageSet>) -> io::Result<PageSet> {
        match pages {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(self.all_pages()),
            pages => pages,
        }
    }

    /// Returns the pages whose entry of the kernel's table meets `condition`.
    fn pages_by(&self, condition: impl Fn(u64) -> bool) -> io::Result<PageSet> {
        let table = page_map()?;
        let mut bytes = vec![0; ENTRIES * ENTRY_SIZE];
        let mut regions = Vec::new();
        for region in self.regions() {
            let page_count = region.len as usize / PAGE_SIZE;
            let first = region.host_address as usize / PAGE_SIZE;
            let mut words = vec![0; page_count.div_ceil(u64::BITS as usize)];
            for start in (0..page_count).step_by(ENTRIES) {
                let count = ENTRIES.min(page_count - start);
                let bytes = &mut bytes[..count * ENTRY_SIZE];
                table.read_exact_at(bytes, ((first + start) * ENTRY_SIZE) as u64)?;
                let (entries, _) = bytes.as_chunks();
                for (page, entry) in (start..).zip(entries) {
                    if condition(u64::from_ne_bytes(*entry)) {
                        words[page / u64::BITS as usize] |= 1 << (page % u64::BITS as usize);
                    }
                }
            }
            regions.push((region.start, region.len, words));
        }
        Ok(PageSet::from_words(regions))
    }

    /// Returns whether the page at `address` is all zero; `false` if it is not a page of guest memory.
    pub fn is_zero_page(&self, address: GuestAddress) -> bool {
        let Some(pointer) = self.host_range(address, PAGE_SIZE) else {
            return false;
        };
        let words = pointer.as_ptr().cast::<AtomicU64>();
        if !words.is_aligned() {
            return false;
        }
        // Most pages with content differ from zero early on.
        (0..PAGE_SIZE / ENTRY_SIZE).step_by(8).all(|first| {
            let mut bits = 0;
            for index in first..first + 8 {
                // SAFETY: the page is mapped as long as `self` is, the pointer is aligned, and the guest too changes
                // words in it only by accesses to memory that other processors may access.
                bits |= unsafe { &*words.add(index) }.load(Ordering::Relaxed);
            }
            bits == 0
        })
    }
}

impl PageSet {
    /// Adds the pages for which `file` has data, of the `len` bytes at `address` that begin at `offset` in the file.
    ///
    /// # Errors
    /// Those of `lseek`.
    pub fn add_data(
        &mut self,
        file: &File,
        address: GuestAddress,
        len: u64,
        offset: u64,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut position = offset;
        while position < end {
            let data = seek(file, position, libc::SEEK_DATA)?;
            let Some(data) = data.filter(|&data| data < end) else {
                break;
            };
            let hole = seek(file, data, libc::SEEK_HOLE)?.unwrap_or(end).min(end);
            let first = (data - offset) & !(PAGE_SIZE as u64 - 1);
            for page in (first..hole - offset).step_by(PAGE_SIZE) {
                self.insert(GuestAddress(address.0 + page));
            }
            position = hole.max(data + 1);
        }
        Ok(())
    }
}

/// Returns where the next data or the next hole begins; `None` past the last one.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, whence) };
    if let Ok(position) = u64::try_from(result) {
        return Ok(Some(position));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        error => Err(error),
    }
}
