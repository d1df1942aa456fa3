//! A disk whose image is not raw.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::thread;

use bantam_storage::HostOpener;

use super::direct::folders;
use super::test_image::{ImageThread, TestImage};
use super::*;

/// Requests in flight at a time.
const DEPTH: u64 = 32;
const SECTOR: u64 = 512;
/// Most sectors of a request.
const MAX_SECTORS: u64 = 40;
/// The part of the disk that is used, in sectors: small, so that requests meet.
const SECTORS: u64 = 512;
/// Size of the data that is compared as a whole, in bytes. Nothing copies it in two.
const GRANULE: usize = 8;

fn machine(image: &Arc<TestImage>, engine: Engine, cache: CacheMode) -> Machine {
    let options = BlockOptions {
        engine,
        ..BlockOptions::default()
    };
    let folder = TempDir::new().unwrap();
    Machine::of(image.disk(cache), PathBuf::new(), folder, &options)
}

fn image(seed: u64) -> (Arc<TestImage>, TempDir) {
    let folder = TempDir::new().unwrap();
    let image = TestImage::new(&folder.as_path().join("file"), seed);
    (image, folder)
}

const MODES: [CacheMode; 3] = [
    CacheMode::Writeback,
    CacheMode::Writethrough,
    CacheMode::Unsafe,
];

impl Machine {
    /// Offers many reads, calls `replace`, and checks that each read has found one of `contents`.
    fn read_during(
        &mut self,
        contents: &[Vec<u8>],
        replace: impl FnOnce(&mut Machine) -> Result<(), ReplaceError>,
    ) {
        const COUNT: u64 = 64;
        const SIZE: u32 = 0x1_0000;
        let address = |index: u64| DATA + index * u64::from(SIZE);
        let sector = |index: u64| index * 113 % 8000;
        let heads: Vec<u16> = (0..COUNT)
            .map(|index| self.offer(VIRTIO_BLK_T_IN, sector(index), &[(address(index), SIZE)]))
            .collect();
        self.driver.ring_doorbell();
        self.manager.run_with_timeout(0).unwrap();
        replace(self).unwrap();
        let done = self.driver.take_used().len();
        self.run(COUNT as usize - done);
        for (index, head) in (0..).zip(heads) {
            assert_eq!(self.status(head), VIRTIO_BLK_S_OK);
            let bytes = self.bytes(address(index), SIZE as usize);
            let offset = sector(index) as usize * 512;
            let is_there = |content: &Vec<u8>| content[offset..][..bytes.len()] == bytes;
            assert!(contents.iter().any(is_there), "request {index}");
        }
    }
}

/// What a sector may hold.
struct Value {
    /// Number of the request that has written it, 0 for zeroes.
    id: u32,
    /// When the request was offered and done.
    offered: u64,
    done: Option<u64>,
    /// When another value was certainly in its place.
    replaced: Option<u64>,
}

/// What is known of the disk while requests are under way that meet each other.
struct Model {
    sectors: Vec<Vec<Value>>,
    /// Counts what happens.
    time: u64,
}

impl Model {
    /// Returns the bytes that the request `id` writes to `sector`.
    fn bytes(id: u32, sector: u64) -> Vec<u8> {
        let granule = match id {
            0 => [0; GRANULE],
            id => ((u64::from(id) << 32) | sector).to_le_bytes(),
        };
        granule.repeat(SECTOR as usize / GRANULE)
    }

    fn offer(&mut self, id: u32, sectors: Range<u64>) {
        for sector in sectors {
            self.sectors[sector as usize].push(Value {
                id,
                offered: self.time,
                done: None,
                replaced: None,
            });
        }
    }

    /// Takes account of a change that is done, `offered` at a time. Unless it `replaces` what was there, that
    /// may be there still.
    fn done(&mut self, id: u32, offered: u64, sectors: Range<u64>, replaces: bool) {
        for sector in sectors {
            for value in &mut self.sectors[sector as usize] {
                if value.id == id && value.offered == offered {
                    value.done = Some(self.time);
                } else if replaces && value.done.is_some_and(|done| done < offered) {
                    value.replaced.get_or_insert(self.time);
                }
            }
        }
    }

    /// Checks what a read has found that was `offered` at a time.
    fn check(&self, bytes: &[u8], offered: u64, sectors: Range<u64>) {
        for (sector, bytes) in sectors.zip(bytes.chunks(SECTOR as usize)) {
            let values = &self.sectors[sector as usize];
            let possible = values
                .iter()
                .filter(|value| value.replaced.is_none_or(|replaced| replaced > offered))
                .map(|value| Model::bytes(value.id, sector)[..GRANULE].to_vec());
            let possible: Vec<_> = possible.collect();
            // A request ends a piece of its data within a granule, so a read beside it can find one half of that.
            let begins = |bytes: &[u8]| possible.iter().any(|value| value.starts_with(bytes));
            let ends = |bytes: &[u8]| possible.iter().any(|value| value.ends_with(bytes));
            for granule in bytes.chunks(GRANULE) {
                let is_known = (0..=GRANULE).any(|place| {
                    let (first, second) = granule.split_at(place);
                    begins(first) && ends(second)
                });
                assert!(is_known, "sector {sector} holds {granule:x?}");
            }
        }
    }
}

/// A request that is under way.
struct Request {
    kind: u32,
    /// How many were begun before it.
    number: usize,
    id: u32,
    offered: u64,
    sectors: Range<u64>,
    /// Where its data is.
    address: u64,
}

/// Has `count` requests of all kinds done that use the same parts of the disk at the same time. `let_fail`
/// is called to say whether some may fail. Returns how many have.
fn drive(machine: &mut Machine, seed: u64, count: usize, let_fail: impl Fn(bool)) -> u32 {
    let mut random = Random(seed);
    let mut model = Model {
        sectors: (0..SECTORS).map(|_| Vec::new()).collect(),
        time: 1,
    };
    // All of it is zero at first.
    let_fail(false);
    for start in (0..SECTORS).step_by(128) {
        let range = [start.to_le_bytes(), 128_u64.to_le_bytes()].concat();
        machine
            .memory
            .write_slice(&range, GuestAddress(DATA))
            .unwrap();
        let head = machine.offer_readable(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16)]);
        assert_eq!(machine.run(1), [(head, 1)]);
        assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
    }
    model.offer(0, 0..SECTORS);
    model.time += 1;
    model.done(0, 1, 0..SECTORS, true);
    let_fail(seed.is_multiple_of(2));

    let stride = MAX_SECTORS * SECTOR + 4096;
    let mut idle: Vec<u64> = (0..DEPTH).map(|place| DATA + place * stride).collect();
    let mut out: HashMap<u16, Request> = HashMap::new();
    let (mut begun, mut failed) = (0, 0);
    while begun < count || !out.is_empty() {
        // The driver uses its descriptors in turn, four for each request.
        let oldest = out.values().map(|request| request.number).min();
        let end = oldest.map_or(count, |oldest| count.min(oldest + 60));
        while begun < end
            && let Some(address) = idle.pop()
        {
            let number = begun;
            begun += 1;
            let (id, offered) = (begun as u32, model.time);
            let start = random.below(SECTORS);
            let end = start + 1 + random.below((SECTORS - start).min(MAX_SECTORS));
            let mut request = Request {
                kind: match random.below(16) {
                    0..7 => VIRTIO_BLK_T_IN,
                    7..13 => VIRTIO_BLK_T_OUT,
                    13 => VIRTIO_BLK_T_WRITE_ZEROES,
                    14 => VIRTIO_BLK_T_DISCARD,
                    _ => VIRTIO_BLK_T_FLUSH,
                },
                number,
                id,
                offered,
                sectors: start..end,
                address,
            };
            let len = (end - start) * SECTOR;
            let (bytes, data) = match request.kind {
                VIRTIO_BLK_T_IN => (vec![0x77; len as usize], len),
                VIRTIO_BLK_T_OUT => {
                    let bytes = (start..end).flat_map(|sector| Model::bytes(id, sector));
                    (bytes.collect(), len)
                }
                VIRTIO_BLK_T_FLUSH => (Vec::new(), 0),
                _ => {
                    request.id = 0;
                    (
                        [start.to_le_bytes(), (end - start).to_le_bytes()].concat(),
                        16,
                    )
                }
            };
            machine
                .memory
                .write_slice(&bytes, GuestAddress(address))
                .unwrap();
            if matches!(
                request.kind,
                VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_WRITE_ZEROES | VIRTIO_BLK_T_DISCARD
            ) {
                model.offer(request.id, request.sectors.clone());
            }
            // In two pieces that are not sectors.
            let first = (data / 2 + 3).min(data);
            let pieces = [
                (address, first as u32),
                (address + first, (data - first) as u32),
            ];
            let pieces = &pieces[..if data == 0 { 0 } else { 2 }];
            let head = machine.offer_with(
                request.kind,
                match request.kind {
                    VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => start,
                    _ => 0,
                },
                pieces,
                request.kind == VIRTIO_BLK_T_IN,
            );
            out.insert(head, request);
            model.time += 1;
        }
        for (head, _) in machine.run(1) {
            model.time += 1;
            let request = out.remove(&head).expect("it is done once");
            idle.push(request.address);
            if machine.status(head) != VIRTIO_BLK_S_OK {
                failed += 1;
                continue;
            }
            match request.kind {
                VIRTIO_BLK_T_IN => {
                    let len = (request.sectors.end - request.sectors.start) * SECTOR;
                    let bytes = machine.bytes(request.address, len as usize);
                    model.check(&bytes, request.offered, request.sectors);
                }
                VIRTIO_BLK_T_FLUSH => {}
                kind => {
                    // What is discarded may be zero.
                    let replaces = kind != VIRTIO_BLK_T_DISCARD;
                    model.done(request.id, request.offered, request.sectors, replaces);
                }
            }
        }
    }
    let mut content = vec![0; (SECTORS * SECTOR) as usize];
    let_fail(false);
    let Disk::Formatted(disk) = &*machine.handle.disk() else {
        panic!("it is raw");
    };
    disk.image().read_at(&mut content, 0).unwrap();
    model.check(&content, model.time, 0..SECTORS);
    failed
}

#[test]
fn what_was_written_is_read_while_the_image_moves_it() {
    let mut seed = 1;
    for engine in ENGINES {
        for cache in MODES {
            for delay in [0, 100] {
                for _ in 0..2 {
                    seed += 1;
                    let (image, _folder) = image(seed);
                    image.delay.store(delay, Ordering::SeqCst);
                    let mut machine = machine(&image, engine, cache);
                    let let_fail = |fails| image.fails.store(fails, Ordering::SeqCst);
                    let failed = drive(&mut machine, seed, 1500, let_fail);
                    assert_eq!(failed > 0, seed.is_multiple_of(2), "{failed} have failed");
                    assert!(!machine.link.needs_reset());
                }
            }
        }
    }
}

/// Drives a disk in a qcow2 image in `folder` with these options, over other files.
fn drive_qcow2(
    folder: &Path,
    engine: Engine,
    cache: CacheMode,
    seed: u64,
    layers: usize,
    options: &str,
) {
    let folder = TempDir::new_in(folder).unwrap();
    let top = qcow2_chain(folder.as_path(), layers, options);
    let disk_options = DiskOptions {
        cache,
        backing: true,
        ..DiskOptions::default()
    };
    let disk = Disk::open_by(&HostOpener, &top, &disk_options).unwrap();
    let options = BlockOptions {
        engine,
        ..BlockOptions::default()
    };
    let other = TempDir::new().unwrap();
    let mut machine = Machine::of(disk, top.clone(), other, &options);
    assert_eq!(drive(&mut machine, seed, 1000, |_| {}), 0);
    drop(machine);
    let checked = qemu_img(folder.as_path(), &["check", top.to_str().unwrap()]);
    assert!(checked, "seed {seed}");
}

#[test]
fn what_was_written_to_qcow2_images_is_read() {
    let mut seed = 100;
    for engine in ENGINES {
        for cache in MODES {
            for (layers, options) in [
                (1, "cluster_size=64k"),
                (2, "cluster_size=4k"),
                (2, "extended_l2=on"),
            ] {
                seed += 1;
                let folder = std::env::temp_dir();
                drive_qcow2(&folder, engine, cache, seed, layers, options);
            }
        }
    }
}

#[test]
fn what_was_written_to_qcow2_images_past_the_page_cache_is_read() {
    let mut seed = 200;
    for engine in ENGINES {
        for folder in folders() {
            for (layers, options) in [
                (1, "cluster_size=64k"),
                (2, "cluster_size=4k"),
                (2, "extended_l2=on,cluster_size=128k"),
            ] {
                seed += 1;
                drive_qcow2(&folder, engine, CacheMode::None, seed, layers, options);
            }
        }
    }
}

fn qemu_img(folder: &Path, arguments: &[&str]) -> bool {
    let mut command = Command::new("qemu-img");
    let command = command.args(arguments).current_dir(folder);
    let output = command.output().expect("qemu-img is installed");
    output.status.success()
}

/// Makes an image over some others, the lowest of which is raw, and returns its path.
fn qcow2_chain(folder: &Path, layers: usize, options: &str) -> PathBuf {
    let bytes: Vec<u8> = (0..DISK_SIZE).map(byte_of_disk).collect();
    fs::write(folder.join("0"), bytes).unwrap();
    for layer in 1..=layers {
        let (above, below) = (format!("{layer}"), format!("{}", layer - 1));
        let format = if layer == 1 { "raw" } else { "qcow2" };
        let arguments = [
            "create", "-q", "-f", "qcow2", "-o", options, "-F", format, "-b", &below, &above,
        ];
        assert!(qemu_img(folder, &arguments));
    }
    let top = folder.join("top.qcow2");
    fs::rename(folder.join(layers.to_string()), &top).unwrap();
    top
}

#[test]
fn a_discard_waits_for_transfers_of_its_bytes_and_they_wait_for_it() {
    let (image, folder) = image(3);
    image.is_steady.store(true, Ordering::SeqCst);
    let options = BlockOptions {
        engine: Engine::IoUring,
        ..BlockOptions::default()
    };
    let disk = || image.disk(CacheMode::Writeback);
    let block = Block::new(disk(), "", &options).unwrap();
    // What is read from the file is what the test writes to a pipe, and hangs until then.
    let (reader, writer) = io::pipe().unwrap();
    let ring = Some(Ring::over(&[reader.as_raw_fd()]).unwrap());
    let disk = Arc::new(disk().into());
    drop(
        block
            .blueprint
            .slot
            .exchange(OpenDisk { disk, ring }, || Ok(()), no_haste()),
    );
    let mut machine = Machine::over_block(block, PathBuf::new(), folder);
    // Dropped before the machine, which waits for its requests.
    let mut pipe = writer;
    let work = |machine: &mut Machine| {
        machine.driver.ring_doorbell();
        while machine.manager.run_with_timeout(100).unwrap() > 0 {}
        let used = machine.driver.take_used();
        used.iter().map(|&(head, _)| head).collect::<Vec<u16>>()
    };
    let read = |machine: &mut Machine, address| {
        // The second cluster is in the file.
        machine.offer(VIRTIO_BLK_T_IN, 8, &[(address, 4096)])
    };
    let discard = |machine: &mut Machine, sector: u64| {
        let range = [sector.to_le_bytes(), 8_u64.to_le_bytes()].concat();
        let address = DATA + sector * 4096;
        let memory = &machine.memory;
        memory.write_slice(&range, GuestAddress(address)).unwrap();
        machine.offer_readable(VIRTIO_BLK_T_DISCARD, 0, &[(address, 16)])
    };

    let first = read(&mut machine, DATA);
    assert!(work(&mut machine).is_empty());
    let discarded = discard(&mut machine, 8);
    let second = read(&mut machine, DATA + 4096);
    let elsewhere = discard(&mut machine, 40);
    assert_eq!(work(&mut machine), [elsewhere]);
    image.close(true);
    pipe.write_all(&[7; 4096]).unwrap();
    assert_eq!(work(&mut machine), [first]);
    assert_eq!(machine.bytes(DATA, 4096), [7; 4096]);
    image.close(false);
    assert_eq!(work(&mut machine), [discarded, second]);
    assert_eq!(machine.bytes(DATA + 4096, 4096), [0; 4096]);
}

#[test]
fn a_write_that_must_last_is_flushed_before_it_is_done() {
    for engine in ENGINES {
        for (cache, flushes) in [(CacheMode::Writethrough, 1), (CacheMode::Writeback, 0)] {
            let (image, _folder) = image(7);
            let mut machine = machine(&image, engine, cache);
            for sector in [0, 8, 16, 3] {
                let before = image.flushes.load(Ordering::SeqCst);
                let status = machine.request(VIRTIO_BLK_T_OUT, sector, &[(DATA, 0x3000)]);
                assert_eq!(status, VIRTIO_BLK_S_OK);
                assert_eq!(image.flushes.load(Ordering::SeqCst) - before, flushes);
            }
            let before = image.flushes.load(Ordering::SeqCst);
            machine.request(VIRTIO_BLK_T_FLUSH, 0, &[]);
            assert_eq!(image.flushes.load(Ordering::SeqCst) - before, 1);
        }
    }
    let (image, _folder) = image(7);
    let mut machine = machine(&image, Engine::Auto, CacheMode::Unsafe);
    assert_eq!(machine.request(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
    assert_eq!(image.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn a_reset_waits_for_the_thread_of_the_image() {
    for engine in ENGINES {
        let (image, _folder) = image(3);
        let mut machine = machine(&image, engine, CacheMode::Writeback);
        image.close(true);
        // The first cluster is not in the file.
        machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 4096)]);
        machine.driver.ring_doorbell();
        machine.manager.run_with_timeout(100).unwrap();
        thread::scope(|scope| {
            let opener = scope.spawn(|| {
                thread::sleep(Duration::from_millis(50));
                image.close(false);
            });
            let worker = machine.manager.remove_subscriber(machine.worker).unwrap();
            drop(worker);
            // What the guest does with its memory from now on, nothing changes.
            assert!(!image.is_closed());
            opener.join().unwrap();
        });
        let before = vec![0x5a; 4096];
        machine
            .memory
            .write_slice(&before, GuestAddress(DATA))
            .unwrap();
        thread::sleep(Duration::from_millis(20));
        assert!(machine.bytes(DATA, 4096) == before);
    }
}

#[test]
fn a_thread_that_panics_fails_the_requests_that_it_has_and_gets() {
    for engine in ENGINES {
        let (image, _folder) = image(3);
        let mut machine = machine(&image, engine, CacheMode::Writeback);
        image.panics.store(true, Ordering::SeqCst);
        for _ in 0..2 {
            for index in 0..8 {
                // Each is in a cluster that is not in the file.
                let data = [(DATA + index * 4096, 4096)];
                machine.offer(VIRTIO_BLK_T_IN, index * 24, &data);
            }
            for (head, _) in machine.run(8) {
                assert_eq!(machine.status(head), VIRTIO_BLK_S_IOERR);
            }
        }
        let id = [(DATA, 20)];
        let status = machine.request(VIRTIO_BLK_T_GET_ID, 0, &id);
        assert_eq!(status, VIRTIO_BLK_S_OK);
    }
}

#[test]
fn what_is_read_from_an_image_is_in_the_dirty_log() {
    for engine in ENGINES {
        let (image, _folder) = image(5);
        let mut machine = machine(&image, engine, CacheMode::Writeback);
        // One cluster is nowhere, others are in memory and in the file.
        let range = [16_u64.to_le_bytes(), 8_u64.to_le_bytes()].concat();
        machine
            .memory
            .write_slice(&range, GuestAddress(DATA))
            .unwrap();
        let head = machine.offer_readable(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)]);
        machine.run(1);
        assert_eq!(machine.status(head), VIRTIO_BLK_S_OK);
        machine.offer(VIRTIO_BLK_T_IN, 0, &[(DATA, 0x5000), (DATA + 0x8000, 512)]);
        machine.memory.start_dirty_log().unwrap();
        machine.run(1);
        let pages = machine.memory.take_dirty().unwrap();
        let dirty: Vec<u64> = pages.iter().map(|page| page.0).collect();
        let used = RINGS + 0x2000;
        let mut expected = vec![used, HEADERS];
        expected.extend((0..5).map(|page| DATA + page * 0x1000));
        expected.push(DATA + 0x8000);
        assert_eq!(dirty, expected);
    }
}

#[test]
fn images_of_all_formats_take_the_place_of_each_other() {
    for engine in ENGINES {
        let mut machine = Machine::new(engine, CacheMode::Writeback);
        assert_eq!(machine.image_threads.count(), 0);
        let raw: Vec<u8> = (0..DISK_SIZE).map(byte_of_disk).collect();
        let mut present = raw.clone();
        for round in 0..2 {
            // Many requests are in progress, or wait, when the image is replaced.
            let (image, _folder) = image(3);
            let content = [present, image.content()];
            machine.read_during(&content, |machine| {
                machine.replace(image.disk(CacheMode::Writeback))
            });
            assert_eq!(machine.image_threads.count(), 1);
            let status = machine.request(VIRTIO_BLK_T_OUT, 1000, &[(DATA, 0x3000)]);
            assert_eq!(status, VIRTIO_BLK_S_OK);
            assert_eq!(machine.request(VIRTIO_BLK_T_FLUSH, 0, &[]), VIRTIO_BLK_S_OK);
            let data = machine.bytes(DATA, 0x3000);
            assert!(image.content()[1000 * 512..][..0x3000] == data);

            let content = [image.content(), raw.clone()];
            let path = machine.folder.as_path().join(format!("raw{round}.img"));
            fs::write(&path, &raw).unwrap();
            let disk = open(&path, false, CacheMode::Writeback).unwrap();
            machine.read_during(&content, |machine| machine.replace(disk));
            let status = machine.request(VIRTIO_BLK_T_OUT, 1000, &[(DATA, 0x3000)]);
            assert_eq!(status, VIRTIO_BLK_S_OK);
            let data = machine.bytes(DATA, 0x3000);
            present = fs::read(&path).unwrap();
            assert!(present[1000 * 512..][..0x3000] == data);
        }
        // Requests that only a thread does are done after a reset, too.
        let (image, _folder) = image(4);
        machine.replace(image.disk(CacheMode::Writeback)).unwrap();
        machine.reset();
        machine.read_during(&[image.content()], |_| Ok(()));
        assert_eq!(machine.image_threads.count(), 1);
    }
}

/// The owner of a machine on a host without more threads.
struct NoThreads;

impl DiskOwner for NoThreads {
    fn start_image_thread(&self, _: Arc<ImageWork>) -> io::Result<()> {
        Err(io::Error::other("no more threads"))
    }

    fn start_job(&self, _: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        Err(io::Error::other("no more threads"))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

#[test]
fn an_image_without_a_thread_does_not_take_the_place_of_a_raw_one() {
    let mut machine = Machine::new(Engine::Auto, CacheMode::Writeback);
    machine.handle.owner = Arc::new(NoThreads);
    let (image, _folder) = image(3);
    let error = machine
        .replace(image.disk(CacheMode::Writeback))
        .unwrap_err();
    assert!(matches!(error, ReplaceError::Thread { .. }), "{error}");
    let raw: Vec<u8> = (0..DISK_SIZE).map(byte_of_disk).collect();
    machine.read_during(&[raw], |_| Ok(()));
}

#[test]
fn an_image_is_prepared_unless_its_thread_ends() {
    let (image, _folder) = image(5);
    let work = Arc::new(ImageWork::new().unwrap());
    work.prepare(image.clone());
    work.end();
    work.prepare(image.clone());
    assert_eq!(Arc::strong_count(&image), 1);

    let work = Arc::new(ImageWork::new().unwrap());
    work.prepare(image.clone());
    let thread = ImageThread::start(work);
    let start = Instant::now();
    while image.preparations.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::yield_now();
    }
    drop(thread);
    assert_eq!(Arc::strong_count(&image), 1);
}
