//! Which clusters of the file hold metadata, so that nothing else is ever written to them.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

/// What a cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    Snapshots,
    SnapshotL1,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Header => "the header",
            Kind::L1 => "the L1 table",
            Kind::L2 => "an L2 table",
            Kind::RefcountTable => "the refcount table",
            Kind::RefcountBlock => "a refcount block",
            Kind::Snapshots => "the snapshot table",
            Kind::SnapshotL1 => "the L1 table of a snapshot",
        })
    }
}

/// The clusters that are known to hold metadata.
#[derive(Debug, Default)]
pub(super) struct Metadata {
    /// Number of clusters of the file. Nothing is behind them.
    pub file_clusters: u64,
    ranges: Vec<(Range<u64>, Kind)>,
    clusters: HashMap<u64, Kind>,
}

impl Metadata {
    /// Adds one cluster.
    pub fn add(&mut self, cluster: u64, kind: Kind) {
        self.clusters.insert(cluster, kind);
    }

    /// Removes one cluster.
    pub fn remove(&mut self, cluster: u64) {
        self.clusters.remove(&cluster);
    }

    /// Adds a run of clusters.
    pub fn add_range(&mut self, clusters: Range<u64>, kind: Kind) {
        if !clusters.is_empty() {
            self.ranges.push((clusters, kind));
        }
    }

    /// Replaces all runs of a kind by `clusters`.
    pub fn replace(&mut self, kind: Kind, clusters: Range<u64>) {
        self.ranges.retain(|(_, other)| *other != kind);
        self.add_range(clusters, kind);
    }

    /// Returns what one of `clusters` holds, if it is metadata.
    pub fn find(&self, clusters: Range<u64>) -> Option<Kind> {
        let overlaps =
            |range: &Range<u64>| range.start < clusters.end && clusters.start < range.end;
        if let Some((_, kind)) = self.ranges.iter().find(|(range, _)| overlaps(range)) {
            return Some(*kind);
        }
        if clusters.end.saturating_sub(clusters.start) > self.clusters.len() as u64 {
            let found = self
                .clusters
                .iter()
                .find(|(cluster, _)| clusters.contains(cluster));
            return found.map(|(_, kind)| *kind);
        }
        clusters
            .into_iter()
            .find_map(|cluster| self.clusters.get(&cluster).copied())
    }
}
