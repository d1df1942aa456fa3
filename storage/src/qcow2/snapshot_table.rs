//! The table of internal snapshots, as bytes.
//!
//! "Snapshots" of the specification.

use std::io;

use super::error::Error;
use super::header::{Header, MAX_L1_BYTES, be32, be64};
use crate::ImageFile;

/// Length of the fixed part of an entry.
const FIXED: usize = 40;
/// Length of the extra data that is interpreted here.
const KNOWN_EXTRA: usize = 16;
/// Maximum length of the extra data of a snapshot. The limit is QEMU's too.
const MAX_EXTRA: usize = 1024;
/// Maximum size of the table in bytes. The limit is QEMU's too.
const MAX_TABLE: usize = 64 << 20;

/// An internal snapshot of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Identifier, unique in the image.
    pub id: String,
    /// Name that the user has given it.
    pub name: String,
    /// Size of the disk in bytes.
    pub size: u64,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
    /// For how long the guest had run, in nanoseconds.
    pub guest_clock: u64,
    /// Size in bytes of the machine's state that another program has saved with it.
    pub machine_state: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// Extra data that is kept and not interpreted.
    pub(super) extra: Vec<u8>,
}

impl Snapshot {
    /// Returns how many instructions the guest had executed, if it was run with a count of them.
    pub fn instructions(&self) -> Option<u64> {
        let count = self.extra.first_chunk().copied().map(u64::from_be_bytes);
        count.filter(|&count| count != u64::MAX)
    }
}

/// Reads the table that a header names, and returns it with its length in bytes.
///
/// # Errors
/// If it is damaged, or the host cannot read it.
pub(super) fn read(file: &dyn ImageFile, header: &Header) -> io::Result<(Vec<Snapshot>, u64)> {
    let damaged = |what: &str| Error::Damaged(format!("the snapshot table has {what}"));
    let start = header.snapshots_offset;
    let mut position = 0;
    let mut snapshots = Vec::new();
    // L1 tables of different snapshots do not overlap, so the file limits their total size.
    let mut l1_room = file.size()?;
    for _ in 0..header.snapshots {
        let mut fixed = [0; FIXED];
        file.read_at(&mut fixed, start + position as u64)?;
        let extra_len = be32(&fixed, 36) as usize;
        if extra_len > MAX_EXTRA {
            return Err(damaged("too much extra data").into());
        }
        let id_len = usize::from(u16::from_be_bytes([fixed[12], fixed[13]]));
        let name_len = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
        let mut rest = vec![0; extra_len + id_len + name_len];
        file.read_at(&mut rest, start + (position + FIXED) as u64)?;
        position = (position + FIXED + rest.len()).next_multiple_of(8);
        if position > MAX_TABLE {
            return Err(damaged("more than 64 MiB").into());
        }
        let (extra, strings) = rest.split_at(extra_len);
        let (id, name) = strings.split_at(id_len);
        let l1_offset = be64(&fixed, 0);
        let l1_size = be32(&fixed, 8);
        let l1_bytes = u64::from(l1_size) * 8;
        if l1_bytes > MAX_L1_BYTES.min(l1_room)
            || !l1_offset.is_multiple_of(header.cluster_size())
            || l1_offset
                .checked_add(l1_bytes)
                .is_none_or(|end| end > 1 << 56)
        {
            return Err(damaged("a wrong L1 table").into());
        }
        l1_room -= l1_bytes;
        let size = if extra_len >= 16 {
            be64(extra, 8)
        } else {
            header.size
        };
        if size > 1 << 62 || header.geometry().l1_entries(size) > u64::from(l1_size) {
            return Err(damaged("an L1 table that is too small for its disk").into());
        }
        snapshots.push(Snapshot {
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            size,
            seconds: be32(&fixed, 16),
            nanoseconds: be32(&fixed, 20),
            guest_clock: be64(&fixed, 24),
            machine_state: if extra_len >= 8 {
                be64(extra, 0)
            } else {
                be32(&fixed, 32).into()
            },
            l1_offset,
            l1_size,
            extra: extra.get(KNOWN_EXTRA..).unwrap_or_default().to_vec(),
        });
    }
    Ok((snapshots, position as u64))
}

/// Serializes a table.
///
/// # Errors
/// If it would be larger than QEMU accepts.
pub(super) fn to_bytes(snapshots: &[Snapshot]) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        let too_long = |_| Error::Option("the name of a snapshot is too long".to_owned());
        let id_len = u16::try_from(snapshot.id.len()).map_err(too_long)?;
        let name_len = u16::try_from(snapshot.name.len()).map_err(too_long)?;
        bytes.extend_from_slice(&snapshot.l1_offset.to_be_bytes());
        bytes.extend_from_slice(&snapshot.l1_size.to_be_bytes());
        bytes.extend_from_slice(&id_len.to_be_bytes());
        bytes.extend_from_slice(&name_len.to_be_bytes());
        bytes.extend_from_slice(&snapshot.seconds.to_be_bytes());
        bytes.extend_from_slice(&snapshot.nanoseconds.to_be_bytes());
        bytes.extend_from_slice(&snapshot.guest_clock.to_be_bytes());
        let short_state = u32::try_from(snapshot.machine_state).unwrap_or(0);
        bytes.extend_from_slice(&short_state.to_be_bytes());
        let extra_len = (KNOWN_EXTRA + snapshot.extra.len()) as u32;
        bytes.extend_from_slice(&extra_len.to_be_bytes());
        bytes.extend_from_slice(&snapshot.machine_state.to_be_bytes());
        bytes.extend_from_slice(&snapshot.size.to_be_bytes());
        bytes.extend_from_slice(&snapshot.extra);
        bytes.extend_from_slice(snapshot.id.as_bytes());
        bytes.extend_from_slice(snapshot.name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        if bytes.len() > MAX_TABLE {
            return Err(Error::NotPossible(
                "the image has no room for more snapshots".to_owned(),
            ));
        }
    }
    Ok(bytes)
}
