//! The whole device against a driver of our own.

mod suspend;

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use event_manager::{EventManager, SubscriberId, SubscriberOps};
use nix::sys::mman::mlock;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::event_loop::Subscriber;
use crate::virtio::VirtQueue;
use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};

const PAGE_SIZE: u64 = 4096;
const MEMORY_SIZE: u64 = 16 << 20;
/// Where queue 0 has its rings; those of the others follow.
const RINGS: u64 = 0x1000;
/// Page numbers and statistics.
const REQUESTS: u64 = 0x10_0000;
/// First of the pages for the balloon.
const FIRST_PAGE: u64 = 0x800;
const LIMIT: Duration = Duration::from_secs(20);

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;

const ALL: BalloonOptions = BalloonOptions {
    target_mib: 4,
    deflate_on_oom: true,
    statistics_interval: NonZeroU32::new(3600),
    free_page_reporting: true,
    free_page_hinting: false,
};

const HINTS: BalloonOptions = BalloonOptions {
    free_page_hinting: true,
    ..ALL
};

/// A device at work and its drivers, one for each queue.
struct Machine {
    memory: Arc<GuestMemory>,
    drivers: Vec<TestDriver>,
    interrupts: InterruptCounter,
    link: Arc<DriverLink>,
    manager: EventManager<Subscriber>,
    worker: SubscriberId,
    handle: BalloonHandle,
    shared: Arc<Shared>,
}

fn memory() -> Arc<GuestMemory> {
    let regions = [(GuestAddress(0), MEMORY_SIZE as usize)];
    Arc::new(GuestMemory::from_ranges(&regions).unwrap())
}

impl Machine {
    /// A machine whose driver accepts all features, and sets up all queues.
    fn new(options: &BalloonOptions) -> Machine {
        Machine::with(options, u64::MAX, |_| true)
    }

    /// A machine whose driver accepts `features`, as far as they are offered, and sets up the queues
    /// for which `is_used`.
    fn with(options: &BalloonOptions, features: u64, is_used: fn(usize) -> bool) -> Machine {
        let memory = memory();
        let mut balloon = Balloon::new(options, &memory).unwrap();
        let drivers: Vec<TestDriver> = (0..balloon.queue_max_sizes().len() as u64)
            .map(|index| TestDriver::new(&memory, RINGS + index * RINGS_SIZE, 256))
            .collect();
        let unused = || {
            let queue = Queue::new(QUEUE_SIZE).unwrap();
            let doorbell = EventFd::new(0).unwrap();
            VirtQueue::new(0, &queue, doorbell, memory.clone()).unwrap()
        };
        let queue = |(index, driver): (usize, &TestDriver)| match is_used(index) {
            true => driver.queue(index as u16, false),
            false => unused(),
        };
        let interrupts = InterruptCounter::default();
        let link = interrupts.link();
        let activation = Activation {
            memory: memory.clone(),
            features: balloon.features() & features,
            queues: drivers.iter().enumerate().map(queue).collect(),
            link: link.clone(),
            state: None,
        };
        let handle = balloon.handle(link.clone());
        let shared = balloon.shared.clone();
        let mut manager = EventManager::new().unwrap();
        let worker = Subscriber::Worker(balloon.activate(activation).unwrap());
        let worker = manager.add_subscriber(worker);
        let ones = vec![1; (MEMORY_SIZE - FIRST_PAGE * PAGE_SIZE) as usize];
        let start = GuestAddress(FIRST_PAGE * PAGE_SIZE);
        memory.write_slice(&ones, start).unwrap();
        Machine {
            memory,
            drivers,
            interrupts,
            link,
            manager,
            worker,
            handle,
            shared,
        }
    }

    /// Makes a chain available and has the device do it, or what it does in its turn.
    fn request(&mut self, queue: usize, buffers: &[Buffer]) -> Vec<(u16, u32)> {
        self.drivers[queue].offer(buffers);
        self.drivers[queue].ring_doorbell();
        self.turn();
        self.drivers[queue].take_used()
    }

    fn turn(&mut self) -> usize {
        self.manager.run_with_timeout(0).unwrap()
    }

    /// A request's buffer with `bytes` in it.
    fn readable(&self, bytes: &[u8]) -> Buffer {
        let address = GuestAddress(REQUESTS);
        self.memory.write_slice(bytes, address).unwrap();
        readable(REQUESTS, bytes.len() as u32)
    }

    fn page_numbers(&self, numbers: impl IntoIterator<Item = u64>) -> Buffer {
        let numbers = numbers.into_iter().flat_map(|it| (it as u32).to_le_bytes());
        self.readable(&numbers.collect::<Vec<_>>())
    }

    /// Whether the page is as it was at the start.
    fn has_kept(&self, page: u64) -> bool {
        let mut bytes = [0; PAGE_SIZE as usize];
        let address = GuestAddress(page * PAGE_SIZE);
        self.memory.read_slice(&mut bytes, address).unwrap();
        let byte = bytes[0];
        assert!(bytes.iter().all(|&it| it == byte), "page {page:#x}");
        byte == 1
    }

    fn kept_pages(&self, pages: std::ops::Range<u64>) -> Vec<u64> {
        pages.filter(|&page| self.has_kept(page)).collect()
    }

    fn metrics(&self) -> String {
        serde_json::to_string(&**self.handle.metrics()).unwrap()
    }
}

fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: false,
    }
}

fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: true,
    }
}

#[test]
fn inflated_pages_are_discarded_and_deflated_ones_are_the_drivers_again() {
    let mut machine = Machine::new(&ALL);
    let pages = [0x805, 0x804, 0x803, 0x808, 0x80a, 0x80a, 0xfff];
    let numbers = machine.page_numbers(pages);
    assert_eq!(machine.request(INFLATE, &[numbers]), [(0, 0)]);
    assert_eq!(machine.interrupts.take(), 1);
    let kept = machine.kept_pages(0x800..0x80c);
    assert_eq!(kept, [0x800, 0x801, 0x802, 0x806, 0x807, 0x809, 0x80b]);
    assert!(machine.has_kept(0xffe) && !machine.has_kept(0xfff));

    let address = GuestAddress(0x804 * PAGE_SIZE);
    let ones = [1; PAGE_SIZE as usize];
    machine.memory.write_slice(&ones, address).unwrap();
    let numbers = machine.page_numbers(pages);
    assert_eq!(machine.request(DEFLATE, &[numbers]), [(0, 0)]);
    assert_eq!(machine.interrupts.take(), 1);
    assert!(machine.has_kept(0x804));
    assert!(!machine.link.needs_reset());
    assert_eq!(
        machine.metrics(),
        r#"{"inflate_count":1,"deflate_count":1,"stats_updates_count":0,"stats_update_fails":0,"#
            .to_string()
            + r#""event_fails":0,"free_page_report_count":0,"free_page_report_freed":0,"#
            + r#""free_page_report_fails":0,"free_page_hint_count":0,"free_page_hint_freed":0,"#
            + r#""free_page_hint_fails":0,"activate_fails":0}"#
    );
}

#[test]
fn page_numbers_may_be_in_several_buffers() {
    let mut machine = Machine::new(&ALL);
    machine.page_numbers([0x801, 0x802, 0x803, 0x804]);
    let parts = [
        readable(REQUESTS, 3),
        readable(REQUESTS + 3, 0),
        readable(REQUESTS + 3, 2),
        readable(REQUESTS + 5, 11),
    ];
    assert_eq!(machine.request(INFLATE, &parts), [(0, 0)]);
    assert_eq!(machine.kept_pages(0x800..0x806), [0x800, 0x805]);
}

#[test]
fn reported_buffers_lose_their_whole_pages() {
    let mut machine = Machine::new(&ALL);
    let queue = 3;
    let page = |number: u64| number * PAGE_SIZE;
    let report = [
        writable(page(0x800), 0x2000),
        writable(page(0x803) + 1, 0x2fff),
        writable(page(0x807), 0xfff),
        writable(page(0x808), 0),
        writable(page(0x809) - 1, 0x1002),
    ];
    assert_eq!(machine.request(queue, &report), [(0, 0)]);
    assert_eq!(machine.interrupts.take(), 1);
    let kept = machine.kept_pages(0x800..0x80b);
    assert_eq!(kept, [0x802, 0x803, 0x806, 0x807, 0x808, 0x80a]);
    let metrics = machine.handle.metrics();
    assert_eq!(metrics.free_page_report_count.total(), 1);
    assert_eq!(metrics.free_page_report_freed.total(), 5 * PAGE_SIZE);
}

// --- Hints of free pages --------------------------------------------------------------------------

impl Machine {
    /// Has the device take a command of the driver's.
    fn send_command(&mut self, queue: usize, command: u32) {
        let buffer = self.readable(&command.to_le_bytes());
        assert_eq!(self.request(queue, &[buffer]).len(), 1);
    }

    /// Names one page, and says whether it is discarded.
    fn is_hint_taken(&mut self, queue: usize) -> bool {
        let page = FIRST_PAGE * PAGE_SIZE;
        let ones = [1; PAGE_SIZE as usize];
        self.memory.write_slice(&ones, GuestAddress(page)).unwrap();
        assert_eq!(self.request(queue, &[writable(page, 0x1000)]).len(), 1);
        !self.has_kept(FIRST_PAGE)
    }

    /// The command ID that the driver reads.
    fn command(&self) -> u32 {
        u32::from_le_bytes(self.shared.config.array(config::HINTING_COMMAND as u64))
    }
}

#[test]
fn hinted_pages_are_discarded_while_they_answer_the_request() {
    let mut machine = Machine::new(&HINTS);
    let queue = 3;
    assert!(!machine.is_hint_taken(queue));
    let start = HintingCommand::Start {
        acknowledge_on_stop: true,
    };
    machine.interrupts.take();
    machine.handle.hint(start).unwrap();
    assert_eq!((machine.interrupts.take(), machine.command()), (1, 2));
    assert!(!machine.is_hint_taken(queue));
    machine.send_command(queue, 2);
    assert!(machine.is_hint_taken(queue));
    // The owner asks anew, and what the driver names still belongs to the request before.
    machine.handle.hint(start).unwrap();
    assert!(!machine.is_hint_taken(queue));
    machine.send_command(queue, 3);
    assert!(machine.is_hint_taken(queue));
    machine.send_command(queue, 0);
    assert_eq!(machine.command(), 1);
    assert!(!machine.is_hint_taken(queue));
    let metrics = machine.handle.metrics();
    assert_eq!(metrics.free_page_hint_freed.total(), 2 * PAGE_SIZE);
    assert!(!machine.link.needs_reset());
}

#[test]
fn pages_that_the_driver_has_again_are_kept() {
    let mut machine = Machine::new(&HINTS);
    let queue = 3;
    let start = HintingCommand::Start {
        acknowledge_on_stop: false,
    };
    machine.handle.hint(start).unwrap();
    machine.send_command(queue, 2);
    machine.send_command(queue, 0);
    assert_eq!(machine.command(), 2);
    machine.handle.hint(HintingCommand::Stop).unwrap();
    assert_eq!(machine.command(), 1);
    assert!(!machine.is_hint_taken(queue));
    machine.send_command(queue, 2);
    assert!(!machine.is_hint_taken(queue));
}

#[test]
fn hints_are_served_by_the_queue_that_the_driver_counts() {
    let start = HintingCommand::Start {
        acknowledge_on_stop: true,
    };
    let no_statistics = !feature::STATS_VQ;
    for (features, queues, hinting, reporting) in [
        (u64::MAX, [true; 5], 3, 4),
        (no_statistics, [true; 5], 2, 3),
        (no_statistics, [true, true, false, true, true], 3, 4),
    ] {
        let is_used = match queues[2] {
            true => |_| true,
            false => |index| index != 2,
        };
        let mut machine = Machine::with(&HINTS, features, is_used);
        machine.handle.hint(start).unwrap();
        machine.send_command(hinting, 2);
        assert!(machine.is_hint_taken(hinting));
        // Reports need no request.
        machine.send_command(hinting, 0);
        assert!(machine.is_hint_taken(reporting));
    }
}

#[test]
fn hints_that_break_the_rules_need_a_reset() {
    let page = FIRST_PAGE * PAGE_SIZE;
    for buffers in [
        &[readable(REQUESTS, 3)][..],
        &[readable(REQUESTS, 5)],
        &[readable(REQUESTS, 8)],
        &[readable(REQUESTS, 0)],
        &[readable(REQUESTS, 4), writable(page, 0x1000)],
        &[writable(page, 0)],
    ] {
        let mut machine = Machine::new(&HINTS);
        assert_eq!(machine.request(3, buffers), []);
        assert!(machine.link.needs_reset(), "{buffers:?}");
        assert!(machine.has_kept(FIRST_PAGE));
    }
}

#[test]
fn a_balloon_without_hinting_cannot_be_asked_for_hints() {
    let machine = Machine::new(&ALL);
    let error = machine.handle.hint(HintingCommand::Stop).unwrap_err();
    assert!(matches!(error, BalloonError::NoHinting), "{error}");
    assert_eq!(machine.handle.statistics().hinting, None);
}

#[test]
fn the_owner_learns_whether_there_is_a_driver() {
    let memory = memory();
    let mut balloon = Balloon::new(&HINTS, &memory).unwrap();
    let interrupts = InterruptCounter::default();
    let handle = balloon.handle(interrupts.link());
    assert!(!handle.statistics().has_driver);
    let drivers: Vec<TestDriver> = (0..5)
        .map(|index| TestDriver::new(&memory, RINGS + index * RINGS_SIZE, 256))
        .collect();
    let activation = Activation {
        memory: memory.clone(),
        features: balloon.features(),
        queues: (0..)
            .zip(&drivers)
            .map(|(index, it)| it.queue(index, false))
            .collect(),
        link: interrupts.link(),
        state: None,
    };
    let worker = balloon.activate(activation).unwrap();
    assert!(handle.statistics().has_driver);
    drop(worker);
    assert!(!handle.statistics().has_driver);
}

#[test]
fn a_request_of_any_size_leaves_other_queues_their_turn() {
    let mut machine = Machine::new(&ALL);
    // Each page is discarded by a system call of its own, again and again.
    let count = 1 << 19;
    let numbers = (0..count).map(|index| 0x800 + index % 0x400 * 2);
    let numbers = machine.page_numbers(numbers);
    assert_eq!(machine.request(INFLATE, &[numbers]), []);
    machine.drivers[DEFLATE].offer(&[readable(REQUESTS, 4)]);
    machine.drivers[DEFLATE].ring_doorbell();
    machine.turn();
    assert_eq!(machine.drivers[DEFLATE].take_used(), [(0, 0)]);
    assert_eq!(machine.drivers[INFLATE].take_used(), []);
    let start = Instant::now();
    loop {
        machine.turn();
        match machine.drivers[INFLATE].take_used()[..] {
            [] => assert!(start.elapsed() < LIMIT),
            ref used => break assert_eq!(used, [(0, 0)]),
        }
    }
    let kept = machine.kept_pages(0x800..0x1000);
    assert!(kept.iter().all(|page| page % 2 == 1) && kept.len() == 0x400);
    assert!(!machine.link.needs_reset());
}

#[test]
fn what_breaks_the_rules_needs_a_reset() {
    let numbers = |len| readable(REQUESTS, len);
    let page = FIRST_PAGE * PAGE_SIZE;
    for (queue, buffers) in [
        (INFLATE, &[numbers(0)][..]),
        (INFLATE, &[numbers(3)]),
        (INFLATE, &[numbers(4), numbers(1)]),
        (INFLATE, &[numbers(4), writable(page, 4)]),
        (INFLATE, &[writable(page, 4)]),
        (INFLATE, &[readable(MEMORY_SIZE - 2, 4)]),
        // Two page numbers, of which the second is behind the end of memory.
        (INFLATE, &[numbers(8)]),
        (DEFLATE, &[numbers(0)]),
        (DEFLATE, &[numbers(6)]),
        (DEFLATE, &[writable(page, 4)]),
        (STATISTICS, &[writable(page, 10)]),
        (STATISTICS, &[numbers(10), writable(page, 10)]),
        (STATISTICS, &[readable(u64::MAX - 10, 10)]),
        (3, &[writable(page, 0)]),
        (3, &[readable(page, 4096)]),
        (3, &[readable(page, 4096), writable(page, 4096)]),
        (3, &[writable(MEMORY_SIZE - 4096, 8192)]),
        (4, &[writable(MEMORY_SIZE, 4096)]),
    ] {
        let mut machine = Machine::new(&ALL);
        machine.page_numbers([0x800, MEMORY_SIZE / PAGE_SIZE]);
        assert_eq!(machine.request(queue, buffers), [], "{queue}: {buffers:?}");
        assert!(machine.link.needs_reset(), "{queue}: {buffers:?}");
        assert_eq!(machine.handle.metrics().event_fails.total(), 1);
        // Nothing more is done, and nothing is heard of for ever.
        let valid = machine.page_numbers([0x900]);
        assert_eq!(machine.request(INFLATE, &[valid]), []);
        assert!(machine.has_kept(0x900));
        assert_eq!(machine.turn(), 0);
    }
}

#[test]
fn what_the_host_keeps_is_no_fault_of_the_driver() {
    let mut machine = Machine::new(&ALL);
    // The host discards no memory that is locked.
    let region = machine.memory.regions().next().unwrap();
    assert_eq!(region.start, GuestAddress(0));
    let page = (region.host_address + 0x802 * PAGE_SIZE) as *mut libc::c_void;
    let page = std::ptr::NonNull::new(page).unwrap();
    // SAFETY: nothing is done to memory by locking it.
    unsafe { mlock(page, PAGE_SIZE as usize) }.unwrap();
    let numbers = machine.page_numbers([0x800, 0x802, 0x804]);
    assert_eq!(machine.request(INFLATE, &[numbers]), [(0, 0)]);
    let report = [0x806, 0x802, 0x808].map(|page| writable(page * PAGE_SIZE, 4096));
    assert_eq!(machine.request(3, &report), [(0, 0)]);
    assert_eq!(machine.kept_pages(0x800..0x804), [0x801, 0x802, 0x803]);
    assert!(!machine.has_kept(0x804) && !machine.has_kept(0x806) && !machine.has_kept(0x808));
    assert!(!machine.link.needs_reset());
    let metrics = machine.handle.metrics();
    assert_eq!(metrics.event_fails.total(), 1);
    assert_eq!(metrics.free_page_report_fails.total(), 1);
    assert_eq!(metrics.free_page_report_freed.total(), 2 * PAGE_SIZE);
}

#[test]
fn a_second_buffer_of_statistics_breaks_the_rules() {
    let mut machine = Machine::new(&ALL);
    let buffer = machine.readable(&[0; 10]);
    assert_eq!(machine.request(STATISTICS, &[buffer]), []);
    assert!(!machine.link.needs_reset());
    machine.request(STATISTICS, &[buffer]);
    assert!(machine.link.needs_reset());
}

/// An entry of free memory.
fn free_memory(value: u64) -> Vec<u8> {
    [&[4, 0][..], &value.to_le_bytes()].concat()
}

#[test]
fn statistics_are_kept_and_asked_for_again_when_the_interval_changes() {
    let mut machine = Machine::new(&ALL);
    let buffer = machine.readable(&free_memory(1 << 40));
    assert_eq!(machine.request(STATISTICS, &[buffer]), []);
    let statistics = || BalloonStatistics {
        target_pages: 1024,
        actual_pages: 0,
        target_mib: 4,
        actual_mib: 0,
        guest: GuestStatistics {
            free_memory: Some(1 << 40),
            ..GuestStatistics::default()
        },
        has_driver: true,
        hinting: None,
    };
    assert_eq!(machine.handle.statistics(), statistics());
    assert_eq!(
        serde_json::to_string(&statistics()).unwrap(),
        format!(
            r#"{{"target_pages":1024,"actual_pages":0,"target_mib":4,"actual_mib":0,"guest":{{"free_memory":{}}},"has_driver":true,"hinting":null}}"#,
            1_u64 << 40
        )
    );

    for round in 1..=3 {
        assert_eq!(machine.interrupts.take(), 0);
        let interval = NonZeroU32::new(1000 + round).unwrap();
        machine.handle.set_statistics_interval(interval).unwrap();
        assert_eq!(machine.handle.options().statistics_interval, Some(interval));
        machine.manager.run_with_timeout(1000).unwrap();
        assert_eq!(machine.drivers[STATISTICS].take_used().len(), 1);
        assert_eq!(machine.interrupts.take(), 1);
        // Nothing is asked for while the driver is about to answer.
        machine.handle.set_statistics_interval(interval).unwrap();
        machine.manager.run_with_timeout(1000).unwrap();
        assert_eq!(machine.drivers[STATISTICS].take_used(), []);
        // An entry that is cut off is no harm.
        let buffer = machine.readable(&[free_memory(round.into()), vec![5, 0]].concat());
        assert_eq!(machine.request(STATISTICS, &[buffer]), []);
        let free_memory = machine.handle.statistics().guest.free_memory;
        assert_eq!(free_memory, Some(round.into()));
    }
    assert!(!machine.link.needs_reset());
    let metrics = machine.handle.metrics();
    assert_eq!(metrics.stats_updates_count.total(), 4);
    assert_eq!(metrics.stats_update_fails.total(), 3);
}

#[test]
fn statistics_are_asked_for_at_each_interval() {
    let options = BalloonOptions {
        statistics_interval: NonZeroU32::new(1),
        ..ALL
    };
    let start = Instant::now();
    let mut machine = Machine::new(&options);
    for round in 1..=2 {
        let buffer = machine.readable(&free_memory(round));
        assert_eq!(machine.request(STATISTICS, &[buffer]), []);
        while machine.drivers[STATISTICS].take_used().is_empty() {
            assert!(start.elapsed() < LIMIT);
            machine.manager.run_with_timeout(100).unwrap();
        }
        assert!(start.elapsed() >= Duration::from_secs(round));
    }
}

#[test]
fn statistics_that_were_off_stay_off() {
    let options = BalloonOptions {
        statistics_interval: None,
        ..ALL
    };
    let machine = Machine::new(&options);
    let error = machine.handle.set_statistics_interval(NonZeroU32::MIN);
    assert!(matches!(error, Err(BalloonError::NoStatistics)));
}

#[test]
fn a_new_target_reaches_the_driver() {
    let machine = Machine::new(&ALL);
    let target = || -> [u8; 4] { machine.shared.config.array(0) };
    assert_eq!(target(), 1024_u32.to_le_bytes());
    machine.handle.set_target(16).unwrap();
    assert_eq!(target(), 4096_u32.to_le_bytes());
    assert_eq!(machine.interrupts.take(), 1);
    machine.handle.set_target(16).unwrap();
    assert_eq!(machine.interrupts.take(), 0, "that is no change");
    for mib in [17, 1 << 24, u32::MAX] {
        let error = machine.handle.set_target(mib).unwrap_err();
        let BalloonError::TooLarge { memory_mib: 16, .. } = error else {
            panic!("{error}");
        };
    }
    assert_eq!(machine.handle.options().target_mib, 16);
    assert_eq!(machine.handle.statistics().target_pages, 4096);
}

#[test]
fn features_and_queues_follow_the_options() {
    let memory = memory();
    for (statistics, hinting, reporting, count) in [
        (false, false, false, 2),
        (true, false, false, 3),
        (false, true, false, 4),
        (true, true, false, 4),
        (false, false, true, 5),
        (true, true, true, 5),
    ] {
        for deflate_on_oom in [false, true] {
            let options = BalloonOptions {
                target_mib: 0,
                deflate_on_oom,
                statistics_interval: NonZeroU32::new(statistics.into()),
                free_page_reporting: reporting,
                free_page_hinting: hinting,
            };
            let balloon = Balloon::new(&options, &memory).unwrap();
            assert_eq!(balloon.queue_max_sizes().len(), count);
            let features = balloon.features() & !COMMON_FEATURES;
            let expected = u64::from(statistics) << 1
                | u64::from(deflate_on_oom) << 2
                | u64::from(hinting) << 3
                | u64::from(reporting) << 5;
            assert_eq!(features, expected);
        }
    }
    let too_large = BalloonOptions {
        target_mib: 17,
        ..ALL
    };
    assert!(Balloon::new(&too_large, &memory).is_err());
}

#[test]
fn reports_come_by_whichever_queue_the_driver_takes_for_theirs() {
    let no_statistics = BalloonOptions {
        statistics_interval: None,
        ..ALL
    };
    for (options, features, queue) in [
        (&ALL, u64::MAX, 3),
        (&ALL, u64::MAX, 4),
        (&ALL, !feature::STATS_VQ, 2),
        (&ALL, !feature::STATS_VQ, 3),
        (&ALL, !feature::STATS_VQ, 4),
        (&no_statistics, u64::MAX, 2),
        (&no_statistics, u64::MAX, 4),
    ] {
        let is_used: fn(usize) -> bool = match queue {
            2 => |index| matches!(index, 0..=2),
            3 => |index| matches!(index, 0..=1 | 3),
            _ => |index| matches!(index, 0..=1 | 4),
        };
        let mut machine = Machine::with(options, features, is_used);
        let report = [writable(FIRST_PAGE * PAGE_SIZE, 4096)];
        assert_eq!(machine.request(queue, &report), [(0, 0)], "{queue}");
        assert!(!machine.has_kept(FIRST_PAGE));
    }
    // A driver that has not accepted reports has no queue for them.
    let mut machine = Machine::with(&ALL, !feature::REPORTING, |_| true);
    for queue in [3, 4] {
        let report = [writable(FIRST_PAGE * PAGE_SIZE, 4096)];
        assert_eq!(machine.request(queue, &report), []);
    }
    assert!(machine.has_kept(FIRST_PAGE));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_request_harms_other_pages(
        queue in 0..5_usize,
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        buffers in prop::collection::vec(
            (0..0x20_u64, 0..0x30_u32, any::<bool>()),
            1..6,
        ),
    ) {
        let mut machine = Machine::new(&ALL);
        // Page numbers that are in memory or just behind it.
        let numbers = bytes.iter().map(|&byte| 0xfc0 + u64::from(byte % 0x44));
        machine.page_numbers(numbers);
        let mut buffers: Vec<Buffer> = buffers
            .into_iter()
            .map(|(offset, len, writable)| Buffer {
                address: if writable { 0xfc0 * PAGE_SIZE + offset * 0x800 } else { REQUESTS + offset },
                len: if writable { len * 0x400 } else { len },
                writable,
            })
            .collect();
        buffers.sort_by_key(|buffer| buffer.writable);
        machine.request(queue, &buffers);
        prop_assert_eq!(machine.kept_pages(FIRST_PAGE..0xfc0).len(), 0xfc0 - FIRST_PAGE as usize);
        while machine.turn() > 0 {}
    }
}
