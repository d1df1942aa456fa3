//! Checks of an image, and repairs.
//!
//! All references to clusters are counted and compared with the refcounts. This happens for one window of the file
//! at a time, so that memory is bounded. Findings are counted as `qemu-img check` counts them.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::entry::L1Entry;
use super::error::Error;
use super::header::{Field, Header, incompatible};
use super::locks::{ALL, lock};
use super::refcounts::WRITE;
use super::tables::{L1, read_words, to_bytes};
use super::walk::References;
use super::{Options, Qcow2};
use crate::ImageFile;

/// Number of clusters that are counted at a time.
const WINDOW: u64 = 1 << 22;
/// Maximum number of findings in words.
const MAX_FINDINGS: usize = 100;

/// What a check changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Repair {
    /// Nothing.
    Nothing,
    /// Clusters that have a refcount and no reference become free.
    Leaks,
    /// Refcounts, and the flags for clusters with one reference, are made right.
    All,
}

/// What a check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Things that are wrong and were not repaired. Writing to the image could destroy data.
    pub corruptions: u64,
    /// Clusters whose refcount is too high, and was not repaired.
    pub leaks: u64,
    /// Things that were wrong and are repaired.
    pub corruptions_fixed: u64,
    /// Clusters whose refcount was too high, and is repaired.
    pub leaks_fixed: u64,
    /// Descriptions of the first 100 findings at most.
    pub findings: Vec<String>,
}

impl Report {
    fn find(&mut self, finding: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding());
        }
    }

    /// Adds a finding that leaves room for worse ones.
    fn find_leak(&mut self, finding: impl FnOnce() -> String) {
        if self.findings.len() < MAX_FINDINGS / 2 {
            self.findings.push(finding());
        }
    }
}

impl Qcow2 {
    /// Checks the image in `file`, which must not be open elsewhere. Its backing file is not needed.
    ///
    /// # Errors
    /// If the header cannot be understood, or the host cannot read or write the file.
    pub fn check(file: Arc<dyn ImageFile>, repair: Repair) -> Result<Report, Error> {
        let header = Header::read(&*file)?;
        let options = Options {
            read_only: repair == Repair::Nothing,
            cache_bytes: 0,
            ..Options::default()
        };
        let image = Qcow2::assemble(file, header, options)?;
        if !image.read_only {
            image.find_metadata()?;
        }
        image
            .check_unlocked(repair)
            .map_err(Error::io("check the image"))
    }

    /// Checks the image while it is open. The reserve is given back first, so it does not count as leaked.
    ///
    /// # Errors
    /// If the host cannot read or write the file.
    pub fn check_open(&self) -> Result<Report, Error> {
        let _layout = lock(&self.layout);
        let _guard = self.ranges.exclusive(ALL);
        let given_back = if self.check_writable().is_ok() {
            self.sync_and_release()
                .and_then(|()| lock(&self.allocator).give_back())
        } else {
            Ok(())
        };
        given_back
            .and_then(|()| self.check_unlocked(Repair::Nothing))
            .map_err(Error::io("check the image"))
    }

    /// Checks the image for a caller that has exclusive use of it.
    pub(super) fn check_unlocked(&self, repair: Repair) -> io::Result<Report> {
        if repair != Repair::Nothing {
            self.gate.sync()?;
        }
        let mut report = Report::default();
        let references = self.find_references()?;
        for damage in references.damage.iter().chain(&references.flaws) {
            report.corruptions += 1;
            report.find(|| damage.clone());
        }
        let missing = self.compare_refcounts(&references, repair, &mut report)?;
        if repair == Repair::All && !missing.is_empty() {
            self.add_missing_blocks(&missing)?;
            // Its findings were reported before.
            let mut rest = Report::default();
            self.compare_refcounts(&self.find_references()?, repair, &mut rest)?;
        }
        if repair != Repair::Nothing {
            self.gate.sync()?;
        }
        self.compare_copied(&references, repair, &mut report)?;
        if repair == Repair::All {
            let (offset, entries) = references.active_l1();
            self.tables
                .replace_l1(L1::read(&*self.file, offset, entries)?);
            lock(&self.allocator).give_back()?;
            self.gate.sync()?;
            let wrong = incompatible::DIRTY | incompatible::CORRUPT;
            let features = self.header().incompatible;
            if report.corruptions == 0 && features & wrong != 0 {
                let features = features & !wrong;
                let field = Field::Incompatible(features);
                self.write_header(field, |header| header.incompatible = features)?;
                self.gate.sync()?;
            }
        }
        Ok(report)
    }

    /// Compares refcounts with the references, and makes them right. Returns which blocks are missing.
    fn compare_refcounts(
        &self,
        references: &References,
        repair: Repair,
        report: &mut Report,
    ) -> io::Result<BTreeSet<u64>> {
        let (file_clusters, per_block) = {
            let allocator = lock(&self.allocator);
            let file_clusters = allocator.file_size().div_ceil(self.geometry.cluster_size());
            (file_clusters, allocator.refcounts.per_block())
        };
        let mut missing = BTreeSet::new();
        let mut start = 0;
        while start < file_clusters {
            let window = start..file_clusters.min(start + WINDOW);
            let mut counts = vec![0u32; (window.end - window.start) as usize];
            let visit = |clusters: Range<u64>, count: u32| {
                for cluster in clusters.start.max(window.start)..clusters.end.min(window.end) {
                    let place = &mut counts[(cluster - window.start) as usize];
                    *place = place.saturating_add(count);
                }
            };
            let is_first = start == 0;
            self.visit_references(references, visit, |damage, count| {
                if is_first {
                    report.corruptions += u64::from(count);
                    report.find(|| damage);
                }
            })?;
            let mut allocator = lock(&self.allocator);
            let mut next = window.start;
            while next < window.end {
                let index = next / per_block;
                let end = window.end.min((index + 1) * per_block);
                let counts = &counts[(next - window.start) as usize..(end - window.start) as usize];
                // A damaged entry of the table is among the findings already.
                let has_block = matches!(allocator.refcounts.block_offset(index), Ok(Some(offset))
                    if offset >> self.geometry.cluster_bits < file_clusters);
                for (cluster, &count) in (next..end).zip(counts) {
                    let count = u64::from(count);
                    let stored = if has_block {
                        allocator.refcounts.get(cluster)?
                    } else {
                        0
                    };
                    if stored == count {
                        continue;
                    }
                    let is_leak = stored > count;
                    let wanted = if is_leak { Repair::Leaks } else { Repair::All };
                    let mut is_fixed = repair >= wanted && count <= allocator.refcounts.max();
                    // Clusters to which an unreadable table refers seem to be unused.
                    is_fixed &= references.damage.is_empty() || (has_block && !is_leak);
                    if is_fixed && has_block {
                        allocator.refcounts.set(cluster..cluster + 1, count)?;
                    } else if is_fixed {
                        missing.insert(index);
                    }
                    *match (is_leak, is_fixed) {
                        (true, false) => &mut report.leaks,
                        (true, true) => &mut report.leaks_fixed,
                        (false, false) => &mut report.corruptions,
                        (false, true) => &mut report.corruptions_fixed,
                    } += 1;
                    let finding = || {
                        format!("cluster {cluster:#x} has refcount {stored} and {count} references")
                    };
                    if is_leak {
                        report.find_leak(finding);
                    } else {
                        report.find(finding);
                    }
                }
                next = end;
            }
            allocator.refcounts.write_back()?;
            start = window.end;
        }
        Ok(missing)
    }

    /// Makes refcount blocks that count nothing. Refcounts of other blocks are right already.
    fn add_missing_blocks(&self, missing: &BTreeSet<u64>) -> io::Result<()> {
        let mut allocator = lock(&self.allocator);
        for &index in missing {
            // It was created if a cluster at the end of the file was taken.
            if allocator.refcounts.block_offset(index)?.is_some() {
                continue;
            }
            let taken = allocator.take(1)?;
            let offset = taken.start << self.geometry.cluster_bits;
            if allocator.refcounts.block_offset(index)?.is_some() {
                allocator.free(taken);
                continue;
            }
            allocator
                .refcounts
                .write_block(index, offset, &(0..0), WRITE)?;
            self.gate.sync()?;
            allocator.refcounts.add_block(index, offset, WRITE)?;
        }
        self.gate.sync()?;
        let freed = allocator.take_freed();
        allocator.release(freed)
    }

    /// Compares the flags for tables and clusters with one reference (`COPIED`) with the refcounts.
    pub(super) fn compare_copied(
        &self,
        references: &References,
        repair: Repair,
        report: &mut Report,
    ) -> io::Result<()> {
        let cluster_bits = self.geometry.cluster_bits;
        let (l1_offset, entries) = references.active_l1();
        let mut allocator = lock(&self.allocator);
        let note = |report: &mut Report, what: &str, offset: u64| {
            *if repair == Repair::All {
                &mut report.corruptions_fixed
            } else {
                &mut report.corruptions
            } += 1;
            report.find(|| format!("{what} at {offset:#x} is marked wrongly as copied or not"));
        };
        for (index, word) in (0..).zip(read_words(&*self.file, l1_offset, entries)?) {
            let entry = L1Entry(word);
            let Some(table) = entry.table() else {
                continue;
            };
            if !references.l2.contains_key(&table) {
                continue;
            }
            let is_single = allocator.refcounts.get(table >> cluster_bits)? == 1;
            if is_single != entry.is_copied() {
                note(report, "the L2 table", table);
                if repair == Repair::All {
                    let entry = entry.with_copied(is_single);
                    self.file
                        .write_at(&entry.0.to_be_bytes(), l1_offset + index * 8)?;
                }
            }
        }
        for (&table, _) in references.l2.iter().filter(|(_, uses)| uses.is_active) {
            let mut words = Vec::new();
            let mut is_changed = false;
            for mut entry in self.read_table(table)? {
                if let Some(host) = entry.host()
                    && entry.mapping(self.geometry, 0).is_ok()
                {
                    let is_single = allocator.refcounts.get(host >> cluster_bits)? == 1;
                    if is_single != entry.is_copied() {
                        note(report, "the cluster", host);
                        entry = entry.with_copied(is_single);
                        is_changed = true;
                    }
                }
                words.push(entry.word);
                if self.geometry.extended {
                    words.push(entry.bitmap);
                }
            }
            if is_changed && repair == Repair::All {
                self.file.write_at(&to_bytes(&words), table)?;
            }
        }
        Ok(())
    }
}
