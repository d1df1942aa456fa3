//! Memory files, written from guest memory, merged, and mapped again.

#![allow(clippy::unwrap_used, reason = "every step of a test has to succeed")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use bantam_memory::{GuestMemory, PAGE_SIZE, PageSet};
use bantam_snapshot::{
    CopiedPages, Facts, MemoryFile, MemoryWriter, SnapshotError, SnapshotFiles, StateFile, Witness,
    merge, put_in_place,
};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

const PAGE: u64 = PAGE_SIZE as u64;
const FIRST: u64 = 300;
const SECOND: u64 = 5000;
const SECOND_START: u64 = 1 << 32;
const REGIONS: [(u64, u64); 2] = [(0, FIRST * PAGE), (SECOND_START, SECOND * PAGE)];

fn ranges() -> [(GuestAddress, usize); 2] {
    REGIONS.map(|(start, len)| (GuestAddress(start), len as usize))
}

/// The address of a page by its number in the file.
fn address(page: u64) -> GuestAddress {
    GuestAddress(match page {
        ..FIRST => page * PAGE,
        _ => SECOND_START + (page - FIRST) * PAGE,
    })
}

fn memory() -> Arc<GuestMemory> {
    Arc::new(GuestMemory::from_ranges(&ranges()).unwrap())
}

fn fill(memory: &GuestMemory, page: u64, byte: u8) {
    memory
        .write_slice(&[byte; PAGE_SIZE], address(page))
        .unwrap();
}

fn bytes(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; ((FIRST + SECOND) * PAGE) as usize];
    let (first, second) = bytes.split_at_mut((FIRST * PAGE) as usize);
    memory.read_slice(first, address(0)).unwrap();
    memory.read_slice(second, address(FIRST)).unwrap();
    bytes
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::empty(REGIONS.map(|(start, len)| (GuestAddress(start), len)));
    pages.into_iter().for_each(|page| set.insert(address(page)));
    set
}

/// Writes a full snapshot, or one of these pages since another.
fn write(
    directory: &Path,
    memory: &Arc<GuestMemory>,
    base: Option<&StateFile>,
    pages: Option<PageSet>,
    copied: bool,
) -> StateFile {
    fs::create_dir_all(directory).unwrap();
    let files = SnapshotFiles::in_directory(directory);
    let facts = Facts::now(base.map(|base| base.facts().id), REGIONS).unwrap();
    let writer = MemoryWriter::create(&files.memory, &facts).unwrap();
    let to_write = pages.clone();
    let to_write = to_write.unwrap_or_else(|| memory.pages_with_content().unwrap());
    match copied {
        true => writer
            .write_copied(&CopiedPages::copy(memory, to_write).unwrap())
            .unwrap(),
        false => writer.write(memory, &to_write).unwrap(),
    }
    put_in_place([writer.finish().unwrap()]).unwrap();
    let state = StateFile::new(&files.state, facts, pages, Vec::new());
    put_in_place([state.write().unwrap()]).unwrap();
    StateFile::open(&files.state).unwrap()
}

fn open(directory: &Path) -> Result<MemoryFile, SnapshotError> {
    let files = SnapshotFiles::in_directory(directory);
    MemoryFile::open(&files.memory, &StateFile::open(&files.state)?)
}

#[test]
fn memory_comes_back_and_zeroes_take_no_room() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    // Enough to be written past the page cache, with pages of zeroes among them.
    for page in 200..FIRST + SECOND - 100 {
        fill(&memory, page, (page % 5) as u8);
    }
    write(directory.path(), &memory, None, None, false);
    let file = open(directory.path()).unwrap();
    assert_eq!(bytes(&file.map().unwrap()), bytes(&memory));
    let copy = self::memory();
    file.read_into(&copy).unwrap();
    assert_eq!(bytes(&copy), bytes(&memory));
    let blocks = file.file().metadata().unwrap().blocks() * 512;
    assert!(blocks < (FIRST + SECOND) * PAGE * 9 / 10, "{blocks}");
    file.check_unchanged().unwrap();
}

#[test]
fn files_that_do_not_belong_together_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (directory.path().join("one"), directory.path().join("other"));
    let memory = memory();
    fill(&memory, 1, 1);
    for path in [&one, &other] {
        write(path, &memory, None, None, false);
    }
    fs::copy(other.join("memory"), one.join("memory")).unwrap();
    let error = open(&one).unwrap_err().to_string();
    assert!(error.ends_with("it is that of another snapshot"), "{error}");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(other.join("memory"));
    let file = file.unwrap();
    let mapped = open(&other).unwrap();
    file.set_len((FIRST + SECOND) * PAGE).unwrap();
    let error = open(&other).unwrap_err().to_string();
    assert!(error.contains("bytes instead of"), "{error}");
    let error = mapped.check_unchanged().unwrap_err().to_string();
    assert!(error.ends_with("changed since it was opened"), "{error}");
    file.set_len((FIRST + SECOND + 1) * PAGE).unwrap();
    let error = open(&other).unwrap_err().to_string();
    assert!(error.ends_with("its seal is missing"), "{error}");
}

#[test]
fn a_new_snapshot_replaces_an_earlier_one_only_when_it_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    fill(&memory, 1, 1);
    let first = write(directory.path(), &memory, None, None, false);
    let files = SnapshotFiles::in_directory(directory.path());
    let facts = Facts::now(None, REGIONS).unwrap();
    let writer = MemoryWriter::create(&files.memory, &facts).unwrap();
    writer.write(&memory, &set([1])).unwrap();
    assert!(directory.path().join("memory.new").exists());
    drop(writer);
    assert!(!directory.path().join("memory.new").exists());
    // What a program that was killed has left does not matter.
    fs::write(directory.path().join("memory.new"), "x").unwrap();
    assert_eq!(
        open(directory.path()).unwrap().map().unwrap().size(),
        memory.size()
    );
    let second = write(directory.path(), &memory, None, None, false);
    assert_ne!(first.facts().id, second.facts().id);
    open(directory.path()).unwrap();
}

#[test]
fn only_snapshots_that_follow_each_other_are_merged() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let files = |name: &str| SnapshotFiles::in_directory(&path(name));
    let memory = memory();
    let base = write(&path("base"), &memory, None, None, false);
    let first = write(&path("1"), &memory, Some(&base), Some(set([1])), false);
    write(&path("2"), &memory, Some(&first), Some(set([2])), false);
    fs::create_dir(path("out")).unwrap();
    let error = merge(&files("base"), &[files("2"), files("1")], &files("out")).unwrap_err();
    assert!(matches!(error, SnapshotError::NotBased { .. }), "{error}");
    let error = merge(&files("1"), &[files("2")], &files("out")).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Differential { .. }),
        "{error}"
    );
    assert_eq!(fs::read_dir(path("out")).unwrap().count(), 0);
    merge(&files("base"), &[files("1"), files("2")], &files("out")).unwrap();
}

#[test]
fn the_memory_file_of_a_differential_snapshot_is_complete_with_the_pages_of_its_base() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for other_pages in [0..FIRST + SECOND, 5..6] {
        let memory = memory();
        for page in other_pages {
            fill(&memory, page, (page % 250) as u8 + 1);
        }
        let base = write(&path("base"), &memory, None, None, false);
        assert!(open(&path("base")).unwrap().is_complete(&base).unwrap());
        // One of the pages is zero now.
        fill(&memory, 1, 7);
        fill(&memory, 2, 0);
        let pages = set([1, 2]);
        let state = write(
            &path("next"),
            &memory,
            Some(&base),
            Some(pages.clone()),
            false,
        );
        let file = open(&path("next")).unwrap();
        // Without witnesses that cannot be known.
        assert!(!file.is_complete(&state).unwrap());
        let state = state.with_witnesses(Witness::find(&memory, base.facts(), &pages));
        put_in_place([state.write().unwrap()]).unwrap();
        let state = StateFile::open(state.path()).unwrap();
        assert!(!state.witnesses().is_empty());
        assert!(!file.is_complete(&state).unwrap());

        // Into a copy of the base.
        let writer = MemoryWriter::create(&path("next").join("memory"), state.facts()).unwrap();
        let base = open(&path("base")).unwrap();
        writer.copy(&base, None, &pages).unwrap();
        writer.copy(&file, Some(pages), &set([])).unwrap();
        put_in_place([writer.finish().unwrap()]).unwrap();
        let file = open(&path("next")).unwrap();
        assert!(file.is_complete(&state).unwrap());
        assert_eq!(bytes(&file.map().unwrap()), bytes(&memory));
        // It is then the base of others as well.
        let last = write(&path("last"), &memory, Some(&state), Some(set([3])), false);
        assert_eq!(last.facts().base, Some(state.facts().id));
        let files = |name: &str| SnapshotFiles::in_directory(&path(name));
        fs::create_dir_all(path("out")).unwrap();
        merge(&files("next"), &[files("last")], &files("out")).unwrap();
        assert_eq!(
            bytes(&open(&path("out")).unwrap().map().unwrap()),
            bytes(&memory)
        );
    }
}

#[test]
fn pages_of_zeroes_are_written_where_they_replace_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("memory");
    let memory = memory();
    fill(&memory, 1, 1);
    let facts = Facts::now(None, REGIONS).unwrap();
    let written = |writer: MemoryWriter| {
        writer.write(&memory, &set([1, 2, 3])).unwrap();
        put_in_place([writer.finish().unwrap()]).unwrap();
        fs::metadata(&path).unwrap().blocks()
    };
    let new = || MemoryWriter::create(&path, &facts).unwrap();
    assert!(written(new()) < written(new().writing_zeroes()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn a_merged_chain_is_the_last_snapshot(
        rounds in prop::collection::vec(
            (prop::collection::btree_map(0..FIRST + SECOND, 0..4_u8, 0..40), any::<bool>()),
            1..6,
        ),
    ) {
        let directory = tempfile::tempdir().unwrap();
        let memory = memory();
        for page in (0..FIRST + SECOND).step_by(7) {
            fill(&memory, page, 9);
        }
        let path = |name: usize| directory.path().join(name.to_string());
        let mut last = write(&path(0), &memory, None, None, false);
        let mut chain = Vec::new();
        for (index, (writes, copied)) in (1..).zip(&rounds) {
            let writes: &BTreeMap<u64, u8> = writes;
            writes.iter().for_each(|(&page, &byte)| fill(&memory, page, byte));
            let pages = set(writes.keys().copied());
            last = write(&path(index), &memory, Some(&last), Some(pages), *copied);
            chain.push(SnapshotFiles::in_directory(&path(index)));
        }
        let out = directory.path().join("out");
        fs::create_dir(&out).unwrap();
        let target = SnapshotFiles::in_directory(&out);
        merge(&SnapshotFiles::in_directory(&path(0)), &chain, &target).unwrap();
        let merged = open(&out).unwrap();
        prop_assert_eq!(bytes(&merged.map().unwrap()), bytes(&memory));
        prop_assert_eq!(StateFile::open(&target.state).unwrap().facts().id, last.facts().id);
    }
}
