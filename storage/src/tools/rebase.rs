//! Makes an image independent of what differs between two backing files.

use super::{Job, ToolError};
use crate::qcow2::Qcow2;
use crate::{Content, Image};

/// How many bytes are compared at a time, if a cluster is not larger.
const CHUNK: u64 = 1 << 20;

/// Copies into `image` what it takes from its backing file and would not read the same from `new`, so that `new` can
/// become its backing file. `None` stands for no backing file. What the image reads as is the same at every moment.
///
/// If `new` is the same image as the layer that lies below the first `shared` layers of `image`, bytes that come from
/// there are not compared.
///
/// # Errors
/// If one of the images cannot be read or written, or the job is cancelled.
pub fn copy_differences(
    image: &Qcow2,
    new: Option<&dyn Image>,
    shared: Option<usize>,
    job: Job<'_>,
) -> Result<(), ToolError> {
    let size = image.size();
    let cluster = image.header().cluster_size();
    let chunk = CHUNK.max(cluster);
    let read_failed = |image, offset| {
        move |error| ToolError::Read {
            image,
            offset,
            error,
        }
    };
    let (mut old_bytes, mut new_bytes) = (Vec::new(), Vec::new());
    let mut position = 0;
    while position < size {
        job.check()?;
        job.report(position, size);
        let status = image.status(position..size);
        let status = status.map_err(read_failed("the image", position))?;
        let is_same = status
            .depth
            .is_some_and(|depth| depth == 0 || shared.is_some_and(|shared| depth >= shared));
        let len = status.len.max(1);
        if is_same {
            position += len;
            continue;
        }
        let new_size = new.map_or(0, Image::size);
        let new_len = new_size.saturating_sub(position).min(len);
        // Most of a disk is often zeroes in both.
        if let Content::Zeroes | Content::Hole { .. } = status.content {
            let both = match new.filter(|_| new_len > 0) {
                None => len,
                Some(new) => {
                    let status = new.status(position..position + new_len);
                    let status = status.map_err(read_failed("the new backing file", position))?;
                    match status.content {
                        Content::Zeroes | Content::Hole { .. } => status.len,
                        Content::Data { .. } | Content::Compressed => 0,
                    }
                }
            };
            if both > 0 {
                position += both;
                continue;
            }
        }
        let end = (position / chunk + 1) * chunk;
        let len = len.min(end - position) as usize;
        old_bytes.resize(len, 0);
        let read = image.read_at(&mut old_bytes, position);
        read.map_err(read_failed("the image", position))?;
        new_bytes.clear();
        new_bytes.resize(len, 0);
        if let Some(new) = new.filter(|_| new_len > 0) {
            let part = &mut new_bytes[..len.min(new_len as usize)];
            let read = new.read_at(part, position);
            read.map_err(read_failed("the new backing file", position))?;
        }
        // Pieces end at borders of clusters.
        let mut start = 0;
        while start < len {
            let at = position + start as u64;
            let end = (cluster - at % cluster).min((len - start) as u64) as usize + start;
            let old = &old_bytes[start..end];
            if old != &new_bytes[start..end] {
                let written = match old.iter().all(|&byte| byte == 0) {
                    true => image.pin_zeroes(at..at + old.len() as u64),
                    false => image.write_at(old, at),
                };
                written.map_err(|error| ToolError::Write { offset: at, error })?;
            }
            start = end;
        }
        position += len as u64;
    }
    job.report(size, size);
    Ok(())
}
