//! The whole device against a test driver, with files of the host.

mod direct;
mod dirty_log;
mod handle;
mod images;
mod live_images;
mod suspend;
mod test_image;

use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bantam_memory::GuestMemory;
use bantam_storage::{DiskError, DiskFile, DiskOptions};
use event_manager::{EventManager, SubscriberId, SubscriberOps};
use proptest::prelude::*;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::event_loop::Subscriber;
use crate::rate_limiter::{Limits, RateLimit};
use crate::virtio::DriverLink;
use crate::virtio::test_driver::{Buffer, InterruptCounter, RINGS_SIZE, TestDriver};
use test_image::ImageThreads;

const RINGS: u64 = 0x1000;
/// Headers and status bytes of requests, at a position given by their head.
const HEADERS: u64 = RINGS + RINGS_SIZE;
const HEADER_STRIDE: u64 = 32;
const DATA: u64 = 0x1_0000;
const MEMORY_SIZE: usize = 0x80_0000;
const DISK_SIZE: usize = 0x40_0000;
const UNTOUCHED: u8 = 0xff;
const LIMIT: Duration = Duration::from_secs(20);

/// Returns a deadline that no test reaches.
fn no_haste() -> Instant {
    Instant::now() + 3 * LIMIT
}

const ENGINES: [Engine; 3] = [Engine::Auto, Engine::IoUring, Engine::Sync];
const CACHE_MODES: [CacheMode; 4] = [
    CacheMode::Writeback,
    CacheMode::Writethrough,
    CacheMode::None,
    CacheMode::Unsafe,
];

/// A device at work, its driver, and its disk.
struct Machine {
    memory: Arc<GuestMemory>,
    driver: TestDriver,
    interrupts: InterruptCounter,
    link: Arc<DriverLink>,
    manager: EventManager<Subscriber>,
    worker: SubscriberId,
    handle: BlockHandle,
    image: PathBuf,
    folder: TempDir,
    block: Block,
    /// End after the worker.
    image_threads: ImageThreads,
}

pub(super) fn open(path: &Path, read_only: bool, cache: CacheMode) -> Result<DiskFile, DiskError> {
    let options = DiskOptions {
        read_only,
        cache,
        ..DiskOptions::default()
    };
    DiskFile::open(path, &options)
}

struct Random(u64);

impl Random {
    /// Returns a number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

fn byte_of_disk(offset: usize) -> u8 {
    (offset / 512 * 7 + offset % 251) as u8
}

impl Machine {
    fn new(engine: Engine, cache: CacheMode) -> Machine {
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        Machine::with(&options, cache)
    }

    fn with(options: &BlockOptions, cache: CacheMode) -> Machine {
        // Beside this program: the usual folder for temporary files may be in memory, and have no O_DIRECT.
        let program = std::env::current_exe().unwrap();
        let folder = TempDir::new_in(program.parent().unwrap()).unwrap();
        let image = folder.as_path().join("disk.img");
        let bytes: Vec<u8> = (0..DISK_SIZE).map(byte_of_disk).collect();
        fs::write(&image, bytes).unwrap();
        Machine::over(image, folder, options, cache)
    }

    fn over(image: PathBuf, folder: TempDir, options: &BlockOptions, cache: CacheMode) -> Machine {
        let disk = open(&image, false, cache).unwrap();
        Machine::of(disk, image, folder, options)
    }

    fn of(
        disk: impl Into<Disk>,
        image: PathBuf,
        folder: TempDir,
        options: &BlockOptions,
    ) -> Machine {
        let block = Block::new(disk, "test disk", options).unwrap();
        Machine::over_block(block, image, folder)
    }

    fn over_block(mut block: Block, image: PathBuf, folder: TempDir) -> Machine {
        let image_threads = ImageThreads::default();
        image_threads.extend(block.image_work());

        let regions = [(GuestAddress(0), MEMORY_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let driver = TestDriver::new(&memory, RINGS, 256);
        let interrupts = InterruptCounter::default();
        let link = interrupts.link();
        let activation = Activation {
            memory: memory.clone(),
            features: block.features(),
            queues: vec![driver.queue(0, false)],
            link: link.clone(),
            state: None,
        };
        let handle = block.handle(link.clone(), image_threads.owner());
        let mut manager = EventManager::new().unwrap();
        let worker =
            manager.add_subscriber(Subscriber::Worker(block.activate(activation).unwrap()));
        Machine {
            memory,
            driver,
            interrupts,
            link,
            manager,
            worker,
            handle,
            image,
            folder,
            block,
            image_threads,
        }
    }

    /// Makes a request with its data at the given places available.
    fn offer(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        self.offer_with(kind, sector, data, kind != VIRTIO_BLK_T_OUT)
    }

    /// Makes a request available that has data for the device.
    fn offer_readable(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u16 {
        self.offer_with(kind, sector, data, false)
    }

    fn offer_with(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[(u64, u32)],
        device_writes: bool,
    ) -> u16 {
        let head = self.driver.next_head();
        let header = HEADERS + u64::from(head) * HEADER_STRIDE;
        let status = header + 16;
        let address = GuestAddress;
        self.memory.write_obj(kind, address(header)).unwrap();
        self.memory.write_obj(sector, address(header + 8)).unwrap();
        self.memory.write_obj(UNTOUCHED, address(status)).unwrap();
        let buffer = |address, len, writable| Buffer {
            address,
            len,
            writable,
        };
        let mut buffers = vec![buffer(header, 16, false)];
        buffers.extend(
            data.iter()
                .map(|&(address, len)| buffer(address, len, device_writes)),
        );
        buffers.push(buffer(status, 1, true));
        assert_eq!(self.driver.offer(&buffers), head);
        head
    }

    /// Rings the doorbell and lets the device work until it has returned `count` requests.
    fn run(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.driver.ring_doorbell();
        let deadline = Instant::now() + LIMIT;
        let mut used = Vec::new();
        while used.len() < count {
            assert!(Instant::now() < deadline, "only {used:?} are done");
            self.manager.run_with_timeout(100).unwrap();
            used.extend(self.driver.take_used());
        }
        used
    }

    fn status(&self, head: u16) -> u32 {
        let address = HEADERS + u64::from(head) * HEADER_STRIDE + 16;
        let status: u8 = self.memory.read_obj(GuestAddress(address)).unwrap();
        status.into()
    }

    /// Has one request done, and returns its status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)]) -> u32 {
        let head = self.offer(kind, sector, data);
        let used = self.run(1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        self.status(head)
    }

    /// Returns the capacity in sectors that the driver sees.
    fn capacity(&self) -> u64 {
        u64::from_le_bytes(self.block.config().array(config::offset::CAPACITY as u64))
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(address);
        self.memory.read_slice(&mut bytes, address).unwrap();
        bytes
    }
}

fn for_each_kind(check: impl Fn(Machine)) {
    for engine in ENGINES {
        for cache in CACHE_MODES {
            check(Machine::new(engine, cache));
        }
    }
}

#[test]
fn one_request_after_the_other() {
    for_each_kind(|mut machine| {
        // In three pieces, the second of which is not aligned at all.
        let pieces = [(DATA, 512), (DATA + 0x1003, 509), (DATA + 0x2000, 3)];
        assert_eq!(
            machine.request(VIRTIO_BLK_T_IN, 9, &pieces),
            VIRTIO_BLK_S_OK
        );
        let read: Vec<u8> = pieces
            .iter()
            .flat_map(|&(address, len)| machine.bytes(address, len as usize))
            .collect();
        let expected: Vec<u8> = (9 * 512..11 * 512).map(byte_of_disk).collect();
        assert!(read == expected);

        assert_eq!(
            machine.request(VIRTIO_BLK_T_OUT, 4096, &pieces),
            VIRTIO_BLK_S_OK
        );
        assert_eq!(machine.request(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
        assert!(fs::read(&machine.image).unwrap()[4096 * 512..][..1024] == expected);

        assert_eq!(
            machine.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20)]),
            VIRTIO_BLK_S_OK
        );
        assert_eq!(&machine.bytes(DATA, 10), b"test disk\0");
        assert!(machine.interrupts.take() >= 4);
    });
}

#[test]
fn many_requests_at_once() {
    const LEN: u32 = 3 * 512;
    for_each_kind(|mut machine| {
        for index in 0..64_u64 {
            let data = (0..LEN).map(|byte| (byte as u8) ^ (index as u8));
            let address = DATA + index * 0x2000;
            let bytes: Vec<u8> = data.collect();
            machine
                .memory
                .write_slice(&bytes, GuestAddress(address))
                .unwrap();
            machine.offer(VIRTIO_BLK_T_OUT, index * 5, &[(address, LEN)]);
        }
        let used = machine.run(64);
        assert!(
            used.iter()
                .all(|&(head, _)| machine.status(head) == VIRTIO_BLK_S_OK)
        );
        let reads: Vec<u16> = (0..64)
            .map(|index| {
                let address = DATA + 0x20_0000 + index * 0x2000;
                machine.offer(VIRTIO_BLK_T_IN, index * 5, &[(address, LEN)])
            })
            .collect();
        let mut used = machine.run(64);
        used.sort_by_key(|&(head, _)| reads.iter().position(|&read| read == head));
        for (index, &(head, written)) in used.iter().enumerate() {
            assert_eq!((head, written), (reads[index], LEN + 1));
            assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
            let (from, to) = (DATA + index as u64 * 0x2000, 0x20_0000);
            assert!(machine.bytes(from, LEN as usize) == machine.bytes(from + to, LEN as usize));
        }
    });
}

#[test]
fn what_cannot_be_done_is_refused_and_the_rest_is_done() {
    let end = DISK_SIZE as u64 / 512;
    for_each_kind(|mut machine| {
        for (kind, sector, len, status) in [
            (VIRTIO_BLK_T_IN, end, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, end - 1, 1024, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_OUT, u64::MAX, 512, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_IN, 0, 511, VIRTIO_BLK_S_IOERR),
            (VIRTIO_BLK_T_GET_ID, 0, 19, VIRTIO_BLK_S_IOERR),
            (77, 0, 512, VIRTIO_BLK_S_UNSUPP),
            (VIRTIO_BLK_T_IN, end - 1, 512, VIRTIO_BLK_S_OK),
        ] {
            assert_eq!(machine.request(kind, sector, &[(DATA, len)]), status);
        }
        assert!(!machine.link.needs_reset());
    });
}

#[test]
fn a_request_is_not_larger_than_the_event_loop_can_bear() {
    // A sparse disk that is larger than any memory, and one buffer many times.
    let size = 64 << 30;
    let machine = |engine| {
        let machine = Machine::new(engine, CacheMode::Writeback);
        let file = OpenOptions::new().write(true).open(&machine.image).unwrap();
        file.set_len(size).unwrap();
        machine.handle.update_size().unwrap();
        machine
    };
    for engine in ENGINES {
        let mut machine = machine(engine);
        let buffer = (DATA, 4 << 20);
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
            for (count, status) in [
                (16, VIRTIO_BLK_S_OK),
                (17, VIRTIO_BLK_S_IOERR),
                (250, VIRTIO_BLK_S_IOERR),
            ] {
                assert_eq!(machine.request(kind, 0, &vec![buffer; count]), status);
            }
        }
        // One request for as many zeroes, which the host may have to write, or for a hole of that size.
        for kind in [VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_T_DISCARD] {
            for (sectors, data, status) in [
                (1 << 17, &[(DATA, 16)][..], VIRTIO_BLK_S_OK),
                (1 << 17 | 1, &[(DATA, 16)], VIRTIO_BLK_S_IOERR),
                (1 << 17, &[(DATA, 16); 2], VIRTIO_BLK_S_IOERR),
            ] {
                let range = [0_u64, sectors].map(u64::to_le_bytes).concat();
                let memory = machine.memory.clone();
                memory.write_slice(&range, GuestAddress(DATA)).unwrap();
                let head = machine.offer_readable(kind, 0, data);
                machine.run(1);
                assert_eq!(machine.status(head), status);
            }
        }
    }
}

#[test]
fn the_clock_is_looked_at_after_each_request_that_is_not_a_transfer() {
    let range = [0_u64, 8].map(u64::to_le_bytes).concat();
    for kind in [
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_T_FLUSH,
    ] {
        let mut machine = Machine::new(Engine::Sync, CacheMode::Writeback);
        let memory = machine.memory.clone();
        memory.write_slice(&range, GuestAddress(DATA)).unwrap();
        for _ in 0..16 {
            machine.offer_readable(kind, 0, &[(DATA, 16)]);
        }
        machine.run(16);
        // The driver is told of each batch, after which the device checks the clock.
        assert_eq!(machine.interrupts.take(), 16);
    }
}

#[test]
fn a_file_that_was_truncated_fails_the_requests_beyond_its_end() {
    for_each_kind(|mut machine| {
        let file = OpenOptions::new().write(true).open(&machine.image).unwrap();
        file.set_len(0x10_0000).unwrap();
        let beyond = 0x10_0000 / 512;
        for _ in 0..20 {
            machine.offer(VIRTIO_BLK_T_IN, beyond - 1, &[(DATA, 1024)]);
        }
        for (head, _) in machine.run(20) {
            assert_eq!(machine.status(head), VIRTIO_BLK_S_IOERR);
        }
        let inside = machine.request(VIRTIO_BLK_T_IN, beyond - 1, &[(DATA, 512)]);
        assert_eq!(inside, VIRTIO_BLK_S_OK);
    });
}

#[test]
fn a_reset_waits_for_what_is_under_way() {
    for_each_kind(|mut machine| {
        let heads: Vec<u16> = (0..32)
            .map(|index| {
                let address = DATA + index * 0x2_0000;
                machine.offer(VIRTIO_BLK_T_IN, index * 256, &[(address, 0x2_0000)])
            })
            .collect();
        machine.driver.ring_doorbell();
        machine.manager.run_with_timeout(0).unwrap();
        drop(machine.manager.remove_subscriber(machine.worker).unwrap());
        for (index, &head) in heads.iter().enumerate() {
            let start = index * 0x2_0000;
            let bytes = machine.bytes(DATA + start as u64, 0x2_0000);
            // If the host is slow, a turn ends before all are begun.
            if index > 0 && machine.status(head) == u32::from(UNTOUCHED) {
                assert!(bytes.iter().all(|&byte| byte == 0));
                continue;
            }
            assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
            let expected: Vec<u8> = (start..start + 0x2_0000).map(byte_of_disk).collect();
            assert!(bytes == expected);
        }
        // The lock is released with the device.
        drop((machine.manager, machine.handle, machine.block));
        open(&machine.image, false, CacheMode::Writeback).unwrap();
    });
}

#[test]
fn a_disk_grows_and_shrinks_under_its_driver() {
    for_each_kind(|mut machine| {
        let end = DISK_SIZE as u64 / 512;
        let file = OpenOptions::new().write(true).open(&machine.image).unwrap();
        let mut last_sector = |sector| machine.request(VIRTIO_BLK_T_IN, sector, &[(DATA, 512)]);
        assert_eq!(last_sector(end), VIRTIO_BLK_S_IOERR);
        file.set_len(DISK_SIZE as u64 + 4096).unwrap();
        assert_eq!(last_sector(end), VIRTIO_BLK_S_IOERR);

        let handle = &machine.handle;
        assert_eq!(handle.update_size().unwrap(), DISK_SIZE as u64 + 4096);
        assert_eq!(machine.interrupts.take(), 2 + 1);
        assert_eq!(
            machine.request(VIRTIO_BLK_T_IN, end, &[(DATA, 512)]),
            VIRTIO_BLK_S_OK
        );
        assert_eq!(machine.capacity(), end + 8);

        file.set_len(4096).unwrap();
        assert_eq!(machine.handle.update_size().unwrap(), 4096);
        assert_eq!(
            machine.request(VIRTIO_BLK_T_IN, 8, &[(DATA, 512)]),
            VIRTIO_BLK_S_IOERR
        );
        for size in [0, 4095] {
            file.set_len(size).unwrap();
            assert!(machine.handle.update_size().is_err());
            assert_eq!(machine.capacity(), 8);
        }
    });
}

#[test]
fn a_device_that_needs_a_reset_lets_the_event_loop_rest() {
    let mut machine = Machine::new(Engine::IoUring, CacheMode::Writeback);
    let everything = [(DATA, DISK_SIZE as u32)];
    let status = machine.request(VIRTIO_BLK_T_OUT, 0, &everything);
    assert_eq!(status, VIRTIO_BLK_S_OK);
    // The flush is in progress when the device finds a chain that does not exist.
    machine.offer(VIRTIO_BLK_T_FLUSH, 0, &[]);
    machine.driver.offer_head(999);
    machine.driver.ring_doorbell();
    machine.manager.run_with_timeout(0).unwrap();
    assert!(machine.link.needs_reset());
    let mut turns = 0;
    while machine.manager.run_with_timeout(500).unwrap() > 0 {
        turns += 1;
        assert!(turns < 10, "the device spins");
    }
}

#[test]
fn limits_are_kept_without_spinning() {
    let limit = RateLimit::per_second(100, Some(10));
    let in_sectors = RateLimit::per_second(100 * 512, Some(10 * 512));
    for (operations, bytes) in [(Some(limit), None), (None, Some(in_sectors))] {
        let options = BlockOptions {
            limits: Limits { operations, bytes },
            ..BlockOptions::default()
        };
        let mut machine = Machine::with(&options, CacheMode::Writeback);
        for sector in 0..30 {
            machine.offer(VIRTIO_BLK_T_IN, sector, &[(DATA, 512)]);
        }
        machine.driver.ring_doorbell();
        let (start, mut done, mut turns) = (Instant::now(), 0, 0);
        while done < 30 {
            assert!(start.elapsed() < LIMIT, "only {done} are done");
            machine.manager.run_with_timeout(1000).unwrap();
            done += machine.driver.take_used().len();
            turns += 1;
        }
        // Ten of them, and one that exceeds the limit, come at once.
        assert!(start.elapsed() >= Duration::from_millis(180));
        assert!(turns <= 60, "{turns} turns");
    }
}

#[test]
fn a_device_that_polls_does_what_others_do() {
    let options = BlockOptions {
        polls: true,
        ..BlockOptions::default()
    };
    let mut machine = Machine::with(&options, CacheMode::Writeback);
    for sector in 0..100 {
        let status = machine.request(VIRTIO_BLK_T_IN, sector, &[(DATA, 512)]);
        assert_eq!(status, VIRTIO_BLK_S_OK);
        let start = sector as usize * 512;
        let expected: Vec<u8> = (start..start + 512).map(byte_of_disk).collect();
        assert!(machine.bytes(DATA, 512) == expected);
    }
}

#[test]
fn writes_last_where_the_driver_cannot_flush() {
    let durable = |cache, features| {
        let machine = Machine::new(Engine::Sync, cache);
        drop((machine.manager, machine.handle, machine.block));
        let disk = open(&machine.image, false, cache).unwrap();
        let (memory, link) = (machine.memory, machine.link);
        RequestHandler::new(Arc::new(disk.into()), [0; ID_SIZE], features, memory, link)
            .writes_are_durable()
    };
    let flush = 1 << VIRTIO_BLK_F_FLUSH;
    let of_each = |features| CACHE_MODES.map(|cache| durable(cache, features));
    assert_eq!(of_each(flush), [false, true, false, false]);
    assert_eq!(of_each(0), [true, true, true, false]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Descriptors of any content: the device returns the chain, or asks for a reset.
    #[test]
    fn a_hostile_driver_is_survived(
        descriptors in prop::collection::vec(
            (0..0x90_0000_u64, prop_oneof![0..0x3000_u32, any::<u32>()], 0..8_u16, 0..20_u16),
            16,
        ),
        header in prop::collection::vec(prop_oneof![0..16_u8, any::<u8>()], 16),
        heads in prop::collection::vec(0..20_u16, 1..10),
        engine in prop::sample::select(&ENGINES[..]),
    ) {
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        machine.memory.write_slice(&header, GuestAddress(HEADERS)).unwrap();
        for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
            let address = if index % 4 == 0 { HEADERS } else { address };
            let buffer = Buffer { address, len, writable: false };
            machine.driver.write_descriptor(index as u16, buffer, flags, next);
        }
        for &head in &heads {
            machine.driver.offer_head(head);
        }
        machine.driver.ring_doorbell();
        let deadline = Instant::now() + LIMIT;
        let mut returned = 0;
        while returned < heads.len() && !machine.link.needs_reset() {
            prop_assert!(Instant::now() < deadline, "the device does nothing");
            machine.manager.run_with_timeout(100).unwrap();
            returned += machine.driver.take_used().len();
        }
    }
}
