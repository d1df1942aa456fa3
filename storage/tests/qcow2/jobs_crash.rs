//! Crashes of the host at all moments of a commit and of a pull, while the guest writes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use bantam_storage::job::{CopyJob, CopyJobOptions, JobState, PullJob};
use bantam_storage::qcow2::{BackingName, CreateOptions, Options, Qcow2, Repair};
use bantam_storage::{DiskOptions, FormattedDisk, Image, RawImage};

use crate::crash::crash;
use crate::memory_file::{Change, Journal, MemoryFile};
use crate::support::{Numbers, read_all};

const SIZE: u64 = 2 << 20;
const SECTOR: u64 = 512;
const SECTORS: u64 = SIZE / SECTOR;

/// What the base of a disk is.
#[derive(Debug, Clone, Copy)]
pub enum Base {
    Raw,
    Qcow2 { cluster_size: u64 },
}

pub fn name(base: Base) -> BackingName {
    let format = match base {
        Base::Raw => "raw",
        Base::Qcow2 { .. } => "qcow2",
    };
    BackingName {
        name: "base".to_owned(),
        format: Some(format.to_owned()),
    }
}

pub fn open_base(base: Base, file: &Arc<MemoryFile>, read_only: bool) -> Arc<dyn Image> {
    let file = Arc::clone(file) as _;
    match base {
        Base::Raw => Arc::new(RawImage::new(file, read_only).unwrap()),
        Base::Qcow2 { .. } => {
            let options = Options {
                read_only,
                ..Options::default()
            };
            Arc::new(Qcow2::open(file, options).unwrap())
        }
    }
}

pub fn open_top(file: &Arc<MemoryFile>, base: Option<Arc<dyn Image>>, max_pending: usize) -> Qcow2 {
    let options = Options {
        backing: base,
        max_pending,
        cache_bytes: 0,
        ..Options::default()
    };
    Qcow2::open(Arc::clone(file) as _, options).unwrap()
}

/// Fills parts of an image.
fn fill(image: &dyn Image, numbers: &mut Numbers, count: u64) {
    for _ in 0..count {
        let (offset, len) = range(numbers);
        let bytes = vec![numbers.below(255) as u8 + 1; len as usize];
        image.write_at(&bytes, offset).unwrap();
    }
    image.flush().unwrap();
}

fn range(numbers: &mut Numbers) -> (u64, u64) {
    let first = numbers.below(SECTORS);
    let most = [4, 40, 300][numbers.below(3) as usize];
    let count = (numbers.below(most) + 1).min(SECTORS - first);
    (first * SECTOR, count * SECTOR)
}

/// What the sectors of a disk may hold after a crash. Each is of one byte.
pub struct Model {
    /// What each sector was about to hold, with the number of changes of files before.
    sectors: Vec<Vec<(usize, u8)>>,
    /// Numbers of changes after which a flush has ended, and the newest of these values at its begin.
    flushes: Vec<(usize, Vec<usize>)>,
}

impl Model {
    pub fn new(image: &dyn Image) -> Model {
        let bytes = read_all(image);
        let sectors = bytes.chunks(SECTOR as usize);
        Model {
            sectors: sectors.map(|sector| vec![(0, sector[0])]).collect(),
            flushes: Vec::new(),
        }
    }

    fn expect(&mut self, now: usize, offset: u64, bytes: &[u8]) {
        for (number, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            self.sectors[(offset / SECTOR) as usize + number].push((now, sector[0]));
        }
    }

    fn newest(&self) -> Vec<usize> {
        self.sectors.iter().map(|values| values.len() - 1).collect()
    }

    /// Checks a disk after a crash that came after `changes` changes of files were begun.
    pub fn check(&self, bytes: &[u8], changes: usize, what: &str) {
        let flushed = self
            .flushes
            .iter()
            .rev()
            .find(|(number, _)| *number <= changes);
        for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let first = flushed.map_or(0, |(_, newest)| newest[index]);
            let values = self.sectors[index].iter().enumerate().skip(first);
            let mut allowed = values
                .filter(|(number, (since, _))| *number == first || *since <= changes)
                .map(|(_, &(_, byte))| byte);
            assert!(
                sector.iter().all(|&byte| byte == sector[0])
                    && allowed.any(|byte| byte == sector[0]),
                "{what}: sector {index} holds {:?}, not one of {:?} from {first}",
                &sector[..2],
                self.sectors[index],
            );
        }
    }
}

/// Has a disk do one thing that its guest may ask for.
pub fn use_once(image: &dyn Image, journal: &Journal, numbers: &mut Numbers, model: &mut Model) {
    let (offset, len) = range(numbers);
    let byte = numbers.below(255) as u8 + 1;
    let mut bytes = vec![byte; len as usize];
    match numbers.below(10) {
        0..5 => {
            model.expect(journal.len(), offset, &bytes);
            image.write_at(&bytes, offset).unwrap();
        }
        5 => {
            bytes.fill(0);
            model.expect(journal.len(), offset, &bytes);
            image
                .write_zeroes(offset..offset + len, byte < 128)
                .unwrap();
        }
        6 => {
            bytes.fill(0);
            model.expect(journal.len(), offset, &bytes);
            image.discard(offset..offset + len).unwrap();
            image.read_at(&mut bytes, offset).unwrap();
            model.expect(journal.len(), offset, &bytes);
        }
        7 | 8 => {
            let newest = model.newest();
            image.flush().unwrap();
            model.flushes.push((journal.len(), newest));
        }
        _ => thread::yield_now(),
    }
}

/// Uses a disk as its guest does while `run` runs, and for some time afterwards.
fn use_while(
    image: &dyn Image,
    journal: &Journal,
    numbers: &mut Numbers,
    run: impl FnOnce() -> JobState + Send,
) -> Model {
    let mut model = Model::new(image);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let job = scope.spawn(|| {
            let state = run();
            is_over.store(true, Ordering::Relaxed);
            state
        });
        let mut left = 10;
        while left > 0 {
            left -= u32::from(is_over.load(Ordering::Relaxed));
            use_once(image, journal, numbers, &mut model);
        }
        assert_eq!(job.join().unwrap(), JobState::Ready);
    });
    model
}

/// A file as it was at first, and the changes of it that a journal has.
struct History {
    start: Vec<u8>,
    changes: Vec<Change>,
}

impl History {
    /// Returns the file after a crash that came after its first `count` changes.
    fn crash(&self, count: usize, numbers: &mut Numbers) -> Vec<u8> {
        let begun = &self.changes[..count];
        let is_sync = |change: &Change| matches!(change, Change::Sync);
        let stable = begun.iter().rposition(is_sync).map_or(0, |last| last + 1);
        let mut file = self.start.clone();
        for change in &begun[..stable] {
            change.apply(&mut file);
        }
        crash(&file, &begun[stable..], numbers)
    }
}

/// Crashes at many moments, and has the disk examined.
pub fn crash_often(
    files: &[(Vec<u8>, Arc<MemoryFile>)],
    journal: &Journal,
    numbers: &mut Numbers,
    mut examine: impl FnMut(&[Arc<MemoryFile>], usize),
) {
    let histories: Vec<History> = files
        .iter()
        .map(|(start, file)| History {
            start: start.clone(),
            changes: file.changes(),
        })
        .collect();
    let order = journal.files();
    let share = (order.len() as u64 / 120).max(1);
    let mut counts = vec![0; files.len()];
    for number in 0..=order.len() {
        if number > 0 {
            counts[order[number - 1]] += 1;
        }
        if numbers.below(share) == 0 {
            let crashed = histories.iter().zip(&counts);
            let crashed: Vec<_> = crashed
                .map(|(history, &count)| history.crash(count, numbers))
                .map(|bytes| Arc::new(MemoryFile::new(bytes)))
                .collect();
            examine(&crashed, number);
        }
    }
}

pub fn check_clean(file: &Arc<MemoryFile>, what: &str) {
    let report = Qcow2::check(Arc::clone(file) as _, Repair::Nothing).unwrap();
    assert_eq!(report.corruptions, 0, "{what}: {report:?}");
}

/// Makes a base and an image over it. Returns the bytes of both files.
pub fn make_files(base: Base, top: &CreateOptions, numbers: &mut Numbers) -> (Vec<u8>, Vec<u8>) {
    let base_file = Arc::new(MemoryFile::new(Vec::new()));
    match base {
        Base::Raw => bantam_storage::ImageFile::set_size(&*base_file, SIZE).unwrap(),
        Base::Qcow2 { cluster_size } => {
            let options = CreateOptions {
                size: SIZE,
                cluster_size,
                ..CreateOptions::default()
            };
            Qcow2::create(Arc::clone(&base_file) as _, &options).unwrap();
        }
    }
    fill(&*open_base(base, &base_file, false), numbers, 8);
    let top_file = Arc::new(MemoryFile::new(Vec::new()));
    Qcow2::create(Arc::clone(&top_file) as _, top).unwrap();
    let image = open_top(&top_file, Some(open_base(base, &base_file, true)), 1024);
    fill(&image, numbers, 8);
    drop(image);
    (base_file.bytes(), top_file.bytes())
}

pub fn tops(base: Base) -> Vec<CreateOptions> {
    let usual = CreateOptions {
        size: SIZE,
        backing: Some(name(base)),
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    vec![
        CreateOptions {
            cluster_size: 65536,
            ..usual.clone()
        },
        CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            ..usual.clone()
        },
        CreateOptions {
            version: 2,
            ..usual.clone()
        },
        usual,
    ]
}

pub const BASES: [Base; 3] = [
    Base::Raw,
    Base::Qcow2 { cluster_size: 4096 },
    Base::Qcow2 {
        cluster_size: 65536,
    },
];

#[test]
fn a_crash_during_a_commit_loses_nothing_that_was_flushed() {
    for (seed, base) in BASES.into_iter().enumerate() {
        for (number, top) in tops(base).iter().enumerate() {
            let mut numbers = Numbers::new(seed as u64 * 10 + number as u64 + 1);
            let (base_bytes, top_bytes) = make_files(base, top, &mut numbers);
            let journal = Arc::new(Journal::default());
            let file = |number, bytes: &[u8]| {
                Arc::new(MemoryFile::new(bytes.to_vec()).recorded_in(&journal, number))
            };
            let (base_file, top_file) = (file(0, &base_bytes), file(1, &top_bytes));
            let target = open_base(base, &base_file, false);
            let max_pending = [3, 1024][number % 2];
            let source: Arc<dyn Image> =
                Arc::new(open_top(&top_file, Some(Arc::clone(&target)), max_pending));
            let options = CopyJobOptions {
                target_is_zero: false,
                layers: Some(1),
            };
            let job = CopyJob::new(source, target, options).unwrap();
            let filter = job.filter();
            let model = use_while(&*filter, &journal, &mut numbers, || job.run());
            drop((filter, job));
            let files = [(base_bytes, base_file), (top_bytes, top_file)];
            crash_often(&files, &journal, &mut numbers, |files, changes| {
                let what = format!("{base:?}, {top:?}, {changes} changes");
                check_clean(&files[1], &what);
                if let Base::Qcow2 { .. } = base {
                    check_clean(&files[0], &what);
                }
                let base = open_base(base, &files[0], true);
                let image = open_top(&files[1], Some(base), 1024);
                model.check(&read_all(&image), changes, &what);
            });
        }
    }
}

#[test]
fn a_crash_during_a_pull_loses_nothing_that_was_flushed() {
    for (seed, base) in BASES.into_iter().enumerate() {
        for (number, top) in tops(base).iter().enumerate() {
            let mut numbers = Numbers::new(seed as u64 * 10 + number as u64 + 101);
            let (base_bytes, top_bytes) = make_files(base, top, &mut numbers);
            let journal = Arc::new(Journal::default());
            let base_file = Arc::new(MemoryFile::new(base_bytes));
            let top_file = Arc::new(MemoryFile::new(top_bytes.clone()).recorded_in(&journal, 0));
            let max_pending = [3, 1024][number % 2];
            let backing = open_base(base, &base_file, true);
            let image: Arc<dyn Image> = Arc::new(open_top(&top_file, Some(backing), max_pending));
            let disk = FormattedDisk::new(
                "top".as_ref(),
                Arc::clone(&image),
                Vec::new(),
                &DiskOptions::default(),
            );
            let job = PullJob::new(&disk.unwrap(), None).unwrap();
            let model = use_while(&*image, &journal, &mut numbers, || job.run());
            drop((image, job));
            let has_backing = Mutex::new([false; 2]);
            crash_often(
                &[(top_bytes, top_file)],
                &journal,
                &mut numbers,
                |files, changes| {
                    let what = format!("{base:?}, {top:?}, {changes} changes");
                    check_clean(&files[0], &what);
                    let image = open_top(&files[0], Some(open_base(base, &base_file, true)), 1024);
                    has_backing.lock().unwrap()[usize::from(image.backing().is_some())] = true;
                    model.check(&read_all(&image), changes, &what);
                },
            );
            assert_eq!(has_backing.into_inner().unwrap(), [true; 2]);
        }
    }
}
