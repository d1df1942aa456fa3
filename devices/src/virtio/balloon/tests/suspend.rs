//! The balloon is paused, and another takes its place.

use super::*;
use crate::suspend_test::suspend_tests;
use crate::virtio::suspend_test::{Backend, Driver, FREE_MEMORY, VirtioGuest};
use crate::worker::QueueProgress;

/// Takes the worker off its loop, as a pause does.
fn pause(machine: &mut Machine) -> Box<dyn VirtioWorker> {
    let Subscriber::Worker(mut worker) = machine.manager.remove_subscriber(machine.worker).unwrap()
    else {
        panic!("it is a worker");
    };
    worker.pause().unwrap();
    worker
}

#[test]
fn a_request_that_is_half_done_at_a_pause_is_done_after_it() {
    let mut machine = Machine::new(&ALL);
    let count = 1 << 19;
    let numbers = (0..count).map(|index| 0x800 + index % 0x400 * 2);
    let numbers = machine.page_numbers(numbers);
    assert_eq!(machine.request(INFLATE, &[numbers]), []);

    let worker = pause(&mut machine);
    assert_eq!(worker.progress(), [QueueProgress::default(); 5]);
    machine.worker = machine.manager.add_subscriber(Subscriber::Worker(worker));
    machine.drivers[INFLATE].ring_doorbell();
    let start = Instant::now();
    while machine.drivers[INFLATE].take_used() != [(0, 0)] {
        assert!(start.elapsed() < LIMIT);
        machine.turn();
    }
    assert_eq!(machine.kept_pages(0x800..0x1000).len(), 0x400);
}

#[test]
fn another_worker_asks_for_statistics_and_hints_where_the_first_was() {
    let mut machine = Machine::new(&HINTS);
    let free_memory = |value: u64| [&4_u16.to_le_bytes()[..], &value.to_le_bytes()].concat();
    let buffer = machine.readable(&free_memory(7));
    assert_eq!(machine.request(STATISTICS, &[buffer]), []);
    machine
        .handle
        .hint(HintingCommand::Start {
            acknowledge_on_stop: true,
        })
        .unwrap();
    let request = machine.handle.statistics().hinting.unwrap().host_command;

    let worker = pause(&mut machine);
    let progress = worker.progress();
    assert_eq!(
        progress[STATISTICS],
        QueueProgress::default(),
        "the buffer is the driver's to be taken again"
    );
    let state = worker.save().unwrap();
    drop(worker);

    let mut balloon = Balloon::new(&HINTS, &machine.memory).unwrap();
    let (config, generation) = machine.shared.config.save();
    balloon.restore(&config, None).unwrap();
    balloon.config().restore(&config, generation).unwrap();
    let queues = (0..).zip(&machine.drivers);
    let activation = Activation {
        memory: machine.memory.clone(),
        features: balloon.features(),
        queues: queues.map(|(index, it)| it.queue(index, false)).collect(),
        link: machine.link.clone(),
        state,
    };
    machine.handle = balloon.handle(machine.link.clone());
    let worker = balloon.activate(activation).unwrap();
    machine.worker = machine.manager.add_subscriber(Subscriber::Worker(worker));
    machine.drivers[STATISTICS].ring_doorbell();
    machine.turn();
    let statistics = machine.handle.statistics();
    assert_eq!(statistics.guest.free_memory, Some(7));
    assert_eq!(statistics.hinting.unwrap().host_command, request);
    assert!(!machine.link.needs_reset());
}

#[test]
fn a_balloon_is_not_restored_larger_than_memory() {
    let memory = memory();
    let mut balloon = Balloon::new(&ALL, &memory).unwrap();
    let (mut config, _) = balloon.config().save();
    balloon.restore(&config, None).unwrap();
    config[..4].copy_from_slice(&(16 * 256 + 1_u32).to_le_bytes());
    let error = balloon.restore(&config, None).unwrap_err();
    assert!(error.to_string().contains("16 MiB"), "{error}");
}

/// A balloon whose driver provides statistics, whose buffer the device keeps until it wants newer ones.
struct Pages;

/// A page that the guest has written to.
const PAGE: u64 = FREE_MEMORY + 0x10_0000;
const MANY: u32 = 1 << 16;

impl Backend for Pages {
    const QUEUES: u64 = 3;
    const FEATURES: u64 = u64::MAX;

    fn new() -> Pages {
        Pages
    }

    fn device(&mut self, memory: &Arc<GuestMemory>, _: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
        let options = BalloonOptions {
            statistics_interval: NonZeroU32::new(1000),
            ..ALL
        };
        Box::new(Balloon::new(&options, memory).unwrap())
    }

    fn set_up(&mut self, driver: &mut Driver) {
        driver.store(FREE_MEMORY, &[0; 10]);
        driver.offer(STATISTICS, &[readable(FREE_MEMORY, 10)]);
    }

    fn work(&mut self, driver: &mut Driver) {
        driver.store(PAGE, &[1; PAGE_SIZE as usize]);
        driver.store(FREE_MEMORY + 16, &((PAGE / PAGE_SIZE) as u32).to_le_bytes());
        for queue in [INFLATE, DEFLATE] {
            driver.offer(queue, &[readable(FREE_MEMORY + 16, 4)]);
            driver.wait(queue, 1);
        }
        assert!(
            driver
                .load(PAGE, PAGE_SIZE as usize)
                .iter()
                .all(|&byte| byte == 0)
        );
    }

    /// More pages than can be discarded in one turn.
    fn begin(&mut self, driver: &mut Driver) {
        driver.store(PAGE, &[1; PAGE_SIZE as usize]);
        let number = ((PAGE / PAGE_SIZE) as u32).to_le_bytes();
        let numbers = number.repeat(MANY as usize);
        driver.store(2 * PAGE, &numbers);
        driver.offer(INFLATE, &[readable(2 * PAGE, 4 * MANY)]);
    }

    fn end(&mut self, driver: &mut Driver) {
        driver.wait(INFLATE, 1);
        assert!(
            driver
                .load(PAGE, PAGE_SIZE as usize)
                .iter()
                .all(|&byte| byte == 0)
        );
    }
}

suspend_tests!(VirtioGuest<Pages>);
