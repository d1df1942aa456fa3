use super::*;
use bantam_memory::{MissingPages, PAGE_SIZE};
use vm_memory::Bytes;

use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};

const DATA: u64 = 0x4000;
const QUEUE: u16 = 3;

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap())
}

fn buffer(offset: u64, len: u32, writable: bool) -> Buffer {
    let address = DATA + offset;
    Buffer {
        address,
        len,
        writable,
    }
}

/// Makes a driver and the device's side of a queue of four descriptors.
fn pair(event_index: bool) -> (TestDriver, VirtQueue, Chain) {
    let memory = memory();
    let driver = TestDriver::new(&memory, 0x1000, 4);
    const { assert!(0x1000 + RINGS_SIZE <= DATA) };
    let queue = driver.queue(QUEUE, event_index);
    (driver, queue, Chain::new(&memory))
}

#[test]
fn a_chain_is_taken_whole_and_returned() {
    let (mut driver, mut queue, mut chain) = pair(false);
    assert!(!queue.pop(&mut chain).unwrap());
    let head = driver.offer(&[buffer(0, 3, false), buffer(8, 5, true), buffer(16, 6, true)]);
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.readable.len(), chain.writable.len()), (3, 11));
    assert_eq!(chain.last_writable_byte, Some(GuestAddress(DATA + 21)));
    queue.undo_pop();
    assert!(queue.pop(&mut chain).unwrap());
    assert_eq!((chain.head, chain.writable.len()), (head, 11));
    queue.add_used(head, 7);
    assert_eq!(driver.take_used(), [(head, 7)]);
    assert!(!queue.pop(&mut chain).unwrap());
}

#[test]
fn chains_are_taken_behind_one_another_and_returned_together() {
    let (mut driver, mut queue, mut chain) = pair(false);
    for _ in 0..5 {
        let first = driver.offer(&[buffer(0, 3, true)]);
        let second = driver.offer(&[buffer(8, 4, true), buffer(16, 5, true)]);
        chain.writable.clear();
        assert!(queue.pop_behind(&mut chain).unwrap());
        assert_eq!((chain.head, chain.writable.len()), (first, 3));
        assert!(queue.pop_behind(&mut chain).unwrap());
        assert_eq!((chain.head, chain.writable.len()), (second, 12));
        queue.add_used_together(&[(second, 1), (first, 2)]);
        assert_eq!(driver.take_used(), [(second, 1), (first, 2)]);
    }
}

#[test]
fn chains_are_put_back_whichever_were_returned() {
    let (mut driver, mut queue, mut chain) = pair(false);
    let mut take = |queue: &mut VirtQueue, count: usize| -> Vec<u16> {
        let heads = (0..count).map(|_| queue.pop(&mut chain).unwrap().then_some(chain.head));
        heads.flatten().collect()
    };
    // Positions wrap, and each order occurs at each position.
    for round in 0..20_000 {
        let offered: Vec<u16> = (0..4)
            .map(|_| driver.offer(&[buffer(0, 8, true)]))
            .collect();
        let mut left = take(&mut queue, 3);
        assert_eq!(left, offered[..3]);
        queue.add_used(left.remove(round % 3), 0);
        queue.put_back(left.clone());
        let progress = queue.progress();
        assert_eq!(progress.next_available, progress.next_used);
        assert_eq!(queue.substitutes().is_empty(), round % 3 == 0);

        // One of them is taken, and returned or not, and the others are put back again.
        let first = take(&mut queue, 1);
        assert_eq!(first, left[..1]);
        queue.undo_pop();
        assert_eq!(take(&mut queue, 1), first);
        if round % 2 == 0 {
            queue.add_used(left.remove(0), 0);
            queue.put_back(Vec::new());
        } else {
            queue.put_back(first);
        }

        // Another queue continues with them.
        let progress = queue.progress();
        let mut other = driver.queue_from(0, false, progress);
        other.set_substitutes(queue.substitutes().to_vec());
        queue = other;
        left.push(offered[3]);
        assert_eq!(take(&mut queue, 4), left);
        for head in left {
            queue.add_used(head, 0);
        }
        let mut returned: Vec<u16> = driver.take_used().iter().map(|used| used.0).collect();
        returned.sort_unstable();
        assert_eq!(returned, [0, 1, 2, 3]);
    }
}

#[test]
fn what_breaks_the_rules_is_refused() {
    let (mut driver, mut queue, mut chain) = pair(false);
    driver.offer(&[buffer(0, 3, true), buffer(8, 5, false)]);
    let error = queue.pop(&mut chain).unwrap_err();
    assert!(
        matches!(error, QueueError::Order { head: 0, .. }),
        "{error}"
    );

    let (mut driver, mut queue, mut chain) = pair(false);
    driver.offer(&[buffer(0x4000, 1, true)]);
    let error = queue.pop(&mut chain).unwrap_err();
    assert!(
        matches!(error, QueueError::Buffer { head: 0, .. }),
        "{error}"
    );

    // A chain that is a loop, one whose link is out of range, and a head that is out of range.
    for (next, head) in [(0, 0), (4, 0), (0, 4)] {
        let (mut driver, mut queue, mut chain) = pair(false);
        driver.write_descriptor(0, buffer(0, 1, true), 1, next);
        driver.offer_head(head);
        let error = queue.pop(&mut chain).unwrap_err();
        assert!(matches!(error, QueueError::BrokenChain { .. }), "{error}");
    }

    let (mut driver, mut queue, mut chain) = pair(false);
    for _ in 0..5 {
        driver.offer_head(0);
    }
    let error = queue.pop(&mut chain).unwrap_err();
    assert!(
        matches!(error, QueueError::TooManyAvailable { .. }),
        "{error}"
    );
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let (driver, mut queue, _) = pair(false);
    assert!(!queue.needs_interrupt(), "nothing was returned");
    queue.add_used(0, 0);
    assert!(queue.needs_interrupt());
    driver.set_no_interrupt(true);
    queue.add_used(0, 0);
    assert!(!queue.needs_interrupt());
    driver.set_no_interrupt(false);
    assert!(!queue.needs_interrupt(), "that chain was considered");
}

#[test]
fn interrupts_come_at_the_event_index() {
    let (driver, mut queue, _) = pair(true);
    queue.add_used(0, 0);
    assert!(queue.needs_interrupt(), "the first, at index 0");
    queue.add_used(0, 0);
    assert!(!queue.needs_interrupt(), "index 0 has passed");
    driver.set_used_event(4);
    queue.add_used_together(&[(0, 0), (1, 0)]);
    assert!(!queue.needs_interrupt(), "index 4 is not returned yet");
    queue.add_used_together(&[(0, 0), (1, 0), (2, 0)]);
    assert!(queue.needs_interrupt(), "index 4 is among them");
    assert!(!queue.needs_interrupt());
    // The index wraps.
    driver.set_used_event(u16::MAX);
    let mut interrupts = 0;
    for _ in 7..=u16::MAX {
        queue.add_used(0, 0);
        interrupts += usize::from(queue.needs_interrupt());
    }
    assert_eq!(interrupts, 1);
}

#[test]
fn the_doorbell_is_asked_for_behind_chains_that_are_let_be() {
    for event_index in [false, true] {
        let (mut driver, mut queue, _) = pair(event_index);
        for _ in 0..2 {
            driver.offer(&[buffer(0, 8, true)]);
        }
        assert!(queue.enable_doorbell_behind(1).unwrap());
        assert!(!queue.enable_doorbell_behind(2).unwrap());
        if event_index {
            assert_eq!(driver.available_event(), 2);
        }
        driver.offer(&[buffer(0, 8, true)]);
        assert!(queue.enable_doorbell_behind(2).unwrap());
    }
}

#[test]
fn serving_suppresses_doorbells_and_interrupts_once() {
    let (mut driver, mut queue, mut chain) = pair(false);
    let counter = InterruptCounter::default();
    let link = counter.link();
    for _ in 0..3 {
        driver.offer(&[buffer(0, 8, true)]);
    }
    let serve = |chain: &mut Chain| -> Result<u32, QueueError> {
        assert!(!driver.wants_doorbell());
        Ok(chain.writable.write(b"x") as u32)
    };
    queue.serve(&mut chain, &link, serve).unwrap();
    assert!(driver.wants_doorbell());
    assert_eq!(driver.take_used(), [(0, 1), (1, 1), (2, 1)]);
    assert_eq!(counter.take(), 1);
    assert!(counter.take_queues().iter().eq([QUEUE]));
}

#[test]
fn a_queue_that_is_not_set_up_leaves_memory_alone() {
    let memory = memory();
    memory
        .write_slice(&[0x5a; 0x8000], GuestAddress(0))
        .unwrap();
    let (queue, doorbell) = (Queue::new(4).unwrap(), EventFd::new(0).unwrap());
    let mut queue = VirtQueue::new(0, &queue, doorbell, memory.clone()).unwrap();
    let counter = InterruptCounter::default();
    let mut chain = Chain::new(&memory);
    let serve = |_: &mut Chain| -> Result<u32, QueueError> { panic!("there is no chain") };
    queue.serve(&mut chain, &counter.link(), serve).unwrap();
    let mut bytes = vec![0; 0x8000];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0x5a));
    assert_eq!(counter.take(), 0);
}

#[test]
fn no_chain_is_taken_when_the_content_of_memory_is_lost() {
    let memory = memory();
    let pages = match MissingPages::of(memory.clone(), &[]) {
        Ok(pages) => pages,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    // All but the last pages.
    let present = [0; DATA as usize + PAGE_SIZE];
    pages.fill(GuestAddress(0), &present).unwrap();
    let mut driver = TestDriver::new(&memory, 0x1000, 4);
    let mut queue = driver.queue(QUEUE, false);
    let mut chain = Chain::new(&memory);
    driver.offer(&[buffer(0, 8, false), buffer(PAGE_SIZE as u64, 8, true)]);
    driver.offer(&[buffer(0, 8, false), buffer(PAGE_SIZE as u64, 8, false)]);
    driver.offer(&[buffer(0, 8, false)]);
    // What the device writes need not be there.
    assert!(queue.pop(&mut chain).unwrap());
    let taking = std::thread::spawn(move || {
        let taken = queue.pop(&mut chain).unwrap();
        (
            taken,
            queue.has_available().unwrap(),
            queue.available_count().unwrap(),
        )
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!taking.is_finished());
    pages.give_up();
    assert_eq!(taking.join().unwrap(), (false, false, 0));
}
