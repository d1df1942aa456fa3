//! The working set of a snapshot: the pages that a machine has needed first after it.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use bantam_memory::{PAGE_SIZE, PageSet};
use bantam_state::{RestoreError, SavedState, Section};
use serde::{Deserialize, Serialize};

use crate::facts::{Facts, SnapshotId};
use crate::state_file::{damaged, page_sections, read_pages, read_sections, write_sections};
use crate::{NewFile, SnapshotError, put_in_place};

const MAGIC: [u8; 8] = *b"BANTAMSW";
/// Version of the format of the file as a whole.
const FORMAT: u32 = 1;
/// Most bytes of a file besides its pages.
const MAX_HEAD: u64 = 4096;
/// Most bytes that a word of a set of pages, for 64 pages, takes in a section.
const MAX_WORD: u64 = 10;

/// The snapshot whose working set it is.
#[derive(Debug, Serialize, Deserialize)]
struct Owner {
    id: SnapshotId,
}

impl SavedState for Owner {
    const KIND: &'static str = "working set";
    const VERSION: u16 = 1;
}

/// Writes the file at `path` with the working set of the snapshot with these facts. It replaces an earlier one when it is
/// complete.
///
/// # Errors
/// If it cannot be written.
pub fn write_working_set(path: &Path, facts: &Facts, pages: &PageSet) -> Result<(), SnapshotError> {
    let file = NewFile::create(path)?;
    let mut sections = vec![Section::of(&Owner { id: facts.id })?];
    sections.extend(page_sections(pages)?);
    write_sections(file.file(), MAGIC, FORMAT, sections, path)?;
    put_in_place([file])
}

/// Reads the working set at `path` of the snapshot with these facts. Returns `None` if there is none.
///
/// # Errors
/// If it cannot be read, is damaged, or is that of another snapshot.
pub fn read_working_set(path: &Path, facts: &Facts) -> Result<Option<PageSet>, SnapshotError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(SnapshotError::read(path))?,
    };
    let words = facts.memory_size() / (PAGE_SIZE as u64 * u64::from(u64::BITS));
    let mut reader = BufReader::new(file.take(MAX_HEAD + words * MAX_WORD));
    let pages = read(&mut reader, facts);
    pages.map(Some).map_err(|error| SnapshotError::WorkingSet {
        path: path.to_path_buf(),
        reason: match error {
            RestoreError::Damaged { reason } => reason,
            error => error.to_string(),
        },
    })
}

fn read(reader: &mut impl Read, facts: &Facts) -> Result<PageSet, RestoreError> {
    let mut head = [0; MAGIC.len() + size_of::<u32>()];
    reader.read_exact(&mut head)?;
    if head[..MAGIC.len()] != MAGIC || head[MAGIC.len()..] != FORMAT.to_le_bytes() {
        return Err(damaged("it does not begin like a working set"));
    }
    let sections = read_sections(reader)?;
    let Some((owner, pages)) = sections.split_first() else {
        return Err(damaged("it does not say whose it is"));
    };
    let owner: Owner = owner.decode()?;
    if owner.id != facts.id {
        return Err(damaged("it is that of another snapshot"));
    }
    read_pages(facts, pages)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    const PAGE: u64 = PAGE_SIZE as u64;
    const REGIONS: [(u64, u64); 2] = [(0, 100 * PAGE), (1000 * PAGE, 70 * PAGE)];

    fn facts() -> Facts {
        Facts::now(None, REGIONS).unwrap()
    }

    fn set(pages: &[u64]) -> PageSet {
        let regions = REGIONS.map(|(start, len)| (GuestAddress(start), len));
        let mut set = PageSet::empty(regions);
        for page in pages {
            set.insert(GuestAddress(page * PAGE));
        }
        set
    }

    #[test]
    fn a_working_set_is_read_for_its_own_snapshot_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("working-set");
        let facts = facts();
        assert_eq!(read_working_set(&path, &facts).unwrap(), None);
        for pages in [set(&[]), set(&[0, 3, 99, 1000, 1069])] {
            write_working_set(&path, &facts, &pages).unwrap();
            assert_eq!(read_working_set(&path, &facts).unwrap(), Some(pages));
        }
        let error = read_working_set(&path, &self::facts()).unwrap_err();
        assert!(error.to_string().contains("another snapshot"), "{error}");
        let one = Facts {
            regions: vec![REGIONS[0]],
            ..facts
        };
        let error = read_working_set(&path, &one).unwrap_err();
        assert!(
            error.to_string().contains("not that of its memory"),
            "{error}"
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn all_pages_of_a_large_memory_fit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("working-set");
        let (start, len) = (0, 64 << 30);
        let facts = Facts::now(None, [(start, len)]).unwrap();
        let words = vec![u64::MAX; (len / PAGE / 64) as usize];
        let pages = PageSet::from_words([(GuestAddress(start), len, words)]);
        write_working_set(&path, &facts, &pages).unwrap();
        assert_eq!(read_working_set(&path, &facts).unwrap(), Some(pages));
    }

    proptest! {
        #[test]
        fn damage_is_found(at in any::<prop::sample::Index>(), bit in 0..8_u8, cut in any::<bool>()) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("working-set");
            let facts = facts();
            write_working_set(&path, &facts, &set(&[1, 2, 1003])).unwrap();
            let mut bytes = fs::read(&path).unwrap();
            let place = at.index(bytes.len());
            match cut {
                true => bytes.truncate(place),
                false => bytes[place] ^= 1 << bit,
            }
            fs::write(&path, bytes).unwrap();
            prop_assert!(read_working_set(&path, &facts).is_err());
        }
    }
}
