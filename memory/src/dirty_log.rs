//! The log of the pages of guest memory that the monitor has written.

use std::io;
use std::iter;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, compiler_fence};

use vm_memory::GuestAddress;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::{PAGE_SIZE, PageSet};

/// Pages per word of the log.
const PAGES_PER_WORD: usize = u64::BITS as usize;

/// A bit for each page of guest memory. While the log is on, the bit is set after the monitor has
/// written to the page.
///
/// A thread that reads memory after it has taken a page from the log, or after it has started the
/// log, sees what was written before. A writer needs no barrier for this: it writes, and then checks
/// whether the log is on and the bit is set already. [`DirtyLog::start`] and [`DirtyLog::take`] have a
/// barrier of the whole process, after they have changed the flag or the bits and before the memory is
/// read: a writer that has checked before it has written before it, too.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    is_on: AtomicBool,
    /// Made when the log is first started, and kept: a writer may still set a bit after the log was
    /// stopped.
    words: OnceLock<Box<[AtomicU64]>>,
    regions: Vec<LoggedRegion>,
}

/// The bits of one region.
#[derive(Debug, Clone, Copy)]
struct LoggedRegion {
    start: GuestAddress,
    /// Length in bytes.
    len: usize,
    first_word: usize,
    word_count: usize,
}

impl DirtyLog {
    /// Makes a log, which is off, of regions given by their start and their length in bytes.
    pub(crate) fn new(regions: impl IntoIterator<Item = (GuestAddress, usize)>) -> DirtyLog {
        let mut first_word = 0;
        let regions = regions.into_iter().map(|(start, len)| {
            let word_count = len.div_ceil(PAGE_SIZE * PAGES_PER_WORD);
            let region = LoggedRegion {
                start,
                len,
                first_word,
                word_count,
            };
            first_word += word_count;
            region
        });
        DirtyLog {
            is_on: AtomicBool::new(false),
            regions: regions.collect(),
            words: OnceLock::new(),
        }
    }

    /// Returns whether the caller has to mark what it just wrote.
    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        // The processor may still read the flag before other threads see the write. If it finds the
        // log off, `start` comes later, and its barrier makes the write visible.
        compiler_fence(Ordering::SeqCst);
        self.is_on.load(Ordering::Relaxed)
    }

    /// Starts the log, empty. When this returns, all writes to pages that are not in the log are
    /// visible to the caller.
    ///
    /// # Errors
    /// If the kernel has no barrier for all threads of a process (`membarrier`).
    pub(crate) fn start(&self) -> io::Result<()> {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED)?;
        let word_count = self.regions.iter().map(|region| region.word_count).sum();
        let words = self.words.get_or_init(|| {
            iter::repeat_with(AtomicU64::default)
                .take(word_count)
                .collect()
        });
        for word in words {
            word.store(0, Ordering::Relaxed);
        }
        self.is_on.store(true, Ordering::SeqCst);
        membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED).inspect_err(|_| self.stop())
    }

    /// Stops the log.
    pub(crate) fn stop(&self) {
        self.is_on.store(false, Ordering::SeqCst);
    }

    /// Removes the pages that were marked since the log was started, or since the last call, and
    /// returns them.
    ///
    /// # Errors
    /// If the kernel's barrier fails. The pages are lost then.
    pub(crate) fn take(&self) -> io::Result<PageSet> {
        let words = self.words.get().map(Box::as_ref).unwrap_or_default();
        let take = |word: &AtomicU64| match word.load(Ordering::Relaxed) {
            // A bit that is set meanwhile is for the next call.
            0 => 0,
            _ => word.swap(0, Ordering::AcqRel),
        };
        let regions = self.regions.iter().map(|region| {
            let words = words.get(region.first_word..).unwrap_or_default();
            let words = words.iter().take(region.word_count).map(take).collect();
            (region.start, region.len as u64, words)
        });
        let pages = PageSet::from_words(regions);
        // A log that was never started has not prepared the barrier, nor has it pages.
        if !words.is_empty() {
            membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED)?;
        }
        Ok(pages)
    }

    /// Marks the pages of `len` bytes, which have been written, `offset` bytes after the start of
    /// the region at index `region`.
    #[cold]
    #[inline(never)]
    pub(crate) fn mark(&self, region: usize, offset: usize, len: usize) {
        let (Some(words), Some(region)) = (self.words.get(), self.regions.get(region)) else {
            return;
        };
        let Some(last_byte) = len.checked_sub(1).and_then(|len| offset.checked_add(len)) else {
            return;
        };
        let words = words.get(region.first_word..).unwrap_or_default();
        let (first, last) = (offset / PAGE_SIZE, last_byte / PAGE_SIZE);
        let (first_word, last_word) = (first / PAGES_PER_WORD, last / PAGES_PER_WORD);
        let affected = words.iter().take(region.word_count).enumerate();
        for (index, word) in affected.take(last_word + 1).skip(first_word) {
            let mut bits = u64::MAX;
            if index == first_word {
                bits &= u64::MAX << (first % PAGES_PER_WORD);
            }
            if index == last_word {
                bits &= u64::MAX >> (PAGES_PER_WORD - 1 - last % PAGES_PER_WORD);
            }
            // Most writes are to pages of a ring or a buffer that are in the log already. To look costs less than to
            // change the word. A bit that appears to be set and has been taken meanwhile is no loss: `take` then has
            // its barrier after this look, and so after the write.
            if word.load(Ordering::Relaxed) & bits != bits {
                word.fetch_or(bits, Ordering::Release);
            }
        }
    }
}

/// Makes every thread of this process pass a memory barrier, or prepares for that.
fn membarrier(command: libc::c_int) -> io::Result<()> {
    // SAFETY: the call takes only integers and changes no memory.
    match unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The log as `vm-memory` sees it: from an offset in a region on.
#[derive(Debug, Clone, Copy)]
pub struct LogSlice<'a> {
    log: &'a DirtyLog,
    region: usize,
    offset: usize,
}

impl Bitmap for LogSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.log.is_on() {
            self.log.mark(self.region, self.offset + offset, len);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = (self.offset + offset) / PAGE_SIZE;
        let region = self.log.regions.get(self.region);
        let word = region
            .zip(self.log.words.get())
            .and_then(|(region, words)| {
                let word = page / PAGES_PER_WORD;
                (word < region.word_count).then(|| &words[region.first_word + word])
            });
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (page % PAGES_PER_WORD) & 1 != 0)
    }

    fn slice_at(&self, offset: usize) -> Self {
        LogSlice {
            offset: self.offset + offset,
            ..*self
        }
    }
}

impl WithBitmapSlice<'_> for LogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for LogSlice<'_> {}

/// The log of one region, as held by a mapping of `vm-memory`.
#[derive(Debug, Clone)]
pub struct RegionLog {
    log: std::sync::Arc<DirtyLog>,
    region: usize,
}

impl RegionLog {
    pub(crate) fn new(log: std::sync::Arc<DirtyLog>, region: usize) -> RegionLog {
        RegionLog { log, region }
    }

    fn whole(&self) -> LogSlice<'_> {
        LogSlice {
            log: &self.log,
            region: self.region,
            offset: 0,
        }
    }
}

impl Bitmap for RegionLog {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.whole().mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.whole().dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> LogSlice<'_> {
        self.whole().slice_at(offset)
    }
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = LogSlice<'a>;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Pages of two regions, the first of which does not fill its last word.
    const PAGES: [usize; 2] = [70, 130];
    const STARTS: [u64; 2] = [0x10_0000, 0x80_0000];

    #[derive(Debug, Clone)]
    enum Step {
        Mark {
            region: usize,
            offset: usize,
            len: usize,
        },
        Take,
        Start,
        Stop,
    }

    fn step() -> impl Strategy<Value = Step> {
        let mark = (0..2_usize).prop_flat_map(|region| {
            let size = PAGES[region] * PAGE_SIZE;
            (0..size, prop_oneof![0..10_usize, 0..size]).prop_map(move |(offset, len)| {
                let len = len.min(size - offset);
                Step::Mark {
                    region,
                    offset,
                    len,
                }
            })
        });
        prop_oneof![
            6 => mark,
            2 => Just(Step::Take),
            1 => Just(Step::Start),
            1 => Just(Step::Stop),
        ]
    }

    proptest! {
        #[test]
        fn the_log_is_a_set_of_pages(steps in prop::collection::vec(step(), 1..60)) {
            let log = DirtyLog::new([0, 1].map(|index| {
                (GuestAddress(STARTS[index]), PAGES[index] * PAGE_SIZE)
            }));
            let log = std::sync::Arc::new(log);
            let regions = [0, 1].map(|region| RegionLog::new(log.clone(), region));
            let (mut is_on, mut model) = (false, BTreeSet::new());
            for step in steps {
                match step {
                    Step::Mark { region, offset, len } => {
                        // In two steps, as slices of a mapping do.
                        let cut = offset / 2;
                        regions[region].slice_at(cut).mark_dirty(offset - cut, len);
                        if is_on {
                            let bytes = offset as u64..(offset + len) as u64;
                            let pages = bytes.map(|byte| byte / PAGE_SIZE as u64);
                            let pages: BTreeSet<u64> = pages.collect();
                            let address = |page| STARTS[region] + page * PAGE_SIZE as u64;
                            model.extend(pages.into_iter().map(address));
                        }
                    }
                    Step::Take => {
                        let pages: Vec<u64> = log.take().unwrap().iter().map(|page| page.0).collect();
                        let expected: Vec<u64> = std::mem::take(&mut model).into_iter().collect();
                        prop_assert_eq!(pages, expected);
                    }
                    Step::Start => {
                        log.start().unwrap();
                        is_on = true;
                        model.clear();
                    }
                    Step::Stop => {
                        log.stop();
                        is_on = false;
                    }
                }
                for (region, regions_log) in regions.iter().enumerate() {
                    let offset = 69 * PAGE_SIZE;
                    let address = STARTS[region] + offset as u64;
                    prop_assert_eq!(regions_log.dirty_at(offset), model.contains(&address));
                }
            }
        }
    }

    #[test]
    fn bytes_past_the_end_of_a_region_mark_no_other() {
        let log = DirtyLog::new(
            [0, 1].map(|index| (GuestAddress(STARTS[index]), PAGES[index] * PAGE_SIZE)),
        );
        log.start().unwrap();
        log.mark(0, usize::MAX, 2);
        log.mark(0, 1 << 40, 1);
        log.mark(2, 0, 1);
        assert_eq!(log.take().unwrap().iter().next(), None);
        log.mark(0, 0, usize::MAX);
        assert!(log.take().unwrap().iter().all(|page| page.0 < STARTS[1]));
    }
}
