//! Compares two disks.

use std::io;

use super::{Job, MapEntry, ToolError};
use crate::Image;

const CHUNK: u64 = 1 << 20;
const SECTOR: usize = 512;

/// What differs first between two disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The sector at this offset.
    Content(u64),
    /// What is allocated at this offset, though the content is the same.
    Allocation(u64),
}

/// Compares two disks; what the larger one has beyond the end of the other is compared with zeroes. With
/// `allocation`, they also have to agree on what is allocated.
///
/// # Errors
/// If an image cannot be read, or the job is cancelled.
pub fn compare(
    first: &dyn Image,
    second: &dyn Image,
    allocation: bool,
    job: Job<'_>,
) -> Result<Option<Difference>, ToolError> {
    let total = first.size().max(second.size());
    let (mut left, mut right) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut position = 0;
    while position < total {
        job.check()?;
        job.report(position, total);
        let [a, b] = [(first, "the first image"), (second, "the second image")]
            .map(|(image, name)| side(image, name, position));
        let (a, b) = (a?, b?);
        if allocation && a.kind != b.kind && a.kind.is_some() && b.kind.is_some() {
            return Ok(Some(Difference::Allocation(position)));
        }
        let run = a.len.min(b.len).min(total - position);
        if a.zero && b.zero {
            position += run;
            continue;
        }
        let len = run.min(CHUNK);
        let (left, right) = (&mut left[..len as usize], &mut right[..len as usize]);
        read(first, "the first image", a.zero, left, position)?;
        read(second, "the second image", b.zero, right, position)?;
        if left != right {
            let pairs = left.chunks(SECTOR).zip(right.chunks(SECTOR));
            let sector = pairs.take_while(|(left, right)| left == right).count();
            let offset = position + (sector * SECTOR) as u64;
            return Ok(Some(Difference::Content(offset)));
        }
        position += len;
    }
    job.report(total, total);
    Ok(None)
}

/// What one of the disks has at a position.
struct Side {
    /// Length in bytes.
    len: u64,
    zero: bool,
    /// What qualifies the allocation. `None` beyond the end.
    kind: Option<(bool, bool, bool, bool)>,
}

fn side(image: &dyn Image, name: &'static str, position: u64) -> Result<Side, ToolError> {
    if position >= image.size() {
        return Ok(Side {
            len: u64::MAX,
            zero: true,
            kind: None,
        });
    }
    let status = image.status(position..image.size());
    let status = status.map_err(|error| cannot_read(name, position, error))?;
    let entry = MapEntry::new(position, &status, false);
    Ok(Side {
        len: status.len,
        zero: entry.zero,
        kind: Some((
            entry.data,
            entry.zero,
            entry.present,
            entry.offset.is_some(),
        )),
    })
}

/// Reads `bytes`, which are `zero` if the image says so, or beyond its end.
fn read(
    image: &dyn Image,
    name: &'static str,
    zero: bool,
    bytes: &mut [u8],
    position: u64,
) -> Result<(), ToolError> {
    if zero {
        bytes.fill(0);
        return Ok(());
    }
    let read = image.read_at(bytes, position);
    read.map_err(|error| cannot_read(name, position, error))
}

fn cannot_read(image: &'static str, offset: u64, error: io::Error) -> ToolError {
    ToolError::Read {
        image,
        offset,
        error,
    }
}
