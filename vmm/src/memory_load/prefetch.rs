//! Reads a mapped memory file ahead.

use std::io;

use bantam_memory::PageSet;
use bantam_snapshot::MemoryFile;
use vm_memory::GuestAddress;

use super::Link;

/// Most bytes that are mapped at once. The machine's end, and changes of its mappings, may have to wait for that.
const PIECE: usize = 2 << 20;
/// How many bytes the host is asked for ahead of those that are mapped.
const AHEAD: usize = 32 << 20;
/// Pages up to so many bytes apart are read together, as that takes less time than another request.
const GAP: u64 = 64 << 10;

/// Reads the pages of `first`, and then, if it `reads_all`, all others that the file has data for.
pub(super) fn prefetch(link: &Link, file: &MemoryFile, first: Option<PageSet>, reads_all: bool) {
    let result = first
        .map_or(Ok(()), |pages| read(link, file, &pages))
        .and_then(|()| match reads_all {
            true => read(link, file, &file.data_pages()?),
            false => Ok(()),
        });
    match result {
        // Linux has it since 5.14.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            tracing::debug!("guest memory is read ahead, but not mapped: {error}");
        }
        Err(error) => tracing::warn!(
            "guest memory is not read ahead any more, but when it is touched: {error}"
        ),
        Ok(()) => {}
    }
}

fn read(link: &Link, file: &MemoryFile, pages: &PageSet) -> io::Result<()> {
    let mut requests = requests(pages).peekable();
    let (mut requested, mut read) = (0, 0);
    for (address, len) in pages.runs(PIECE) {
        while let Some(request) = requests.next_if(|_| requested < read + AHEAD) {
            file.read_ahead(request.start, request.len);
            requested += request.wanted;
        }
        if link.is_over() {
            return Ok(());
        }
        link.memory.populate(address, len)?;
        read += len;
    }
    Ok(())
}

/// A part of memory that the host is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    start: GuestAddress,
    len: usize,
    /// How many of its bytes are wanted.
    wanted: usize,
}

/// Returns what to ask the host for so that it reads `pages`.
fn requests(pages: &PageSet) -> impl Iterator<Item = Request> {
    let mut runs = pages.runs(PIECE).peekable();
    std::iter::from_fn(move || {
        let (start, len) = runs.next()?;
        let mut request = Request {
            start,
            len,
            wanted: len,
        };
        let longer = |request: &Request, &(next, more): &(GuestAddress, usize)| {
            let gap = next.0 - (start.0 + request.len as u64);
            gap <= GAP && request.wanted + more <= AHEAD
        };
        while let Some((next, more)) = runs.next_if(|run| longer(&request, run)) {
            request.len = (next.0 - start.0) as usize + more;
            request.wanted += more;
        }
        Some(request)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = bantam_memory::PAGE_SIZE as u64;

    #[test]
    fn pages_that_are_close_together_are_read_together() {
        let regions = [(GuestAddress(0), 16 << 30)];
        let mut pages = PageSet::empty(regions);
        for page in [3, 4, 20, 37, 38] {
            pages.insert(GuestAddress(page * PAGE));
        }
        let request = |first: u64, len: u64, wanted: u64| Request {
            start: GuestAddress(first * PAGE),
            len: (len * PAGE) as usize,
            wanted: (wanted * PAGE) as usize,
        };
        let found: Vec<_> = requests(&pages).collect();
        assert_eq!(found, [request(3, 36, 5)]);
        pages.insert(GuestAddress(56 * PAGE));
        let found: Vec<_> = requests(&pages).collect();
        assert_eq!(found, [request(3, 36, 5), request(56, 1, 1)]);
        // No request is without limit.
        let all = PageSet::from_words([(GuestAddress(0), 1 << 30, vec![u64::MAX; 4096])]);
        let found: Vec<_> = requests(&all).collect();
        assert_eq!(found.len(), (1 << 30) / AHEAD);
        assert!(found.iter().all(|it| it.len == AHEAD));
    }
}
