//! Fills pages of guest memory from the memory file when they are touched.

use std::collections::{HashSet, VecDeque};
use std::io;
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
/// For how many bytes it is looked at once which of them the file has data for. A file may have data and holes by turns, so
/// that this takes long for all of it.
const SECTION: u64 = 64 << 20;
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
    /// What is filled after those.
    fills: Fills,
    /// What is still to be filled in the background.
    queue: VecDeque<(GuestAddress, usize)>,
    /// The pages that the file has data for, as far as it was looked at. All others are zero.
    data: PageSet,
    /// The first addresses of the sections of memory for which it was looked at.
    sections: HashSet<u64>,
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

/// Which pages are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fills {
    /// Those that are touched.
    Touched,
    /// All, which are not in the queue yet.
    All,
    /// All. Those that have not been filled are in the queue.
    Rest,
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
            fills: match fills_all {
                true => Fills::All,
                false => Fills::Touched,
            },
            queue: VecDeque::new(),
            data: none.clone(),
            sections: HashSet::new(),
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
        if let Some(first) = self.first.take() {
            self.enqueue(&first);
        }
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
            self.take_events()?;
            if self.link.is_over() {
                self.fills = Fills::Touched;
                self.queue.clear();
            } else if self.queue.is_empty() && self.awaited.is_empty() {
                self.go_on_to_all()?;
            }
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
                Outcome::Done => match self.fills {
                    Fills::Touched => None,
                    Fills::All => Some(Duration::ZERO),
                    Fills::Rest => {
                        self.pages.complete();
                        tracing::info!("all guest memory has been copied");
                        return Ok(());
                    }
                },
            };
        }
    }

    /// Adds pages to what is filled in the background.
    fn enqueue(&mut self, pages: &PageSet) {
        for (start, len) in pages.runs(usize::MAX) {
            let page = self.page_size as u64;
            let (first, end) = (start.0 & !(page - 1), start.0 + len as u64);
            let len = end.next_multiple_of(page) - first;
            self.queue.push_back((GuestAddress(first), len as usize));
        }
    }

    /// Adds all pages with data to the queue, if they are to be filled and not there yet.
    fn go_on_to_all(&mut self) -> Result<(), Error> {
        if self.fills == Fills::All {
            let pages = self
                .file
                .data_pages()
                .map_err(|error| self.unreadable(error))?;
            self.file.check_unchanged().map_err(Error::MemoryFile)?;
            self.enqueue(&pages);
            self.fills = Fills::Rest;
        }
        Ok(())
    }

    /// Finds out for which pages around this one the file has data.
    fn look_at(&mut self, page: GuestAddress) -> Result<(), Error> {
        let section = page.0 & !(SECTION - 1);
        if self.sections.insert(section) {
            let regions = self.pages.memory().regions();
            let parts =
                regions.map(|it| (it.start.0.max(section), it.end().min(section + SECTION)));
            for (start, end) in parts.filter(|(start, end)| start < end) {
                let data = self
                    .file
                    .add_data(&mut self.data, GuestAddress(start), end - start);
                data.map_err(|error| self.unreadable(error))?;
            }
            // What has been cut off looks like a hole.
            self.file.check_unchanged().map_err(Error::MemoryFile)?;
        }
        Ok(())
    }

    fn unreadable(&self, source: io::Error) -> Error {
        let path = self.file.path().to_path_buf();
        Error::MemoryFile(SnapshotFileError::Read { path, source })
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
        self.look_at(page)?;
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
            self.look_at(GuestAddress(first))?;
            let source = self.source(GuestAddress(first));
            let fits = |it: &u64| {
                *it - first < PIECE as u64
                    && *it / SECTION == first / SECTION
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::Instant;

    use bantam_memory::{Backing, GuestBuffers, GuestMemory, UserfaultError};
    use bantam_snapshot::{Facts, MemoryWriter, put_in_place};
    use proptest::prelude::*;
    use vm_memory::Bytes;
    use vmm_sys_util::tempdir::TempDir;

    use super::super::MemoryService;
    use super::super::tests::service;
    use super::*;
    use crate::hooks::ThreadRole;

    const PAGE: u64 = PAGE_SIZE as u64;
    const PAGES: u64 = 100;
    const PATIENCE: Duration = Duration::from_secs(20);
    /// Two regions with a hole between them, in the middle of a block.
    const REGIONS: [(GuestAddress, usize); 2] = [
        (GuestAddress(0), 70 * PAGE_SIZE),
        (GuestAddress(100 * PAGE), 30 * PAGE_SIZE),
    ];

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Read(u64),
        Write(u64),
        Discard(u64),
    }

    fn address(page: u64) -> GuestAddress {
        GuestAddress(if page < 70 { page } else { page + 30 } * PAGE)
    }

    /// Makes a memory file in which each page of `data` consists of its number.
    fn file(folder: &TempDir, data: &[u64]) -> Arc<MemoryFile> {
        let memory = Arc::new(GuestMemory::new(&REGIONS, Backing::Anonymous).unwrap());
        for &page in data {
            let bytes = [page as u8 | 0x80; PAGE_SIZE];
            memory.write_slice(&bytes, address(page)).unwrap();
        }
        let regions = memory.regions().map(|it| (it.start.0, it.len));
        let facts = Facts::now(None, regions).unwrap();
        let path = folder.as_path().join("memory");
        let writer = MemoryWriter::create(&path, &facts).unwrap();
        writer
            .write(&memory, &memory.pages_with_content().unwrap())
            .unwrap();
        let file = writer.finish().unwrap();
        put_in_place([file]).unwrap();
        let file = File::open(&path).unwrap();
        Arc::new(MemoryFile::of(file, &path, &facts).unwrap())
    }

    fn set(pages: &[u64]) -> PageSet {
        let mut set = PageSet::empty(REGIONS.map(|(start, len)| (start, len as u64)));
        for page in pages {
            set.insert(address(*page));
        }
        set
    }

    /// Returns memory that is filled from `file`; `None` if this user may not have it.
    fn filled(
        file: &Arc<MemoryFile>,
        first: Option<PageSet>,
        fills_all: bool,
        fills_one: bool,
    ) -> Option<(Arc<GuestMemory>, MemoryService)> {
        let memory = Arc::new(GuestMemory::new(&REGIONS, Backing::Anonymous).unwrap());
        let pages = match MissingPages::of(memory.clone(), &file.layers()) {
            Ok(pages) => pages,
            Err(error @ UserfaultError::Register(_)) => panic!("{error}"),
            Err(error) => {
                eprintln!("skipped: {error}");
                return None;
            }
        };
        let mut service = service(&memory);
        let link = service.link.clone();
        let filler = Filler::new(link, pages, file.clone(), first, fills_all, fills_one);
        service
            .spawn(&ThreadRole::Memory, None, || filler.run())
            .unwrap();
        Some((memory, service))
    }

    fn wait_until(done: impl Fn() -> bool) {
        let begin = Instant::now();
        while !done() {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn each_page_has_the_content_of_the_file_until_it_is_changed(
            data in prop::collection::vec(0..PAGES, 0..60),
            first in prop::option::of(prop::collection::vec(0..PAGES, 0..30)),
            [fills_all, fills_one] in any::<[bool; 2]>(),
            steps in prop::collection::vec((0..3, 0..PAGES), 0..60),
        ) {
            let folder = TempDir::new().unwrap();
            let file = file(&folder, &data);
            let first = first.map(|pages| set(&pages));
            let Some((memory, _service)) = filled(&file, first, fills_all, fills_one) else {
                return Ok(());
            };
            let mut model: Vec<u8> = (0..PAGES)
                .map(|page| if data.contains(&page) { page as u8 | 0x80 } else { 0 })
                .collect();
            let steps = steps.into_iter().map(|(kind, page)| match kind {
                0 => Step::Read(page),
                1 => Step::Write(page),
                _ => Step::Discard(page),
            });
            for step in steps.chain((0..PAGES).map(Step::Read)) {
                match step {
                    Step::Read(page) => {
                        let mut bytes = [1; PAGE_SIZE];
                        memory.read_slice(&mut bytes, address(page)).unwrap();
                        prop_assert!(bytes == [model[page as usize]; PAGE_SIZE], "{}", page);
                    }
                    Step::Write(page) => {
                        memory.write_slice(&[7; PAGE_SIZE], address(page)).unwrap();
                        model[page as usize] = 7;
                    }
                    Step::Discard(page) => {
                        let mut buffers = GuestBuffers::new(memory.clone());
                        buffers.push(address(page), PAGE as u32).unwrap();
                        buffers.discard_front(usize::MAX).unwrap();
                        model[page as usize] = 0;
                    }
                }
            }
            prop_assert!(!memory.is_lost());
        }
    }

    #[test]
    fn a_page_is_filled_with_those_around_it() {
        let folder = TempDir::new().unwrap();
        let file = file(&folder, &[17, 18, 19, 20, 22, 40, 69, 70]);
        let present = |fills_one, touched: u64, first: &[u64]| {
            let (memory, _service) = filled(&file, Some(set(first)), false, fills_one)?;
            wait_until(|| memory.present_pages().unwrap().len() >= first.len());
            memory.read_obj::<u8>(address(touched)).unwrap();
            let pages = memory.present_pages().unwrap();
            Some(
                (0..PAGES)
                    .filter(|page| pages.contains(address(*page)))
                    .collect::<Vec<_>>(),
            )
        };
        let Some(pages) = present(false, 18, &[]) else {
            return;
        };
        assert_eq!(pages, [17, 18, 19, 20]);
        assert_eq!(present(true, 18, &[]).unwrap(), [18]);
        assert_eq!(present(false, 18, &[19, 40]).unwrap(), [17, 18, 19, 40]);
        // Not beyond the end of a region.
        assert_eq!(present(false, 69, &[]).unwrap(), [69]);
        assert_eq!(present(false, 70, &[]).unwrap(), [70]);
    }

    #[test]
    fn no_page_is_missing_when_all_have_been_filled() {
        let folder = TempDir::new().unwrap();
        let file = file(&folder, &[3, 99]);
        let Some((memory, _service)) = filled(&file, None, true, false) else {
            return;
        };
        wait_until(|| !memory.is_missing_pages());
        assert_eq!(memory.present_pages().unwrap(), set(&[3, 99]));
        assert_eq!(memory.read_obj::<u8>(address(98)).unwrap(), 0);
        assert!(!memory.is_lost());
    }

    #[test]
    fn a_file_that_is_cut_fails_the_machine() {
        let folder = TempDir::new().unwrap();
        let file = file(&folder, &[3]);
        let Some((memory, service)) = filled(&file, None, false, false) else {
            return;
        };
        let path = folder.as_path().join("memory");
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_len(0)
            .unwrap();
        assert_eq!(memory.read_obj::<u8>(address(3)).unwrap(), 0);
        assert!(memory.is_lost());
        let error = service.begin().unwrap_err();
        assert!(matches!(error, Error::MemoryFile(_)), "{error}");
    }

    #[test]
    fn who_waits_at_the_end_of_the_machine_is_freed() {
        let folder = TempDir::new().unwrap();
        let file = file(&folder, &[3]);
        let Some((memory, service)) = filled(&file, None, false, false) else {
            return;
        };
        let end = || service.link.control.finish(Ok(crate::ExitReason::Stopped));
        end();
        // Pages are still filled for a while.
        assert_eq!(memory.read_obj::<u8>(address(3)).unwrap(), 0x83);
        wait_until(|| memory.is_lost());
        assert_eq!(memory.read_obj::<u8>(address(50)).unwrap(), 0);
    }
}
