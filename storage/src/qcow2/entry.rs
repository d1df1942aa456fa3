//! Entries of L1 and L2 tables.
//!
//! "Cluster mapping" and "Extended L2 Entries" of the specification.

use std::ops::Range;

/// Bits of an entry that hold an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// This is the only reference to the table or cluster, which can therefore be written in place.
const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes.
const ZERO: u64 = 1;
/// Bits of an L1 entry that are 0.
const RESERVED_L1: u64 = !(OFFSET | COPIED);
/// Bits of an L2 entry that are 0 unless the cluster is compressed.
const RESERVED_L2: u64 = !(OFFSET | COPIED | COMPRESSED | ZERO);
/// Number of subclusters of a cluster.
pub(super) const SUBCLUSTERS: u64 = 32;

/// Sizes that follow from the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Cluster size as a power of two, 9 to 21.
    pub cluster_bits: u32,
    /// Whether entries have 16 bytes, with the state of subclusters.
    pub extended: bool,
    /// Whether an entry can say that a cluster reads as zeroes.
    pub zero_flag: bool,
}

impl Geometry {
    /// Cluster size in bytes.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Number of 8-byte words of an L2 entry.
    pub fn entry_words(self) -> u64 {
        if self.extended { 2 } else { 1 }
    }

    /// Number of entries of an L2 table as a power of two.
    pub fn l2_bits(self) -> u32 {
        self.cluster_bits - if self.extended { 4 } else { 3 }
    }

    /// Number of entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    /// Number of bytes of the disk that one L2 table maps.
    pub fn l2_coverage(self) -> u64 {
        1 << self.l2_coverage_bits()
    }

    /// [`Geometry::l2_coverage`] as a power of two.
    pub fn l2_coverage_bits(self) -> u32 {
        self.l2_bits() + self.cluster_bits
    }

    /// Size in bytes of the smallest unit that can be mapped: a subcluster, or a cluster if there are none.
    pub fn unit_size(self) -> u64 {
        if self.extended {
            self.cluster_size() / SUBCLUSTERS
        } else {
            self.cluster_size()
        }
    }

    /// Returns the clusters that the bytes of `range` touch.
    pub fn clusters(self, range: Range<u64>) -> Range<u64> {
        range.start >> self.cluster_bits..range.end.div_ceil(self.cluster_size())
    }

    /// Number of L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }
}

/// An entry of an L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct L1Entry(pub u64);

impl L1Entry {
    /// Points to an L2 table that has no other reference.
    pub fn new(offset: u64) -> L1Entry {
        L1Entry(offset | COPIED)
    }

    /// Offset of the L2 table in the file, or `None` if there is none.
    pub fn table(self) -> Option<u64> {
        Some(self.0 & OFFSET).filter(|&offset| offset != 0)
    }

    /// Whether bits are set that the specification reserves.
    pub fn has_reserved_bits(self) -> bool {
        self.0 & RESERVED_L1 != 0
    }

    /// Whether the table can be written in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// The same entry with another answer to [`Self::is_copied`].
    pub fn with_copied(self, copied: bool) -> L1Entry {
        L1Entry(if copied {
            self.0 | COPIED
        } else {
            self.0 & !COPIED
        })
    }
}

/// Where the bytes of a compressed cluster are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Compressed {
    /// Offset in the file. Not aligned.
    pub offset: u64,
    /// Length in bytes, up to the end of a sector. The compressed data may end before.
    pub len: u64,
}

/// What an L2 entry says about a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mapping {
    /// The backing file holds them. They are zeroes if there is none.
    Unallocated,
    /// They read as zeroes.
    Zeroes,
    /// They begin at `host` in the file.
    Data {
        /// Offset in the file.
        host: u64,
        /// Whether they can be written there.
        in_place: bool,
    },
    /// They are part of a compressed cluster.
    Compressed(Compressed),
}

/// What is wrong with an L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadEntry {
    /// The offset is not that of a cluster.
    #[error("an L2 entry has the unaligned offset {0:#x}")]
    Unaligned(u64),
    /// Version 2 has no such clusters.
    #[error("an L2 entry of an image of version 2 marks zeroes")]
    ZeroFlag,
    /// A subcluster is allocated and zeroes, or allocated nowhere.
    #[error("an L2 entry has the impossible state of subclusters {0:#x}")]
    Subclusters(u64),
}

/// An entry of an L2 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct L2Entry {
    /// The cluster descriptor.
    pub word: u64,
    /// State of subclusters: allocated in the lower half, zeroes in the upper. 0 without subclusters.
    pub bitmap: u64,
}

impl L2Entry {
    /// Maps nothing.
    pub const UNALLOCATED: L2Entry = L2Entry { word: 0, bitmap: 0 };

    /// Maps a cluster at `host` that has no other reference. `bitmap` says which subclusters are there.
    pub fn data(host: u64, bitmap: u64) -> L2Entry {
        L2Entry {
            word: host | COPIED,
            bitmap,
        }
    }

    /// Maps a whole cluster at `host` that has no other reference.
    pub fn whole(geometry: Geometry, host: u64) -> L2Entry {
        let bitmap = match geometry.extended {
            true => u64::from(u32::MAX),
            false => 0,
        };
        L2Entry::data(host, bitmap)
    }

    /// Marks a cluster as zeroes. `host` is kept for later writes.
    pub fn zeroes(geometry: Geometry, host: Option<u64>) -> L2Entry {
        let word = host.map_or(0, |host| host | COPIED);
        if geometry.extended {
            L2Entry {
                word,
                bitmap: u64::from(u32::MAX) << 32,
            }
        } else {
            L2Entry {
                word: word | ZERO,
                bitmap: 0,
            }
        }
    }

    /// Maps a compressed cluster.
    pub fn compressed(geometry: Geometry, data: Compressed) -> L2Entry {
        let sectors = (data.offset + data.len - 1) / 512 - data.offset / 512;
        let word = COMPRESSED | data.offset | sectors << (70 - geometry.cluster_bits);
        L2Entry { word, bitmap: 0 }
    }

    /// Whether the cluster is compressed.
    pub fn is_compressed(self) -> bool {
        self.word & COMPRESSED != 0
    }

    /// Returns what the specification does not allow in the entry, although it says where the bytes are.
    pub fn flaws(self) -> impl Iterator<Item = &'static str> {
        let is_compressed = self.is_compressed();
        let flaws = [
            (
                !is_compressed && self.word & RESERVED_L2 != 0,
                "has reserved bits set",
            ),
            (
                is_compressed && self.word & COPIED != 0,
                "marks a compressed cluster as copied",
            ),
        ];
        flaws
            .into_iter()
            .filter_map(|(is_there, flaw)| is_there.then_some(flaw))
    }

    /// Whether the cluster is unallocated.
    pub fn is_unallocated(self) -> bool {
        self.word & (OFFSET | COMPRESSED | ZERO) == 0 && self.bitmap == 0
    }

    /// Where the compressed data is, if the cluster is compressed.
    pub fn compressed_data(self, geometry: Geometry) -> Option<Compressed> {
        if self.word & COMPRESSED == 0 {
            return None;
        }
        let shift = 70 - geometry.cluster_bits;
        let offset = self.word & ((1 << shift) - 1) & ((1 << 56) - 1);
        let sectors = (self.word & !(COPIED | COMPRESSED)) >> shift;
        Some(Compressed {
            offset,
            len: (sectors + 1) * 512 - offset % 512,
        })
    }

    /// Offset of the cluster in the file if there is one that is not compressed.
    pub fn host(self) -> Option<u64> {
        let host = self.word & OFFSET;
        (self.word & COMPRESSED == 0 && host != 0).then_some(host)
    }

    /// Whether the cluster in the file has no other reference.
    pub fn is_copied(self) -> bool {
        self.word & COPIED != 0 && self.host().is_some()
    }

    /// The same entry with another answer to [`Self::is_copied`].
    pub fn with_copied(self, copied: bool) -> L2Entry {
        let word = if copied {
            self.word | COPIED
        } else {
            self.word & !COPIED
        };
        L2Entry { word, ..self }
    }

    /// Returns the clusters of the file that the entry refers to.
    pub fn host_clusters(self, geometry: Geometry) -> Range<u64> {
        if let Some(data) = self.compressed_data(geometry) {
            geometry.clusters(data.offset..data.offset + data.len)
        } else if let Some(host) = self.host() {
            let cluster = host >> geometry.cluster_bits;
            cluster..cluster + 1
        } else {
            0..0
        }
    }

    /// Returns what the bytes from `within` on are, an offset in the cluster, and for how many bytes this
    /// holds.
    ///
    /// # Errors
    /// If the specification allows no such entry.
    pub fn mapping(self, geometry: Geometry, within: u64) -> Result<(Mapping, u64), BadEntry> {
        let rest = geometry.cluster_size() - within;
        if let Some(data) = self.compressed_data(geometry) {
            return Ok((Mapping::Compressed(data), rest));
        }
        let host = self.word & OFFSET;
        if host & (geometry.cluster_size() - 1) != 0 {
            return Err(BadEntry::Unaligned(host));
        }
        let data = Mapping::Data {
            host: host + within,
            in_place: self.word & COPIED != 0,
        };
        if !geometry.extended {
            if self.word & ZERO != 0 {
                let zeroes = geometry.zero_flag.then_some((Mapping::Zeroes, rest));
                return zeroes.ok_or(BadEntry::ZeroFlag);
            }
            return Ok((
                if host == 0 {
                    Mapping::Unallocated
                } else {
                    data
                },
                rest,
            ));
        }
        let allocated = self.bitmap as u32;
        let zero = (self.bitmap >> 32) as u32;
        if allocated & zero != 0 || (allocated != 0 && host == 0) {
            return Err(BadEntry::Subclusters(self.bitmap));
        }
        let unit_bits = geometry.cluster_bits - 5;
        let first = within >> unit_bits;
        let run = |bits: u32| {
            let end = first + u64::from((bits >> first).trailing_ones()).min(SUBCLUSTERS - first);
            (end << unit_bits) - within
        };
        Ok(if allocated >> first & 1 != 0 {
            (data, run(allocated))
        } else if zero >> first & 1 != 0 {
            (Mapping::Zeroes, run(zero))
        } else {
            (Mapping::Unallocated, run(!(allocated | zero)))
        })
    }
}
