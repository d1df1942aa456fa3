//! Queues on which a driver names pages that the host can have: `inflateq` (section 5.5.6), `free_page_vq`
//! (section 5.5.6.5) and `reporting_vq` (section 5.5.6.7).

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bantam_memory::{BufferError, GuestBuffers, GuestMemory};
use vm_memory::GuestAddress;

use super::{Shared, WorkerError, lock};
use crate::virtio::{Chain, DriverLink, MAX_TURN, VirtQueue};

/// Size of a balloon's page in bytes, whatever the guest's page size is.
const PAGE_SIZE: u32 = 4096;
/// Size of a page number in bytes.
const PAGE_NUMBER_SIZE: usize = size_of::<u32>();
/// Most page numbers that are processed together. Linux sends no more than that in a request.
const MAX_PAGE_NUMBERS: usize = 256;
/// Most bytes that are discarded by one system call, which takes milliseconds for that many.
const MAX_DISCARD: usize = 32 << 20;

/// How requests name pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// By their numbers, in a buffer to be read: `inflateq`.
    Numbers,
    /// The pages themselves are the buffers, for the device to write: `reporting_vq`.
    Buffers,
    /// The pages themselves are the buffers, as long as they answer the owner's request; between them come
    /// commands in buffers to be read: `free_page_vq`.
    Hints,
}

/// A queue whose requests name pages to be discarded.
///
/// However many pages a request names, they are discarded in parts, over as many turns of the event loop as
/// that takes.
pub(super) struct DiscardQueue {
    naming: Naming,
    queue: VirtQueue,
    /// The request in progress. Its page numbers are dropped as they are read.
    chain: Chain,
    is_under_way: bool,
    /// Pages to discard before more of the request is read.
    pages: GuestBuffers,
    shared: Arc<Shared>,
}

impl DiscardQueue {
    pub(super) fn new(
        naming: Naming,
        queue: VirtQueue,
        memory: &Arc<GuestMemory>,
        shared: Arc<Shared>,
    ) -> DiscardQueue {
        DiscardQueue {
            naming,
            queue,
            chain: Chain::new(memory),
            is_under_way: false,
            pages: GuestBuffers::new(memory.clone()),
            shared,
        }
    }

    pub(super) fn queue(&self) -> &VirtQueue {
        &self.queue
    }

    /// Puts back the request in progress, to be done again from its beginning: its pages belong to the device
    /// until it is returned.
    pub(super) fn put_back(&mut self) {
        if std::mem::take(&mut self.is_under_way) {
            self.pages.clear();
            self.queue.undo_pop();
        }
    }

    /// Serves the queue until it is empty or its turn is over; then the doorbell is rung for the rest.
    pub(super) fn serve(&mut self, link: &DriverLink) -> Result<(), WorkerError> {
        self.queue.disable_doorbell();
        let result = self.serve_turn(link);
        self.queue.notify_driver(link);
        result
    }

    fn serve_turn(&mut self, link: &DriverLink) -> Result<(), WorkerError> {
        let start = Instant::now();
        loop {
            if self.is_under_way || self.begin(link)? {
                self.proceed(link)?;
            } else if self.queue.enable_doorbell()? {
                self.queue.disable_doorbell();
            } else {
                return Ok(());
            }
            if start.elapsed() >= MAX_TURN {
                self.queue.ring_doorbell();
                return Ok(());
            }
        }
    }

    /// Takes the next request; `false` if there is none.
    fn begin(&mut self, link: &DriverLink) -> Result<bool, WorkerError> {
        if !self.queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        match self.naming {
            Naming::Numbers => check_page_numbers(&self.chain)?,
            Naming::Buffers => {
                let chain = &mut self.chain;
                let (readable, writable) = (chain.readable.len(), chain.writable.len());
                if readable > 0 || writable == 0 {
                    return Err(WorkerError::Report {
                        head: chain.head,
                        readable,
                        writable,
                    });
                }
                self.pages.append(&mut chain.writable);
            }
            Naming::Hints => {
                let chain = &mut self.chain;
                let (readable, writable) = (chain.readable.len(), chain.writable.len());
                match (chain.readable.read_array(), writable) {
                    (Some(command), 0) if chain.readable.is_empty() => {
                        let command = u32::from_le_bytes(command);
                        self.shared
                            .change_hinting(link, |hinting| hinting.take_guest_command(command));
                    }
                    (None, 1..) if readable == 0 => self.pages.append(&mut chain.writable),
                    _ => {
                        return Err(WorkerError::Hint {
                            head: chain.head,
                            readable,
                            writable,
                        });
                    }
                }
            }
        }
        self.is_under_way = true;
        Ok(true)
    }

    /// Does a part of the request in progress, and returns the request after the last part.
    fn proceed(&mut self, link: &DriverLink) -> Result<(), WorkerError> {
        if self.pages.is_empty() {
            let head = self.chain.head;
            take_page_numbers(&mut self.chain.readable, &mut self.pages)
                .map_err(|source| WorkerError::Page { head, source })?;
        }
        let discarded = self.discard_part();
        let (metrics, naming) = (&*self.shared.metrics, self.naming);
        match discarded {
            Ok(size) => match naming {
                Naming::Numbers => {}
                Naming::Buffers => metrics.free_page_report_freed.add(size as u64),
                Naming::Hints => metrics.free_page_hint_freed.add(size as u64),
            },
            // There is no way to tell the driver, and it makes no difference to the guest.
            Err(error) => {
                link.warn_of_host(format_args!("the host does not take memory back: {error}"));
                match naming {
                    Naming::Numbers => metrics.event_fails.add(1),
                    Naming::Buffers => metrics.free_page_report_fails.add(1),
                    Naming::Hints => metrics.free_page_hint_fails.add(1),
                }
            }
        }
        if self.pages.is_empty() && self.chain.readable.is_empty() {
            match naming {
                Naming::Numbers => metrics.inflate_count.add(1),
                Naming::Buffers => metrics.free_page_report_count.add(1),
                Naming::Hints => metrics.free_page_hint_count.add(1),
            }
            self.queue.add_used(self.chain.head, 0);
            self.is_under_way = false;
        }
        Ok(())
    }

    /// Discards the first part of the remaining pages.
    fn discard_part(&mut self) -> io::Result<usize> {
        if self.naming != Naming::Hints {
            return self.pages.discard_front(MAX_DISCARD);
        }
        // Held until the pages are gone: the driver uses them again as soon as it is told that the device is
        // done.
        let hinting = lock(&self.shared.hinting);
        if !hinting.answers_request() {
            self.pages.clear();
            return Ok(0);
        }
        self.pages.discard_front(MAX_DISCARD)
    }
}

/// Checks that a request consists of at least one page number and nothing else.
pub(super) fn check_page_numbers(chain: &Chain) -> Result<(), WorkerError> {
    let (readable, writable) = (chain.readable.len(), chain.writable.len());
    if readable == 0 || !readable.is_multiple_of(PAGE_NUMBER_SIZE) || writable > 0 {
        return Err(WorkerError::PageNumbers {
            head: chain.head,
            readable,
            writable,
        });
    }
    Ok(())
}

/// Takes some page numbers from the front of a list, and appends the pages to `pages`, with consecutive pages
/// merged.
fn take_page_numbers(list: &mut GuestBuffers, pages: &mut GuestBuffers) -> Result<(), BufferError> {
    let mut numbers = [0; MAX_PAGE_NUMBERS];
    let mut count = 0;
    for number in &mut numbers {
        let Some(bytes) = list.read_array() else {
            break;
        };
        *number = u32::from_le_bytes(bytes);
        count += 1;
    }
    let numbers = &mut numbers[..count];
    // A driver takes pages wherever they are free, often in descending order.
    numbers.sort_unstable();
    for run in numbers.chunk_by(|number, next| next - number <= 1) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            let address = u64::from(*first) * u64::from(PAGE_SIZE);
            pages.push(GuestAddress(address), (last - first + 1) * PAGE_SIZE)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use vm_memory::Bytes;

    use super::*;

    const PAGE_COUNT: u32 = 64;
    /// The page with the list of numbers.
    const LIST: u64 = 80 * PAGE_SIZE as u64;

    /// Takes all of a list of page numbers, and returns the resulting ranges of page numbers.
    fn taken(numbers: &[u32]) -> Result<Vec<(u32, u32)>, BufferError> {
        let regions = [
            (GuestAddress(0), (PAGE_COUNT * PAGE_SIZE) as usize),
            (GuestAddress(LIST), PAGE_SIZE as usize),
        ];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let start = memory.regions().next().unwrap().host_address as usize;
        let bytes: Vec<u8> = numbers.iter().flat_map(|it| it.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        let mut list = GuestBuffers::new(memory.clone());
        // In two parts, with a number across both.
        list.push(GuestAddress(LIST), 2).unwrap();
        let rest = bytes.len() as u32 - 2;
        list.push(GuestAddress(LIST + 2), rest).unwrap();
        let mut pages = GuestBuffers::new(memory.clone());
        while !list.is_empty() {
            take_page_numbers(&mut list, &mut pages)?;
        }
        let range = |vector: &libc::iovec| {
            let offset = vector.iov_base.addr() - start;
            let (first, count) = (offset as u32 / PAGE_SIZE, vector.iov_len as u32 / PAGE_SIZE);
            (first, first + count)
        };
        Ok(pages.vectors().iter().map(range).collect())
    }

    #[test]
    fn pages_that_follow_one_another_are_one_range() {
        assert_eq!(taken(&[7]), Ok(vec![(7, 8)]));
        assert_eq!(
            taken(&[9, 8, 7, 7, 63, 0, 1, 3]),
            Ok(vec![(0, 2), (3, 4), (7, 10), (63, 64)])
        );
        let descending: Vec<u32> = (0..PAGE_COUNT).rev().collect();
        assert_eq!(taken(&descending), Ok(vec![(0, PAGE_COUNT)]));
    }

    #[test]
    fn pages_outside_of_memory_are_refused() {
        for number in [PAGE_COUNT, u32::MAX] {
            let address = u64::from(number) * u64::from(PAGE_SIZE);
            let len = PAGE_SIZE;
            let error = BufferError::OutsideMemory { address, len };
            assert_eq!(taken(&[0, number, 1]), Err(error));
        }
        assert!(taken(&[PAGE_COUNT - 1, PAGE_COUNT]).is_err());
    }

    proptest! {
        #[test]
        fn ranges_have_the_pages_that_were_named_and_no_others(
            numbers in prop::collection::vec(0..PAGE_COUNT, 1..1000),
        ) {
            let ranges = taken(&numbers).unwrap();
            let pages: BTreeSet<u32> = ranges.iter().flat_map(|&(start, end)| start..end).collect();
            prop_assert_eq!(pages, numbers.iter().copied().collect());
        }
    }
}
