//! L2 entries that wait for a sync of the data that they refer to.
//!
//! The file keeps the former entries meanwhile, so a crash shows the old bytes of such a cluster. An entry may change
//! again while it waits, even after the sync has begun that it waits for. Changes are numbered for this reason:
//! what is written after a sync is the entry as it was when the sync began.

use std::collections::BTreeMap;
use std::ops::Range;

use super::entry::L2Entry;

/// The pending entries, by their clusters of the guest.
#[derive(Debug, Default)]
pub(super) struct Pending {
    entries: BTreeMap<u64, Entry>,
    /// Number of changes so far.
    changes: u64,
}

#[derive(Debug)]
struct Entry {
    entry: L2Entry,
    /// What the file has instead. After a failed write it may have any entry that was to be written.
    stored: L2Entry,
    /// The stored entry, if its clusters become free when it is replaced.
    unused: Option<L2Entry>,
    /// Number of the first change that the file does not have.
    first_change: u64,
    /// Number of the last change.
    last_change: u64,
}

/// A pending entry as it was at some moment.
#[derive(Debug)]
pub(super) struct Waiting {
    pub cluster: u64,
    pub entry: L2Entry,
    change: u64,
}

impl Pending {
    /// Number of pending entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns all pending entries as they are now, in the order of their clusters.
    pub fn waiting(&self) -> Vec<Waiting> {
        let waiting = self.entries.iter().map(|(&cluster, entry)| Waiting {
            cluster,
            entry: entry.entry,
            change: entry.last_change,
        });
        waiting.collect()
    }

    /// Returns the pending entries of `clusters`.
    pub fn range(&self, clusters: Range<u64>) -> impl Iterator<Item = (u64, L2Entry)> {
        let entries = self.entries.range(clusters);
        entries.map(|(&cluster, entry)| (cluster, entry.entry))
    }

    /// Returns what the file has instead of the pending entry of `cluster`, if there is one.
    pub fn stored(&self, cluster: u64) -> Option<L2Entry> {
        Some(self.entries.get(&cluster)?.stored)
    }

    /// Adds an entry, or changes one that refers to the same cluster of the file. `unused` is the entry `old` if
    /// its clusters become free when the file has the new one.
    pub fn defer(&mut self, cluster: u64, old: L2Entry, new: L2Entry, unused: Option<L2Entry>) {
        self.changes += 1;
        let change = self.changes;
        let entry = self.entries.entry(cluster).or_insert(Entry {
            entry: new,
            stored: old,
            unused,
            first_change: change,
            last_change: change,
        });
        entry.entry = new;
        entry.last_change = change;
    }

    /// Drops the pending entry of `cluster` because the file has another one now. Returns the former entry whose
    /// clusters this frees.
    pub fn cancel(&mut self, cluster: u64) -> Option<L2Entry> {
        self.entries.remove(&cluster)?.unused
    }

    /// Whether the file has neither this entry nor a later one.
    pub fn is_due(&self, waiting: &Waiting) -> bool {
        let entry = self.entries.get(&waiting.cluster);
        entry.is_some_and(|entry| entry.first_change <= waiting.change)
    }

    /// Notes that the file has an entry that was due. Returns the former entry whose clusters this frees.
    pub fn settle(&mut self, waiting: &Waiting) -> Option<L2Entry> {
        let entry = self.entries.get_mut(&waiting.cluster)?;
        if entry.last_change == waiting.change {
            return self.cancel(waiting.cluster);
        }
        entry.stored = waiting.entry;
        entry.first_change = waiting.change + 1;
        entry.unused.take()
    }
}
