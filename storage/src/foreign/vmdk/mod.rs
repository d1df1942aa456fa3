//! VMDK, the format of VMware.
//!
//! The specification is VMware's "Virtual Disk Format 5.0" (2011). A descriptor, which is text, lists the
//! extents of the disk. A flat extent is a part of a file; a sparse extent has grains, found by a directory
//! of tables, and can have them compressed (streamOptimized). The descriptor is a file by itself, or in the
//! only extent, which is sparse then. Numbers are little-endian and count sectors of 512 bytes.

mod descriptor;
mod sparse;
mod stream;
mod writer;

use std::io;
use std::sync::Arc;

use super::blocks::{BlockImage, Layout, Place, SizedFile};
use super::error::damaged;
use super::{Foreign, MAX_DISK_SIZE, OpenError, OpenSibling};
use crate::ImageFile;
use descriptor::Descriptor;
use sparse::Sparse;
pub use stream::VmdkStreamWriter;
pub use writer::{Adapter, VmdkWriter};

const SECTOR: u64 = 512;
/// Sparse extents of ESX, which has two formats of its own.
const ESX_SPARSE: [&[u8]; 2] = [b"COWD", &[0xbe, 0xba, 0xfe, 0xca, 0, 0, 0, 0]];

/// What a VMDK image says of itself.
#[derive(Debug, Clone)]
pub struct VmdkDetails {
    /// The content ID.
    pub cid: u32,
    /// The content ID of the image it depends on: all ones, as there is none.
    pub parent_cid: u32,
    /// The type that its creator has given it.
    pub create_type: String,
    /// Its extents, in the order of the disk.
    pub extents: Vec<VmdkExtent>,
}

/// An extent of a VMDK image.
#[derive(Debug, Clone)]
pub struct VmdkExtent {
    /// Its size in bytes.
    pub size: u64,
    /// Number of the file that it is in; 0 is the image itself.
    pub file: usize,
    /// The type that the descriptor gives it. `None` if the extent has the descriptor.
    pub kind: Option<String>,
    /// The size of its grains in bytes, if it is sparse.
    pub grain: Option<u64>,
    /// Whether its grains are compressed.
    pub is_compressed: bool,
}

/// Whether a file that begins with `start` is a VMDK image.
pub fn probe(start: &[u8]) -> bool {
    let is_esx = |magic: &&[u8]| start.starts_with(magic);
    start.starts_with(sparse::MAGIC) || ESX_SPARSE.iter().any(is_esx) || descriptor::probe(start)
}

/// Opens a VMDK image. Its extents are opened by `open_sibling`, which gets the name of a file in the folder
/// of the image: it never has a slash, and is neither `.` nor `..`.
///
/// # Errors
/// If a file cannot be opened or read, it is not a VMDK image, or is one that depends on another.
pub fn open(
    file: Arc<dyn ImageFile>,
    open_sibling: &mut OpenSibling<'_>,
) -> Result<Foreign, OpenError> {
    let file = SizedFile::new(file)?;
    let mut start = [0; 8];
    file.file.read_at(&mut start, 0)?;
    if ESX_SPARSE.iter().any(|magic| start.starts_with(magic)) {
        return Err(OpenError::unsupported(
            "sparse extents of ESX are not supported; clone the disk with vmkfstools -i first",
        ));
    }
    if start.starts_with(sparse::MAGIC) {
        return open_monolithic(file);
    }
    let length = file.size.min(descriptor::MAX_SIZE);
    let mut text = vec![0; length as usize];
    file.file.read_at(&mut text, 0)?;
    if !descriptor::probe(&text) {
        return Err(OpenError::unsupported("it is not a VMDK image"));
    }
    if file.size > length {
        return Err(OpenError::unsupported(format!(
            "a descriptor of more than {} bytes is not supported",
            descriptor::MAX_SIZE
        )));
    }
    open_described(file, descriptor::parse(&text)?, open_sibling)
}

/// Opens an image that is one sparse extent with the descriptor in it.
fn open_monolithic(file: SizedFile) -> Result<Foreign, OpenError> {
    let sparse = Sparse::open(&file, 0)?;
    let (offset, length) = sparse.descriptor;
    let end = offset.checked_add(length);
    if length == 0 || length > descriptor::MAX_SIZE || end.is_none_or(|end| end > file.size) {
        return Err(no_descriptor());
    }
    let mut text = vec![0; length as usize];
    file.file.read_at(&mut text, offset)?;
    if !descriptor::probe(&text) {
        return Err(no_descriptor());
    }
    let descriptor = descriptor::parse(&text)?;
    let mut disk = Disk::default();
    disk.add(
        sparse.size,
        Some((0, None)),
        ExtentPlace::Sparse(Box::new(sparse)),
    )?;
    Ok(disk.finish(descriptor, vec![file], Vec::new()))
}

fn no_descriptor() -> OpenError {
    OpenError::unsupported(
        "it has no descriptor: it is one extent of a disk, whose descriptor is another file",
    )
}

/// Opens an image whose descriptor is `file`.
fn open_described(
    file: SizedFile,
    mut descriptor: Descriptor,
    open_sibling: &mut OpenSibling<'_>,
) -> Result<Foreign, OpenError> {
    let (mut files, mut siblings) = (vec![file], Vec::new());
    let mut disk = Disk::default();
    for line in std::mem::take(&mut descriptor.extents) {
        let size = sectors(line.sectors)?;
        if line.kind == "ZERO" {
            disk.add(size, None, ExtentPlace::Zeroes)?;
            continue;
        }
        let Some(name) = line.file.filter(|name| is_sibling(name)) else {
            return Err(OpenError::unsupported(format!(
                "its descriptor names an extent that is not in its folder: '{}'",
                line.kind
            )));
        };
        let opened = open_sibling(&name).and_then(SizedFile::new);
        let opened = opened.map_err(|error| OpenError::Sibling {
            name: name.clone(),
            error,
        })?;
        let number = files.len();
        let place = match line.kind.as_str() {
            "FLAT" | "VMFS" => {
                let offset = sectors(line.offset)?;
                let end = offset.checked_add(size);
                if end.is_none_or(|end| end > opened.size) {
                    return Err(OpenError::damaged(format!(
                        "its extent '{name}' is shorter than its descriptor says"
                    )));
                }
                ExtentPlace::Flat {
                    file: number,
                    offset,
                }
            }
            "SPARSE" => {
                let sparse = Sparse::open(&opened, number)?;
                if sparse.size != size {
                    return Err(OpenError::damaged(format!(
                        "its extent '{name}' does not have the size that its descriptor says"
                    )));
                }
                ExtentPlace::Sparse(Box::new(sparse))
            }
            kind => {
                return Err(OpenError::unsupported(format!(
                    "extents of the type '{kind}' are not supported, only FLAT, VMFS, SPARSE and ZERO"
                )));
            }
        };
        files.push(opened);
        siblings.push(name);
        disk.add(size, Some((number, Some(line.kind))), place)?;
    }
    if disk.extents.is_empty() {
        return Err(OpenError::damaged("its descriptor names no extents"));
    }
    Ok(disk.finish(descriptor, files, siblings))
}

/// Whether a name is one of a file in the same folder. A descriptor must not name any other: the owner of
/// the image decides what it is, and could make others copy files of the host into a disk.
fn is_sibling(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0'])
}

/// Returns the bytes of a number of sectors.
fn sectors(count: u64) -> Result<u64, OpenError> {
    count
        .checked_mul(SECTOR)
        .filter(|&size| size <= MAX_DISK_SIZE)
        .ok_or_else(|| OpenError::damaged(format!("{count} sectors are not possible")))
}

/// The extents of a disk.
#[derive(Debug, Default)]
struct Disk {
    extents: Vec<Extent>,
    details: Vec<VmdkExtent>,
}

#[derive(Debug)]
struct Extent {
    /// Where it begins on the disk.
    start: u64,
    /// Where it ends.
    end: u64,
    place: ExtentPlace,
}

#[derive(Debug)]
enum ExtentPlace {
    Zeroes,
    Flat { file: usize, offset: u64 },
    Sparse(Box<Sparse>),
}

impl Disk {
    fn size(&self) -> u64 {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    /// Adds an extent at the end of the disk, with the number of its file and its type.
    fn add(
        &mut self,
        size: u64,
        file: Option<(usize, Option<String>)>,
        place: ExtentPlace,
    ) -> Result<(), OpenError> {
        let start = self.size();
        let end = start.checked_add(size).filter(|&end| end <= MAX_DISK_SIZE);
        let end = end.ok_or_else(|| OpenError::damaged("its disk is too large"))?;
        if let Some((file, kind)) = file {
            let sparse = match &place {
                ExtentPlace::Sparse(sparse) => Some(sparse),
                _ => None,
            };
            self.details.push(VmdkExtent {
                size,
                file,
                kind,
                grain: sparse.map(|sparse| sparse.grain),
                is_compressed: sparse.is_some_and(|sparse| sparse.is_compressed),
            });
        }
        self.extents.push(Extent { start, end, place });
        Ok(())
    }

    fn finish(
        self,
        descriptor: Descriptor,
        files: Vec<SizedFile>,
        siblings: Vec<String>,
    ) -> Foreign {
        let vmdk = VmdkDetails {
            cid: descriptor.cid,
            parent_cid: descriptor.parent_cid,
            create_type: descriptor.create_type,
            extents: self.details.clone(),
        };
        Foreign {
            siblings,
            cluster_size: self.details.iter().find_map(|extent| extent.grain),
            vmdk: Some(vmdk),
            image: Arc::new(BlockImage::new(self.size(), files, self)),
        }
    }

    fn extent(&self, offset: u64) -> io::Result<&Extent> {
        let index = self.extents.partition_point(|extent| extent.end <= offset);
        let extent = self.extents.get(index);
        extent.ok_or_else(|| damaged("a place is in no extent"))
    }
}

impl Layout for Disk {
    fn place(&self, offset: u64) -> io::Result<(Place, u64)> {
        let extent = self.extent(offset)?;
        let (within, rest) = (offset - extent.start, extent.end - offset);
        match &extent.place {
            ExtentPlace::Zeroes => Ok((Place::Zeroes, rest)),
            &ExtentPlace::Flat { file, offset } => {
                let place = Place::File {
                    file,
                    offset: offset + within,
                    sparse: true,
                };
                Ok((place, rest))
            }
            ExtentPlace::Sparse(sparse) => {
                let (place, len) = sparse.place(within)?;
                Ok((place, len.min(rest)))
            }
        }
    }

    fn decompress(&self, file: usize, files: &[SizedFile], offset: u64) -> io::Result<Vec<u8>> {
        let of_file = |extent: &Extent| match &extent.place {
            ExtentPlace::Sparse(sparse) if sparse.file == file => {
                Some(sparse.decompress(&files[file], offset))
            }
            _ => None,
        };
        let grain = self.extents.iter().find_map(of_file);
        grain.unwrap_or_else(|| Err(damaged("a file has no compressed grains")))
    }
}
