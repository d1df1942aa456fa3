use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::{Backing, GuestBuffers, PAGE_SIZE, PageSet, Sharing};

const PAGE: u64 = PAGE_SIZE as u64;
/// Two regions with a hole between them.
const REGIONS: [(GuestAddress, usize); 2] = [
    (GuestAddress(0), 8 * PAGE_SIZE),
    (GuestAddress(16 * PAGE), 4 * PAGE_SIZE),
];
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns memory whose pages are missing; `None` if this user may not have it.
fn missing(content: &[Layer]) -> Option<Arc<MissingPages>> {
    let memory = Arc::new(GuestMemory::new(&REGIONS, Backing::Anonymous).unwrap());
    match MissingPages::of(memory, content) {
        Ok(pages) => Some(Arc::new(pages)),
        Err(error @ UserfaultError::Register(_)) => panic!("{error}"),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Waits for the next event.
fn next_event(pages: &MissingPages) -> MemoryEvent {
    let mut poll = libc::pollfd {
        fd: pages.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid structure is passed.
    let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE.as_millis() as libc::c_int) };
    assert_eq!(ready, 1, "no event");
    let events = pages.take_events().unwrap();
    assert_eq!(events.len(), 1);
    events[0]
}

/// Touches the page with this number on another thread, which sends the byte that it has found.
fn touch(pages: &MissingPages, page: u64) -> mpsc::Receiver<u8> {
    let (sender, receiver) = mpsc::channel();
    let memory = pages.memory().clone();
    thread::spawn(move || {
        let byte = memory.read_obj::<u8>(GuestAddress(page * PAGE + 7));
        let _ = sender.send(byte.unwrap());
    });
    receiver
}

fn numbers(pages: &PageSet) -> Vec<u64> {
    pages.iter().map(|address| address.0 / PAGE).collect()
}

#[test]
fn who_touches_a_missing_page_waits_until_it_is_filled() {
    let Some(pages) = missing(&[]) else { return };
    assert!(pages.memory().is_missing_pages());
    assert_eq!(pages.take_events().unwrap(), []);
    let found = touch(&pages, 17);
    assert_eq!(
        next_event(&pages),
        MemoryEvent::Missing(GuestAddress(17 * PAGE))
    );
    assert!(found.recv_timeout(Duration::from_millis(50)).is_err());
    let content = [9; 2 * PAGE_SIZE];
    let filled = pages.fill(GuestAddress(17 * PAGE), &content).unwrap();
    assert_eq!(filled, Filled::Bytes(2 * PAGE_SIZE));
    assert_eq!(found.recv_timeout(PATIENCE), Ok(9));
    assert_eq!(touch(&pages, 18).recv_timeout(PATIENCE), Ok(9));
    // What is there is not filled again.
    let again = pages.fill(GuestAddress(18 * PAGE), &[1; PAGE_SIZE]);
    assert_eq!(again.unwrap(), Filled::Present);
    // The pages before it are.
    let more = pages.fill(GuestAddress(16 * PAGE), &[5; 2 * PAGE_SIZE]);
    assert_eq!(more.unwrap(), Filled::Bytes(PAGE_SIZE));
    assert_eq!(touch(&pages, 16).recv_timeout(PATIENCE), Ok(5));
    let zeroes = pages.fill_with_zeroes(GuestAddress(0), PAGE_SIZE);
    assert_eq!(zeroes.unwrap(), Filled::Bytes(PAGE_SIZE));
    assert_eq!(touch(&pages, 0).recv_timeout(PATIENCE), Ok(0));
    assert!(pages.fill(GuestAddress(8 * PAGE), &[0; PAGE_SIZE]).is_err());
}

#[test]
fn pages_that_are_discarded_are_reported_before_they_are_zero() {
    let Some(pages) = missing(&[]) else { return };
    pages.fill(GuestAddress(0), &[3; 8 * PAGE_SIZE]).unwrap();
    let memory = pages.memory().clone();
    let discarding = thread::spawn(move || {
        let mut buffers = GuestBuffers::new(memory);
        buffers
            .push(GuestAddress(2 * PAGE), 3 * PAGE as u32)
            .unwrap();
        buffers.discard_front(usize::MAX).unwrap()
    });
    let expected = MemoryEvent::Discarded {
        start: GuestAddress(2 * PAGE),
        len: 3 * PAGE,
    };
    assert_eq!(next_event(&pages), expected);
    assert_eq!(discarding.join().unwrap(), 3 * PAGE_SIZE);
    let found = touch(&pages, 3);
    assert_eq!(
        next_event(&pages),
        MemoryEvent::Missing(GuestAddress(3 * PAGE))
    );
    pages
        .fill_with_zeroes(GuestAddress(3 * PAGE), PAGE_SIZE)
        .unwrap();
    assert_eq!(found.recv_timeout(PATIENCE), Ok(0));
    assert_eq!(
        numbers(&pages.memory().written_pages().unwrap()),
        [0, 1, 2, 3, 4, 5, 6, 7]
    );
}

#[test]
fn giving_up_frees_all_who_wait() {
    let Some(pages) = missing(&[]) else { return };
    pages.fill(GuestAddress(0), &[3; PAGE_SIZE]).unwrap();
    let memory = pages.memory().clone();
    let mut buffers = GuestBuffers::new(memory.clone());
    buffers.push(GuestAddress(0), 2 * PAGE as u32).unwrap();
    let read = thread::spawn(move || buffers.await_pages());
    let found = touch(&pages, 19);
    let discarding = {
        let memory = memory.clone();
        thread::spawn(move || {
            let mut buffers = GuestBuffers::new(memory);
            buffers.push(GuestAddress(0), PAGE as u32).unwrap();
            buffers.discard_front(usize::MAX).unwrap()
        })
    };
    assert!(found.recv_timeout(Duration::from_millis(50)).is_err());
    assert!(!memory.is_lost());
    pages.give_up();
    assert_eq!(found.recv_timeout(PATIENCE), Ok(0));
    assert!(memory.is_lost());
    // What has come meanwhile is no longer asked for.
    assert!(!read.join().unwrap());
    assert_eq!(discarding.join().unwrap(), PAGE_SIZE);
    assert_eq!(touch(&pages, 18).recv_timeout(PATIENCE), Ok(0));
}

#[test]
fn complete_memory_is_like_any_other() {
    let Some(pages) = missing(&[]) else { return };
    pages.fill(GuestAddress(0), &[3; PAGE_SIZE]).unwrap();
    pages.complete();
    let memory = pages.memory();
    assert!(!memory.is_missing_pages() && !memory.is_lost());
    assert_eq!(touch(&pages, 19).recv_timeout(PATIENCE), Ok(0));
    let mut buffers = GuestBuffers::new(memory.clone());
    buffers.push(GuestAddress(0), PAGE as u32).unwrap();
    assert!(buffers.await_pages());
    assert_eq!(buffers.discard_front(usize::MAX).unwrap(), PAGE_SIZE);
    let filled = pages.fill(GuestAddress(PAGE), &[1; PAGE_SIZE]).unwrap();
    assert_eq!(filled, Filled::Replaced);
}

#[test]
fn a_snapshot_needs_the_pages_of_the_files_and_those_that_were_filled() {
    let mut file = TempFile::new().unwrap().into_file();
    file.set_len(12 * PAGE).unwrap();
    file.write_all(&[1; PAGE_SIZE]).unwrap();
    let file: Arc<File> = Arc::new(file);
    let layers = REGIONS.map(|(start, len)| Layer {
        start,
        len: len as u64,
        file: file.clone(),
        offset: if start.0 == 0 { 0 } else { 8 * PAGE },
    });
    let Some(pages) = missing(&layers) else {
        return;
    };
    pages.fill(GuestAddress(5 * PAGE), &[2; PAGE_SIZE]).unwrap();
    let memory = pages.memory();
    assert_eq!(numbers(&memory.pages_with_content().unwrap()), [0, 5]);
    assert_eq!(numbers(&memory.written_pages().unwrap()), [5]);
    assert_eq!(numbers(&memory.present_pages().unwrap()), [5]);

    // If the files are not known, it needs all.
    let Some(pages) = missing(&[]) else { return };
    let all = pages.memory().pages_with_content().unwrap();
    assert_eq!(all.len(), 12);
}

#[test]
fn memory_that_is_shared_has_no_missing_pages_any_more() {
    let Some(pages) = missing(&[]) else { return };
    let memory = pages.memory().clone();
    let sharing = thread::spawn(move || {
        let sharing = Sharing::begin(&memory).unwrap();
        sharing.finish().unwrap()
    });
    while !sharing.is_finished() {
        for event in pages.take_events().unwrap() {
            if let MemoryEvent::Missing(address) = event {
                pages
                    .fill(address, &[address.0 as u8 | 1; PAGE_SIZE])
                    .unwrap();
            }
        }
    }
    let layers = sharing.join().unwrap();
    assert!(!pages.memory().is_missing_pages());
    let child = GuestMemory::from_layers(&REGIONS, &layers).unwrap();
    let mut bytes = [0; 2];
    for memory in [&child, &**pages.memory()] {
        memory
            .read_slice(&mut bytes, GuestAddress(18 * PAGE))
            .unwrap();
        assert_eq!(bytes, [1, 1]);
    }
    let filled = pages.fill(GuestAddress(0), &[1; PAGE_SIZE]).unwrap();
    assert_eq!(filled, Filled::Replaced);
}
