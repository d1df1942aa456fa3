//! Lists what a disk holds, and where.

use std::ops::Range;

use super::{Job, ToolError};
use crate::{BlockStatus, Content, Image};

/// A range of the disk that is kept in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// Where it begins.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// How many backing files deep the layer is that has it.
    pub depth: usize,
    /// Whether a layer has it.
    pub present: bool,
    /// Whether it is known to read as zeroes.
    pub zero: bool,
    /// Whether it takes storage as far as the format says.
    pub data: bool,
    /// Number of the file, and where in it the range begins, if it is there as it is.
    pub offset: Option<(usize, u64)>,
}

impl MapEntry {
    /// Says what the status of an image at `start` means. A hole of a raw image (`is_raw`) is not data; one of a
    /// file that another format keeps data in is.
    pub fn new(start: u64, status: &BlockStatus, is_raw: bool) -> MapEntry {
        let (zero, data, offset) = match status.content {
            Content::Data { file, offset } => (false, true, Some((file, offset))),
            Content::Hole { file, offset } => (true, !is_raw, Some((file, offset))),
            Content::Compressed => (false, true, None),
            Content::Zeroes => (true, false, None),
        };
        MapEntry {
            start,
            len: status.len,
            depth: status.depth.unwrap_or_default(),
            present: status.depth.is_some(),
            zero,
            data,
            offset,
        }
    }

    /// Appends `next` if it continues this range in the same way.
    fn join(&mut self, next: &MapEntry) -> bool {
        let key = |entry: &MapEntry| (entry.depth, entry.present, entry.zero, entry.data);
        let continued = match (self.offset, next.offset) {
            (None, None) => true,
            (Some((file, offset)), Some(next)) => (file, offset + self.len) == next,
            _ => false,
        };
        let joined = key(self) == key(next) && continued;
        if joined {
            self.len += next.len;
        }
        joined
    }
}

/// Calls `found` for each part of `range` that is kept in one way, in order.
///
/// # Errors
/// If the image cannot be read, the job is cancelled, or `found` fails.
pub fn map<E: From<ToolError>>(
    image: &dyn Image,
    range: Range<u64>,
    is_raw: bool,
    job: Job<'_>,
    mut found: impl FnMut(&MapEntry) -> Result<(), E>,
) -> Result<(), E> {
    let mut current: Option<MapEntry> = None;
    let mut position = range.start;
    while position < range.end {
        job.check()?;
        let status = image.status(position..range.end);
        let status = status.map_err(|error| ToolError::Read {
            image: "the image",
            offset: position,
            error,
        })?;
        let entry = MapEntry::new(position, &status, is_raw);
        position += status.len.max(1);
        if current.as_mut().is_some_and(|current| current.join(&entry)) {
            continue;
        }
        if let Some(done) = current.replace(entry) {
            found(&done)?;
        }
    }
    match current {
        Some(last) => found(&last),
        None => Ok(()),
    }
}
