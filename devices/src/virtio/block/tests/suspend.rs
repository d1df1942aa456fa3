//! A device that is paused, resumed, saved and restored under load.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::thread;

use bantam_state::RestoreError;
use bantam_storage::SECTOR_SIZE;

use super::test_image::{ImageThreads, TestImage};
use super::*;
use crate::suspend_test::suspend_tests;
use crate::virtio::F_EVENT_IDX;
use crate::virtio::no_io_uring_test::without_io_uring_setup;
use crate::virtio::suspend_test::{
    Backend, Driver, FREE_MEMORY, SuspendMachine, VirtioGuest, readable, writable,
};
use crate::virtio::transport::mmio::register;

/// Requests in flight at a time, each on its own part of the disk.
const DEPTH: usize = 32;
const SECTOR: usize = SECTOR_SIZE as usize;
const OTHER_SIZE: usize = 0x10_0000;
const OTHER_BYTE: u8 = 0xa7;

/// An image in a folder beside this program: the usual folder for temporary files may be in memory, and have
/// no O_DIRECT.
struct Image {
    path: PathBuf,
    folder: TempDir,
    options: BlockOptions,
    cache: CacheMode,
    /// Present if it is not raw.
    formatted: Option<Arc<TestImage>>,
    threads: ImageThreads,
}

impl Image {
    fn new(engine: Engine, cache: CacheMode) -> Image {
        let program = std::env::current_exe().unwrap();
        let folder = TempDir::new_in(program.parent().unwrap()).unwrap();
        let path = folder.as_path().join("disk.img");
        let bytes: Vec<u8> = (0..DISK_SIZE).map(byte_of_disk).collect();
        fs::write(&path, bytes).unwrap();
        let options = BlockOptions {
            engine,
            ..BlockOptions::default()
        };
        Image {
            path,
            folder,
            options,
            cache,
            formatted: None,
            threads: ImageThreads::default(),
        }
    }

    /// Makes an image that is not raw, whose calls take some time.
    fn formatted(engine: Engine, cache: CacheMode) -> Image {
        let mut image = Image::new(engine, cache);
        let formatted = TestImage::new(&image.folder.as_path().join("file"), 9);
        formatted.delay.store(200, Ordering::SeqCst);
        image.formatted = Some(formatted);
        image
    }

    /// Returns the content of the disk.
    fn content(&self) -> Vec<u8> {
        match &self.formatted {
            Some(image) => image.content(),
            None => fs::read(&self.path).unwrap(),
        }
    }

    /// Makes a device over the image. Its blocks are large, so that small writes share some.
    fn block(&self, link: Arc<DriverLink>) -> (Box<dyn VirtioDevice>, BlockHandle) {
        if let Some(image) = &self.formatted {
            let disk = image.disk(self.cache);
            let block = Block::new(disk, "test disk", &self.options).unwrap();
            self.threads.extend(block.image_work());
            let handle = block.handle(link, self.threads.owner());
            return (Box::new(block), handle);
        }
        let mut disk = open(&self.path, false, self.cache).unwrap();
        if self.cache == CacheMode::None {
            disk = disk.with_block(4096);
        }
        let block = Block::new(disk, "test disk", &self.options).unwrap();
        let handle = block.handle(link, self.threads.owner());
        (Box::new(block), handle)
    }

    fn other_disk(&self) -> DiskFile {
        let path = self.folder.as_path().join("other.img");
        fs::write(&path, vec![OTHER_BYTE; OTHER_SIZE]).unwrap();
        open(&path, false, self.cache).unwrap()
    }

    fn is_free(&self) -> bool {
        open(&self.path, false, CacheMode::Writeback).is_ok()
    }
}

/// Features that the driver accepts if they are offered.
const FEATURES: u64 = COMMON_FEATURES & !F_EVENT_IDX | 1 << VIRTIO_BLK_F_FLUSH;

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_SIZE)]).unwrap())
}

/// Makes a machine whose driver is ready.
fn machine(image: &Image) -> (SuspendMachine, BlockHandle, TestDriver) {
    let memory = memory();
    let driver = TestDriver::new(&memory, RINGS, 256);
    let make = |link| image.block(link);
    let (mut machine, handle) = SuspendMachine::new(&memory, make);
    machine.initialize(FEATURES, &[&driver]);
    (machine, handle, driver)
}

/// Makes a request with one buffer available.
fn offer(
    driver: &mut TestDriver,
    memory: &GuestMemory,
    kind: u32,
    sector: u64,
    data: (u64, u32),
) -> u16 {
    let head = driver.next_head();
    let header = HEADERS + u64::from(head) * HEADER_STRIDE;
    let at = GuestAddress;
    memory.write_obj(kind, at(header)).unwrap();
    memory.write_obj(sector, at(header + 8)).unwrap();
    memory.write_obj(UNTOUCHED, at(header + 16)).unwrap();
    let buffers = [
        (header, 16, false),
        (data.0, data.1, kind != VIRTIO_BLK_T_OUT),
        (header + 16, 1, true),
    ];
    driver.offer(&buffers.map(|(address, len, writable)| Buffer {
        address,
        len,
        writable,
    }))
}

fn status(memory: &GuestMemory, head: u16) -> u32 {
    let address = HEADERS + u64::from(head) * HEADER_STRIDE + 16;
    let status: u8 = memory.read_obj(GuestAddress(address)).unwrap();
    status.into()
}

/// Waits until the driver has got `count` chains back, and returns them.
fn wait_for(driver: &mut TestDriver, count: usize) -> Vec<(u16, u32)> {
    let deadline = Instant::now() + LIMIT;
    let mut used = Vec::new();
    while used.len() < count {
        assert!(Instant::now() < deadline, "only {used:?} are done");
        used.extend(driver.take_used());
        thread::sleep(Duration::from_micros(100));
    }
    used
}

/// Reads a sector, and returns its content.
fn read(
    machine: &mut SuspendMachine,
    driver: &mut TestDriver,
    sector: u64,
) -> Result<Vec<u8>, u32> {
    let memory = machine.memory.clone();
    let data = (DATA, SECTOR as u32);
    let head = offer(driver, &memory, VIRTIO_BLK_T_IN, sector, data);
    machine.ring_doorbell(0);
    assert_eq!(wait_for(driver, 1)[0].0, head);
    let mut bytes = vec![0; SECTOR];
    memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    match status(&memory, head) {
        VIRTIO_BLK_S_OK => Ok(bytes),
        status => Err(status),
    }
}

/// A driver that keeps requests in flight and knows the content of the disk.
struct Load {
    driver: TestDriver,
    model: Vec<u8>,
    /// Size of each part of the disk.
    len: usize,
    /// By head: the part of the disk that the request is for, and what it writes, if it is a write.
    out: HashMap<u16, (usize, Option<Vec<u8>>)>,
    idle: Vec<usize>,
    random: Random,
}

impl Load {
    fn offer_all(&mut self, memory: &GuestMemory) {
        for part in std::mem::take(&mut self.idle) {
            let address = DATA + (part * self.len.next_multiple_of(4096)) as u64;
            let sector = (part * self.len / SECTOR) as u64;
            let data = (address, self.len as u32);
            let written = (self.random.below(3) > 0).then(|| {
                let first = self.random.below(256) as u8;
                let bytes = (0..self.len).map(|at| (at as u8).wrapping_mul(3) ^ first);
                bytes.collect::<Vec<u8>>()
            });
            let zeroes = vec![0; self.len];
            let bytes = written.as_ref().unwrap_or(&zeroes);
            memory.write_slice(bytes, GuestAddress(address)).unwrap();
            let kind = match written {
                Some(_) => VIRTIO_BLK_T_OUT,
                None => VIRTIO_BLK_T_IN,
            };
            let head = offer(&mut self.driver, memory, kind, sector, data);
            assert!(self.out.insert(head, (part, written)).is_none());
        }
    }

    /// Takes completed requests back and checks them. Returns how many there were.
    fn take_back(&mut self, memory: &GuestMemory) -> usize {
        let used = self.driver.take_used();
        for &(head, _) in &used {
            let (part, written) = self.out.remove(&head).expect("it is done once");
            assert_eq!(status(memory, head), VIRTIO_BLK_S_OK);
            let on_disk = &mut self.model[part * self.len..][..self.len];
            match written {
                Some(bytes) => on_disk.copy_from_slice(&bytes),
                None => {
                    let mut bytes = vec![0; self.len];
                    let address = DATA + (part * self.len.next_multiple_of(4096)) as u64;
                    memory
                        .read_slice(&mut bytes, GuestAddress(address))
                        .unwrap();
                    assert!(bytes == on_disk, "part {part}");
                }
            }
            self.idle.push(part);
        }
        used.len()
    }
}

#[test]
fn a_device_is_paused_and_moved_at_any_moment() {
    pause_and_move(&CACHE_MODES, Image::new);
}

#[test]
fn a_device_over_an_image_that_is_not_raw_is_paused_and_moved_at_any_moment() {
    let modes = [CacheMode::Writeback, CacheMode::Writethrough];
    pause_and_move(&modes, Image::formatted);
}

/// Pauses and moves devices over images that `make` makes.
fn pause_and_move(modes: &[CacheMode], make: fn(Engine, CacheMode) -> Image) {
    let mut number = 1;
    for engine in ENGINES {
        for &cache in modes {
            for len in [3 * SECTOR, DISK_SIZE / DEPTH] {
                number += 1;
                let image = make(engine, cache);
                let (mut machine, mut handle, driver) = machine(&image);
                let mut load = Load {
                    driver,
                    model: image.content(),
                    len,
                    out: HashMap::new(),
                    idle: (0..DEPTH).collect(),
                    random: Random(number),
                };
                let mut done = 0;
                for round in 0..24 {
                    load.offer_all(&machine.memory);
                    machine.ring_doorbell(0);
                    thread::sleep(Duration::from_micros(load.random.below(1500)));
                    machine.pause().unwrap();
                    let memory = machine.memory.clone();
                    let count = load.take_back(&memory);
                    done += count;
                    assert!(count == 0 || machine.interrupts.take() > 0);
                    if round % 2 == 0 {
                        thread::sleep(Duration::from_millis(1));
                        assert_eq!(load.driver.take_used(), [], "it is paused");
                    }
                    if round % 8 == 7 {
                        let config = machine.config(config::offset::SIZE);
                        drop(handle);
                        (machine, handle) = machine.moved(|link| image.block(link));
                        load.driver.move_to(&machine.memory);
                        assert_eq!(machine.config(config::offset::SIZE), config);
                    }
                    machine.resume();
                }
                let deadline = Instant::now() + LIMIT;
                while !load.out.is_empty() {
                    assert!(Instant::now() < deadline, "{} are out", load.out.len());
                    let memory = machine.memory.clone();
                    done += load.take_back(&memory);
                }
                assert!(done >= DEPTH);
                assert!(!machine.needs_reset());
                assert!(image.content() == load.model);
            }
        }
    }
}

#[test]
fn a_disk_is_replaced_while_the_device_is_paused() {
    for engine in ENGINES {
        for moves in [false, true] {
            let image = Image::new(engine, CacheMode::Writeback);
            let (mut machine, mut handle, mut driver) = machine(&image);
            assert!(read(&mut machine, &mut driver, 0).is_ok());
            machine.pause().unwrap();
            if moves {
                drop(handle);
                (machine, handle) = machine.moved(|link| image.block(link));
                driver.move_to(&machine.memory);
            }
            machine.interrupts.take();
            let start = Instant::now();
            handle.replace(image.other_disk(), no_haste()).unwrap();
            assert!(start.elapsed() < LIMIT / 2);
            assert!(image.is_free());
            assert_eq!(machine.interrupts.take(), 1);
            let capacity = OTHER_SIZE / SECTOR;
            assert_eq!(machine.config(8), capacity.to_le_bytes());
            machine.resume();
            let last = capacity as u64 - 1;
            assert_eq!(
                read(&mut machine, &mut driver, last),
                Ok(vec![OTHER_BYTE; SECTOR])
            );
            assert!(read(&mut machine, &mut driver, last + 1).is_err());
        }
    }
}

#[test]
fn a_disk_grows_while_the_device_is_paused() {
    for engine in ENGINES {
        let image = Image::new(engine, CacheMode::None);
        let (mut machine, handle, mut driver) = machine(&image);
        let end = (DISK_SIZE / SECTOR) as u64;
        machine.pause().unwrap();
        let file = OpenOptions::new().write(true).open(&image.path).unwrap();
        file.set_len(DISK_SIZE as u64 + 4096).unwrap();
        handle.update_size().unwrap();
        assert_eq!(machine.config(8), (end + 8).to_le_bytes());
        machine.resume();
        assert_eq!(
            read(&mut machine, &mut driver, end + 7),
            Ok(vec![0; SECTOR])
        );
    }
}

#[test]
fn limits_outlive_a_pause_and_are_changed_in_one() {
    let limits = Limits {
        operations: Some(RateLimit {
            size: 1,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        }),
        bytes: None,
    };
    for engine in ENGINES {
        let mut image = Image::new(engine, CacheMode::Writeback);
        image.options.limits = limits;
        let (mut machine, handle, mut driver) = machine(&image);
        let memory = machine.memory.clone();
        for _ in 0..9 {
            offer(&mut driver, &memory, VIRTIO_BLK_T_IN, 0, (DATA, 512));
        }
        machine.ring_doorbell(0);
        // One request, and one that exceeds the limit.
        assert_eq!(wait_for(&mut driver, 2).len(), 2);
        for _ in 0..2 {
            machine.pause().unwrap();
            machine.resume();
            thread::sleep(Duration::from_millis(5));
            assert_eq!(driver.take_used(), []);
        }
        machine.pause().unwrap();
        handle.set_limits(&Limits::default()).unwrap();
        assert_eq!(driver.take_used(), []);
        machine.resume();
        assert_eq!(wait_for(&mut driver, 7).len(), 7);
    }
}

#[test]
fn a_device_that_is_paused_ends_at_once() {
    for engine in ENGINES {
        let image = Image::new(engine, CacheMode::None);
        let (mut machine, handle, mut driver) = machine(&image);
        let memory = machine.memory.clone();
        for _ in 0..DEPTH {
            offer(&mut driver, &memory, VIRTIO_BLK_T_IN, 0, (DATA, 0x1_0000));
        }
        machine.ring_doorbell(0);
        machine.pause().unwrap();
        drop((machine, handle));
        assert!(image.is_free());
    }
}

#[test]
fn a_disk_of_another_size_is_refused() {
    let image = Image::new(Engine::Auto, CacheMode::Writeback);
    let (mut first, handle, _) = machine(&image);
    first.pause().unwrap();
    let section = first.save();
    drop((first, handle));
    let restore = |image: &Image| {
        let make = |link| image.block(link);
        let (mut machine, _) = SuspendMachine::new(&memory(), make);
        match machine.restore(&section) {
            Err(RestoreError::Invalid { reason, .. }) => reason,
            other => panic!("{other:?}"),
        }
    };
    let mut many = Image::new(Engine::Auto, CacheMode::Writeback);
    many.options.queues = 2;
    assert_eq!(
        restore(&many),
        "number of queues: 1 in the saved state, 2 here"
    );

    let file = OpenOptions::new().write(true).open(&image.path).unwrap();
    file.set_len(OTHER_SIZE as u64).unwrap();
    assert_eq!(
        restore(&image),
        "size in bytes: 4194304 in the saved state, 1048576 here"
    );
    file.set_len(DISK_SIZE as u64).unwrap();
    let (mut machine, _) = SuspendMachine::new(&memory(), |link| image.block(link));
    machine.restore(&section).unwrap();
}

/// Makes a device whose reads return what the test writes to a pipe, and hang until then.
fn hanging_worker() -> (
    PausableWorker,
    TestDriver,
    Arc<GuestMemory>,
    io::PipeWriter,
    Image,
    Block,
) {
    let image = Image::new(Engine::IoUring, CacheMode::Writeback);
    let disk = open(&image.path, false, CacheMode::Writeback).unwrap();
    let disk = Arc::new(disk.into());
    let block = Block::new(image.other_disk(), "", &image.options).unwrap();
    let (reader, writer) = io::pipe().unwrap();
    let ring = Some(Ring::over(&[reader.as_raw_fd()]).unwrap());
    let slot = &block.blueprint.slot;
    let old = slot.exchange(OpenDisk { disk, ring }, || Ok(()), no_haste());
    drop(old.unwrap());
    let memory = memory();
    let driver = TestDriver::new(&memory, RINGS, 256);
    let activation = Activation {
        memory: memory.clone(),
        features: block.features(),
        queues: vec![driver.queue(0, false)],
        link: InterruptCounter::default().link(),
        state: None,
    };
    let worker = PausableWorker::new(block.blueprint.clone(), activation);
    (worker, driver, memory, writer, image, block)
}

#[test]
fn storage_that_hangs_fails_the_pause_and_the_device_goes_on() {
    let (worker, mut driver, memory, mut pipe, ..) = hanging_worker();
    let head = offer(&mut driver, &memory, VIRTIO_BLK_T_IN, 0, (DATA, 512));
    let mut manager: EventManager<PausableWorker> = EventManager::new().unwrap();
    let id = manager.add_subscriber(worker);
    driver.ring_doorbell();
    manager.run_with_timeout(100).unwrap();
    // The rest of the request is begun by the thread that pauses the device, and is cancelled when that
    // thread ends.
    pipe.write_all(&[1; 100]).unwrap();
    let mut worker = manager.remove_subscriber(id).unwrap();
    thread::scope(|scope| {
        let owner = scope.spawn(|| worker.pause_by(Instant::now() + Duration::from_millis(100)));
        let error = owner.join().unwrap().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    });
    assert!(worker.save().is_err());
    assert_eq!(driver.take_used(), []);

    let id = manager.add_subscriber(worker);
    while manager.run_with_timeout(20).unwrap() > 0 {}
    assert_eq!(driver.take_used(), []);
    pipe.write_all(&[2; 412]).unwrap();
    let mut worker = manager.remove_subscriber(id).unwrap();
    worker.pause().unwrap();
    assert_eq!(driver.take_used(), [(head, 513)]);
    assert_eq!(status(&memory, head), VIRTIO_BLK_S_OK);
    let mut bytes = [0; 512];
    memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert!(bytes == [&[1; 100][..], &[2; 412]].concat()[..]);
    let progress = worker.progress()[0];
    assert_eq!((progress.next_available, progress.next_used), (1, 1));
}

#[test]
fn a_disk_that_waits_for_requests_takes_its_place_in_the_pause() {
    let (worker, mut driver, memory, mut pipe, image, block) = hanging_worker();
    offer(&mut driver, &memory, VIRTIO_BLK_T_IN, 0, (DATA, 512));
    let mut manager: EventManager<PausableWorker> = EventManager::new().unwrap();
    let id = manager.add_subscriber(worker);
    driver.ring_doorbell();
    manager.run_with_timeout(100).unwrap();
    let handle = block.handle(InterruptCounter::default().link(), image.threads.owner());
    thread::scope(|scope| {
        let owner = scope.spawn(|| handle.replace(image.other_disk(), no_haste()));
        // Once the worker has the other disk, it begins nothing more on this one.
        while !block.blueprint.slot.is_under_way() {
            manager.run_with_timeout(20).unwrap();
        }
        offer(
            &mut driver,
            &memory,
            VIRTIO_BLK_T_IN,
            0,
            (DATA + 0x1000, 512),
        );
        driver.ring_doorbell();
        manager.run_with_timeout(5000).unwrap();
        let mut worker = manager.remove_subscriber(id).unwrap();
        assert!(!owner.is_finished());
        pipe.write_all(&[3; 512]).unwrap();
        worker.pause().unwrap();
        owner.join().unwrap().unwrap();
        assert_eq!(driver.take_used().len(), 1);
        manager.add_subscriber(worker);
    });
    driver.ring_doorbell();
    manager.run_with_timeout(100).unwrap();
    while manager.run_with_timeout(20).unwrap() > 0 {}
    assert_eq!(driver.take_used().len(), 1);
    let mut bytes = [0; 512];
    let address = GuestAddress(DATA + 0x1000);
    memory.read_slice(&mut bytes, address).unwrap();
    assert_eq!(bytes, [OTHER_BYTE; 512]);
    assert!(image.is_free());
}

/// Makes a request for one sector available.
fn sector_request(driver: &mut Driver, kind: u32, sector: u64, place: u64) {
    let header = FREE_MEMORY + place * 0x1000;
    let bytes = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()];
    driver.store(header, &bytes.concat());
    driver.store(header + 16, &[UNTOUCHED]);
    let len = SECTOR as u32;
    let data = match kind {
        VIRTIO_BLK_T_OUT => readable(header + SECTOR as u64, len),
        _ => writable(header + SECTOR as u64, len),
    };
    let request = [readable(header, 16), data, writable(header + 16, 1)];
    driver.offer(0, &request);
}

/// Returns the data of a completed request.
fn sector_data(driver: &Driver, place: u64) -> Vec<u8> {
    let header = FREE_MEMORY + place * 0x1000;
    let status = driver.load(header + 16, 1);
    assert_eq!(u32::from(status[0]), VIRTIO_BLK_S_OK);
    driver.load(header + SECTOR as u64, SECTOR)
}

impl Backend for Image {
    const QUEUES: u64 = 1;
    const FEATURES: u64 = COMMON_FEATURES | 1 << VIRTIO_BLK_F_FLUSH;

    fn new() -> Image {
        Image::new(Engine::Auto, CacheMode::None)
    }

    fn device(&mut self, _: &Arc<GuestMemory>, link: Arc<DriverLink>) -> Box<dyn VirtioDevice> {
        self.block(link).0
    }

    fn work(&mut self, driver: &mut Driver) {
        let written: Vec<u8> = (0..SECTOR).map(|at| at as u8 ^ 0x5a).collect();
        driver.store(FREE_MEMORY + SECTOR as u64, &written);
        sector_request(driver, VIRTIO_BLK_T_OUT, 100, 0);
        driver.wait(0, 1);
        sector_request(driver, VIRTIO_BLK_T_IN, 100, 1);
        driver.wait(0, 1);
        assert!(sector_data(driver, 1) == written);
    }

    fn begin(&mut self, driver: &mut Driver) {
        for place in 0..16 {
            sector_request(driver, VIRTIO_BLK_T_IN, 200 + place, place);
        }
    }

    fn end(&mut self, driver: &mut Driver) {
        driver.wait(0, 16);
        for place in 0..16 {
            let start = (200 + place as usize) * SECTOR;
            let expected: Vec<u8> = (start..start + SECTOR).map(byte_of_disk).collect();
            assert!(sector_data(driver, place) == expected);
        }
    }
}

suspend_tests!(VirtioGuest<Image>);

/// An image that is not raw.
struct FormattedImage(Image);

impl Backend for FormattedImage {
    const QUEUES: u64 = Image::QUEUES;
    const FEATURES: u64 = Image::FEATURES;

    fn new() -> FormattedImage {
        FormattedImage(Image::formatted(Engine::Auto, CacheMode::Writeback))
    }

    fn device(
        &mut self,
        memory: &Arc<GuestMemory>,
        link: Arc<DriverLink>,
    ) -> Box<dyn VirtioDevice> {
        self.0.device(memory, link)
    }

    fn work(&mut self, driver: &mut Driver) {
        self.0.work(driver);
    }

    fn begin(&mut self, driver: &mut Driver) {
        self.0.begin(driver);
    }

    fn end(&mut self, driver: &mut Driver) {
        self.0.end(driver);
    }
}

mod formatted {
    use super::*;

    suspend_tests!(VirtioGuest<FormattedImage>);
}

#[test]
fn a_thread_that_hangs_fails_the_pause_and_the_device_goes_on() {
    for engine in ENGINES {
        let image = Image::formatted(engine, CacheMode::Writeback);
        let formatted = image.formatted.as_ref().unwrap();
        let block = Block::new(formatted.disk(image.cache), "", &image.options).unwrap();
        let threads = ImageThreads::default();
        threads.extend(block.image_work());
        let memory = memory();
        let mut driver = TestDriver::new(&memory, RINGS, 256);
        let activation = Activation {
            memory: memory.clone(),
            features: block.features(),
            queues: vec![driver.queue(0, false)],
            link: InterruptCounter::default().link(),
            state: None,
        };
        let worker = PausableWorker::new(block.blueprint.clone(), activation);
        let mut manager: EventManager<PausableWorker> = EventManager::new().unwrap();
        let id = manager.add_subscriber(worker);
        formatted.close(true);
        let head = offer(&mut driver, &memory, VIRTIO_BLK_T_FLUSH, 0, (DATA, 512));
        driver.ring_doorbell();
        manager.run_with_timeout(100).unwrap();
        let mut worker = manager.remove_subscriber(id).unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = worker.pause_by(deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(driver.take_used(), []);

        let id = manager.add_subscriber(worker);
        formatted.close(false);
        while driver.take_used() != [(head, 513)] {
            manager.run_with_timeout(20).unwrap();
        }
        let mut worker = manager.remove_subscriber(id).unwrap();
        worker.pause().unwrap();
        let progress = worker.progress()[0];
        assert_eq!((progress.next_available, progress.next_used), (1, 1));
    }
}

/// The descriptor of the ring that waits for a worker.
fn waiting_ring(handle: &BlockHandle) -> Option<RawFd> {
    let (open_disk, _, lease) = handle.slot.lease();
    let descriptor = open_disk.ring.as_ref().map(AsRawFd::as_raw_fd);
    if let Some(ring) = open_disk.ring {
        lease.give_back(ring);
    }
    descriptor
}

#[test]
fn drivers_one_after_the_other_have_the_ring_that_was_made_with_the_device() {
    let image = Image::new(Engine::IoUring, CacheMode::Writeback);
    let memory = memory();
    let make = |link| image.block(link);
    let (mut machine, handle) = SuspendMachine::new(&memory, make);
    let made = waiting_ring(&handle);
    assert!(made.is_some());
    without_io_uring_setup(|| {
        for _ in 0..3 {
            let rings = [0; RINGS_SIZE as usize];
            memory.write_slice(&rings, GuestAddress(RINGS)).unwrap();
            let mut driver = TestDriver::new(&memory, RINGS, 256);
            machine.initialize(FEATURES, &[&driver]);
            let head = offer(&mut driver, &memory, VIRTIO_BLK_T_IN, 0, (DATA, 512));
            machine.ring_doorbell(0);
            machine.pause().unwrap();
            assert_eq!(waiting_ring(&handle), made);
            machine.resume();
            while driver.take_used() != [(head, 513)] {
                thread::yield_now();
            }
            // The worker ends while the ring has requests.
            for sector in 0..32 {
                offer(&mut driver, &memory, VIRTIO_BLK_T_IN, sector, (DATA, 512));
            }
            machine.ring_doorbell(0);
            machine.write(register::STATUS, 0);
            assert_eq!(waiting_ring(&handle), made);
        }
    });
}

#[test]
fn a_ring_that_is_lost_is_replaced_on_the_event_loop() {
    let image = Image::new(Engine::IoUring, CacheMode::Writeback);
    let (mut machine, handle) = SuspendMachine::new(&memory(), |link| image.block(link));
    let (open_disk, _, lease) = handle.slot.lease();
    drop((open_disk, lease));
    assert_eq!(waiting_ring(&handle), None);
    without_io_uring_setup(|| {
        let driver = TestDriver::new(&machine.memory.clone(), RINGS, 256);
        machine.initialize(FEATURES, &[&driver]);
        machine.write(register::STATUS, 0);
    });
    assert!(waiting_ring(&handle).is_some());
}
