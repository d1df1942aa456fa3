//! Changes of what an image is: its version, its features, the name of its backing file.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::Qcow2;
use super::entry::{L2Entry, Mapping};
use super::error::Error;
use super::header::{BackingName, Compression, Header, LAZY_REFCOUNTS, incompatible};
use super::locks::lock;
use super::{Options, snapshot_table};
use crate::{Image, ImageFile};

/// What is changed in an image. `None` stands for what it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amendment {
    /// Version of the format, 2 or 3.
    pub version: Option<u32>,
    /// Whether refcounts may be written late. Version 2 does not know this.
    pub lazy_refcounts: Option<bool>,
}

impl Qcow2 {
    /// Changes the version or the features of the image, which is to be closed afterwards. Nobody else uses it.
    ///
    /// A crash leaves an image that reads as before, as what it was or as what it was to be.
    ///
    /// # Errors
    /// If version 2 lacks something that the image uses, or the host cannot write.
    pub fn amend(&self, amendment: Amendment) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        self.check_writable()
            .map_err(Error::io("change the image"))?;
        let header = self.header();
        let version = amendment.version.unwrap_or(header.version);
        let is_lazy = amendment
            .lazy_refcounts
            .unwrap_or(version >= 3 && header.has_lazy_refcounts());
        if is_lazy && version < 3 {
            return Err(impossible("lazy refcounts need version 3: compat=1.1"));
        }
        match (header.version, version) {
            (2, 3) => self.prepare_version_3()?,
            (3, 2) => self.prepare_version_2(&header)?,
            _ => {}
        }
        self.rewrite_header(|header| {
            header.version = version;
            header.compatible = match is_lazy {
                true => header.compatible | LAZY_REFCOUNTS,
                false => header.compatible & !LAZY_REFCOUNTS,
            };
        })
    }

    /// Gives snapshots the extra data that version 3 demands.
    fn prepare_version_3(&self) -> Result<(), Error> {
        let header = self.header();
        if header.snapshots == 0 {
            return Ok(());
        }
        let (snapshots, _) =
            snapshot_table::read(&*self.file, &header).map_err(Error::io("read the snapshots"))?;
        self.write_snapshots(&snapshots)
            .map_err(Error::io("write the snapshots"))
    }

    /// Removes from the image what version 2 does not know.
    fn prepare_version_2(&self, header: &Header) -> Result<(), Error> {
        if header.refcount_order != 4 {
            return Err(impossible("version 2 has refcounts of 16 bits only"));
        }
        if header.incompatible & incompatible::EXTENDED_L2 != 0 {
            return Err(impossible("version 2 has no subclusters"));
        }
        if header.compression != Compression::Zlib {
            return Err(impossible("version 2 compresses by zlib only"));
        }
        if header.snapshots > 0 {
            return Err(impossible(
                "version 2 has no clusters of zeroes, which the snapshots may have: delete them first",
            ));
        }
        let expanded = self.expand_zeroes().and_then(|()| self.sync_and_release());
        expanded.map_err(Error::io("write the zeroes of the image"))
    }

    /// Replaces clusters that are marked as zeroes.
    fn expand_zeroes(&self) -> io::Result<()> {
        let end = self.geometry.clusters(0..self.size()).end;
        if self.backing.is_none() {
            let is_zero = |entry: L2Entry| {
                let mapping = entry.mapping(self.geometry, 0);
                matches!(mapping, Ok((Mapping::Zeroes, _)))
            };
            return self.change_entries(0..end, |entry| match is_zero(entry) {
                true => L2Entry::UNALLOCATED,
                false => entry,
            });
        }
        static ZEROES: [u8; 65536] = [0; 65536];
        let mut next = 0;
        while next < self.size() {
            let (mapping, len) = self.lookup(next, self.size() - next)?;
            let len = match mapping {
                Mapping::Zeroes => {
                    let len = len.min(ZEROES.len() as u64);
                    self.write_range(&ZEROES[..len as usize], next)?;
                    len
                }
                _ => len,
            };
            next += len;
        }
        Ok(())
    }

    /// Forgets all that the image itself holds, so that it reads as its backing file.
    ///
    /// The caller makes sure that no data is transferred by an answer of [`Image::map`] meanwhile.
    ///
    /// # Errors
    /// If the host cannot write.
    pub fn make_empty(&self) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        let end = self.geometry.clusters(0..self.size()).end;
        let emptied = self.check_writable().and_then(|()| {
            let changed = self.change_entries(0..end, |_| L2Entry::UNALLOCATED);
            self.note(changed.and_then(|()| self.sync_and_release()))
        });
        emptied.map_err(Error::io("empty the image"))
    }

    /// Makes a range within one cluster read as zeroes, whatever backing file the image gets.
    ///
    /// # Errors
    /// Those of [`Image::write_at`].
    pub(crate) fn pin_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        self.check_writable()?;
        self.check_range(&range)?;
        let whole = self.whole_clusters(&range);
        self.note(if whole.is_empty() || !self.geometry.zero_flag {
            self.write_range(&vec![0; (range.end - range.start) as usize], range.start)
        } else {
            let zeroes = L2Entry::zeroes(self.geometry, None);
            self.change_entries(whole, |_| zeroes)
        })
    }

    /// Has the image in `file`, which is not open, name another backing file or none, on stable storage. The former one
    /// and the other one are not read: what the image takes from its backing file is what the other one has there.
    ///
    /// # Errors
    /// If it is not an image, the name is too long for it, or the host cannot write.
    pub fn rename_backing(
        file: Arc<dyn ImageFile>,
        name: Option<BackingName>,
    ) -> Result<(), Error> {
        let header = Header::read(&*file)?;
        // Nothing but the header is written.
        let options = Options {
            read_only: true,
            ..Options::default()
        };
        Qcow2::assemble(file, header, options)?.change_backing_name(name)
    }

    /// Has the open image name another backing file or none. The image and its name are on stable storage then. It is to
    /// be closed afterwards, as it goes on with the former backing file.
    ///
    /// # Errors
    /// If the name is too long for the image, or the host cannot write.
    pub fn rebase(&self, name: Option<BackingName>) -> Result<(), Error> {
        let _layout = lock(&self.layout);
        self.check_writable()
            .and_then(|()| self.sync_and_release())
            .map_err(Error::io("write the image"))?;
        self.change_backing_name(name)
    }
}

fn impossible(why: &str) -> Error {
    Error::NotPossible(why.to_owned())
}
