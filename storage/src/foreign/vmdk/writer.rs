//! Writes a VMDK image that is one sparse extent (monolithicSparse).

use std::io;
use std::sync::Arc;

use super::SECTOR;
use super::sparse::{HAS_LINE_ENDS, LINE_ENDS, MAGIC, USE_REDUNDANT_DIRECTORY};
use crate::ImageFile;
use crate::foreign::allocator::{Allocator, Arrangement, NOWHERE, put, write_table};
use crate::foreign::new_image::NewImage;
use crate::foreign::random_id;

pub const GRAIN: u64 = 64 << 10;
pub const GRAINS_OF_TABLE: u64 = 512;
/// A table takes 4 sectors.
const TABLE_SECTORS: u64 = GRAINS_OF_TABLE * 4 / SECTOR;
/// The descriptor follows the header and has room to be edited.
pub const DESCRIPTOR_SECTORS: u64 = 20;
/// Sectors are counted with 32 bits.
const MAX_FILE: u64 = (1 << 32) * SECTOR;

/// The controller that a descriptor names for its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adapter {
    /// IDE.
    Ide,
    /// SCSI by BusLogic.
    BusLogic,
    /// SCSI by LSI Logic.
    LsiLogic,
    /// SCSI of old versions of ESX.
    LegacyEsx,
}

impl Adapter {
    fn name(self) -> &'static str {
        match self {
            Adapter::Ide => "ide",
            Adapter::BusLogic => "buslogic",
            Adapter::LsiLogic => "lsilogic",
            Adapter::LegacyEsx => "legacyESX",
        }
    }

    /// Returns the heads and sectors of the geometry that the controller's BIOS makes.
    fn geometry(self) -> (u64, u64) {
        match self {
            Adapter::Ide => (16, 63),
            _ => (255, 63),
        }
    }
}

/// A VMDK image that is created as one sparse extent.
pub struct VmdkWriter {
    file: Arc<dyn ImageFile>,
    size: u64,
    adapter: Adapter,
    name: String,
    allocator: Allocator,
}

impl VmdkWriter {
    /// Creates an image in an empty file, whose `name` its descriptor says.
    ///
    /// # Errors
    /// If the disk is too large, or the host cannot write to the file.
    pub fn new(
        file: Arc<dyn ImageFile>,
        size: u64,
        adapter: Adapter,
        name: String,
    ) -> io::Result<VmdkWriter> {
        check_size(size)?;
        let layout = Layout::of(size);
        let arrangement = Arrangement {
            block: GRAIN,
            start: layout.start * SECTOR,
            lead: Vec::new(),
        };
        Ok(VmdkWriter {
            allocator: Allocator::new(Arc::clone(&file), size, arrangement, false)?,
            file,
            size,
            adapter,
            name,
        })
    }
}

/// Refuses a disk that an extent cannot hold.
pub fn check_size(size: u64) -> io::Result<()> {
    match size {
        size if size < MAX_FILE => Ok(()),
        _ => Err(io::ErrorKind::FileTooLarge.into()),
    }
}

/// The sectors where the parts of the file begin: a directory with its tables, the same again, the grains.
struct Layout {
    tables: u64,
    directories: [u64; 2],
    start: u64,
}

impl Layout {
    fn of(size: u64) -> Layout {
        let tables = size.div_ceil(GRAIN).div_ceil(GRAINS_OF_TABLE);
        let directory = (tables * 4).div_ceil(SECTOR);
        let first = 1 + DESCRIPTOR_SECTORS;
        let second = first + directory + tables * TABLE_SECTORS;
        let end = second + directory + tables * TABLE_SECTORS;
        Layout {
            tables,
            directories: [first, second],
            start: end.next_multiple_of(GRAIN / SECTOR),
        }
    }

    /// Returns the sector of the first table of a directory.
    fn tables_of(&self, directory: u64) -> u64 {
        directory + (self.tables * 4).div_ceil(SECTOR)
    }
}

impl NewImage for VmdkWriter {
    fn file(&self) -> &dyn ImageFile {
        &*self.file
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.allocator.write(bytes, offset)
    }

    fn write_tables(&self) -> io::Result<()> {
        let layout = Layout::of(self.size);
        let (blocks, end) = self.allocator.finish()?;
        if end > MAX_FILE {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let grain = |&place: &u32| match place {
            NOWHERE => 0,
            place => (self.allocator.offset(place) / SECTOR) as u32,
        };
        for directory in layout.directories {
            let first = layout.tables_of(directory);
            let tables = (0..layout.tables).map(|index| (first + index * TABLE_SECTORS) as u32);
            write_table(
                &*self.file,
                directory * SECTOR,
                tables.map(u32::to_le_bytes),
            )?;
            let grains = blocks.places.iter().map(grain);
            write_table(&*self.file, first * SECTOR, grains.map(u32::to_le_bytes))?;
        }
        let text = descriptor("monolithicSparse", self.size, self.adapter, &self.name)?;
        self.file.write_at(text.as_bytes(), SECTOR)?;
        let header = Header {
            version: 1,
            flags: HAS_LINE_ENDS | USE_REDUNDANT_DIRECTORY,
            size: self.size,
            directories: layout.directories,
            start: layout.start,
            compression: 0,
        };
        self.file.write_at(&header.bytes(), 0)
    }
}

/// The header of a sparse extent that has a descriptor.
pub struct Header {
    pub version: u32,
    pub flags: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Sectors of the redundant directory and of the directory.
    pub directories: [u64; 2],
    /// Sector where the grains begin.
    pub start: u64,
    pub compression: u16,
}

impl Header {
    /// Returns the bytes of the header.
    pub fn bytes(&self) -> [u8; SECTOR as usize] {
        let mut header = [0; SECTOR as usize];
        put(&mut header, 0, MAGIC);
        for (offset, number) in [
            (4, self.version),
            (8, self.flags),
            (44, GRAINS_OF_TABLE as u32),
        ] {
            put(&mut header, offset, &number.to_le_bytes());
        }
        let [redundant, directory] = self.directories;
        for (offset, number) in [
            (12, self.size / SECTOR),
            (20, GRAIN / SECTOR),
            (28, 1),
            (36, DESCRIPTOR_SECTORS),
            (48, redundant),
            (56, directory),
            (64, self.start),
        ] {
            put(&mut header, offset, &number.to_le_bytes());
        }
        put(&mut header, 73, &LINE_ENDS);
        put(&mut header, 77, &self.compression.to_le_bytes());
        header
    }
}

/// Returns the descriptor of an image that is one sparse extent.
pub fn descriptor(
    create_type: &str,
    size: u64,
    adapter: Adapter,
    name: &str,
) -> io::Result<String> {
    let [a, b, c, ..] = random_id()?;
    // All ones mean that there is no image.
    let cid = u32::from_be_bytes([0, a, b, c]);
    let sectors = size / SECTOR;
    let (heads, per_track) = adapter.geometry();
    let cylinders = (sectors / (heads * per_track)).min(65535);
    let adapter = adapter.name();
    // Line ends, quotes and the like would end the name or begin another line.
    let name: String = name
        .chars()
        .filter(|c| !c.is_control() && *c != '"')
        .take(255)
        .collect();
    Ok(format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         CID={cid:08x}\n\
         parentCID=ffffffff\n\
         createType=\"{create_type}\"\n\
         \n\
         # Extent description\n\
         RW {sectors} SPARSE \"{name}\"\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"4\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{heads}\"\n\
         ddb.geometry.sectors = \"{per_track}\"\n\
         ddb.adapterType = \"{adapter}\"\n"
    ))
}
