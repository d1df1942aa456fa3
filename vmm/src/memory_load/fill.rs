//! Fills pages of guest memory from the memory file when they are touched.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bantam_memory::{Filled, MemoryEvent, MissingPages, PAGE_SIZE, PageSet};
use bantam_snapshot::{MemoryFile, SnapshotError as SnapshotFileError};
use nix::poll::PollFlags;
use vm_memory::GuestAddress;

use super::{Link, Patience, Turn};
use crate::error::Error;

/// How many bytes around a page that is touched are filled with it, as the guest is likely to touch them too.
const BLOCK: usize = 64 << 10;
/// How many bytes are filled at once in the background. A guest that touches another page meanwhile has to wait for that.
const PIECE: usize = 256 << 10;
/// How long to wait for the end of a discard, during which no page can be filled.
const DISCARD_TIME: Duration = Duration::from_millis(1);

/// Fills the missing pages of one machine, on a thread of its own.
pub(super) struct Filler {
    link: Arc<Link>,
    pages: MissingPages,
    file: Arc<MemoryFile>,
    /// Size of the pages that are filled at once, at least.
    page_size: usize,
    /// How much is filled when a page is touched.
    block: usize,
    /// The pages that are needed first.
    first: Option<PageSet>,
    /// Whether all pages are filled, whatever the guest touches.
    fills_all: bool,
    /// What is still to be filled in the background.
    queue: VecDeque<(GuestAddress, usize)>,
    /// The pages that the file has data for. All others are zero.
    data: PageSet,
    /// The pages that have been filled.
    done: PageSet,
    /// The pages that have been discarded, which are zero and may be missing again.
    discarded: PageSet,
    /// The pages that someone waits for.
    awaited: Vec<GuestAddress>,
    buffer: Vec<u8>,
}

/// Where the content of pages comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    File,
    Zero,
}

/// Whether pages could be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Done,
    /// Pages are being discarded, so it has to be tried again.
    TryAgain,
    /// Files were mapped in the place of the memory.
    Replaced,
}

impl Filler {
    /// Prepares to fill `pages` from `file`, those of `first` before they are touched, and, if it `fills_all`, then all others
    /// as well. If it `fills_one`, it fills no others with a page that is touched.
    pub(super) fn new(
        link: Arc<Link>,
        pages: MissingPages,
        file: Arc<MemoryFile>,
        first: Option<PageSet>,
        fills_all: bool,
        fills_one: bool,
    ) -> Filler {
        let page_size = pages.memory().backing().page_size();
        let regions = pages.memory().regions();
        let none = PageSet::empty(regions.map(|region| (region.start, region.len)));
        Filler {
            link,
            pages,
            file,
            page_size,
            block: match fills_one {
                true => page_size,
                false => BLOCK.max(page_size),
            },
            first,
            fills_all,
            queue: VecDeque::new(),
            data: none.clone(),
            done: none.clone(),
            discarded: none,
            awaited: Vec::new(),
            buffer: Vec::new(),
        }
    }

    /// Fills pages until the machine has ended, or none is missing any more.
    pub(super) fn run(mut self) {
        if let Err(error) = self.fill_pages() {
            self.link.fail(error);
            self.link.give_up(&self.pages);
        }
    }

    fn fill_pages(&mut self) -> Result<(), Error> {
        self.prepare()?;
        let mut patience = Patience::default();
        let mut time = Some(Duration::ZERO);
        loop {
            match patience.wait(&self.link, self.pages.as_fd(), PollFlags::POLLIN, time) {
                Turn::End => {
                    self.pages.give_up();
                    return Ok(());
                }
                Turn::GiveUp => {
                    self.link.give_up(&self.pages);
                    return Ok(());
                }
                Turn::Ready | Turn::Other => {}
            }
            if self.link.is_over() {
                self.fills_all = false;
                self.queue.clear();
            }
            self.take_events()?;
            let mut outcome = Outcome::Done;
            for address in std::mem::take(&mut self.awaited) {
                outcome = self.fill_awaited(address)?;
                match outcome {
                    Outcome::Done => {}
                    Outcome::TryAgain => self.awaited.push(address),
                    Outcome::Replaced => return Ok(()),
                }
            }
            if self.awaited.is_empty() {
                outcome = self.fill_next()?;
            }
            time = match outcome {
                Outcome::Replaced => return Ok(()),
                Outcome::TryAgain => Some(DISCARD_TIME),
                Outcome::Done if !self.queue.is_empty() => Some(Duration::ZERO),
                Outcome::Done if self.fills_all => {
                    self.pages.complete();
                    tracing::info!("all guest memory has been copied");
                    return Ok(());
                }
                Outcome::Done => None,
            };
        }
    }

    /// Finds out what there is to fill.
    fn prepare(&mut self) -> Result<(), Error> {
        let data = self.file.data_pages();
        let path = self.file.path().to_path_buf();
        self.data =
            data.map_err(|source| Error::MemoryFile(SnapshotFileError::Read { path, source }))?;
        let first = self.first.take();
        let rest = self.fills_all.then_some(&self.data);
        for (start, len) in first.iter().chain(rest).flat_map(|it| it.runs(usize::MAX)) {
            let page = self.page_size as u64;
            let (first, end) = (start.0 & !(page - 1), start.0 + len as u64);
            let len = end.next_multiple_of(page) - first;
            self.queue.push_back((GuestAddress(first), len as usize));
        }
        Ok(())
    }

    fn take_events(&mut self) -> Result<(), Error> {
        for event in self.pages.take_events().map_err(Error::FillMemory)? {
            match event {
                MemoryEvent::Missing(address) => {
                    let page = address.0 & !(self.page_size as u64 - 1);
                    self.awaited.push(GuestAddress(page));
                }
                MemoryEvent::Discarded { start, len } => {
                    for page in (start.0..start.0 + len).step_by(PAGE_SIZE) {
                        self.discarded.insert(GuestAddress(page));
                    }
                }
            }
        }
        Ok(())
    }

    /// Fills a page that someone waits for, and those around it.
    fn fill_awaited(&mut self, page: GuestAddress) -> Result<Outcome, Error> {
        if self.discarded.contains(page) {
            // It may have been filled before it was discarded.
            return self.fill(page, self.page_size, Source::Zero);
        }
        if self.done.contains(page) {
            self.pages.wake_at(page).map_err(Error::FillMemory)?;
            return Ok(Outcome::Done);
        }
        let (start, len, source) = self.around(page);
        self.fill(start, len, source)
    }

    /// Returns what is filled together with a page.
    fn around(&self, page: GuestAddress) -> (GuestAddress, usize, Source) {
        let first = page.0 & !(self.block as u64 - 1);
        let mut regions = self.pages.memory().regions();
        let region = regions.find(|it| (it.start.0..it.end()).contains(&page.0));
        let (lowest, end) = region.map_or((page.0, page.0), |it| (it.start.0, it.end()));
        let (first, end) = (first.max(lowest), (first + self.block as u64).min(end));
        let source = self.source(page);
        let fits = |it: &u64| !self.is_settled(*it) && self.source(GuestAddress(*it)) == source;
        let step = self.page_size;
        let before = 1..=(page.0 - first) as usize / step;
        let before = before.map(|count| page.0 - (count * step) as u64);
        let start = before.take_while(fits).last().unwrap_or(page.0);
        let after = (page.0..end).step_by(step).take_while(fits);
        let last = after.last().unwrap_or(page.0);
        (GuestAddress(start), (last - start) as usize + step, source)
    }

    /// Fills some pages of the queue.
    fn fill_next(&mut self) -> Result<Outcome, Error> {
        while let Some((start, len)) = self.queue.pop_front() {
            let end = start.0 + len as u64;
            let mut pages = (start.0..end).step_by(self.page_size);
            let Some(first) = pages.find(|page| !self.is_settled(*page)) else {
                continue;
            };
            let source = self.source(GuestAddress(first));
            let fits = |it: &u64| {
                *it - first < PIECE as u64
                    && !self.is_settled(*it)
                    && self.source(GuestAddress(*it)) == source
            };
            let last = pages.take_while(fits).last().unwrap_or(first);
            let next = last + self.page_size as u64;
            let outcome = self.fill(GuestAddress(first), (next - first) as usize, source)?;
            let rest = match outcome {
                Outcome::TryAgain => first,
                Outcome::Done | Outcome::Replaced => next,
            };
            if rest < end {
                let len = (end - rest) as usize;
                self.queue.push_front((GuestAddress(rest), len));
            }
            return Ok(outcome);
        }
        Ok(Outcome::Done)
    }

    /// Whether the page at this address must not be filled from the file any more.
    fn is_settled(&self, page: u64) -> bool {
        let page = GuestAddress(page);
        self.done.contains(page) || self.discarded.contains(page)
    }

    fn source(&self, page: GuestAddress) -> Source {
        let mut parts = (page.0..page.0 + self.page_size as u64).step_by(PAGE_SIZE);
        match parts.any(|part| self.data.contains(GuestAddress(part))) {
            true => Source::File,
            false => Source::Zero,
        }
    }

    /// Fills `len` bytes of pages from `start` on. Those that are there already stay as they are.
    fn fill(&mut self, start: GuestAddress, len: usize, source: Source) -> Result<Outcome, Error> {
        let is_huge = self.page_size != PAGE_SIZE;
        if source == Source::File || is_huge {
            self.buffer.clear();
            self.buffer.resize(len, 0);
        }
        if source == Source::File {
            let read = self.file.read_at(start, &mut self.buffer);
            read.map_err(Error::MemoryFile)?;
        }
        let mut filled = 0;
        while filled < len {
            let address = GuestAddress(start.0 + filled as u64);
            let result = match source {
                // The host has no page of zeroes of that size.
                Source::Zero if !is_huge => self.pages.fill_with_zeroes(address, len - filled),
                Source::Zero | Source::File => self.pages.fill(address, &self.buffer[filled..]),
            };
            let count = match result.map_err(Error::FillMemory)? {
                Filled::Bytes(count) => count,
                Filled::Present => self.page_size,
                Filled::Discarding => return Ok(Outcome::TryAgain),
                Filled::Replaced => return Ok(Outcome::Replaced),
            };
            for page in (0..count).step_by(PAGE_SIZE) {
                self.done.insert(GuestAddress(address.0 + page as u64));
            }
            filled += count;
        }
        Ok(Outcome::Done)
    }
}
