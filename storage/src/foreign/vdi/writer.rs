//! Writes a VDI image.

use std::io;
use std::sync::Arc;

use super::{DYNAMIC, FREE, SECTOR, SIGNATURE, SIGNATURE_OFFSET, STATIC, VERSION};
use crate::ImageFile;
use crate::foreign::allocator::{Allocator, Arrangement, NOWHERE, put, write_table};
use crate::foreign::new_image::NewImage;
use crate::foreign::random_id;

const TEXT: &[u8] = b"<<< Oracle VM VirtualBox Disk Image >>>\n";
const BLOCK: u64 = 1 << 20;
/// From the field with this number on to the end of the header.
const HEADER_SIZE: u32 = 0x180;
const MAP: u64 = SECTOR;

/// A VDI image that is created.
pub struct VdiWriter {
    file: Arc<dyn ImageFile>,
    size: u64,
    is_static: bool,
    start: u64,
    allocator: Allocator,
}

impl VdiWriter {
    /// Creates an image in an empty file.
    ///
    /// # Errors
    /// If the disk is too large, or the host cannot write to the file.
    pub fn new(file: Arc<dyn ImageFile>, size: u64, is_static: bool) -> io::Result<VdiWriter> {
        let start = (MAP + size.div_ceil(BLOCK) * 4).next_multiple_of(SECTOR);
        let arrangement = Arrangement {
            block: BLOCK,
            start,
            lead: Vec::new(),
        };
        Ok(VdiWriter {
            allocator: Allocator::new(Arc::clone(&file), size, arrangement, is_static)?,
            file,
            size,
            is_static,
            start,
        })
    }

    fn header(&self, blocks: usize, allocated: u32) -> io::Result<Vec<u8>> {
        let mut header = vec![0; SECTOR as usize];
        let image_type = if self.is_static { STATIC } else { DYNAMIC };
        put(&mut header, 0, TEXT);
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        for (offset, number) in [
            (SIGNATURE_OFFSET, SIGNATURE),
            (0x44, VERSION),
            (0x48, HEADER_SIZE),
            (0x4c, image_type),
            (0x154, MAP as u32),
            (0x158, u32::try_from(self.start).map_err(too_large)?),
            (0x168, SECTOR as u32),
            (0x178, BLOCK as u32),
            (0x180, blocks as u32),
            (0x184, allocated),
        ] {
            put(&mut header, offset, &number.to_le_bytes());
        }
        put(&mut header, 0x170, &self.size.to_le_bytes());
        put(&mut header, 0x188, &random_id()?);
        put(&mut header, 0x198, &random_id()?);
        Ok(header)
    }
}

impl NewImage for VdiWriter {
    fn file(&self) -> &dyn ImageFile {
        &*self.file
    }

    fn write_data(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.allocator.write(bytes, offset)
    }

    fn write_tables(&self) -> io::Result<()> {
        let (blocks, _) = self.allocator.finish()?;
        let header = self.header(blocks.places.len(), blocks.count)?;
        let entry = |&place: &u32| if place == NOWHERE { FREE } else { place };
        let entries = blocks.places.iter().map(|place| entry(place).to_le_bytes());
        write_table(&*self.file, MAP, entries)?;
        self.file.write_at(&header, 0)
    }
}
