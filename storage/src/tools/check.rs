//! Looks for damage in the tables of an image.

use std::io;

use super::{Job, ToolError};
use crate::Image;

/// Counts the blocks whose place is not possible, or is not in the file. `block` is the size of one; an image
/// without blocks is looked at in steps of 1 MiB.
///
/// # Errors
/// If the host cannot read the image, or the job is cancelled.
pub fn check_blocks(image: &dyn Image, block: Option<u64>, job: Job<'_>) -> Result<u64, ToolError> {
    let block = block.unwrap_or(1 << 20);
    let (size, mut position, mut damaged) = (image.size(), 0, 0);
    while position < size {
        job.check()?;
        job.report(position, size);
        match image.status(position..size) {
            Ok(status) => position += status.len.max(1),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                damaged += 1;
                position = (position + 1).next_multiple_of(block);
            }
            Err(error) => {
                return Err(ToolError::Read {
                    image: "the image",
                    offset: position,
                    error,
                });
            }
        }
    }
    Ok(damaged)
}
