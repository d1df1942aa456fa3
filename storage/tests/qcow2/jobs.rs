//! Jobs that copy a disk while several threads use it as its guest does.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use bantam_storage::job::{
    CommitJob, Control, CopyJob, CopyJobOptions, JobError, JobState, PullJob,
};
use bantam_storage::qcow2::{BackingName, CreateOptions, Header, Qcow2};
use bantam_storage::{
    Direction, Disk, DiskError, DiskOptions, Extent, FormattedDisk, HostOpener, Image, ImageFormat,
    LayerFile, RawImage,
};
use proptest::prelude::*;
use proptest::test_runner::Config;

use crate::memory_file::{Change, MemoryFile};
use crate::support::{Folder, Numbers, host_file, qemu, read_all};

/// Each thread has a part of the disk for itself, where it knows what it reads. The last part is for all.
const PART: u64 = (2 << 20) + 7 * 512;
const THREADS: u64 = 3;
const SIZE: u64 = PART * (THREADS + 1);

/// How a layer of a disk is kept.
#[derive(Debug, Clone, Copy)]
enum Layer {
    Raw,
    Qcow2 {
        cluster_size: u64,
        version: u32,
        extended_l2: bool,
    },
}

fn layer() -> impl Strategy<Value = Layer> {
    prop_oneof![1 => Just(Layer::Raw), 4 => qcow2_layer()]
}

fn qcow2_layer() -> impl Strategy<Value = Layer> {
    (9u32..=17, 2u32..=3, any::<bool>()).prop_map(|(bits, version, extended)| Layer::Qcow2 {
        cluster_size: 1 << bits,
        version,
        extended_l2: extended && version == 3 && bits >= 14,
    })
}

impl Layer {
    fn format(self) -> &'static str {
        match self {
            Layer::Raw => "raw",
            Layer::Qcow2 { .. } => "qcow2",
        }
    }

    /// Makes an image of zeroes, or over a backing file.
    fn create(self, path: &Path, size: u64, backing: Option<BackingName>) {
        let file = std::fs::File::create(path).unwrap();
        let Layer::Qcow2 {
            cluster_size,
            version,
            extended_l2,
        } = self
        else {
            file.set_len(size).unwrap();
            return;
        };
        let options = CreateOptions {
            size,
            cluster_size,
            version,
            extended_l2,
            backing,
            ..CreateOptions::default()
        };
        Qcow2::create(host_file(path, false), &options).unwrap();
    }
}

/// Makes a chain of images `layer0`, which is the lowest, `layer1` and so on, with random content, and returns the
/// path of the last one.
fn make_chain(folder: &Folder, layers: &[(Layer, u64)], seed: u64) -> std::path::PathBuf {
    let mut numbers = Numbers::new(seed);
    let mut backing = None;
    let mut path = folder.path("layer0");
    for (number, &(layer, size)) in layers.iter().enumerate() {
        path = folder.path(&format!("layer{number}"));
        layer.create(&path, size, backing.take());
        {
            let disk = open(&path, layer);
            let image = disk.image();
            for turn in 0..12 {
                let range = range_in(&mut numbers, 0..size);
                match turn % 6 {
                    5 => image.write_zeroes(range, true).unwrap(),
                    _ => {
                        let bytes =
                            vec![numbers.below(255) as u8 + 1; (range.end - range.start) as usize];
                        image.write_at(&bytes, range.start).unwrap();
                    }
                }
            }
            image.flush().unwrap();
        }
        backing = Some(BackingName {
            name: format!("layer{number}"),
            format: Some(layer.format().to_owned()),
        });
    }
    path
}

fn open(path: &Path, layer: Layer) -> FormattedDisk {
    let options = DiskOptions {
        format: Some(match layer {
            Layer::Raw => ImageFormat::Raw,
            Layer::Qcow2 { .. } => ImageFormat::Qcow2,
        }),
        backing: true,
        ..DiskOptions::default()
    };
    let disk = Disk::open_by(&HostOpener, path, &options).unwrap();
    disk.to_formatted(&HostOpener).unwrap()
}

/// Returns a range of sectors.
fn range_in(numbers: &mut Numbers, within: Range<u64>) -> Range<u64> {
    let sectors = (within.end - within.start) / 512;
    let most = [1, 8, 200, 2000][numbers.below(4) as usize];
    let first = numbers.below(sectors);
    let count = (numbers.below(most) + 1).min(sectors - first);
    within.start + first * 512..within.start + (first + count) * 512
}

/// Does to a disk what a guest does, until `is_over`. Returns what the part of each thread holds.
fn use_disk(image: &dyn Image, files: &[LayerFile], seed: u64, is_over: &AtomicBool) -> Vec<u8> {
    let work = |number: u64| {
        let mut numbers = Numbers::new(seed * THREADS + number);
        let own = number * PART..(number + 1) * PART;
        let mut model = vec![0; PART as usize];
        image.read_at(&mut model, own.start).unwrap();
        while !is_over.load(Ordering::Relaxed) {
            let is_own = numbers.below(4) > 0;
            let range = match is_own {
                true => range_in(&mut numbers, own.clone()),
                false => range_in(&mut numbers, PART * THREADS..SIZE),
            };
            let byte = numbers.below(255) as u8 + 1;
            let kind = numbers.below(10);
            let mut bytes = vec![byte; (range.end - range.start) as usize];
            match kind {
                0..5 => image.write_at(&bytes, range.start).unwrap(),
                5 => image.write_zeroes(range.clone(), byte < 128).unwrap(),
                6 => image.discard(range.clone()).unwrap(),
                7 => image.flush().unwrap(),
                8 => {
                    // A transfer by the answer of `map`, as a device does it.
                    if let Extent::File { file, offset, len } =
                        image.map(range.clone(), Direction::Read)
                        && is_own
                    {
                        use std::os::unix::fs::FileExt;
                        let part = &mut bytes[..len as usize];
                        files[file]
                            .for_transfers()
                            .read_exact_at(part, offset)
                            .unwrap();
                        let start = (range.start - own.start) as usize;
                        assert!(*part == model[start..start + part.len()]);
                    }
                    continue;
                }
                _ => {}
            }
            if is_own && kind != 7 {
                let place = (range.start - own.start) as usize..(range.end - own.start) as usize;
                match kind {
                    0..5 => model[place].fill(byte),
                    5 => model[place].fill(0),
                    _ => {
                        image.read_at(&mut bytes, range.start).unwrap();
                        let model = &mut model[place];
                        let mut pairs = bytes.iter().zip(&*model);
                        assert!(pairs.all(|(new, old)| new == old || (kind == 6 && *new == 0)));
                        model.copy_from_slice(&bytes);
                    }
                }
            }
            thread::sleep(Duration::from_micros(numbers.below(300)));
        }
        model
    };
    thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = (0..THREADS)
            .map(|number| scope.spawn(move || work(number)))
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    })
}

/// Uses a disk, and runs a job meanwhile. Returns what the parts of the threads hold, and the state of the job. With
/// `cancel`, cancels it after some time.
fn use_while(
    image: &dyn Image,
    files: &[LayerFile],
    seed: u64,
    run: impl FnOnce() -> JobState + Send,
    cancel: Option<&Control>,
) -> (Vec<u8>, JobState) {
    let is_over = AtomicBool::new(false);
    let mut numbers = Numbers::new(seed);
    let pause = Duration::from_micros(numbers.below(8000));
    thread::scope(|scope| {
        let guest = scope.spawn(|| use_disk(image, files, seed, &is_over));
        thread::sleep(pause);
        let job = scope.spawn(run);
        if let Some(cancel) = cancel {
            thread::sleep(pause);
            cancel.cancel();
        }
        let state = job.join().unwrap();
        // The guest goes on with a disk that has been copied.
        thread::sleep(Duration::from_millis(5));
        is_over.store(true, Ordering::Relaxed);
        (guest.join().unwrap(), state)
    })
}

fn check(folder: &Folder, name: &str, layer: Layer) {
    if layer.format() == "qcow2" {
        folder.check(name);
    }
}

/// Compares an image with bytes by `qemu-img`.
fn compare(folder: &Folder, name: &str, layer: Layer, bytes: &[u8]) {
    std::fs::write(folder.path("expected"), bytes).unwrap();
    let (name, expected) = (folder.name(name), folder.name("expected"));
    qemu(
        "qemu-img",
        &[
            "compare",
            "-f",
            layer.format(),
            "-F",
            "raw",
            &name,
            &expected,
        ],
    );
}

#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    cancel: bool,
}

fn plan() -> impl Strategy<Value = Plan> {
    (any::<u32>(), prop::bool::weighted(0.25)).prop_map(|(seed, cancel)| Plan {
        seed: seed.into(),
        cancel,
    })
}

/// A disk of two or three layers. Only the lowest can be raw.
fn chain() -> impl Strategy<Value = Vec<(Layer, u64)>> {
    let size = prop_oneof![
        Just(SIZE),
        (1..SIZE / 512).prop_map(|sectors| sectors * 512)
    ];
    (
        (layer(), size.clone()),
        prop::option::of((qcow2_layer(), size)),
        qcow2_layer(),
    )
        .prop_map(|(base, middle, top)| {
            let middle = middle.into_iter();
            [base]
                .into_iter()
                .chain(middle)
                .chain([(top, SIZE)])
                .collect()
        })
}

fn config(cases: u32) -> Config {
    Config {
        cases,
        max_shrink_iters: 0,
        ..Config::default()
    }
}

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn a_copy_equals_the_disk_whatever_its_guest_does(
        chain in chain(),
        alone in prop::option::weighted(0.3, layer()),
        target in layer(),
        larger in any::<bool>(),
        plan in plan(),
    ) {
        let chain = alone.map_or(chain, |layer| vec![(layer, SIZE)]);
        let folder = Folder::new();
        let path = make_chain(&folder, &chain, plan.seed);
        let source = open(&path, chain.last().unwrap().0);
        target.create(&folder.path("target"), SIZE + if larger { 65536 } else { 0 }, None);
        let copy = open(&folder.path("target"), target);
        let options = CopyJobOptions { target_is_zero: true, layers: None };
        let job = CopyJob::new(Arc::clone(source.image()), Arc::clone(copy.image()), options).unwrap();
        let filter = job.filter();
        let cancel = plan.cancel.then(|| job.control());
        let (model, state) = use_while(&*filter, source.files(), plan.seed, || job.run(), cancel);
        let bytes = read_all(&**source.image());
        prop_assert!(bytes.starts_with(&model));
        if state == JobState::Ready && job.control().state() == JobState::Ready {
            prop_assert_eq!(job.control().progress().done, SIZE);
            job.begin_switch().unwrap();
            prop_assert!(!job.control().cancel());
            let copied = read_all(&**copy.image());
            prop_assert!(copied[..SIZE as usize] == bytes);
            drop((filter, job, copy, source));
            check(&folder, "target", target);
            compare(&folder, "target", target, &bytes);
        } else {
            prop_assert_eq!(job.control().state(), JobState::Cancelled);
            // The filter is the source now.
            filter.write_at(&[7; 512], 512).unwrap();
            prop_assert!(read_all(&*filter) == read_all(&**source.image()));
            drop((filter, job, copy, source));
            check(&folder, "target", target);
        }
        check(&folder, &format!("layer{}", chain.len() - 1), chain.last().unwrap().0);
    }

    #[test]
    fn a_committed_base_equals_the_disk(chain in chain(), both in any::<bool>(), plan in plan()) {
        let folder = Folder::new();
        let path = make_chain(&folder, &chain, plan.seed);
        let top = chain.last().unwrap().0;
        let source = open(&path, top);
        let layers = if both { chain.len() - 1 } else { 1 };
        let base_number = chain.len() - 1 - layers;
        let (base, _) = chain[base_number];
        let base_name = format!("layer{base_number}");
        let before = read_all(&**source.image());
        let job = CommitJob::open(&HostOpener, &source, layers).unwrap();
        prop_assert!(read_all(&**source.image()) == before);
        let copy = job.copy();
        let filter = copy.filter();
        let cancel = plan.cancel.then(|| copy.control());
        let (model, state) = use_while(&*filter, source.files(), plan.seed, || copy.run(), cancel);
        let bytes = read_all(&**source.image());
        prop_assert!(bytes.starts_with(&model));
        let is_ready = state == JobState::Ready && copy.control().state() == JobState::Ready;
        if is_ready {
            copy.begin_switch().unwrap();
            let disk = job.disk().to_formatted(&HostOpener).unwrap();
            prop_assert_eq!(disk.files().len(), base_number + 1);
            prop_assert!(read_all(&**disk.image()) == bytes);
            // The guest goes on with the base.
            disk.image().write_at(&[9; 512], 1024).unwrap();
            disk.image().flush().unwrap();
        } else {
            prop_assert_eq!(copy.control().state(), JobState::Cancelled);
            job.close().unwrap();
            prop_assert!(read_all(&**source.image()) == bytes);
            source.image().flush().unwrap();
            let other = DiskOptions { read_only: true, backing: true, format: Some(match base {
                Layer::Raw => ImageFormat::Raw,
                Layer::Qcow2 { .. } => ImageFormat::Qcow2,
            }), ..DiskOptions::default() };
            // The base can be shared again.
            drop(Disk::open_by(&HostOpener, &folder.path(&base_name), &other).unwrap());
        }
        let mut after = bytes;
        drop((filter, job, source));
        check(&folder, &base_name, base);
        check(&folder, &format!("layer{}", chain.len() - 1), top);
        if is_ready {
            after[1024..1536].fill(9);
            compare(&folder, &base_name, base, &after);
        } else {
            compare(&folder, &format!("layer{}", chain.len() - 1), top, &after);
        }
    }

    #[test]
    fn a_disk_needs_no_backing_file_after_a_pull(
        chain in chain(),
        keep_base in any::<bool>(),
        plan in plan(),
    ) {
        let folder = Folder::new();
        let path = make_chain(&folder, &chain, plan.seed);
        let name = format!("layer{}", chain.len() - 1);
        let top = chain.last().unwrap().0;
        let source = open(&path, top);
        let keeps_base = keep_base && chain.len() == 3;
        let job = PullJob::new(&source, keeps_base.then_some(2)).unwrap();
        let cancel = plan.cancel.then(|| job.control());
        let image = source.image();
        let (model, state) = use_while(&**image, source.files(), plan.seed, || job.run(), cancel);
        let bytes = read_all(&**image);
        prop_assert!(bytes.starts_with(&model));
        drop((job, source));
        let header = Header::read(&*host_file(&path, true)).unwrap();
        if state == JobState::Ready {
            let backing = header.backing().map(|backing| backing.name.clone());
            prop_assert_eq!(backing, keeps_base.then(|| "layer0".to_owned()));
            std::fs::remove_file(folder.path(if keeps_base { "layer1" } else { "layer0" })).unwrap();
        } else {
            prop_assert_eq!(state, JobState::Cancelled);
            prop_assert!(header.backing().is_some());
        }
        folder.check(&name);
        compare(&folder, &name, top, &bytes);
        prop_assert!(read_all(&**open(&path, top).image()) == bytes);
    }
}

const USUAL: Layer = Layer::Qcow2 {
    cluster_size: 65536,
    version: 3,
    extended_l2: false,
};

#[test]
fn a_base_that_others_use_is_not_committed_to() {
    for base in [Layer::Raw, USUAL] {
        let folder = Folder::new();
        let path = make_chain(&folder, &[(base, SIZE), (USUAL, SIZE)], 1);
        let other = folder.path("other");
        let backing = BackingName {
            name: "layer0".to_owned(),
            format: Some(base.format().to_owned()),
        };
        USUAL.create(&other, SIZE, Some(backing));
        let other = open(&other, USUAL);
        let disk = open(&path, USUAL);
        let refused = CommitJob::open(&HostOpener, &disk, 1).unwrap_err();
        assert!(
            matches!(refused, JobError::Disk(DiskError::InUse { .. })),
            "{refused}"
        );
        // Nobody can write to it meanwhile, or later.
        let options = DiskOptions {
            format: Some(ImageFormat::Raw),
            ..DiskOptions::default()
        };
        let write = || Disk::open_by(&HostOpener, &folder.path("layer0"), &options);
        drop(other);
        assert!(matches!(write().unwrap_err(), DiskError::InUse { .. }));
        let job = CommitJob::open(&HostOpener, &disk, 1).unwrap();
        assert!(matches!(write().unwrap_err(), DiskError::InUse { .. }));
        job.close().unwrap();
        assert!(matches!(write().unwrap_err(), DiskError::InUse { .. }));
        drop((job, disk));
        write().unwrap();
    }
}

#[test]
fn errors_of_the_target_end_the_copy_and_spare_the_guest() {
    let folder = Folder::new();
    let target = folder.path("target");
    Layer::Raw.create(&target, SIZE, None);
    let path = make_chain(&folder, &[(USUAL, SIZE)], 3);
    let disk = open(&path, USUAL);
    // Files opened for reading fail every write.
    let read_only = host_file(&target, true);
    let image = Arc::new(RawImage::new(read_only, false).unwrap());
    let options = CopyJobOptions {
        target_is_zero: true,
        layers: None,
    };
    let job = CopyJob::new(Arc::clone(disk.image()), image, options).unwrap();
    let filter = job.filter();
    let JobState::Failed(reason) = job.run() else {
        panic!("the copy has not failed");
    };
    assert!(
        reason.starts_with("cannot write the target at offset"),
        "{reason}"
    );
    filter.write_at(&[1; 4096], 0).unwrap();
    job.begin_switch().unwrap_err();
    let mut bytes = [0; 4096];
    disk.image().read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 4096]);
}

#[test]
fn the_target_counts_from_the_begin_of_a_switch() {
    let source = Arc::new(MemoryFile::new(vec![3; 1 << 20]));
    let target = Arc::new(MemoryFile::new(vec![0; 1 << 20]));
    let raw = |file: &Arc<MemoryFile>| -> Arc<dyn Image> {
        Arc::new(RawImage::new(Arc::clone(file) as _, false).unwrap())
    };
    let job = CopyJob::new(raw(&source), raw(&target), CopyJobOptions::default()).unwrap();
    let filter = job.filter();
    let syncs = |file: &MemoryFile| {
        let changes = file.changes();
        changes
            .iter()
            .filter(|change| matches!(change, Change::Sync))
            .count()
    };
    job.begin_switch().unwrap_err();
    assert_eq!(job.run(), JobState::Ready);
    filter.flush().unwrap();
    assert_eq!((syncs(&source), syncs(&target)), (1, 0));

    job.begin_switch().unwrap();
    assert_eq!((syncs(&source), syncs(&target)), (1, 1));
    assert!(!job.control().cancel());
    filter.write_at(&[4; 512], 0).unwrap();
    filter.flush().unwrap();
    assert_eq!((syncs(&source), syncs(&target)), (2, 2));
    assert!(source.bytes() == target.bytes());

    // A switch that comes to nothing changes nothing.
    job.abort_switch();
    assert_eq!(job.control().state(), JobState::Ready);
    filter.flush().unwrap();
    assert_eq!((syncs(&source), syncs(&target)), (3, 2));

    // What the target does not take has not been written.
    job.begin_switch().unwrap();
    target.fail_after(0, u64::MAX);
    filter.write_at(&[5; 512], 0).unwrap_err();
    filter.flush().unwrap_err();
    assert_eq!(job.control().state(), JobState::Ready);
    job.abort_switch();
    assert!(matches!(job.control().state(), JobState::Failed(_)));
    filter.write_at(&[6; 512], 512).unwrap();
    filter.flush().unwrap();
}

#[test]
fn a_copy_refuses_a_target_without_room() {
    let folder = Folder::new();
    let path = make_chain(&folder, &[(USUAL, SIZE)], 3);
    let disk = open(&path, USUAL);
    let target = folder.path("target");
    Layer::Raw.create(&target, SIZE - 512, None);
    let target = open(&target, Layer::Raw);
    let options = CopyJobOptions::default();
    let refused = CopyJob::new(
        Arc::clone(disk.image()),
        Arc::clone(target.image()),
        options,
    );
    assert!(matches!(refused.unwrap_err(), JobError::TargetSize { .. }));
}

#[test]
fn snapshots_keep_their_backing_file() {
    let folder = Folder::new();
    let path = make_chain(&folder, &[(Layer::Raw, SIZE), (USUAL, SIZE)], 5);
    qemu("qemu-img", &["snapshot", "-c", "s", path.to_str().unwrap()]);
    let disk = open(&path, USUAL);
    let refused = PullJob::new(&disk, None).unwrap_err();
    assert!(refused.to_string().contains("snapshots"), "{refused}");
}
