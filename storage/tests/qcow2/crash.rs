//! Crashes of the host, and failures of its calls, at all moments.

use std::ops::Range;
use std::sync::Arc;

use bantam_storage::Image;
use bantam_storage::qcow2::{BackingName, CreateOptions, Header, Options, Qcow2, Repair, Report};

use crate::memory_file::{Change, MemoryFile};
use crate::support::{Folder, Numbers, image_of, read_all, try_qemu, write_as_device};

const SIZE: u64 = 192 << 10;
const SECTOR: usize = 512;

/// What a sector may hold after a crash.
type Allowed = Vec<Vec<u8>>;

/// What is done to the snapshots of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Snapshots {
    Untouched,
    /// Those that are there in the beginning are applied.
    Applied,
    /// They are made, applied and deleted.
    Changed,
}

/// A disk whose file is recorded, and what its sectors may hold.
struct Recorded {
    file: Arc<MemoryFile>,
    new_file: fn(Vec<u8>) -> MemoryFile,
    image: Option<Qcow2>,
    backing: Option<Arc<dyn Image>>,
    max_pending: usize,
    /// Whether it is written as the device of a disk does it.
    as_device: bool,
    /// What each sector may hold on stable storage, with the number of changes since when.
    sectors: Vec<Vec<(usize, Vec<u8>)>>,
    /// What the disk held when each snapshot was made, by its identifier.
    snapshots: Vec<(String, Vec<u8>)>,
    /// Numbers of changes after which a flush has ended, and what each sector may hold from then on.
    flushes: Vec<(usize, Vec<usize>)>,
}

impl Recorded {
    fn new(
        options: &CreateOptions,
        backing: Option<Arc<dyn Image>>,
        max_pending: usize,
    ) -> Recorded {
        Recorded::in_file(options, backing, max_pending, MemoryFile::new, Vec::new())
    }

    /// Records a file that `new_file` makes of its bytes.
    fn in_file(
        options: &CreateOptions,
        backing: Option<Arc<dyn Image>>,
        max_pending: usize,
        new_file: fn(Vec<u8>) -> MemoryFile,
        bytes: Vec<u8>,
    ) -> Recorded {
        let file = Arc::new(new_file(bytes));
        Qcow2::create(Arc::clone(&file) as _, options).unwrap();
        let mut recorded = Recorded {
            file,
            new_file,
            image: None,
            backing,
            max_pending,
            as_device: false,
            sectors: Vec::new(),
            snapshots: Vec::new(),
            flushes: Vec::new(),
        };
        recorded.restart();
        recorded
    }

    /// Begins the record with the image as it is.
    fn restart(&mut self) {
        self.image = None;
        self.file = Arc::new((self.new_file)(self.file.bytes()));
        self.open();
        let bytes = read_all(self.image());
        let sectors = bytes.chunks(SECTOR);
        self.sectors = sectors.map(|sector| vec![(0, sector.to_vec())]).collect();
    }

    fn open(&mut self) {
        let options = Options {
            backing: self.backing.clone(),
            cache_bytes: 0,
            max_pending: self.max_pending,
            ..Options::default()
        };
        self.image = Some(Qcow2::open(Arc::clone(&self.file) as _, options).unwrap());
    }

    fn image(&self) -> &Qcow2 {
        self.image.as_ref().unwrap()
    }

    /// Notes what the disk may hold while a change of it is under way, before it begins.
    fn expect(&mut self, offset: u64, bytes: &[u8]) {
        let now = self.file.len();
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            let place = &mut self.sectors[offset as usize / SECTOR + number];
            place.push((now, sector.to_vec()));
        }
    }

    fn flush(&mut self) {
        self.image().flush().unwrap();
        self.note_flush();
    }

    /// Returns what each sector may hold if the first `changes` changes were begun.
    fn allowed(&self, changes: usize) -> Vec<Allowed> {
        let flushed = self
            .flushes
            .iter()
            .rev()
            .find(|(number, _)| *number <= changes);
        let values = self.sectors.iter().enumerate();
        values
            .map(|(index, values)| {
                let first = flushed.map_or(0, |(_, newest)| newest[index]);
                let rest = &values[first..];
                rest.iter()
                    .enumerate()
                    .filter(|(number, (since, _))| *number == 0 || *since <= changes)
                    .map(|(_, (_, bytes))| bytes.clone())
                    .collect()
            })
            .collect()
    }

    /// Notes that what the disk holds now is on stable storage.
    fn note_flush(&mut self) {
        let newest = self.sectors.iter().map(|values| values.len() - 1).collect();
        self.flushes.push((self.file.len(), newest));
    }

    fn change_snapshots(&mut self, numbers: &mut Numbers) {
        match (self.snapshots.len(), numbers.below(2)) {
            (0 | 1, _) => {
                let state = read_all(self.image());
                let id = self.image().create_snapshot("s").unwrap();
                self.snapshots.push((id, state));
                self.note_flush();
            }
            (_, 0) => {
                let (id, _) = self.snapshots.remove(0);
                self.image().delete_snapshot(&id).unwrap();
                self.note_flush();
            }
            _ => self.apply_snapshot(0),
        }
    }

    fn apply_snapshot(&mut self, number: usize) {
        let (id, state) = self.snapshots[number].clone();
        // What was there before is on stable storage when it gives way to this.
        self.expect(0, &state);
        self.image().apply_snapshot(&id).unwrap();
        self.note_flush();
    }

    /// Does random things to the disk.
    fn run(&mut self, numbers: &mut Numbers, snapshots: Snapshots) {
        let sectors = SIZE / SECTOR as u64;
        for turn in 0..40 {
            let first = numbers.below(sectors);
            let count = (numbers.below(40) + 1).min(sectors - first);
            let (offset, len) = (first * 512, count * 512);
            let byte = numbers.below(255) as u8 + 1;
            let kind = if snapshots != Snapshots::Untouched && turn % 8 == 7 {
                20
            } else {
                numbers.below(14)
            };
            match kind {
                0..7 => {
                    let bytes = vec![byte; len as usize];
                    self.expect(offset, &bytes);
                    if self.as_device {
                        write_as_device(self.image(), &*self.file, &bytes, offset).unwrap();
                    } else {
                        self.image().write_at(&bytes, offset).unwrap();
                    }
                }
                7 | 8 => {
                    self.expect(offset, &vec![0; len as usize]);
                    self.image()
                        .write_zeroes(offset..offset + len, byte < 128)
                        .unwrap();
                }
                9 | 10 => {
                    // What a discarded sector holds is anything that it held, or zeroes.
                    self.expect(offset, &vec![0; len as usize]);
                    self.image().discard(offset..offset + len).unwrap();
                    let mut bytes = vec![0; len as usize];
                    self.image().read_at(&mut bytes, offset).unwrap();
                    self.expect(offset, &bytes);
                }
                20 if snapshots == Snapshots::Applied => self.apply_snapshot(turn / 8 % 2),
                20 => self.change_snapshots(numbers),
                11 => {
                    self.image = None;
                    self.open();
                }
                _ => self.flush(),
            }
        }
        self.image = None;
    }
}

/// Returns the file after a crash that kept `stable`, and any part of the changes `rest`, among which there is
/// no sync.
pub fn crash(stable: &[u8], rest: &[Change], numbers: &mut Numbers) -> Vec<u8> {
    let mut file = stable.to_vec();
    let style = numbers.below(4);
    for (index, change) in rest.iter().enumerate() {
        let has_ended = index + 1 < rest.len();
        match change {
            _ if style == 0 => change.apply(&mut file),
            Change::DurableWrite { .. } if has_ended => change.apply(&mut file),
            Change::Write { offset, bytes } | Change::DurableWrite { offset, bytes } => {
                // A write is torn between sectors.
                let mut position = 0;
                while position < bytes.len() {
                    let sector = (*offset as usize + position) / SECTOR;
                    let len = bytes.len().min((sector + 1) * SECTOR - *offset as usize) - position;
                    if numbers.below(4) >= style {
                        let bytes = bytes[position..position + len].to_vec();
                        let offset = offset + position as u64;
                        Change::Write { offset, bytes }.apply(&mut file);
                    }
                    position += len;
                }
            }
            change if numbers.below(4) >= style => change.apply(&mut file),
            _ => {}
        }
    }
    file
}

fn check_by_qemu(folder: &Folder, file: &[u8]) {
    std::fs::write(folder.path("base"), []).unwrap();
    std::fs::write(folder.path("crashed"), file).unwrap();
    let result = try_qemu(
        "qemu-img",
        &["check", "-q", "-f", "qcow2", &folder.name("crashed")],
    );
    // 3 is for leaks.
    assert!(matches!(result, Ok(_) | Err((3, _))), "{result:?}");
}

fn survive(
    options: &CreateOptions,
    backing: Option<Arc<dyn Image>>,
    seed: u64,
    snapshots: Snapshots,
) {
    for max_pending in [2, 1024] {
        let recorded = Recorded::new(options, backing.clone(), max_pending);
        survive_with(recorded, options, seed, snapshots);
    }
}

fn survive_with(mut recorded: Recorded, options: &CreateOptions, seed: u64, snapshots: Snapshots) {
    let folder = Folder::new();
    let (backing, max_pending) = (recorded.backing.clone(), recorded.max_pending);
    let start = recorded.file.bytes();
    let mut numbers = Numbers::new(seed);
    recorded.run(&mut numbers, snapshots);
    let changes = recorded.file.changes();
    // All moments of a short run, and many of a long one.
    let share = (changes.len() as u64 / 200).max(1);
    let mut stable = start;
    let mut synced = 0;
    for count in 0..=changes.len() {
        if count > 0 && matches!(changes[count - 1], Change::Sync) {
            for change in &changes[synced..count] {
                change.apply(&mut stable);
            }
            synced = count;
        }
        if numbers.below(share) > 0 {
            continue;
        }
        for turn in 0..2 {
            let file = crash(&stable, &changes[synced..count], &mut numbers);
            let what = format!(
                "{options:?}, {max_pending} pending, seed {seed}, {count} of {} changes",
                changes.len()
            );
            let crashed = Arc::new((recorded.new_file)(file.clone()));
            // While snapshots change, flags do not agree with refcounts. The mark says so, except in version 2.
            let is_dirty = Header::read(&*crashed).unwrap().is_dirty();
            let changes = snapshots == Snapshots::Changed;
            let may_disagree = changes && (is_dirty || options.version == 2);
            if !may_disagree {
                let report = Qcow2::check(Arc::clone(&crashed) as _, Repair::Nothing).unwrap();
                assert_eq!(
                    report.corruptions,
                    0,
                    "{what}: {:#?}",
                    report.findings.iter().rev().take(5).collect::<Vec<_>>()
                );
                if turn == 0 && count % 16 == 0 {
                    check_by_qemu(&folder, &file);
                }
            }
            let open = Options {
                backing: backing.clone(),
                ..Options::default()
            };
            let image = Qcow2::open(Arc::clone(&crashed) as _, open).unwrap();
            let bytes = read_all(&image);
            for (index, (sector, allowed)) in bytes
                .chunks(SECTOR)
                .zip(recorded.allowed(count))
                .enumerate()
            {
                assert!(
                    allowed.iter().any(|allowed| allowed == sector),
                    "{what}: sector {index} is {:?}, not {:?}",
                    &sector[..2],
                    allowed.iter().map(|allowed| allowed[0]).collect::<Vec<_>>(),
                );
            }
            drop(image);
            let report = Qcow2::check(Arc::clone(&crashed) as _, Repair::All).unwrap();
            assert_eq!(
                (report.corruptions, report.leaks),
                (0, 0),
                "{what}: {report:?}"
            );
            let report = Qcow2::check(crashed, Repair::Nothing).unwrap();
            assert_eq!(report, Report::default(), "{what}");
        }
    }
}

fn variants() -> Vec<CreateOptions> {
    let usual = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    vec![
        CreateOptions {
            cluster_size: 4096,
            ..usual.clone()
        },
        CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..usual.clone()
        },
        CreateOptions {
            cluster_size: 1024,
            refcount_bits: 4,
            ..usual.clone()
        },
        CreateOptions {
            cluster_size: 16384,
            version: 2,
            ..usual.clone()
        },
        CreateOptions {
            cluster_size: 16384,
            extended_l2: true,
            ..usual
        },
    ]
}

#[test]
fn a_crash_leaks_clusters_at_most() {
    for (number, options) in variants().into_iter().enumerate() {
        for seed in 0..2 {
            survive(
                &options,
                None,
                seed * 100 + number as u64,
                Snapshots::Untouched,
            );
        }
    }
}

#[test]
fn a_crash_does_not_bring_the_backing_file_or_lose_it() {
    for (number, options) in variants().into_iter().enumerate() {
        let bytes = (0..100 << 10)
            .map(|index| (index / 512 % 120 + 130) as u8)
            .collect();
        let backing: Arc<dyn Image> = image_of(bytes);
        let name = BackingName {
            name: "base".to_owned(),
            format: Some("raw".to_owned()),
        };
        let options = CreateOptions {
            backing: Some(name),
            ..options
        };
        survive(
            &options,
            Some(backing),
            50 + number as u64,
            Snapshots::Untouched,
        );
    }
}

#[test]
fn a_crash_spares_what_a_device_writes() {
    let bytes = (0..100 << 10)
        .map(|index| (index / 512 % 120 + 130) as u8)
        .collect();
    let base: Arc<dyn Image> = image_of(bytes);
    for (number, options) in variants().into_iter().enumerate() {
        for backing in [None, Some(Arc::clone(&base))] {
            let name = backing.as_ref().map(|_| BackingName {
                name: "base".to_owned(),
                format: Some("raw".to_owned()),
            });
            let options = CreateOptions {
                backing: name,
                ..options.clone()
            };
            let mut recorded = Recorded::new(&options, backing.clone(), 1024);
            recorded.as_device = true;
            let snapshots = match backing {
                None => Snapshots::Changed,
                Some(_) => Snapshots::Untouched,
            };
            survive_with(recorded, &options, 90 + number as u64, snapshots);
        }
    }
}

/// Size of the block device that an image is on.
const DEVICE_SIZE: usize = 1 << 20;

#[test]
fn a_crash_spares_an_image_on_a_block_device() {
    for (number, options) in variants().into_iter().enumerate() {
        for as_device in [false, true] {
            let garbage = vec![0xa5; DEVICE_SIZE];
            let mut recorded = Recorded::in_file(&options, None, 1024, MemoryFile::fixed, garbage);
            recorded.as_device = as_device;
            let snapshots = match as_device {
                true => Snapshots::Untouched,
                false => Snapshots::Changed,
            };
            survive_with(recorded, &options, 110 + number as u64, snapshots);
        }
    }
}

#[test]
fn a_block_device_that_is_full_takes_writes_again_after_a_discard() {
    for options in variants() {
        // The disk does not fit into the device.
        let options = CreateOptions {
            size: 2 * DEVICE_SIZE as u64,
            ..options
        };
        let file = Arc::new(MemoryFile::fixed(vec![0xa5; DEVICE_SIZE]));
        Qcow2::create(Arc::clone(&file) as _, &options).unwrap();
        let open = || Qcow2::open(Arc::clone(&file) as _, Options::default()).unwrap();
        let mut image = open();
        let chunk = 32 << 10;
        let chunks = options.size / chunk;
        let fill = |image: &Qcow2, chunks: Range<u64>, byte: u8| {
            let bytes = vec![byte; chunk as usize];
            let write = |number: &u64| image.write_at(&bytes, number * chunk);
            let written = chunks
                .clone()
                .map_while(|number| write(&number).ok())
                .count() as u64;
            let error = (written < chunks.end - chunks.start)
                .then(|| write(&(chunks.start + written)).unwrap_err());
            (written, error)
        };
        let (written, error) = fill(&image, 0..chunks, 1);
        assert_eq!(error.unwrap().kind(), std::io::ErrorKind::StorageFull);
        // Most of the device is used.
        assert!(
            written * chunk > DEVICE_SIZE as u64 * 3 / 4,
            "{options:?}: {written}"
        );
        for turn in 2..5 {
            image.discard(0..written / 2 * chunk).unwrap();
            if turn == 3 {
                image.flush().unwrap();
                drop(image);
                image = open();
            }
            let (again, _) = fill(&image, 0..written / 2, turn);
            assert_eq!(again, written / 2, "{options:?}");
            let bytes = read_all(&image);
            let half = (written / 2 * chunk) as usize;
            assert!(bytes[..half].iter().all(|&byte| byte == turn));
            assert!(
                bytes[half..(written * chunk) as usize]
                    .iter()
                    .all(|&byte| byte == 1)
            );
        }
        drop(image);
        let report = Qcow2::check(file, Repair::Nothing).unwrap();
        assert_eq!(report, Report::default(), "{options:?}");
    }
}

#[test]
fn a_crash_spares_snapshots() {
    for (number, options) in variants().into_iter().enumerate() {
        survive(&options, None, 70 + number as u64, Snapshots::Changed);
    }
}

#[test]
fn a_crash_while_a_snapshot_is_applied_leaks_clusters_at_most() {
    for (number, options) in variants().into_iter().enumerate() {
        for seed in 0..2 {
            let mut numbers = Numbers::new(seed * 10 + number as u64 + 1);
            let mut recorded = Recorded::new(&options, None, 1024);
            // One more, so that some clusters have lost a reference, but not their last one.
            for _ in 0..3 {
                for _ in 0..4 {
                    let first = numbers.below(SIZE / 512 - 40);
                    let bytes = vec![numbers.below(255) as u8 + 1; 40 * 512];
                    recorded.image().write_at(&bytes, first * 512).unwrap();
                }
                let state = read_all(recorded.image());
                let id = recorded.image().create_snapshot("s").unwrap();
                recorded.snapshots.push((id, state));
            }
            let (id, _) = recorded.snapshots.remove(1);
            recorded.image().delete_snapshot(&id).unwrap();
            recorded.restart();
            let seed = 130 + 10 * seed + number as u64;
            survive_with(recorded, &options, seed, Snapshots::Applied);
        }
    }
}

/// What the sectors of a disk hold, each of one byte, and what they may hold in the file.
struct Model {
    now: Vec<u8>,
    /// What each sector has held since the last flush.
    unflushed: Vec<Vec<u8>>,
}

impl Model {
    fn new(image: &Qcow2) -> Model {
        let bytes = read_all(image);
        let now: Vec<u8> = bytes.chunks(SECTOR).map(|sector| sector[0]).collect();
        let unflushed = now.iter().map(|&byte| vec![byte]).collect();
        Model { now, unflushed }
    }

    fn set(&mut self, sector: usize, byte: u8) {
        self.now[sector] = byte;
        self.unflushed[sector].push(byte);
    }

    fn flush(&mut self) {
        for (allowed, &now) in self.unflushed.iter_mut().zip(&self.now) {
            *allowed = vec![now];
        }
    }
}

/// Does a fixed list of things, until it is not known what the disk holds because a write has failed and no
/// read has succeeded since. If `file` is that of the image, it is written as the device of a disk does it.
fn do_things(image: &Qcow2, file: Option<&MemoryFile>, model: &mut Model) {
    let mut numbers = Numbers::new(9);
    for _ in 0..25 {
        let sectors = SIZE / 512;
        let first = numbers.below(sectors);
        let count = (numbers.below(60) + 1).min(sectors - first);
        let (offset, len) = (first * 512, count * 512);
        let sectors = first as usize..(first + count) as usize;
        let kind = numbers.below(10);
        let byte = numbers.below(255) as u8 + 1;
        let result = match kind {
            0..6 => {
                let bytes = vec![byte; len as usize];
                match file {
                    Some(file) => write_as_device(image, file, &bytes, offset),
                    None => image.write_at(&bytes, offset),
                }
            }
            6 | 7 => image.write_zeroes(offset..offset + len, true),
            8 => image
                .create_snapshot("s")
                .map(drop)
                .map_err(std::io::Error::from),
            _ => image.flush(),
        };
        let new = if kind < 6 { byte } else { 0 };
        match (kind, result) {
            (0..8, Ok(())) => sectors.for_each(|sector| model.set(sector, new)),
            // A write that has failed leaves old bytes or new ones.
            (0..8, Err(_)) => {
                let mut bytes = vec![0; len as usize];
                let mut reads = (0..4).map(|_| image.read_at(&mut bytes, offset));
                if !reads.any(|read| read.is_ok()) {
                    for sector in sectors {
                        model.unflushed[sector].push(new);
                    }
                    return;
                }
                for (sector, bytes) in sectors.zip(bytes.chunks(SECTOR)) {
                    let now = bytes[0];
                    assert!(bytes.iter().all(|&byte| byte == now));
                    assert!(now == model.now[sector] || now == new);
                    model.unflushed[sector].push(new);
                    model.set(sector, now);
                }
            }
            (8.., Ok(())) => model.flush(),
            (8.., Err(_)) => {}
        }
    }
    if image.flush().is_ok() {
        model.flush();
    }
}

#[test]
fn failures_of_the_host_leak_clusters_at_most() {
    for options in variants() {
        for max_pending in [2, 1024] {
            survive_failures(&options, None, max_pending, false);
        }
    }
}

#[test]
fn failures_of_the_host_spare_what_a_device_writes() {
    for options in variants() {
        survive_failures(&options, None, 1024, true);
    }
}

#[test]
fn failures_of_the_host_spare_the_backing_file() {
    let bytes = (0..100 << 10)
        .map(|index| (index / 512 % 120 + 130) as u8)
        .collect();
    let backing: Arc<dyn Image> = image_of(bytes);
    let name = BackingName {
        name: "base".to_owned(),
        format: Some("raw".to_owned()),
    };
    for options in variants() {
        let options = CreateOptions {
            backing: Some(name.clone()),
            ..options
        };
        survive_failures(&options, Some(Arc::clone(&backing)), 3, false);
    }
}

fn survive_failures(
    options: &CreateOptions,
    backing: Option<Arc<dyn Image>>,
    max_pending: usize,
    as_device: bool,
) {
    let pristine = Arc::new(MemoryFile::new(Vec::new()));
    Qcow2::create(Arc::clone(&pristine) as _, options).unwrap();
    let open = |file: &Arc<MemoryFile>| {
        let options = Options {
            backing: backing.clone(),
            max_pending,
            ..Options::default()
        };
        Qcow2::open(Arc::clone(file) as _, options).unwrap()
    };
    for failures in [1, 3, u64::MAX] {
        for call in 0.. {
            let what =
                format!("{options:?}, {max_pending} pending, {failures} failures from call {call}");
            let file = Arc::new(MemoryFile::new(pristine.bytes()));
            let image = open(&file);
            let mut model = Model::new(&image);
            file.fail_after(call, failures);
            do_things(&image, as_device.then_some(&*file), &mut model);
            drop(image);
            let is_over = !file.heal();
            let is_dirty = Header::read(&*file).unwrap().is_dirty();
            let report = Qcow2::check(Arc::clone(&file) as _, Repair::Nothing).unwrap();
            if !is_dirty && options.version == 3 {
                assert_eq!(report.corruptions, 0, "{what}: {report:?}");
            }
            let bytes = read_all(&open(&file));
            for (index, (sector, allowed)) in bytes.chunks(SECTOR).zip(&model.unflushed).enumerate()
            {
                assert!(
                    sector.iter().all(|&byte| byte == sector[0]) && allowed.contains(&sector[0]),
                    "{what}: sector {index} is {:?}, not {allowed:?}",
                    &sector[..2],
                );
            }
            if is_over {
                assert!(call > 20);
                break;
            }
        }
    }
}
