//! Makes an image independent of its backing files, while it is in use.

use std::any::Any;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::backing::Below;
use super::entry::L2Entry;
use super::error::Error;
use super::header::BackingName;
use super::locks::{ALL, lock};
use super::read::foreign;
use crate::{BlockStatus, Content, Image};

impl Qcow2 {
    /// Copies into the image what the first bytes of `range` are, if they come from one of the backing files that are
    /// to go, and returns the number of bytes for which this is done. The first `layers` layers become one, and this
    /// image is the first of them; `None` stands for all. Bytes that the image holds are not changed.
    ///
    /// # Errors
    /// Those of [`Image::write_at`], or if a backing file cannot be read.
    pub(crate) fn pull(&self, range: Range<u64>, layers: Option<usize>) -> io::Result<u64> {
        self.check_writable()?;
        self.check_range(&range)?;
        let rest = self.layer_below(layers)?;
        let merge = Merge { layers, rest };
        // Most of a disk is skipped without a lock that others wait for.
        let status = self.status(range.clone())?;
        let (piece, len) = merge.piece(&status, range.start)?;
        if range.is_empty() || piece == Piece::InPlace {
            return Ok(len);
        }
        self.settle_if_many()?;
        let done = self.note(self.pull_piece(range, &merge))?;
        self.note(self.settle_if_many())?;
        Ok(done)
    }

    /// Does what [`Self::pull`] does, for bytes that are mapped at a time.
    fn pull_piece(&self, range: Range<u64>, merge: &Merge) -> io::Result<u64> {
        let start = range.start;
        let range = start..self.piece_end(&range);
        let _guard = self.ranges.exclusive(self.geometry.clusters(range.clone()));
        let status = self.status_unlocked(range)?;
        let (piece, len) = merge.piece(&status, start)?;
        let mut bytes = match piece {
            Piece::InPlace => return Ok(len),
            Piece::Zeroes => {
                let whole = self.whole_clusters(&(start..start + len));
                let zeroes = whole.start << self.geometry.cluster_bits
                    ..(whole.end << self.geometry.cluster_bits).min(start + len);
                if self.geometry.zero_flag && zeroes.start == start && !zeroes.is_empty() {
                    let entry = L2Entry::zeroes(self.geometry, None);
                    self.change_slice_locked(whole, |_| entry)?;
                    return Ok(zeroes.end - start);
                }
                vec![0; len as usize]
            }
            Piece::Data => vec![0; len as usize],
        };
        if piece == Piece::Data {
            self.read_unlocked(&mut bytes, start)?;
        }
        match self.write_new_locked(&bytes, start)? {
            0 => Err(io::Error::other(
                "a part of the image can be neither mapped nor written",
            )),
            written => Ok(written as u64),
        }
    }

    /// Goes on without the backing files of the first `layers` layers, from which [`Self::pull`] has copied everything
    /// since the image was opened or a snapshot was applied to it. The header has the name `name` of the backing file
    /// that is left, and is on stable storage when this returns.
    ///
    /// # Errors
    /// If the image has snapshots, which need the backing files, or the host cannot write.
    pub(crate) fn finish_pull(
        &self,
        layers: Option<usize>,
        name: Option<BackingName>,
    ) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        self.check_unneeded_by_snapshots()?;
        let write = Error::io("remove the backing file of the image");
        self.check_writable()
            .and_then(|()| self.sync_and_release())
            .map_err(write)?;
        let _guard = self.ranges.exclusive(ALL);
        let rest = self
            .layer_below(layers)
            .map_err(Error::io("find the backing file"))?;
        self.change_backing_name(name)?;
        self.backing.replace(rest);
        Ok(())
    }

    /// Refuses to do without backing files if the image has snapshots.
    ///
    /// # Errors
    /// If it has.
    pub(crate) fn check_unneeded_by_snapshots(&self) -> Result<(), Error> {
        if lock(&self.header).snapshots > 0 {
            let error = "the snapshots of the image need its backing file: delete them first";
            return Err(Error::NotPossible(error.to_owned()));
        }
        Ok(())
    }

    /// Returns the backing file below the first `layers` layers, if there is one. The numbers of its files are those
    /// that they have in this image.
    ///
    /// # Errors
    /// If there are not that many layers.
    pub(crate) fn layer_below(&self, layers: Option<usize>) -> io::Result<Option<Below>> {
        let Some(layers) = layers else {
            return Ok(None);
        };
        let missing = || io::Error::other(format!("the image has no {layers} backing files"));
        let mut below = self.backing.get().ok_or_else(missing)?;
        for _ in 1..layers {
            let image: Arc<dyn Image> = Arc::clone(&below.image);
            let image: &dyn Any = &*image;
            let image = image.downcast_ref::<Qcow2>().ok_or_else(missing)?;
            let next = image.backing.get().ok_or_else(missing)?;
            below = Below {
                distance: below.distance + next.distance,
                ..next
            };
        }
        Ok(Some(below))
    }
}

/// The layers that become one.
struct Merge {
    /// Their number. `None`: all.
    layers: Option<usize>,
    /// The backing file that is left.
    rest: Option<Below>,
}

/// What has to be done to bytes before the layers are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    /// Nothing.
    InPlace,
    /// They become data of the image.
    Data,
    /// They become zeroes of the image.
    Zeroes,
}

impl Merge {
    /// Returns what has to be done to the bytes from `start` on, whose status is given, and to how many of them.
    fn piece(&self, status: &BlockStatus, start: u64) -> io::Result<(Piece, u64)> {
        let len = status.len;
        let is_left = |layers| status.depth.is_some_and(|depth| depth >= layers);
        if status.depth == Some(0) || self.layers.is_some_and(is_left) {
            return Ok((Piece::InPlace, len));
        }
        if !is_zero(status) {
            return Ok((Piece::Data, len));
        }
        // The layers that go hide what the one that is left has there. Without one, what is not mapped is zeroes.
        let Some(rest) = &self.rest else {
            return Ok((Piece::InPlace, len));
        };
        let len = match rest.image.size().saturating_sub(start) {
            0 => return Ok((Piece::InPlace, len)),
            left => len.min(left),
        };
        let hidden = rest.image.status(start..start + len).map_err(foreign)?;
        let piece = match is_zero(&hidden) {
            true => Piece::InPlace,
            false => Piece::Zeroes,
        };
        Ok((piece, hidden.len))
    }
}

fn is_zero(status: &BlockStatus) -> bool {
    matches!(status.content, Content::Zeroes | Content::Hole { .. })
}
