use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_memory::Bytes;
use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::{FilePosition, GuestBuffers, PAGE_SIZE};

const PAGE: u64 = PAGE_SIZE as u64;
const NONE: [u64; 0] = [];
/// Two regions that touch, then a hole, then a third.
const REGIONS: [(GuestAddress, usize); 3] = [
    (GuestAddress(0), 4 * PAGE_SIZE),
    (GuestAddress(4 * PAGE), 4 * PAGE_SIZE),
    (GuestAddress(16 * PAGE), 4 * PAGE_SIZE),
];

fn logged_memory() -> Arc<GuestMemory> {
    let memory = Arc::new(GuestMemory::from_ranges(&REGIONS).unwrap());
    memory.start_dirty_log().unwrap();
    memory
}

/// Takes the log's pages and returns their numbers.
fn dirty(memory: &GuestMemory) -> Vec<u64> {
    let pages = memory.take_dirty().unwrap();
    pages.iter().map(|address| address.0 / PAGE).collect()
}

fn buffers(memory: &Arc<GuestMemory>, ranges: &[(u64, u32)]) -> GuestBuffers {
    let mut buffers = GuestBuffers::new(memory.clone());
    for &(address, len) in ranges {
        buffers.push(GuestAddress(address), len).unwrap();
    }
    buffers
}

fn file_of(len: u64) -> File {
    let file = TempFile::new().unwrap().into_file();
    file.set_len(len).unwrap();
    file
}

#[test]
fn regions_are_found_by_address() {
    let memory = GuestMemory::from_ranges(&REGIONS).unwrap();
    assert_eq!(memory.size(), 12 * PAGE);
    let ends: Vec<u64> = memory.regions().map(|region| region.end()).collect();
    assert_eq!(ends, [4 * PAGE, 8 * PAGE, 20 * PAGE]);
    assert!(memory.contains(GuestAddress(0), 8 * PAGE_SIZE));
    assert!(!memory.contains(GuestAddress(0), 8 * PAGE_SIZE + 1));
    assert!(!memory.contains(GuestAddress(u64::MAX), 2));
    let region = memory.regions().nth(2).unwrap();
    let range = memory.host_range(GuestAddress(16 * PAGE + 5), 1).unwrap();
    assert_eq!(range.addr().get() as u64, region.host_address + 5);
    assert!(memory.host_range(GuestAddress(4 * PAGE - 1), 2).is_none());
    assert!(memory.host_range(GuestAddress(u64::MAX), 1).is_none());
    let overlapping = [
        (GuestAddress(0), 2 * PAGE_SIZE),
        (GuestAddress(PAGE), PAGE_SIZE),
    ];
    let error = GuestMemory::from_ranges(&overlapping).unwrap_err();
    assert!(matches!(error, MapError::Regions(_)), "{error}");
    assert!(GuestMemory::from_ranges(&[]).is_err());
}

#[test]
fn writes_are_logged_and_reads_are_not() {
    let memory = logged_memory();
    let mut list = buffers(&memory, &[(3 * PAGE - 1, 2), (18 * PAGE, 4)]);
    let mut bytes = [0; 3];
    list.read_at(0, &mut bytes);
    assert_eq!(dirty(&memory), NONE);
    list.write_at(1, b"ab");
    assert_eq!(dirty(&memory), [3, 18]);
    list.write(b"a");
    assert_eq!(dirty(&memory), [2]);
    assert_eq!(dirty(&memory), NONE);

    let long = vec![1; 2 * PAGE_SIZE];
    let mut list = buffers(&memory, &[(2 * PAGE + 8, 4 * PAGE as u32)]);
    list.write(&long);
    assert_eq!(dirty(&memory), [2, 3, 4]);

    memory.write_slice(&long, GuestAddress(PAGE)).unwrap();
    assert_eq!(dirty(&memory), [1, 2]);
    let mut file = file_of(2 * PAGE);
    let address = GuestAddress(17 * PAGE);
    memory
        .read_exact_volatile_from(address, &mut file, PAGE_SIZE)
        .unwrap();
    assert_eq!(dirty(&memory), [17]);

    memory.mark_written(GuestAddress(5 * PAGE), 1);
    memory.mark_written(GuestAddress(9 * PAGE), 1);
    assert_eq!(dirty(&memory), [5]);
}

#[test]
fn words_are_logged() {
    let memory = logged_memory();
    let words = memory.range::<u32>(GuestAddress(PAGE - 8), 4).unwrap();
    assert_eq!(words.get(0, Ordering::Relaxed), Some([0; 4]));
    assert_eq!(words.get::<2>(3, Ordering::Relaxed), None);
    assert_eq!(words.get::<1>(usize::MAX, Ordering::Relaxed), None);
    assert_eq!(dirty(&memory), NONE);
    words.store(0, [1, 2], Ordering::Relaxed);
    assert_eq!(dirty(&memory), [0]);
    words.store(1, [3, 4], Ordering::Relaxed);
    assert_eq!(dirty(&memory), [0, 1]);
    words.store(3, [5], Ordering::Release);
    assert_eq!(dirty(&memory), [1]);
    assert_eq!(words.get(0, Ordering::Relaxed), Some([1, 3, 4, 5]));
    assert_eq!(words.load(2, Ordering::Relaxed), 4);
    words.store_unmarked(3, [6], Ordering::Relaxed);
    assert_eq!(dirty(&memory), NONE);
    words.mark_all();
    assert_eq!(dirty(&memory), [0, 1]);
    let bytes = memory.range::<u8>(GuestAddress(PAGE - 7), 15).unwrap();
    let [word] = bytes.get_unaligned(3).unwrap();
    assert_eq!(word, u64::from_le_bytes([3, 0, 0, 0, 4, 0, 0, 0]));
    assert_eq!(bytes.get_unaligned::<1>(8), None);
    assert!(memory.range::<u16>(GuestAddress(1), 1).is_none());
    assert!(memory.range::<u64>(GuestAddress(4 * PAGE - 8), 2).is_none());
    assert!(memory.range::<u64>(GuestAddress(0), usize::MAX).is_none());
}

#[test]
fn buffers_that_the_kernel_fills_are_logged() {
    let memory = logged_memory();
    let ranges = [(0, 4), (3 * PAGE - 2, 4), (16 * PAGE, 3 * PAGE as u32)];
    let position = Some(FilePosition {
        offset: 0,
        flags: 0,
    });
    let mut list = buffers(&memory, &ranges);
    assert_eq!(list.read_from(file_of(100).as_fd(), position).unwrap(), 100);
    assert_eq!(
        dirty(&memory),
        [0, 2, 3, 16, 17, 18],
        "all that storage may have written"
    );
    let mut list = buffers(&memory, &ranges);
    let closed = File::open("/").unwrap();
    list.read_from(closed.as_fd(), position).unwrap_err();
    assert_eq!(
        dirty(&memory),
        [0, 2, 3, 16, 17, 18],
        "a failure may come late"
    );

    let (mut sender, receiver) = UnixStream::pair().unwrap();
    receiver.set_nonblocking(true).unwrap();
    sender.write_all(&[1; 7]).unwrap();
    let mut list = buffers(&memory, &ranges);
    assert_eq!(list.read_from(receiver.as_fd(), None).unwrap(), 7);
    assert_eq!(dirty(&memory), [0, 2, 3], "what has come and no more");
    list.read_from(receiver.as_fd(), None).unwrap_err();
    assert_eq!(dirty(&memory), NONE);
    assert_eq!(
        list.write_to(sender.as_fd(), None).unwrap(),
        list_size(&ranges) - 7
    );
    assert_eq!(dirty(&memory), NONE);

    let mut list = buffers(&memory, &ranges);
    assert_eq!(list.vectors_to_fill().len(), 3);
    list.mark_filled(6);
    assert_eq!(dirty(&memory), [0, 2]);
    assert_eq!(list.len(), list_size(&ranges));
}

fn list_size(ranges: &[(u64, u32)]) -> usize {
    ranges.iter().map(|&(_, len)| len as usize).sum()
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "lent to be filled")]
fn a_list_that_is_filled_does_not_change() {
    let memory = logged_memory();
    let mut list = buffers(&memory, &[(0, 4)]);
    list.vectors_to_fill();
    list.advance(4);
}

#[test]
fn discarded_pages_are_logged() {
    let memory = logged_memory();
    let mut list = buffers(&memory, &[(PAGE - 1, 2 + 2 * PAGE as u32), (18 * PAGE, 1)]);
    assert_eq!(
        list.discard_front(usize::MAX & !(PAGE_SIZE - 1)).unwrap(),
        2 * PAGE_SIZE
    );
    assert_eq!(dirty(&memory), [1, 2]);
    assert_eq!(list.discard_front(PAGE_SIZE).unwrap(), 0);
    assert_eq!(dirty(&memory), NONE);
    let elsewhere = [0_u8; 1];
    let error = memory.discard_host(elsewhere.as_ptr().cast_mut(), 1);
    assert_eq!(error.unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn only_a_log_that_is_on_is_written_to() {
    let memory = Arc::new(GuestMemory::from_ranges(&REGIONS).unwrap());
    let write = |page: u64| buffers(&memory, &[(page * PAGE, 1)]).write(&[1]);
    write(0);
    assert_eq!(dirty(&memory), NONE);
    memory.start_dirty_log().unwrap();
    write(1);
    memory.stop_dirty_log();
    write(2);
    assert_eq!(dirty(&memory), [1]);
    memory.start_dirty_log().unwrap();
    write(3);
    memory.start_dirty_log().unwrap();
    write(17);
    assert_eq!(dirty(&memory), [17], "a start empties the log");
}

/// Copies memory the way a migration does, while another thread writes.
#[test]
fn a_copy_by_the_log_is_whole() {
    for _ in 0..50 {
        let memory = Arc::new(GuestMemory::from_ranges(&REGIONS).unwrap());
        let ends = Arc::new(AtomicBool::new(false));
        let writer = thread::spawn({
            let (memory, ends) = (memory.clone(), ends.clone());
            move || {
                let mut lists: Vec<_> = [0, 1, 2, 3, 5, 17, 19]
                    .map(|page| buffers(&memory, &[(page * PAGE + 8, 8)]))
                    .into_iter()
                    .collect();
                let mut number = 0_u64;
                while !ends.load(Ordering::Relaxed) {
                    number += 1;
                    let count = lists.len() as u64;
                    lists[(number * number % count) as usize].write_at(0, &number.to_le_bytes());
                }
            }
        });
        let read = |address: GuestAddress| {
            let mut page = vec![0; PAGE_SIZE];
            memory.read_slice(&mut page, address).unwrap();
            page
        };
        let pages = || (0..20).filter(|page| !(8..16).contains(page));
        let all = || pages().map(|page| GuestAddress(page * PAGE));
        memory.start_dirty_log().unwrap();
        let mut copy: std::collections::BTreeMap<_, _> =
            all().map(|address| (address, read(address))).collect();
        for _ in 0..20 {
            for address in memory.take_dirty().unwrap().iter() {
                copy.insert(address, read(address));
            }
        }
        ends.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        for address in memory.take_dirty().unwrap().iter() {
            copy.insert(address, read(address));
        }
        for address in all() {
            assert!(
                copy[&address] == read(address),
                "{address:?} is not as it was"
            );
        }
    }
}

/// Pages of [`REGIONS`] in a file, each filled with its number there plus one, except that pages 5 to 7 are a hole.
fn mapped_file() -> GuestMemory {
    let file = file_of(12 * PAGE);
    for page in (0..12_u8).filter(|page| !(5..8).contains(page)) {
        let bytes = [page + 1; PAGE_SIZE];
        file.write_all_at(&bytes, u64::from(page) * PAGE).unwrap();
    }
    GuestMemory::from_file(&REGIONS, Arc::new(file)).unwrap()
}

fn numbers(pages: &PageSet) -> Vec<u64> {
    pages.iter().map(|address| address.0 / PAGE).collect()
}

#[test]
fn memory_of_a_file_has_its_content_and_leaves_it_alone() {
    let memory = mapped_file();
    let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
    assert_eq!(
        [byte(0), byte(4), byte(5), byte(16), byte(19)],
        [1, 5, 0, 9, 12]
    );
    assert_eq!(numbers(&memory.written_pages().unwrap()), NONE);
    memory.write_obj(7_u8, GuestAddress(17 * PAGE)).unwrap();
    memory.write_obj(7_u8, GuestAddress(6 * PAGE)).unwrap();
    assert_eq!(numbers(&memory.written_pages().unwrap()), [6, 17]);
    let content = [0, 1, 2, 3, 4, 6, 16, 17, 18, 19];
    assert_eq!(numbers(&memory.pages_with_content().unwrap()), content);
    let mut bytes = [0];
    memory.layers()[0]
        .file
        .read_exact_at(&mut bytes, 9 * PAGE)
        .unwrap();
    assert_eq!(bytes, [10]);
}

#[test]
fn discarded_memory_of_a_file_reads_as_zero() {
    let memory = Arc::new(mapped_file());
    memory.write_obj(7_u8, GuestAddress(2 * PAGE)).unwrap();
    let mut discarded = buffers(&memory, &[(PAGE, 2 * PAGE as u32)]);
    assert_eq!(discarded.discard_front(usize::MAX).unwrap(), 2 * PAGE_SIZE);
    let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
    assert_eq!([byte(0), byte(1), byte(2), byte(3)], [1, 0, 0, 4]);
    assert!(memory.is_zero_page(GuestAddress(PAGE)));
    assert!(!memory.is_zero_page(GuestAddress(0)));
    memory.write_obj(8_u8, GuestAddress(PAGE)).unwrap();
    assert_eq!(byte(1), 8);
}

#[test]
fn a_file_shorter_than_the_memory_is_refused() {
    let file = Arc::new(file_of(12 * PAGE - 1));
    assert!(GuestMemory::from_file(&REGIONS, file).is_err());
}

#[test]
fn only_pages_that_were_touched_have_content() {
    let memory = GuestMemory::from_ranges(&REGIONS).unwrap();
    assert_eq!(numbers(&memory.pages_with_content().unwrap()), NONE);
    memory.write_obj(7_u8, GuestAddress(3 * PAGE + 9)).unwrap();
    memory.write_obj(7_u8, GuestAddress(19 * PAGE)).unwrap();
    assert_eq!(numbers(&memory.pages_with_content().unwrap()), [3, 19]);
    assert!(memory.is_zero_page(GuestAddress(0)));
    assert!(!memory.is_zero_page(GuestAddress(3 * PAGE)));
    assert!(!memory.is_zero_page(GuestAddress(3 * PAGE + 1)));
    assert!(!memory.is_zero_page(GuestAddress(20 * PAGE)));
}
