//! All references to clusters of the file.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;

use super::Qcow2;
use super::entry::{L1Entry, L2Entry};
use super::header::{BITMAPS, Header, be32, be64};
use super::locks::lock;
use super::snapshot_table::{self, Snapshot};
use super::tables::read_words;

/// Maximum size in bytes of the list of bitmaps, and of the table of one. The limits are QEMU's too.
const MAX_BITMAP_DIRECTORY: u64 = 64 << 20;
const MAX_BITMAP_TABLE: u64 = 32 << 20;

/// References to an L2 table.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TableUse {
    /// How many L1 entries refer to it.
    pub count: u32,
    /// Whether one of them is active.
    pub is_active: bool,
}

/// The tables of an image and what refers to them.
#[derive(Debug)]
pub(super) struct References {
    header: Header,
    /// References to runs of clusters of metadata, and what makes them.
    metadata: Vec<(Range<u64>, u32)>,
    /// L2 tables by their offset.
    pub l2: BTreeMap<u64, TableUse>,
    /// What is wrong and can hide references.
    pub damage: Vec<String>,
    /// What is wrong and hides none.
    pub flaws: Vec<String>,
}

impl Qcow2 {
    /// Finds all tables. Nobody else may use the image meanwhile.
    pub(super) fn find_references(&self) -> io::Result<References> {
        let header = self.header();
        let geometry = self.geometry;
        let file_size = lock(&self.allocator).file_size();
        let file_clusters = file_size.div_ceil(geometry.cluster_size());
        let mut references = References {
            header: header.clone(),
            metadata: vec![(0..1, 1)],
            l2: BTreeMap::new(),
            damage: Vec::new(),
            flaws: Vec::new(),
        };
        let allocator = lock(&self.allocator);
        references
            .metadata
            .push((allocator.refcounts.table_clusters(), 1));
        for (index, cluster) in allocator.refcounts.block_clusters() {
            if let Err(error) = allocator.refcounts.block_offset(index) {
                references.damage.push(error.to_string());
            } else if cluster >= file_clusters {
                references
                    .damage
                    .push(format!("refcount block {index} is behind the file's end"));
            } else {
                references.metadata.push((cluster..cluster + 1, 1));
            }
        }
        drop(allocator);

        let (snapshots, table_len) = match snapshot_table::read(&*self.file, &header) {
            Ok(table) => table,
            Err(error) => {
                references.damage.push(error.to_string());
                (Vec::new(), 0)
            }
        };
        if table_len > 0 {
            let start = header.snapshots_offset;
            references
                .metadata
                .push((geometry.clusters(start..start + table_len), 1));
        }
        self.find_tables(&mut references, header.l1_offset, header.l1_size, true)?;
        for Snapshot {
            l1_offset, l1_size, ..
        } in snapshots
        {
            self.find_tables(&mut references, l1_offset, l1_size, false)?;
        }
        if header.autoclear & BITMAPS != 0 {
            self.find_bitmaps(&mut references)?;
        }
        for (range, count) in &mut references.metadata {
            if range.end > file_clusters {
                let start = range.start << geometry.cluster_bits;
                references
                    .damage
                    .push(format!("metadata at {start:#x} is behind the file's end"));
                *count = 0;
            }
        }
        Ok(references)
    }

    /// Finds the L2 tables of an L1 table.
    fn find_tables(
        &self,
        references: &mut References,
        l1_offset: u64,
        l1_size: u32,
        is_active: bool,
    ) -> io::Result<()> {
        let geometry = self.geometry;
        let bytes = l1_offset..l1_offset + u64::from(l1_size) * 8;
        if bytes.is_empty() {
            return Ok(());
        }
        references.metadata.push((geometry.clusters(bytes), 1));
        let file_size = lock(&self.allocator).file_size();
        for (index, word) in read_words(&*self.file, l1_offset, l1_size.into())?
            .iter()
            .enumerate()
        {
            if L1Entry(*word).has_reserved_bits() {
                references
                    .flaws
                    .push(format!("L1 entry {index} has reserved bits set: {word:#x}"));
            }
            let Some(table) = L1Entry(*word).table() else {
                continue;
            };
            if table & (geometry.cluster_size() - 1) != 0 || table >= file_size {
                references
                    .damage
                    .push(format!("L1 entry {index} is {word:#x}"));
                continue;
            }
            let uses = references.l2.entry(table).or_default();
            if is_active && uses.is_active {
                references
                    .damage
                    .push(format!("L1 entry {index} repeats {table:#x}"));
            }
            uses.count = uses.count.saturating_add(1);
            uses.is_active |= is_active;
        }
        Ok(())
    }

    /// Finds the clusters of bitmaps.
    fn find_bitmaps(&self, references: &mut References) -> io::Result<()> {
        let geometry = self.geometry;
        let Some(directory) = self.header().bitmaps else {
            return Ok(());
        };
        let end = directory
            .offset
            .checked_add(directory.size)
            .filter(|&end| end <= 1 << 56);
        if directory.size > MAX_BITMAP_DIRECTORY || end.is_none() {
            references
                .damage
                .push("the list of bitmaps has a wrong place or size".to_owned());
            return Ok(());
        }
        let mut bytes = vec![0; directory.size as usize];
        self.file.read_at(&mut bytes, directory.offset)?;
        let range = directory.offset..directory.offset + directory.size;
        references.metadata.push((geometry.clusters(range), 1));
        let mut rest = bytes.as_slice();
        // Tables of different bitmaps do not overlap, so the file limits their total size.
        let mut room = lock(&self.allocator).file_size();
        for _ in 0..directory.count {
            let Some(fixed) = rest.get(..24) else {
                references
                    .damage
                    .push("the list of bitmaps is cut off".to_owned());
                break;
            };
            let (offset, entries) = (be64(fixed, 0), u64::from(be32(fixed, 8)));
            let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
            let len = (24 + name_len).saturating_add(be32(fixed, 20) as usize);
            rest = rest.get(len.next_multiple_of(8)..).unwrap_or_default();
            if entries * 8 > MAX_BITMAP_TABLE.min(room) || offset > 1 << 56 {
                references
                    .damage
                    .push("a bitmap has a wrong table".to_owned());
                continue;
            }
            room -= entries * 8;
            references
                .metadata
                .push((geometry.clusters(offset..offset + entries * 8), 1));
            for word in read_words(&*self.file, offset, entries)? {
                if let Some(host) = (L2Entry { word, bitmap: 0 }).host() {
                    let cluster = host >> geometry.cluster_bits;
                    references.metadata.push((cluster..cluster + 1, 1));
                }
            }
        }
        Ok(())
    }

    /// Calls `visit` with all references: clusters, and how often they are referred to. Damage that is found
    /// on the way goes to `damage`, with the number of references that lead to it.
    pub(super) fn visit_references(
        &self,
        references: &References,
        mut visit: impl FnMut(Range<u64>, u32),
        mut damage: impl FnMut(String, u32),
    ) -> io::Result<()> {
        let geometry = self.geometry;
        for (range, count) in &references.metadata {
            visit(range.clone(), *count);
        }
        let file_clusters = lock(&self.allocator)
            .file_size()
            .div_ceil(geometry.cluster_size());
        for (&table, uses) in &references.l2 {
            let cluster = table >> geometry.cluster_bits;
            visit(cluster..cluster + 1, uses.count);
            for (index, entry) in self.read_table(table)?.into_iter().enumerate() {
                for flaw in entry.flaws() {
                    let what = format!("L2 entry {index} of the table at {table:#x} {flaw}");
                    damage(what, uses.count);
                }
                if entry.is_compressed() && entry.bitmap != 0 {
                    let what = format!(
                        "L2 entry {index} of the table at {table:#x} gives a compressed cluster subclusters"
                    );
                    damage(what, uses.count);
                    continue;
                }
                if let Err(error) = entry.mapping(geometry, 0) {
                    let what = format!("{error}, number {index} of the table at {table:#x}");
                    damage(what, uses.count);
                    // What it refers to is not free all the same.
                    if let Some(host) = entry.host() {
                        let clusters = geometry.clusters(host..host + geometry.cluster_size());
                        visit(clusters.start..clusters.end.min(file_clusters), uses.count);
                    }
                    continue;
                }
                let clusters = entry.host_clusters(geometry);
                if clusters.end > file_clusters {
                    let what =
                        format!("L2 entry {index} of the table at {table:#x} leaves the file");
                    damage(what, uses.count);
                }
                visit(clusters.start..clusters.end.min(file_clusters), uses.count);
            }
        }
        Ok(())
    }

    /// Reads all entries of an L2 table.
    pub(super) fn read_table(&self, offset: u64) -> io::Result<Vec<L2Entry>> {
        let words = read_words(&*self.file, offset, self.geometry.cluster_size() / 8)?;
        let entries = words.chunks_exact(self.geometry.entry_words() as usize);
        Ok(entries
            .map(|words| L2Entry {
                word: words[0],
                bitmap: words.get(1).copied().unwrap_or(0),
            })
            .collect())
    }
}

impl References {
    /// Where the active L1 table is, and how many entries it has.
    pub fn active_l1(&self) -> (u64, u64) {
        (self.header.l1_offset, self.header.l1_size.into())
    }
}
