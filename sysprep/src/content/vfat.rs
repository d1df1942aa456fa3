//! FAT: the serial number is in the boot sector, and in its copy on FAT32. Layout: Microsoft's FAT specification (fatgen103),
//! section 3.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Identity, field, read_at, text_of, u16_at};

const SECTOR: usize = 512;

/// Where the extended part of a boot sector begins with its drive number.
#[derive(Clone, Copy)]
enum Layout {
    Fat32,
    Other,
}

impl Layout {
    fn of(sector: &[u8]) -> Option<Layout> {
        let size = u16_at(sector, 11);
        let is_sector =
            matches!(size, 512 | 1024 | 2048 | 4096) && sector[510..512] == [0x55, 0xaa];
        if !is_sector {
            None
        } else if sector[82..].starts_with(b"FAT32   ") {
            Some(Layout::Fat32)
        } else if [&b"FAT12   "[..], b"FAT16   ", b"FAT     "]
            .iter()
            .any(|name| sector[54..].starts_with(name))
        {
            Some(Layout::Other)
        } else {
            None
        }
    }

    /// The place of the extended boot signature, which says that a serial number and a label follow.
    fn signature(self) -> usize {
        match self {
            Layout::Fat32 => 66,
            Layout::Other => 38,
        }
    }
}

pub(super) fn is_vfat(sector: &[u8]) -> bool {
    Layout::of(sector).is_some()
}

/// Writes a serial number as blkid does.
pub(super) fn text(serial: [u8; 4]) -> String {
    let [a, b, c, d] = serial;
    format!("{d:02X}{c:02X}-{b:02X}{a:02X}")
}

pub(super) fn label(device: &File) -> io::Result<String> {
    let sector: [u8; SECTOR] = read_at(device, 0)?;
    Ok(Layout::of(&sector).map_or_else(String::new, |layout| {
        let begin = layout.signature() + 5;
        match text_of(&sector[begin..begin + 11]) {
            label if label == "NO NAME" => String::new(),
            label => label,
        }
    }))
}

pub(super) fn identity(device: &File) -> io::Result<Identity> {
    let sector: [u8; SECTOR] = read_at(device, 0)?;
    let layout = Layout::of(&sector).filter(|layout| sector[layout.signature()] == 0x29);
    Ok(match layout {
        Some(layout) => Identity::Changeable {
            id: text(field(&sector, layout.signature() + 1)),
        },
        None => Identity::None,
    })
}

pub(super) fn change(device: &File, new: [u8; 4]) -> io::Result<()> {
    let sector: [u8; SECTOR] = read_at(device, 0)?;
    let layout = Layout::of(&sector).ok_or_else(|| io::Error::other("it is not FAT"))?;
    let place = layout.signature() as u64 + 1;
    device.write_all_at(&new, place)?;
    let copy = u16_at(&sector, 50);
    if let Layout::Fat32 = layout
        && !matches!(copy, 0 | 0xffff)
    {
        let copy = u64::from(copy) * u64::from(u16_at(&sector, 11));
        if read_at::<SECTOR>(device, copy)? == sector {
            device.write_all_at(&new, copy + place)?;
        }
    }
    Ok(())
}
