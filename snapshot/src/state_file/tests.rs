use proptest::prelude::*;

use super::*;
use crate::{SnapshotId, put_in_place};

const PAGE: u64 = bantam_memory::PAGE_SIZE as u64;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Part(u32, String);

impl SavedState for Part {
    const KIND: &'static str = "part";
    const VERSION: u16 = 1;
}

fn facts(base: Option<SnapshotId>) -> Facts {
    Facts {
        id: SnapshotId([7; 16]),
        base,
        taken_at: 1_700_000_000,
        program_version: "0.1.0".to_owned(),
        regions: vec![(0, 70 * PAGE), (1 << 32, 130 * PAGE)],
    }
}

fn state(path: &Path, base: Option<SnapshotId>) -> StateFile {
    let pages = base.map(|_| {
        let regions = facts(None).regions;
        let mut pages = PageSet::empty(regions.iter().map(|it| (GuestAddress(it.0), it.1)));
        for page in [0, 3, 69] {
            pages.insert(GuestAddress(page * PAGE));
            pages.insert(GuestAddress((1 << 32) + page * PAGE));
        }
        pages
    });
    let part = |number, name: &str| Section::of(&Part(number, name.to_owned())).unwrap();
    let sections = vec![part(1, "one"), part(2, "two")];
    StateFile::new(path, facts(base), pages, sections)
}

fn bytes_of(base: Option<SnapshotId>) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state");
    let file = state(&path, base).write().unwrap();
    assert!(!path.exists(), "it appears when it is put in its place");
    put_in_place([file]).unwrap();
    std::fs::read(path).unwrap()
}

fn read(mut bytes: &[u8]) -> Result<StateFile, SnapshotError> {
    StateFile::read(&mut bytes, Path::new("state"))
}

#[test]
fn what_was_written_is_read() {
    for base in [None, Some(SnapshotId([3; 16]))] {
        let expected = state(Path::new("state"), base);
        let found = read(&bytes_of(base)).unwrap();
        assert_eq!(found.facts(), expected.facts());
        assert_eq!(found.pages(), expected.pages());
        assert_eq!(found.sections(), expected.sections());
    }
}

#[test]
fn other_files_and_other_formats_are_refused_by_name() {
    let found = read(b"#!/bin/sh\n").unwrap_err().to_string();
    assert_eq!(found, "'state' is not the state file of a snapshot");
    assert!(matches!(read(b""), Err(SnapshotError::NotSnapshot { .. })));
    let mut bytes = bytes_of(None);
    bytes[8] = 2;
    assert!(matches!(
        read(&bytes),
        Err(SnapshotError::Format {
            known: 1,
            found: 2,
            ..
        })
    ));
    let mut bytes = bytes_of(None);
    bytes.push(0);
    let found = read(&bytes).unwrap_err().to_string();
    assert!(found.contains("bytes after its end"), "{found}");
}

#[test]
fn impossible_facts_are_refused() {
    for regions in [
        vec![],
        vec![(0, 1)],
        vec![(1, PAGE)],
        vec![(0, 0)],
        vec![(0, 2 * PAGE), (PAGE, PAGE)],
        vec![(u64::MAX - PAGE + 1, 2 * PAGE)],
        // With the seal, the memory file would have 2^64 bytes.
        vec![(0, u64::MAX - PAGE + 1)],
        vec![(1 << 52, PAGE)],
    ] {
        let facts = Facts {
            regions: regions.clone(),
            ..facts(None)
        };
        assert!(facts.check().is_err(), "{regions:?}");
    }
}

#[test]
fn a_list_of_pages_must_fit_the_memory() {
    let base = Some(SnapshotId([3; 16]));
    let pages = |words: [Vec<u64>; 2]| {
        // As if the regions were larger, so that all words are written.
        let starts = [GuestAddress(0), GuestAddress(1 << 32)]
            .into_iter()
            .zip(words);
        PageSet::from_words(
            starts.map(|(start, words)| (start, words.len() as u64 * 64 * PAGE, words)),
        )
    };
    let fits = |words| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state");
        let file = StateFile::new(&path, facts(base), Some(pages(words)), Vec::new());
        put_in_place([file.write().unwrap()]).unwrap();
        StateFile::open(&path).is_ok()
    };
    assert!(fits([vec![0, 0x3f], vec![1, 2, 3]]));
    // Bits past the end of the region.
    assert!(!fits([vec![0, 0x40], vec![1, 2, 3]]));
    assert!(!fits([vec![0], vec![1, 2, 3]]));
    assert!(!fits([vec![0, 0], vec![1, 2, 3, 0]]));
    assert!(!fits([vec![0, 0], vec![]]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    #[test]
    fn a_file_with_any_bit_changed_or_its_end_missing_is_refused(position: usize, differential: bool) {
        let bytes = bytes_of(differential.then_some(SnapshotId([3; 16])));
        let bit = position % (bytes.len() * 8);
        let mut changed = bytes.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(read(&changed).is_err());
        prop_assert!(read(&bytes[..bit / 8]).is_err());
    }
}

#[test]
fn any_bytes_are_read_or_refused() {
    bolero::check!().for_each(|bytes: &[u8]| {
        let mut file = [&MAGIC, &FORMAT.to_le_bytes()[..]].concat();
        file.extend_from_slice(bytes);
        let _ = read(&file);
    });
}
