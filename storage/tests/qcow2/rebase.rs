//! Images that get another backing file, or become another version, and crashes meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bantam_storage::qcow2::{
    Amendment, BackingName, CreateOptions, Header, Options, Qcow2, Repair,
};
use bantam_storage::tools::{Job, ToolError, copy_differences};
use bantam_storage::{Image, ImageFile};
use proptest::prelude::*;

use crate::crash::crash;
use crate::memory_file::{Change, MemoryFile};
use crate::support::{Numbers, image_of, read_all};

const SIZE: u64 = (1 << 20) + 512;

/// Backing files by their names.
#[derive(Debug, Clone)]
struct Bases(Vec<(BackingName, Arc<dyn Image>)>);

impl Bases {
    fn open(&self, name: Option<&BackingName>) -> Option<Arc<dyn Image>> {
        let found = self.0.iter().find(|(known, _)| Some(known) == name);
        found.map(|(_, image)| Arc::clone(image))
    }

    fn open_image(&self, file: &Arc<MemoryFile>) -> Qcow2 {
        let header = Header::read(&**file).unwrap();
        let options = Options {
            backing: self.open(header.backing()),
            ..Options::default()
        };
        Qcow2::open(Arc::clone(file) as _, options).unwrap()
    }
}

/// Returns bytes with runs of few values, so that two of them have much in common.
fn content(numbers: &mut Numbers, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    let mut position = 0;
    while position < bytes.len() {
        let len = (numbers.below(60_000) as usize + 1).min(bytes.len() - position);
        bytes[position..position + len].fill(numbers.below(3) as u8);
        position += len;
    }
    bytes
}

#[derive(Debug, Clone)]
struct Plan {
    seed: u64,
    cluster_bits: u32,
    version: u32,
    extended: bool,
    sizes: [u64; 2],
    /// Which of the two there is before, and afterwards.
    old: Option<usize>,
    new: Option<usize>,
    long_name: usize,
}

fn plan() -> impl Strategy<Value = Plan> {
    let sizes = [1..SIZE * 2, 1..SIZE * 2];
    let backing = || prop::option::weighted(0.8, 0usize..2);
    let names = prop_oneof![2 => Just(0usize), 1 => 1usize..900];
    (
        any::<u32>(),
        9u32..=17,
        2u32..=3,
        any::<bool>(),
        sizes,
        backing(),
        backing(),
        names,
    )
        .prop_map(
            |(seed, cluster_bits, version, extended, sizes, old, new, long_name)| Plan {
                seed: seed.into(),
                cluster_bits,
                version,
                extended: extended && version == 3 && cluster_bits >= 14,
                sizes,
                old,
                new,
                long_name: if cluster_bits > 11 { long_name } else { 0 },
            },
        )
}

/// Makes an image as planned, and returns its file.
fn make(plan: &Plan, bases: &Bases, numbers: &mut Numbers) -> Arc<MemoryFile> {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    let options = CreateOptions {
        size: SIZE,
        cluster_size: 1 << plan.cluster_bits,
        version: plan.version,
        extended_l2: plan.extended,
        backing: plan.old.map(|old| bases.0[old].0.clone()),
        ..CreateOptions::default()
    };
    Qcow2::create(Arc::clone(&file) as _, &options).unwrap();
    let image = bases.open_image(&file);
    for turn in 0..8 {
        let offset = numbers.below(SIZE / 512) * 512;
        let len = (numbers.below(60_000) + 1).min(SIZE - offset);
        match turn % 4 {
            3 => image.write_zeroes(offset..offset + len, true).unwrap(),
            _ => {
                let bytes = vec![numbers.below(3) as u8; len as usize];
                image.write_at(&bytes, offset).unwrap();
            }
        }
    }
    drop(image);
    // What is recorded begins here.
    Arc::new(MemoryFile::new(file.bytes()))
}

/// Has an image read at many moments of what was done to its file.
fn assert_unchanged(start: Vec<u8>, changes: &[Change], bases: &Bases, expected: &[u8]) {
    let mut numbers = Numbers::new(changes.len() as u64);
    let share = (changes.len() as u64 / 30).max(1);
    let mut stable = start;
    let mut synced = 0;
    for count in 0..=changes.len() {
        if count > 0 && matches!(changes[count - 1], Change::Sync) {
            for change in &changes[synced..count] {
                change.apply(&mut stable);
            }
            synced = count;
        }
        // The last changes are those of the header.
        if changes.len() - count > 8 && numbers.below(share) > 0 {
            continue;
        }
        let file = crash(&stable, &changes[synced..count], &mut numbers);
        let file = Arc::new(MemoryFile::new(file));
        let report = Qcow2::check(Arc::clone(&file) as _, Repair::Nothing).unwrap();
        assert_eq!(
            report.corruptions,
            0,
            "{count} of {}: {report:?}",
            changes.len()
        );
        let image = bases.open_image(&file);
        let bytes = read_all(&image);
        let different = bytes.iter().zip(expected).position(|(is, was)| is != was);
        assert_eq!(different, None, "{count} of {} changes", changes.len());
    }
}

fn bases(plan: &Plan, numbers: &mut Numbers) -> Bases {
    let bases = plan.sizes.iter().enumerate().map(|(number, &size)| {
        let name = BackingName {
            name: format!("base{number}{}", "x".repeat(plan.long_name)),
            format: Some("raw".to_owned()),
        };
        let image: Arc<dyn Image> = image_of(content(numbers, size));
        (name, image)
    });
    Bases(bases.collect())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 0, ..ProptestConfig::default() })]

    #[test]
    fn a_rebase_changes_no_byte_of_the_disk(plan in plan()) {
        let mut numbers = Numbers::new(plan.seed);
        let bases = bases(&plan, &mut numbers);
        let file = make(&plan, &bases, &mut numbers);
        let start = file.bytes();
        let expected = read_all(&bases.open_image(&file));
        let file = Arc::new(MemoryFile::new(start.clone()));
        let image = bases.open_image(&file);
        let cancelled = AtomicBool::new(numbers.below(4) == 0);
        let progress = |_| ();
        let job = Job { progress: &progress, cancelled: &cancelled };
        let name = plan.new.map(|new| bases.0[new].0.clone());
        let new = bases.open(name.as_ref());
        let shared = (plan.old == plan.new).then_some(1);
        let result = copy_differences(&image, new.as_deref(), shared, job);
        if cancelled.load(Ordering::Relaxed) {
            prop_assert!(matches!(result, Err(ToolError::Cancelled)));
        } else {
            result.unwrap();
            // A small cluster has no room for the table of features, and little for a name.
            match image.rebase(name.clone()) {
                Ok(()) => {
                    let header = Header::read(&*file).unwrap();
                    prop_assert_eq!(header.backing(), name.as_ref());
                }
                Err(error) => {
                    let text = error.to_string();
                    prop_assert!(text.contains("does not fit") && plan.cluster_bits < 12, "{}", text);
                }
            }
        }
        drop(image);
        assert_unchanged(start, &file.changes(), &bases, &expected);
    }

    #[test]
    fn a_change_of_the_version_changes_no_byte_of_the_disk(plan in plan()) {
        let mut numbers = Numbers::new(plan.seed);
        let bases = bases(&plan, &mut numbers);
        let file = make(&plan, &bases, &mut numbers);
        let start = file.bytes();
        let expected = read_all(&bases.open_image(&file));
        let file = Arc::new(MemoryFile::new(start.clone()));
        for version in [5 - plan.version, plan.version] {
            let image = bases.open_image(&file);
            let amendment = Amendment { version: Some(version), lazy_refcounts: None };
            let amended = image.amend(amendment);
            prop_assert_eq!(amended.is_ok(), !(plan.extended && version == 2));
            drop(image);
            let header = Header::read(&*file).unwrap();
            if !plan.extended {
                prop_assert_eq!(header.version(), version);
            }
            prop_assert_eq!(header.backing(), plan.old.map(|old| &bases.0[old].0));
        }
        assert_unchanged(start, &file.changes(), &bases, &expected);
    }
}

#[test]
fn a_header_keeps_what_it_does_not_know() {
    let file = Arc::new(MemoryFile::new(Vec::new()));
    let options = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    Qcow2::create(Arc::clone(&file) as _, &options).unwrap();
    let mut bytes = file.bytes();
    // Header length 120, with a field of the future, and an extension of the future.
    bytes[100..104].copy_from_slice(&120u32.to_be_bytes());
    bytes[112..120].copy_from_slice(b"a field!");
    let extension = [
        &0x1234_5678u32.to_be_bytes()[..],
        &5u32.to_be_bytes(),
        b"known\0\0\0",
    ]
    .concat();
    bytes[120..136].copy_from_slice(&extension);
    bytes[136..144].fill(0);
    let file = Arc::new(MemoryFile::new(bytes));
    for name in [
        Some("base".to_owned()),
        Some("y".repeat(1023)),
        None,
        Some("z".repeat(700)),
    ] {
        let backing = name.map(|name| BackingName {
            name,
            format: Some("raw".to_owned()),
        });
        Qcow2::rename_backing(Arc::clone(&file) as _, backing.clone()).unwrap();
        assert_eq!(Header::read(&*file).unwrap().backing(), backing.as_ref());
        let mut header = [0; 512];
        file.read_at(&mut header, 0).unwrap();
        assert_eq!(&header[112..120], b"a field!");
        assert!(header.windows(16).any(|window| window == extension));
    }
}
