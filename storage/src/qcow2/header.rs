//! The header of an image and its extensions, as bytes.
//!
//! "Header" and "Header extensions" of the specification. The header of an existing image is never written as a
//! whole, but field by field ([`Field`]), so unknown fields and extensions stay as they are.

use super::entry::Geometry;
use super::error::Error;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Length of a header of version 2.
pub(super) const LENGTH_2: usize = 72;
/// Length of the part of a header of version 3 that is always there.
const LENGTH_3: usize = 104;
/// Length of the header that is written here, with the compression type.
pub(super) const LENGTH: usize = 112;
/// Maximum length of the name of a backing file in bytes.
pub(super) const MAX_BACKING_NAME: u32 = 1023;
/// Maximum size of an L1 table in bytes. The limit is QEMU's too.
pub(super) const MAX_L1_BYTES: u64 = 32 << 20;
/// Maximum size of a refcount table in bytes. The limit is QEMU's too.
pub(super) const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Maximum number of snapshots of an image. The limit is QEMU's too.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;

pub(super) const EXTENSION_END: u32 = 0;
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
pub(super) const EXTENSION_FEATURES: u32 = 0x6803_f857;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

/// Incompatible features.
pub(super) mod incompatible {
    pub const DIRTY: u64 = 1 << 0;
    pub const CORRUPT: u64 = 1 << 1;
    pub const EXTERNAL_DATA: u64 = 1 << 2;
    pub const COMPRESSION: u64 = 1 << 3;
    pub const EXTENDED_L2: u64 = 1 << 4;
    pub const SUPPORTED: u64 = DIRTY | CORRUPT | COMPRESSION | EXTENDED_L2;
}

/// Compatible feature: refcounts may be written late.
pub(super) const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature: bitmaps are consistent with the disk.
pub(super) const BITMAPS: u64 = 1 << 0;

/// Names of features for the table in the header: kind, bit and name.
const FEATURE_NAMES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Deflate, which all readers know.
    #[default]
    Zlib,
    /// Zstandard, which is faster and needs version 3.
    Zstd,
}

/// The name of a backing file as an image has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Path, absolute or relative to the folder of the image.
    pub name: String,
    /// Format, as `raw` or `qcow2`. `None` if the image does not say it.
    pub format: Option<String>,
}

/// Where the bitmaps of an image are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BitmapDirectory {
    pub count: u32,
    pub offset: u64,
    pub size: u64,
}

/// A place of the header that is written on its own. No field crosses a sector, so a crash leaves either
/// value.
#[derive(Debug, Clone, Copy)]
pub(super) enum Field {
    /// Disk size and active L1 table, which change together.
    Active {
        size: u64,
        crypt_method: u32,
        l1_size: u32,
        l1_offset: u64,
    },
    /// Refcount table.
    RefcountTable { offset: u64, clusters: u32 },
    /// Snapshot table.
    Snapshots { count: u32, offset: u64 },
    /// Incompatible features.
    Incompatible(u64),
    /// Autoclear features.
    Autoclear(u64),
}

impl Field {
    /// Returns where the field is, and its bytes.
    pub fn bytes(self) -> (u64, Vec<u8>) {
        let mut bytes = Vec::with_capacity(24);
        let offset = match self {
            Field::Active {
                size,
                crypt_method,
                l1_size,
                l1_offset,
            } => {
                bytes.extend_from_slice(&size.to_be_bytes());
                bytes.extend_from_slice(&crypt_method.to_be_bytes());
                bytes.extend_from_slice(&l1_size.to_be_bytes());
                bytes.extend_from_slice(&l1_offset.to_be_bytes());
                24
            }
            Field::RefcountTable { offset, clusters } => {
                bytes.extend_from_slice(&offset.to_be_bytes());
                bytes.extend_from_slice(&clusters.to_be_bytes());
                48
            }
            Field::Snapshots { count, offset } => {
                bytes.extend_from_slice(&count.to_be_bytes());
                bytes.extend_from_slice(&offset.to_be_bytes());
                60
            }
            Field::Incompatible(features) => {
                bytes.extend_from_slice(&features.to_be_bytes());
                72
            }
            Field::Autoclear(features) => {
                bytes.extend_from_slice(&features.to_be_bytes());
                88
            }
        };
        (offset, bytes)
    }
}

/// The header of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_size: u32,
    pub(super) l1_offset: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    pub(super) refcount_order: u32,
    pub(super) compression: Compression,
    pub(super) backing: Option<BackingName>,
    pub(super) bitmaps: Option<BitmapDirectory>,
}

impl Header {
    /// Reads the header from the first cluster of a file, or from all of a file that is shorter.
    ///
    /// # Errors
    /// If it is not the header of an image that is supported.
    pub fn parse(bytes: &[u8]) -> Result<Header, Error> {
        let damaged = |what: &str| Error::Damaged(what.to_owned());
        if bytes.len() < LENGTH_2 || bytes[..4] != MAGIC {
            return Err(Error::Magic);
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(Error::Version(version));
        }
        if version == 3 && bytes.len() < LENGTH_3 {
            return Err(damaged("its header is cut off"));
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(
                "its cluster size is not between 512 bytes and 2 MiB",
            ));
        }
        let cluster_size = 1usize << cluster_bits;
        let cluster = &bytes[..bytes.len().min(cluster_size)];
        let of_version_3 = |offset| if version == 3 { be64(bytes, offset) } else { 0 };
        let (length, refcount_order) = if version == 3 {
            (be32(bytes, 100) as usize, be32(bytes, 96))
        } else {
            (LENGTH_2, 4)
        };
        let least = if version == 3 { LENGTH_3 } else { LENGTH_2 };
        if length < least || length > cluster.len() || !length.is_multiple_of(8) {
            return Err(damaged("the length of its header is wrong"));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible: of_version_3(72),
            compatible: of_version_3(80),
            autoclear: of_version_3(88),
            refcount_order,
            compression: Compression::Zlib,
            backing: None,
            bitmaps: None,
        };

        let backing_offset = be64(bytes, 8);
        let extensions_end = match backing_offset {
            0 => cluster.len(),
            offset => usize::try_from(offset)
                .unwrap_or(usize::MAX)
                .min(cluster.len()),
        };
        let extensions =
            Extensions::parse(cluster.get(length..extensions_end).unwrap_or_default())?;
        header.bitmaps = extensions.bitmaps;
        header.check_features(extensions.feature_names)?;
        match be32(bytes, 32) {
            0 => {}
            1 => return Err(Error::Feature("AES encryption".to_owned())),
            2 => return Err(Error::Feature("LUKS encryption".to_owned())),
            _ => return Err(Error::Feature("unknown encryption".to_owned())),
        }
        let compression = if length > LENGTH_3 {
            bytes[LENGTH_3]
        } else {
            0
        };
        header.compression = match (header.incompatible & incompatible::COMPRESSION, compression) {
            (0, 0) => Compression::Zlib,
            (1.., 1) => Compression::Zstd,
            (1.., 2..) => return Err(Error::Feature(format!("compression type {compression}"))),
            _ => return Err(damaged("its compression type contradicts its features")),
        };

        if backing_offset != 0 {
            let name_length = be32(bytes, 16);
            if name_length > MAX_BACKING_NAME {
                return Err(damaged("the name of its backing file is too long"));
            }
            let name = usize::try_from(backing_offset)
                .ok()
                .and_then(|start| cluster.get(start..start.checked_add(name_length as usize)?))
                .ok_or_else(|| damaged("the name of its backing file is not in its header"))?;
            if !name.is_empty() {
                header.backing = Some(BackingName {
                    name: string(name, "the name of its backing file")?,
                    format: extensions.backing_format,
                });
            }
        }
        header.check_tables()?;
        Ok(header)
    }

    /// Refuses features that are not supported, by their names.
    fn check_features(&self, names: &[u8]) -> Result<(), Error> {
        let unknown = self.incompatible & !incompatible::SUPPORTED;
        if unknown == 0 {
            return Ok(());
        }
        let bit = unknown.trailing_zeros() as u8;
        if unknown & incompatible::EXTERNAL_DATA != 0 {
            return Err(Error::Feature("external data file".to_owned()));
        }
        let (entries, _) = names.as_chunks::<48>();
        let name = entries
            .iter()
            .find(|entry| entry[0] == 0 && entry[1] == bit)
            .map(|entry| {
                let name = entry[2..]
                    .split(|&byte| byte == 0)
                    .next()
                    .unwrap_or_default();
                let name = String::from_utf8_lossy(name);
                name.chars().filter(|c| !c.is_control()).collect::<String>()
            });
        Err(Error::Feature(
            name.unwrap_or_else(|| format!("incompatible feature {bit}")),
        ))
    }

    /// Refuses sizes and places of tables that are not possible.
    fn check_tables(&self) -> Result<(), Error> {
        let damaged = |what: &str| Err(Error::Damaged(what.to_owned()));
        let geometry = self.geometry();
        let cluster_size = geometry.cluster_size();
        let is_outside = |offset: u64, bytes: u64| {
            offset == 0
                || !offset.is_multiple_of(cluster_size)
                || offset.checked_add(bytes).is_none_or(|end| end > 1 << 56)
        };
        if geometry.extended && self.cluster_bits < 14 {
            return damaged("its clusters are too small for subclusters");
        }
        if self.refcount_order > 6 {
            return damaged("its refcounts have more than 64 bits");
        }
        // An offset of the guest is added to and rounded up everywhere.
        if self.size > 1 << 62 {
            return damaged("its disk is too large");
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > MAX_L1_BYTES {
            return damaged("its L1 table is larger than 32 MiB");
        }
        if u64::from(self.l1_size) < geometry.l1_entries(self.size) {
            return damaged("its L1 table is too small for its disk");
        }
        if l1_bytes != 0 && is_outside(self.l1_offset, l1_bytes) {
            return damaged("the place of its L1 table is wrong");
        }
        let table_bytes = u64::from(self.refcount_table_clusters) * cluster_size;
        if table_bytes == 0 || table_bytes > MAX_REFCOUNT_TABLE_BYTES {
            return damaged("its refcount table is empty or larger than 8 MiB");
        }
        if is_outside(self.refcount_table_offset, table_bytes) {
            return damaged("the place of its refcount table is wrong");
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return damaged("it has more than 65536 snapshots");
        }
        if self.snapshots > 0 && is_outside(self.snapshots_offset, 0) {
            return damaged("the place of its snapshot table is wrong");
        }
        Ok(())
    }

    /// Returns the bytes of a new image's header, with its extensions and the name of its backing file.
    ///
    /// # Errors
    /// If they do not fit into a cluster.
    pub(super) fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let length = if self.version == 2 { LENGTH_2 } else { LENGTH };
        let mut bytes = vec![0; length];
        bytes[..4].copy_from_slice(&MAGIC);
        let mut put = |offset: usize, value: &[u8]| {
            if let Some(place) = bytes.get_mut(offset..offset + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(4, &self.version.to_be_bytes());
        put(20, &self.cluster_bits.to_be_bytes());
        for field in [
            Field::Active {
                size: self.size,
                crypt_method: 0,
                l1_size: self.l1_size,
                l1_offset: self.l1_offset,
            },
            Field::RefcountTable {
                offset: self.refcount_table_offset,
                clusters: self.refcount_table_clusters,
            },
            Field::Snapshots {
                count: self.snapshots,
                offset: self.snapshots_offset,
            },
            Field::Incompatible(self.incompatible),
            Field::Autoclear(self.autoclear),
        ] {
            let (offset, value) = field.bytes();
            put(offset as usize, &value);
        }
        put(80, &self.compatible.to_be_bytes());
        put(96, &self.refcount_order.to_be_bytes());
        put(100, &(LENGTH as u32).to_be_bytes());
        put(104, &[u8::from(self.compression == Compression::Zstd)]);
        if let Some(format) = self
            .backing
            .as_ref()
            .and_then(|backing| backing.format.as_ref())
        {
            put_extension(&mut bytes, EXTENSION_BACKING_FORMAT, format.as_bytes());
        }
        // The table is for readers that do not know a feature, which a small cluster has no room for.
        if self.version == 3 && self.cluster_bits > 10 {
            let mut names = Vec::new();
            for (kind, bit, name) in FEATURE_NAMES {
                let mut entry = [0; 48];
                entry[0] = kind;
                entry[1] = bit;
                entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
                names.extend_from_slice(&entry);
            }
            put_extension(&mut bytes, EXTENSION_FEATURES, &names);
        }
        put_extension(&mut bytes, EXTENSION_END, &[]);
        if let Some(backing) = &self.backing {
            let name = backing.name.as_bytes();
            let offset = bytes.len() as u64;
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend_from_slice(name);
            if name.len() > MAX_BACKING_NAME as usize || name.contains(&0) {
                return Err(Error::Option(
                    "the name of the backing file is too long".to_owned(),
                ));
            }
        }
        if bytes.len() > 1 << self.cluster_bits {
            return Err(Error::Option(
                "the name of the backing file does not fit into the first cluster".to_owned(),
            ));
        }
        Ok(bytes)
    }

    /// Disk size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Version of the format, 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Width of a refcount in bits.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// How clusters are compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Whether clusters have subclusters.
    pub fn has_subclusters(&self) -> bool {
        self.incompatible & incompatible::EXTENDED_L2 != 0
    }

    /// Whether refcounts may be written late.
    pub fn has_lazy_refcounts(&self) -> bool {
        self.compatible & LAZY_REFCOUNTS != 0
    }

    /// Whether refcounts may be wrong, as a writer has not closed the image.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & incompatible::DIRTY != 0
    }

    /// Whether the image has been found damaged.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & incompatible::CORRUPT != 0
    }

    /// Whether the image has bitmaps.
    pub fn has_bitmaps(&self) -> bool {
        self.bitmaps.is_some()
    }

    /// The backing file, if there is one.
    pub fn backing(&self) -> Option<&BackingName> {
        self.backing.as_ref()
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            extended: self.has_subclusters(),
            zero_flag: self.version >= 3,
        }
    }
}

/// What is known of the extensions of a header.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<String>,
    feature_names: &'a [u8],
    bitmaps: Option<BitmapDirectory>,
}

impl<'a> Extensions<'a> {
    fn parse(mut bytes: &'a [u8]) -> Result<Extensions<'a>, Error> {
        let damaged = |what: &str| Error::Damaged(what.to_owned());
        let mut extensions = Extensions::default();
        while let Some((head, rest)) = bytes.split_first_chunk::<8>() {
            let (kind, length) = (be32(head, 0), be32(head, 4) as usize);
            if kind == EXTENSION_END {
                break;
            }
            let data = rest
                .get(..length)
                .ok_or_else(|| damaged("a header extension is cut off"))?;
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    extensions.backing_format =
                        Some(string(data, "the format of its backing file")?);
                }
                EXTENSION_FEATURES => extensions.feature_names = data,
                EXTENSION_BITMAPS if length == 24 => {
                    extensions.bitmaps = Some(BitmapDirectory {
                        count: be32(data, 0),
                        size: be64(data, 8),
                        offset: be64(data, 16),
                    });
                }
                EXTENSION_BITMAPS => {
                    return Err(damaged("its bitmaps extension has a wrong length"));
                }
                _ => {}
            }
            bytes = rest.get(length.next_multiple_of(8)..).unwrap_or_default();
        }
        Ok(extensions)
    }
}

pub(super) fn put_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

/// Returns `bytes` as a string that can be shown, and given to the host as part of a path.
fn string(bytes: &[u8], what: &str) -> Result<String, Error> {
    match std::str::from_utf8(bytes) {
        Ok(string) if !string.contains('\0') => Ok(string.to_owned()),
        _ => Err(Error::Damaged(format!("{what} is not text"))),
    }
}

/// Reads 4 bytes. `bytes` has them.
pub(super) fn be32(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..]
        .first_chunk()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

/// Reads 8 bytes. `bytes` has them.
pub(super) fn be64(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
