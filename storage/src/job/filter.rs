//! What stands for a disk while it is copied.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CopyJob, cannot};
use crate::{BlockStatus, Direction, Extent, Image};

/// Passes requests to the source of a job, and those that change what has been copied to the target too.
#[derive(Debug)]
pub(super) struct Filter(pub Arc<CopyJob>);

impl Filter {
    /// Changes a range of the source by `change`, and has `mirror` do the same to the part of it that the target has.
    fn change(
        &self,
        range: Range<u64>,
        change: impl FnOnce(&dyn Image) -> io::Result<()>,
        mirror: impl FnOnce(&dyn Image, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let job = &*self.0;
        if !job.control.is_live() {
            return change(&*job.source);
        }
        let _guard = job.locks.exclusive(range.clone());
        let changed = change(&*job.source);
        let done = job.done_part(range);
        if done.is_empty() || !job.control.is_live() {
            return changed;
        }
        let start = done.start;
        let mirrored = match &changed {
            Ok(()) => mirror(&*job.target, done).map_err(cannot("write", "the target", start)),
            // The source has old bytes, or new ones, or some of both.
            Err(_) => job.copy_all(done),
        };
        changed.and(job.mirrored(mirrored))
    }
}

impl Image for Filter {
    fn size(&self) -> u64 {
        self.0.source.size()
    }

    fn is_read_only(&self) -> bool {
        self.0.source.is_read_only()
    }

    fn map(&self, range: Range<u64>, direction: Direction) -> Extent {
        match direction {
            Direction::Write if self.0.control.is_live() => Extent::Slow {
                len: range.end.saturating_sub(range.start),
            },
            _ => self.0.source.map(range, direction),
        }
    }

    fn prefetch_map(&self, offset: u64) {
        self.0.source.prefetch_map(offset);
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.source.read_at(bytes, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let range = offset..offset.saturating_add(bytes.len() as u64);
        self.change(
            range,
            |source| source.write_at(bytes, offset),
            |target, done| target.write_at(&bytes[..(done.end - done.start) as usize], offset),
        )
    }

    fn write_zeroes(&self, range: Range<u64>, unmap: bool) -> io::Result<()> {
        self.change(
            range.clone(),
            |source| source.write_zeroes(range, unmap),
            |target, done| target.write_zeroes(done, unmap),
        )
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        self.change(
            range.clone(),
            |source| source.discard(range),
            // The source decides what discarded bytes read as.
            |_, done| self.0.copy_all(done),
        )
    }

    fn flush(&self) -> io::Result<()> {
        let job = &*self.0;
        job.source.flush()?;
        if job.is_switching.load(Ordering::Acquire) {
            return job.mirrored(job.target.flush());
        }
        Ok(())
    }

    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        self.0.source.status(range)
    }
}
