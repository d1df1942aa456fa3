//! Places for writes that are found at once.

use std::sync::Arc;

use bantam_storage::qcow2::{BackingName, CreateOptions, Options, Qcow2, Repair};
use bantam_storage::{Allocation, Direction, Extent, Image, ImageFile};

use crate::memory_file::{Change, MemoryFile};
use crate::support::{image_of, read_all};

const CLUSTER: u64 = 16384;
const SIZE: u64 = 1 << 20;

fn create(options: &CreateOptions) -> Arc<MemoryFile> {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    Qcow2::create(Arc::clone(&file) as _, options).unwrap();
    Arc::new(MemoryFile::new(file.bytes()))
}

fn usual() -> CreateOptions {
    CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    }
}

fn open(file: &Arc<MemoryFile>) -> Qcow2 {
    Qcow2::open(Arc::clone(file) as _, Options::default()).unwrap()
}

/// Has the first table made and read into the cache, and the reserve filled.
fn use_first_table(image: &Qcow2) {
    image.write_at(&[1], 0).unwrap();
    image.read_at(&mut [0], 0).unwrap();
}

/// Returns where the bytes of an allocation are in the file, and how many they are.
fn place(found: Option<Allocation>) -> Option<(u64, u64)> {
    match found?.extent {
        Extent::File {
            file: 0,
            offset,
            len,
        } => Some((offset, len)),
        extent => panic!("{extent:?}"),
    }
}

fn assert_sound(file: &Arc<MemoryFile>) {
    let report = Qcow2::check(Arc::clone(file) as _, Repair::Nothing).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
}

#[test]
fn a_place_costs_one_write_of_the_table() {
    for extended_l2 in [false, true] {
        let file = create(&CreateOptions {
            extended_l2,
            ..usual()
        });
        let image = open(&file);
        use_first_table(&image);
        let before = file.len();
        let range = 2 * CLUSTER + 512..6 * CLUSTER - 512;
        let (offset, len) = place(image.allocate(range.clone())).unwrap();
        assert_eq!(len, range.end - range.start);
        let changes = file.changes().split_off(before);
        assert!(
            matches!(&changes[..], [Change::Write { bytes, .. }] if bytes.len() <= 4 * 16),
            "{changes:?}"
        );
        let extent = image.map(range.clone(), Direction::Write);
        let expected = Extent::File {
            file: 0,
            offset,
            len,
        };
        assert_eq!(extent, expected);
        let mut model = read_all(&image);
        assert!(model[1..].iter().all(|&byte| byte == 0));
        file.write_at(&vec![2; len as usize], offset).unwrap();
        model[range.start as usize..range.end as usize].fill(2);
        assert!(read_all(&image) == model);
        // A process that is killed has lost nothing.
        assert!(read_all(&open(&Arc::new(MemoryFile::new(file.bytes())))) == model);
        assert_eq!(place(image.allocate(range)), None);
        drop(image);
        assert_sound(&file);
    }
}

#[test]
fn only_what_reads_as_zeroes_of_its_own_gets_a_place() {
    let second = CLUSTER..2 * CLUSTER;
    let file = create(&usual());
    let image = open(&file);
    // There is no table, and then there is one.
    assert_eq!(place(image.allocate(0..512)), None);
    use_first_table(&image);
    assert!(place(image.allocate(second.clone())).is_some());
    assert_eq!(place(image.allocate(SIZE - 512..SIZE + 512)), None);
    assert_eq!(place(image.allocate(5 * CLUSTER..5 * CLUSTER)), None);
    image
        .write_compressed(&[3; CLUSTER as usize], 2 * CLUSTER)
        .unwrap();
    assert_eq!(place(image.allocate(2 * CLUSTER..3 * CLUSTER)), None);
    // What is marked as zeroes and keeps its cluster is written there by the image.
    image.write_zeroes(second.clone(), false).unwrap();
    assert_eq!(place(image.allocate(second.clone())), None);
    image.write_zeroes(second.clone(), true).unwrap();
    assert!(place(image.allocate(second.clone())).is_some());
    image.create_snapshot("s").unwrap();
    assert_eq!(place(image.allocate(second.clone())), None);
    assert_eq!(place(image.allocate(3 * CLUSTER..4 * CLUSTER)), None);
    drop(image);
    assert_sound(&file);
    let read_only = Options {
        read_only: true,
        ..Options::default()
    };
    let image = Qcow2::open(file, read_only).unwrap();
    assert_eq!(place(image.allocate(3 * CLUSTER..4 * CLUSTER)), None);
}

#[test]
fn bytes_of_a_backing_file_get_no_place_before_they_are_zeroes() {
    let backing = BackingName {
        name: "base".to_owned(),
        format: Some("raw".to_owned()),
    };
    let file = create(&CreateOptions {
        backing: Some(backing),
        ..usual()
    });
    let options = Options {
        backing: Some(image_of(vec![7; SIZE as usize / 2])),
        ..Options::default()
    };
    let image = Qcow2::open(Arc::clone(&file) as _, options).unwrap();
    use_first_table(&image);
    let second = CLUSTER..2 * CLUSTER;
    assert_eq!(place(image.allocate(second.clone())), None);
    image.write_zeroes(second.clone(), true).unwrap();
    assert!(place(image.allocate(second)).is_some());
    assert_eq!(read_all(&image)[CLUSTER as usize], 0);
    assert_eq!(read_all(&image)[2 * CLUSTER as usize], 7);
}

#[test]
fn a_table_that_cannot_be_written_gives_no_place() {
    let file = create(&usual());
    let image = open(&file);
    use_first_table(&image);
    file.fail_after(0, 1);
    assert_eq!(place(image.allocate(CLUSTER..2 * CLUSTER)), None);
    assert!(file.heal());
    image.write_at(&[2; 512], CLUSTER).unwrap();
    assert_eq!(read_all(&image)[CLUSTER as usize], 2);
    drop(image);
    let report = Qcow2::check(file, Repair::Nothing).unwrap();
    // It may be referred to, so the cluster is not used again.
    assert_eq!((report.corruptions, report.leaks), (0, 1), "{report:?}");
}

/// Finds places from `next` on until the image asks for more, and returns where it has come.
fn use_up(image: &Qcow2, mut next: u64) -> u64 {
    loop {
        let range = next..next + CLUSTER;
        next = range.end;
        match image.allocate(range.clone()) {
            Some(found) if found.should_prepare => return next,
            Some(_) => {}
            None => image.write_at(&[1], range.start).unwrap(),
        }
    }
}

#[test]
fn a_crash_while_the_reserve_is_filled_leaks_clusters_at_most() {
    let file = create(&CreateOptions {
        size: 1 << 30,
        // A refcount block counts 64 MiB.
        refcount_bits: 32,
        ..usual()
    });
    let image = open(&file);
    let mut next = 0;
    // The second time, the reserve needs another refcount block.
    let mut blocks = 0;
    for _ in 0..2 {
        next = use_up(&image, next);
        image.flush().unwrap();
        let mut crashed = file.bytes();
        let before = file.len();
        image.prepare().unwrap();
        let changes = file.changes().split_off(before);
        blocks = 0;
        for change in changes {
            let Change::DurableWrite { offset, bytes } = &change else {
                panic!("the data of the guest are synced, or not all that has to be is durable");
            };
            blocks += usize::from(bytes.len() as u64 == CLUSTER);
            // A write is torn between sectors. Those in the middle may be missing.
            let mut torn = crashed.clone();
            for (number, sector) in bytes.chunks(512).enumerate() {
                if number % 3 != 1 {
                    let bytes = sector.to_vec();
                    let offset = offset + number as u64 * 512;
                    Change::Write { offset, bytes }.apply(&mut torn);
                }
            }
            change.apply(&mut crashed);
            for bytes in [torn, crashed.clone()] {
                let report =
                    Qcow2::check(Arc::new(MemoryFile::new(bytes)), Repair::Nothing).unwrap();
                assert_eq!(report.corruptions, 0, "{report:?}");
            }
        }
        // Nothing is to be prepared before it is asked for again.
        let before = file.len();
        image.prepare().unwrap();
        assert_eq!(file.len(), before);
    }
    assert_eq!(blocks, 1);
    drop(image);
    assert_sound(&file);
}

#[test]
fn a_reserve_that_cannot_be_filled_is_left_to_later_writes() {
    let size = 3 * SIZE;
    let file = create(&CreateOptions { size, ..usual() });
    let image = open(&file);
    let next = use_up(&image, 0);
    file.fail_after(0, 1);
    image.prepare().unwrap_err();
    assert!(file.heal());
    // It is not asked for again, and what is left is used.
    let mut places = 0;
    for start in (next..size).step_by(CLUSTER as usize) {
        match image.allocate(start..start + CLUSTER) {
            Some(found) => {
                assert!(!found.should_prepare);
                places += 1;
            }
            None => image.write_at(&[1], start).unwrap(),
        }
    }
    assert!(places > 0);
    drop(image);
    assert_sound(&file);
}
