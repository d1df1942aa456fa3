//! The state file.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bantam_memory::PageSet;
use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use crate::facts::Facts;
use crate::{NewFile, SnapshotError, Witness};

const MAGIC: [u8; 8] = *b"BANTAMSS";
/// Version of the format of the file as a whole.
const FORMAT: u32 = 1;
/// Most sections that a file can have. A machine has fewer than a thousand parts.
const MAX_SECTIONS: usize = 1 << 16;
/// Words of a set of pages in one section, which stays below the limit of a section.
const WORDS_PER_SECTION: usize = 1 << 20;

/// The end of a state file.
#[derive(Debug, Serialize, Deserialize)]
struct End {
    /// Number of sections before it.
    sections: u64,
}

impl SavedState for End {
    const KIND: &'static str = "snapshot end";
    const VERSION: u16 = 1;
}

/// A part of the set of pages of a differential snapshot.
#[derive(Debug, Serialize, Deserialize)]
struct Pages {
    /// First address of the region.
    region: u64,
    /// Index of the first word.
    first: u64,
    words: Vec<u64>,
}

impl SavedState for Pages {
    const KIND: &'static str = "snapshot pages";
    const VERSION: u16 = 1;
}

/// The content of a state file.
#[derive(Debug, Clone)]
pub struct StateFile {
    /// Where it was read from, or is to be written.
    path: PathBuf,
    facts: Facts,
    pages: Option<PageSet>,
    /// Pages that a differential snapshot does not have.
    witnesses: Vec<Witness>,
    sections: Vec<Section>,
}

impl StateFile {
    /// Creates the content of the state file at `path`: facts, the sections of the machine, and, for a differential
    /// snapshot, its pages.
    pub fn new(
        path: &Path,
        facts: Facts,
        pages: Option<PageSet>,
        sections: Vec<Section>,
    ) -> StateFile {
        StateFile {
            path: path.to_path_buf(),
            facts,
            pages,
            witnesses: Vec::new(),
            sections,
        }
    }

    /// Adds witnesses to a differential snapshot.
    #[must_use]
    pub fn with_witnesses(self, witnesses: Vec<Witness>) -> StateFile {
        StateFile { witnesses, ..self }
    }

    /// Returns the same without the sections of the machine.
    #[must_use]
    pub fn without_sections(&self) -> StateFile {
        StateFile {
            path: self.path.clone(),
            facts: self.facts.clone(),
            pages: self.pages.clone(),
            witnesses: self.witnesses.clone(),
            sections: Vec::new(),
        }
    }

    /// Returns where it was read from, or is to be written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the facts about the snapshot.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Returns the pages of a differential snapshot.
    pub fn pages(&self) -> Option<&PageSet> {
        self.pages.as_ref()
    }

    /// Returns the witnesses of a differential snapshot.
    pub fn witnesses(&self) -> &[Witness] {
        &self.witnesses
    }

    /// Returns the sections of the machine.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Writes the file under another name.
    ///
    /// # Errors
    /// If a section is too large, or the file cannot be written.
    pub fn write(&self) -> Result<NewFile, SnapshotError> {
        let file = NewFile::create(&self.path)?;
        self.write_to(file.file())?;
        Ok(file)
    }

    /// Writes what the file has to `writer`.
    ///
    /// # Errors
    /// If a section is too large, or `writer` fails.
    pub fn write_to(&self, writer: impl Write) -> Result<(), SnapshotError> {
        let mut sections = vec![Section::of(&self.facts)?];
        sections.extend(self.sections.iter().cloned());
        if let Some(pages) = &self.pages {
            sections.extend(page_sections(pages)?);
        }
        for witness in &self.witnesses {
            sections.push(Section::of(witness)?);
        }
        write_sections(writer, MAGIC, FORMAT, sections, &self.path)
    }

    /// Opens the state file at `path`.
    ///
    /// # Errors
    /// If it cannot be read, is not a state file, has another format, or is damaged or cut short.
    pub fn open(path: &Path) -> Result<StateFile, SnapshotError> {
        let file = File::open(path).map_err(SnapshotError::read(path))?;
        StateFile::read(&mut BufReader::new(file), path)
    }

    /// Reads a state file, which errors call `path`.
    ///
    /// # Errors
    /// Those of [`StateFile::open`].
    pub fn read(reader: &mut impl Read, path: &Path) -> Result<StateFile, SnapshotError> {
        let not_snapshot = |_| SnapshotError::NotSnapshot {
            path: path.to_path_buf(),
        };
        let mut magic = [0; MAGIC.len()];
        reader.read_exact(&mut magic).map_err(not_snapshot)?;
        if magic != MAGIC {
            return Err(SnapshotError::NotSnapshot {
                path: path.to_path_buf(),
            });
        }
        let mut format = [0; size_of::<u32>()];
        reader
            .read_exact(&mut format)
            .map_err(SnapshotError::read(path))?;
        let found = u32::from_le_bytes(format);
        if found != FORMAT {
            return Err(SnapshotError::Format {
                path: path.to_path_buf(),
                known: FORMAT,
                found,
            });
        }
        read_sections(reader)
            .and_then(|sections| StateFile::from_sections(path, sections))
            .map_err(SnapshotError::state(path))
    }

    /// Makes the content of a file from its sections, all but the last.
    fn from_sections(path: &Path, sections: Vec<Section>) -> Result<StateFile, RestoreError> {
        let mut sections = sections.into_iter();
        let facts: Facts = match sections.next() {
            Some(section) => section.decode()?,
            None => return Err(damaged("it has no facts")),
        };
        facts.check().map_err(|reason| damaged(&reason))?;
        let (pages, sections): (Vec<_>, Vec<_>) =
            sections.partition(|section| section.kind() == Pages::KIND);
        let (witnesses, sections): (Vec<_>, Vec<_>) = sections
            .into_iter()
            .partition(|section| section.kind() == Witness::KIND);
        let witnesses = witnesses
            .iter()
            .map(Section::decode)
            .collect::<Result<_, _>>()?;
        let pages = match facts.base {
            Some(_) => Some(read_pages(&facts, &pages)?),
            None if pages.is_empty() => None,
            None => return Err(damaged("a full snapshot does not list its pages")),
        };
        Ok(StateFile {
            path: path.to_path_buf(),
            facts,
            pages,
            witnesses,
            sections,
        })
    }
}

/// Returns sections with a set of pages.
pub(crate) fn page_sections(pages: &PageSet) -> Result<Vec<Section>, SaveError> {
    let parts = pages.words().flat_map(|(region, words)| {
        let parts = words.chunks(WORDS_PER_SECTION).enumerate();
        parts.map(move |(index, words)| Pages {
            region: region.0,
            first: (index * WORDS_PER_SECTION) as u64,
            words: words.to_vec(),
        })
    });
    parts.map(|part| Section::of(&part)).collect()
}

/// Writes a file, which errors call `path`: magic number, version of the format, `sections` and their end.
pub(crate) fn write_sections(
    writer: impl Write,
    magic: [u8; 8],
    format: u32,
    mut sections: Vec<Section>,
    path: &Path,
) -> Result<(), SnapshotError> {
    let end = Section::of(&End {
        sections: sections.len() as u64,
    })?;
    sections.push(end);
    let mut writer = BufWriter::new(writer);
    let mut write = || {
        writer.write_all(&magic)?;
        writer.write_all(&format.to_le_bytes())?;
        sections
            .iter()
            .try_for_each(|section| section.write_to(&mut writer))?;
        writer.flush()
    };
    write().map_err(SnapshotError::write(path))
}

pub(crate) fn damaged(reason: &str) -> RestoreError {
    RestoreError::Damaged {
        reason: reason.to_owned(),
    }
}

/// Reads sections up to the one that ends the file, which is not returned.
pub(crate) fn read_sections(reader: &mut impl Read) -> Result<Vec<Section>, RestoreError> {
    let mut sections = Vec::new();
    loop {
        let section = Section::read_from(reader)?;
        if section.kind() == End::KIND {
            let end: End = section.decode()?;
            if end.sections != sections.len() as u64 {
                return Err(damaged("sections are missing"));
            }
            let mut rest = [0];
            return match reader.read(&mut rest)? {
                0 => Ok(sections),
                _ => Err(damaged("there are bytes after its end")),
            };
        }
        if sections.len() == MAX_SECTIONS {
            return Err(damaged("it has too many sections"));
        }
        sections.push(section);
    }
}

/// Puts the set of pages together from its sections.
pub(crate) fn read_pages(facts: &Facts, sections: &[Section]) -> Result<PageSet, RestoreError> {
    let page_count = |len: u64| len / bantam_memory::PAGE_SIZE as u64;
    let mut words: Vec<(GuestAddress, Vec<u64>)> = Vec::new();
    for section in sections {
        let pages: Pages = section.decode()?;
        if words
            .last()
            .is_none_or(|(start, _)| start.0 != pages.region)
        {
            words.push((GuestAddress(pages.region), Vec::new()));
        }
        if let Some((_, words)) = words.last_mut() {
            if words.len() as u64 != pages.first {
                return Err(damaged("a part of its list of pages is missing"));
            }
            words.extend(pages.words);
        }
    }
    let fits = words.len() == facts.regions.len()
        && words
            .iter()
            .zip(&facts.regions)
            .all(|((start, words), &(region, len))| {
                let count = page_count(len);
                let beyond = count % u64::from(u64::BITS);
                start.0 == region
                    && words.len() as u64 == count.div_ceil(u64::from(u64::BITS))
                    && (beyond == 0 || words.last().is_none_or(|word| word >> beyond == 0))
            });
    let words = words.into_iter().zip(&facts.regions);
    let words = words.map(|((start, words), &(_, len))| (start, len, words));
    match fits {
        true => Ok(PageSet::from_words(words)),
        false => Err(damaged("its list of pages is not that of its memory")),
    }
}

#[cfg(test)]
mod tests;
