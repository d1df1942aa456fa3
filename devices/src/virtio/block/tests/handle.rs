//! Operations of the machine's owner on the device, and its metrics.

use std::os::fd::AsRawFd;
use std::thread;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use serde_json::{Value, json};
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

use super::*;
use crate::event_loop::Subscriber;
use crate::rate_limiter::RateLimit;

/// Size of a second image, which has different bytes and a different size.
const OTHER_SIZE: usize = 0x10_0000;
const OTHER_BYTE: u8 = 0xa7;

impl Machine {
    /// Replaces the present image while the event loop runs.
    pub(super) fn replace(&mut self, disk: impl Into<Disk>) -> Result<(), ReplaceError> {
        let disk = disk.into();
        self.during(|handle| handle.replace(disk, no_haste()))
    }

    /// Runs the event loop while the owner does `work`.
    pub(super) fn during<T: Send>(&mut self, work: impl FnOnce(&BlockHandle) -> T + Send) -> T {
        let handle = &self.handle;
        thread::scope(|scope| {
            let owner = scope.spawn(|| work(handle));
            let deadline = Instant::now() + LIMIT;
            while !owner.is_finished() {
                assert!(Instant::now() < deadline, "the owner is held up");
                self.manager.run_with_timeout(1).unwrap();
            }
            owner.join().unwrap()
        })
    }

    fn other_image(&self) -> PathBuf {
        let path = self.folder.as_path().join("other.img");
        fs::write(&path, vec![OTHER_BYTE; OTHER_SIZE]).unwrap();
        path
    }

    fn other_disk(&self, cache: CacheMode) -> DiskFile {
        open(&self.other_image(), false, cache).unwrap()
    }

    /// Resets the device and initializes it again.
    pub(super) fn reset(&mut self) {
        drop(self.manager.remove_subscriber(self.worker).unwrap());
        self.link.set_needs_reset(false);
        self.activate();
    }

    pub(super) fn activate(&mut self) {
        let rings = vec![0; RINGS_SIZE as usize];
        self.memory
            .write_slice(&rings, GuestAddress(RINGS))
            .unwrap();
        self.driver = TestDriver::new(&self.memory, RINGS, 256);
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.block.features(),
            queues: vec![self.driver.queue(0, false)],
            link: self.link.clone(),
            state: None,
        };
        let worker = self.block.activate(activation).unwrap();
        self.worker = self.manager.add_subscriber(Subscriber::Worker(worker));
    }

    /// Checks that the driver has the other disk, and that the previous image is free.
    fn has_other_disk(&mut self) {
        assert_eq!(self.capacity(), OTHER_SIZE as u64 / 512);
        let last = OTHER_SIZE as u64 / 512 - 1;
        let read = |machine: &mut Machine, sector| {
            machine.request(VIRTIO_BLK_T_IN, sector, &[(DATA, 512)])
        };
        assert_eq!(read(self, last), VIRTIO_BLK_S_OK);
        assert!(self.bytes(DATA, 512) == [OTHER_BYTE; 512]);
        assert_eq!(read(self, last + 1), VIRTIO_BLK_S_IOERR);
        open(&self.image, false, CacheMode::Writeback).unwrap();
        let error = open(&self.other_image(), true, CacheMode::Writeback);
        assert!(matches!(error, Err(DiskError::InUse { .. })));
    }

    fn metrics(&self) -> Value {
        serde_json::to_value(self.handle.metrics()).unwrap()
    }
}

#[test]
fn another_image_takes_the_place_of_the_first() {
    for engine in ENGINES {
        for caches in [
            [CacheMode::Writeback, CacheMode::None],
            [CacheMode::None, CacheMode::Writeback],
            [CacheMode::Writethrough, CacheMode::Unsafe],
        ] {
            let mut machine = Machine::new(engine, caches[0]);
            // Many requests are in progress, or wait, when the disk is replaced.
            let heads: Vec<u16> = (0..64_u64)
                .map(|index| {
                    let address = DATA + index * 0x1_0000;
                    machine.offer(VIRTIO_BLK_T_IN, 0, &[(address, 0x1_0000)])
                })
                .collect();
            machine.driver.ring_doorbell();
            machine.manager.run_with_timeout(0).unwrap();
            let other = machine.other_disk(caches[1]);
            machine.replace(other).unwrap();
            let done = machine.driver.take_used().len();
            machine.run(64 - done);
            let first: Vec<u8> = (0..0x1_0000).map(byte_of_disk).collect();
            for (index, &head) in heads.iter().enumerate() {
                assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
                let bytes = machine.bytes(DATA + index as u64 * 0x1_0000, 0x1_0000);
                assert!(bytes == first || bytes.iter().all(|&byte| byte == OTHER_BYTE));
            }
            machine.interrupts.take();
            machine.has_other_disk();
        }
    }
}

#[test]
fn the_driver_is_told_of_another_image() {
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    let other = machine.other_disk(CacheMode::Writeback);
    let before = machine.block.config().generation();
    machine.replace(other).unwrap();
    assert_eq!(machine.interrupts.take(), 1);
    assert_eq!(machine.interrupts.take_configuration_changes(), 1);
    assert_ne!(machine.block.config().generation(), before);
}

#[test]
fn an_image_is_replaced_whatever_state_the_driver_is_in() {
    for engine in ENGINES {
        // No driver yet.
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        drop(machine.manager.remove_subscriber(machine.worker).unwrap());
        machine
            .handle
            .replace(machine.other_disk(CacheMode::None), no_haste())
            .unwrap();
        machine.activate();
        machine.has_other_disk();

        // A driver that has broken the rules with requests in progress.
        let mut machine = Machine::new(engine, CacheMode::None);
        for _ in 0..20 {
            machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 0x1_0000)]);
        }
        machine.driver.offer_head(999);
        machine.driver.ring_doorbell();
        while !machine.link.needs_reset() {
            machine.manager.run_with_timeout(100).unwrap();
        }
        let other = machine.other_disk(CacheMode::Writeback);
        machine.replace(other).unwrap();
        machine.reset();
        machine.has_other_disk();

        // A driver that resets the device before the device gets to that.
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        let other = machine.other_disk(CacheMode::Writeback);
        thread::scope(|scope| {
            let owner = scope.spawn(|| machine.handle.replace(other, no_haste()));
            thread::sleep(Duration::from_millis(20));
            assert!(!owner.is_finished());
            drop(machine.manager.remove_subscriber(machine.worker).unwrap());
            owner.join().unwrap().unwrap();
        });
        machine.activate();
        machine.has_other_disk();
    }
}

#[test]
fn a_disk_stays_as_writable_as_it_is() {
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    let other = open(&machine.other_image(), true, CacheMode::Writeback).unwrap();
    let error = machine.replace(other).unwrap_err();
    assert!(matches!(
        error,
        ReplaceError::Access {
            read_only: false,
            ..
        }
    ));
    assert!(
        error.to_string().ends_with(
            "other.img' in the place of a disk that is read and written: it was opened read-only"
        ),
        "{error}"
    );
    assert_eq!(machine.capacity(), DISK_SIZE as u64 / 512);
    let status = machine.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512)]);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    assert_eq!(machine.metrics()["update_fails"], 1);
}

#[test]
fn limits_are_changed_while_requests_wait_for_them() {
    let limits = |size, minutes: u64| Limits {
        operations: Some(RateLimit {
            size,
            refill_time: Duration::from_secs(minutes * 60),
            one_time_burst: 0,
        }),
        bytes: None,
    };
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    machine.handle.set_limits(&limits(1, 60)).unwrap();
    for _ in 0..9 {
        machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 512)]);
    }
    // One request, and one that exceeds the limit.
    assert_eq!(machine.run(2).len(), 2);
    while machine.manager.run_with_timeout(20).unwrap() > 0 {}
    assert_eq!(machine.driver.take_used(), []);
    machine.handle.set_limits(&limits(3, 60)).unwrap();
    assert_eq!(machine.handle.limits(), limits(3, 60));
    assert_eq!(machine.run(4).len(), 4);
    machine.handle.set_limits(&Limits::default()).unwrap();
    assert_eq!(machine.run(3).len(), 3);
    let metrics = machine.metrics();
    assert!(metrics["rate_limiter_throttled_events"].as_u64() >= Some(2));
    assert!(metrics["rate_limiter_event_count"].as_u64() >= Some(2));
    assert!(metrics["remaining_reqs_count"].as_u64() >= Some(7 + 3));
}

#[test]
fn a_reset_gives_nothing_back_that_was_used_up() {
    let options = BlockOptions {
        limits: Limits {
            operations: Some(RateLimit {
                size: 1,
                refill_time: Duration::from_secs(3600),
                one_time_burst: 0,
            }),
            bytes: None,
        },
        ..BlockOptions::default()
    };
    let mut machine = Machine::with(&options, CacheMode::Writeback);
    for _ in 0..2 {
        machine.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512)]);
    }
    machine.reset();
    machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 512)]);
    machine.driver.ring_doorbell();
    while machine.manager.run_with_timeout(20).unwrap() > 0 {}
    assert_eq!(machine.driver.take_used(), []);
}

#[test]
fn what_is_done_is_counted() {
    for_each_kind(|mut machine| {
        let end = DISK_SIZE as u64 / 512;
        for (kind, sector, len) in [
            (VIRTIO_BLK_T_IN, 0, 512),
            (VIRTIO_BLK_T_IN, 8, 4096),
            (VIRTIO_BLK_T_OUT, 0, 1024),
            (VIRTIO_BLK_T_IN, end, 512),
            (77, 0, 512),
        ] {
            machine.request(kind, sector, &[(DATA, len)]);
        }
        machine.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
        machine.driver.ring_doorbell();
        while machine.manager.run_with_timeout(0).unwrap() > 0 {}
        machine.handle.update_size().unwrap();
        let mut metrics = machine.metrics();
        for times in ["read_agg", "write_agg"] {
            let times = metrics.as_object_mut().unwrap().remove(times).unwrap();
            let us = |name| times[name].as_u64().unwrap();
            assert!(us("min_us") <= us("max_us") && us("max_us") <= us("sum_us"));
            assert!(us("sum_us") < LIMIT.as_micros() as u64);
        }
        let rings = metrics.as_object_mut().unwrap().remove("queue_event_count");
        assert!(rings.unwrap().as_u64() >= Some(6));
        let empty = metrics.as_object_mut().unwrap().remove("no_avail_buffer");
        assert!(empty.unwrap().as_u64() >= Some(1));
        let expected = json!({
            "activate_fails": 0, "event_fails": 0, "execute_fails": 0, "invalid_reqs_count": 2,
            "flush_count": 1, "rate_limiter_event_count": 0, "update_count": 1,
            "update_fails": 0, "read_bytes": 4608, "write_bytes": 1024, "read_count": 2,
            "write_count": 1, "rate_limiter_throttled_events": 0,
            "io_engine_throttled_events": 0, "remaining_reqs_count": 0,
        });
        assert_eq!(metrics, expected);
    });
}

#[test]
fn the_time_of_a_request_is_until_the_driver_is_told() {
    for engine in ENGINES {
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        for index in 0..64 {
            machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA + index * 0x1_0000, 0x1_0000)]);
        }
        let start = Instant::now();
        machine.run(64);
        let limit = start.elapsed().as_micros() as u64;
        while machine.manager.run_with_timeout(0).unwrap() > 0 {}
        let times = &machine.metrics()["read_agg"];
        let us = |name: &str| times[name].as_u64().unwrap();
        assert!((1..=limit).contains(&us("max_us")), "{times}");
        assert!(us("sum_us") <= 64 * us("max_us") + 64, "{times}");
        assert!(us("sum_us") >= 64 * us("min_us"), "{times}");
    }
}

#[test]
fn all_queues_have_their_turn_within_a_limit() {
    const SECOND_RINGS: u64 = DATA + 0x10_0000;
    let options = BlockOptions {
        queues: 2,
        limits: Limits {
            operations: Some(RateLimit::per_second(200, Some(1))),
            bytes: None,
        },
        ..BlockOptions::default()
    };
    let mut machine = Machine::with(&options, CacheMode::Writeback);
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    let mut second = TestDriver::new(&machine.memory, SECOND_RINGS, 256);
    let activation = Activation {
        memory: machine.memory.clone(),
        features: machine.block.features(),
        queues: vec![machine.driver.queue(0, false), second.queue(1, false)],
        link: machine.link.clone(),
        state: None,
    };
    let worker = machine.block.activate(activation).unwrap();
    machine.manager.add_subscriber(Subscriber::Worker(worker));
    for _ in 0..40 {
        machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 512)]);
        let [header, status] =
            [(HEADERS, 16, false), (HEADERS + 16, 1, true)].map(|(address, len, writable)| {
                Buffer {
                    address,
                    len,
                    writable,
                }
            });
        second.offer(&[header, status]);
    }
    machine.driver.ring_doorbell();
    second.ring_doorbell();
    let (start, mut done) = (Instant::now(), [0, 0]);
    while done.iter().all(|&count| count < 20) {
        assert!(start.elapsed() < LIMIT, "{done:?} are done");
        machine.manager.run_with_timeout(100).unwrap();
        done[0] += machine.driver.take_used().len();
        done[1] += second.take_used().len();
    }
    assert!(done.iter().all(|&count| count >= 10), "{done:?}");
    assert!(machine.interrupts.take_queues().iter().eq([0, 1]));
}

#[test]
fn a_range_counts_as_bytes() {
    // A file in memory cannot zero a range without giving its storage back.
    let image = memfd_create("disk", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&image, DISK_SIZE as i64).unwrap();
    let options = BlockOptions {
        limits: Limits {
            operations: None,
            bytes: Some(RateLimit {
                size: 4096,
                refill_time: Duration::from_secs(3600),
                one_time_burst: 0,
            }),
        },
        ..BlockOptions::default()
    };
    let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, unmap),
    ] {
        let path = PathBuf::from(format!("/proc/self/fd/{}", image.as_raw_fd()));
        let folder = TempDir::new().unwrap();
        let mut machine = Machine::over(path, folder, &options, CacheMode::Writeback);
        // Eight sectors.
        let range = [
            &0_u64.to_le_bytes()[..],
            &8_u32.to_le_bytes(),
            &flags.to_le_bytes(),
        ];
        machine
            .memory
            .write_slice(&range.concat(), GuestAddress(DATA))
            .unwrap();
        let mut done = || {
            machine.offer_readable(kind, 0, &[(DATA, 16)]);
            machine.driver.ring_doorbell();
            while machine.manager.run_with_timeout(20).unwrap() > 0 {}
            machine.driver.take_used().len()
        };
        // One request within the limit, and one that exceeds it.
        assert_eq!([done(), done(), done()], [1, 1, 0]);
    }
}
