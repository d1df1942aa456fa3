//! Reads: where bytes are, and the bytes themselves.

use std::borrow::Borrow;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Qcow2;
use super::backing::Below;
use super::entry::{Compressed, Mapping};
use super::error::Error;
use super::locks::lock;
use super::tables::Run;
use crate::{BlockStatus, Content, Direction, Extent};

impl Qcow2 {
    /// [`Image::map`].
    pub(super) fn map_range(&self, range: Range<u64>, direction: Direction) -> Extent {
        let end = range.end.min(self.size.load(Ordering::Relaxed));
        let len = end.saturating_sub(range.start);
        let slow = Extent::Slow {
            len: range.end.saturating_sub(range.start),
        };
        if len == 0 {
            return slow;
        }
        let changes = self.backing.changes();
        let Some(Ok((mapping, len))) = self.tables.cached(range.start, len) else {
            return slow;
        };
        match (mapping, direction) {
            (Mapping::Data { host, .. }, Direction::Read) => Extent::File {
                file: 0,
                offset: host,
                len,
            },
            (
                Mapping::Data {
                    host,
                    in_place: true,
                },
                Direction::Write,
            ) if self.check_writable().is_ok() => Extent::File {
                file: 0,
                offset: host,
                len,
            },
            (Mapping::Zeroes, Direction::Read) => Extent::Zeroes { len },
            (Mapping::Unallocated, Direction::Read) => {
                // The entry may be from before a change of the backing file.
                let extent = self.backing.try_with(changes, |below| {
                    let Some((below, backed)) = part(below, range.start, len) else {
                        return Extent::Zeroes { len };
                    };
                    let range = range.start..range.start + backed;
                    match below.image.map(range, Direction::Read) {
                        Extent::File { file, offset, len } => Extent::File {
                            file: file + below.distance,
                            offset,
                            len,
                        },
                        extent => extent,
                    }
                });
                extent.unwrap_or(Extent::Slow { len })
            }
            _ => Extent::Slow { len },
        }
    }

    /// Returns what the bytes from `offset` on are. Reads tables that are not cached.
    pub(super) fn lookup(&self, offset: u64, len: u64) -> io::Result<Run> {
        let run = self
            .tables
            .lookup(offset, len, |entry| self.inspect(entry))?;
        Ok(run.map_err(|error| Error::Damaged(error.to_string()))?)
    }

    /// Returns the backing file and how many of the bytes from `offset` on it has, if it has the first.
    fn backed(&self, offset: u64, len: u64) -> Option<(Below, u64)> {
        part(self.backing.get(), offset, len)
    }

    /// [`Image::read_at`] for a caller that holds a lock on the range. The range may end behind the
    /// disk, in its last cluster.
    pub(super) fn read_unlocked(&self, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let (mapping, len) = self.lookup(offset, bytes.len() as u64)?;
            let (part, rest) = bytes.split_at_mut(len as usize);
            match mapping {
                Mapping::Data { host, .. } => self.file.read_data(part, host)?,
                Mapping::Zeroes => part.fill(0),
                Mapping::Unallocated => self.read_backing(part, offset)?,
                Mapping::Compressed(data) => {
                    let within = offset & (self.geometry.cluster_size() - 1);
                    self.read_compressed(part, data, within as usize)?;
                }
            }
            bytes = rest;
            offset += len;
        }
        Ok(())
    }

    /// Fills `bytes` from the backing file.
    fn read_backing(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let Some((below, len)) = self.backed(offset, bytes.len() as u64) else {
            bytes.fill(0);
            return Ok(());
        };
        let (part, rest) = bytes.split_at_mut(len as usize);
        rest.fill(0);
        // Damage of the backing file is not damage of this image.
        below.image.read_at(part, offset).map_err(foreign)
    }

    /// Whether all bytes of a range of the backing file are known to be zeroes.
    pub(super) fn is_backed_by_zeroes(&self, range: Range<u64>) -> io::Result<bool> {
        let mut next = range.start;
        while let Some((below, len)) = self.backed(next, range.end.saturating_sub(next)) {
            let status = below.image.status(next..next + len).map_err(foreign)?;
            if status.content != Content::Zeroes {
                return Ok(false);
            }
            next += status.len.max(1);
        }
        Ok(true)
    }

    /// Fills `bytes` from a compressed cluster, from its byte `within` on.
    fn read_compressed(&self, bytes: &mut [u8], data: Compressed, within: usize) -> io::Result<()> {
        let copy = |cluster: &[u8], bytes: &mut [u8]| {
            bytes.copy_from_slice(&cluster[within..within + bytes.len()]);
        };
        if let Some((_, cluster)) = lock(&self.decompressed)
            .as_ref()
            .filter(|(cached, _)| *cached == data)
        {
            copy(cluster, bytes);
            return Ok(());
        }
        let mut compressed = vec![0; data.len as usize];
        self.file.read_at(&mut compressed, data.offset)?;
        let mut cluster = vec![0; self.geometry.cluster_size() as usize];
        super::compress::decompress(self.compression, &compressed, &mut cluster)?;
        copy(&cluster, bytes);
        *lock(&self.decompressed) = Some((data, cluster));
        Ok(())
    }

    /// [`Image::status`] for a caller that holds a lock on the range.
    pub(super) fn status_unlocked(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        if range.is_empty() {
            return Ok(BlockStatus {
                len: 0,
                content: Content::Zeroes,
                depth: None,
            });
        }
        let (mapping, len) = self.lookup(range.start, range.end - range.start)?;
        let content = match mapping {
            Mapping::Data { host, .. } => Content::Data {
                file: 0,
                offset: host,
            },
            Mapping::Zeroes => Content::Zeroes,
            Mapping::Compressed(_) => Content::Compressed,
            Mapping::Unallocated => {
                let Some((below, backed)) = self.backed(range.start, len) else {
                    return Ok(BlockStatus {
                        len,
                        content: Content::Zeroes,
                        depth: None,
                    });
                };
                let status = below
                    .image
                    .status(range.start..range.start + backed)
                    .map_err(foreign)?;
                let content = match status.content {
                    Content::Data { file, offset } => Content::Data {
                        file: file + below.distance,
                        offset,
                    },
                    Content::Hole { file, offset } => Content::Hole {
                        file: file + below.distance,
                        offset,
                    },
                    content => content,
                };
                let depth = status.depth.map(|depth| depth + 1);
                return Ok(BlockStatus {
                    content,
                    depth,
                    ..status
                });
            }
        };
        Ok(BlockStatus {
            len,
            content,
            depth: Some(0),
        })
    }
}

/// Returns the backing file `below` and how many of the bytes from `offset` on it has, if it has the first.
fn part<B: Borrow<Below>>(below: Option<B>, offset: u64, len: u64) -> Option<(B, u64)> {
    let below = below?;
    let len = below.borrow().image.size().saturating_sub(offset).min(len);
    (len > 0).then_some((below, len))
}

/// Turns an error of the backing file into one that does not mark this image as damaged.
pub(super) fn foreign(error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("backing file: {error}"))
}
