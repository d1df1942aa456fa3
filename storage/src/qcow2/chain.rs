//! Opens images together with their backing files.

use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use super::error::Error;
use super::header::Header;
use super::{Options, Qcow2};
use crate::{Image, ImageFile};

/// Maximum number of images in a chain.
pub const MAX_DEPTH: usize = 64;

/// An opened file of a chain.
#[derive(Debug)]
pub enum Layer {
    /// An image in qcow2 format, which is opened with its own backing file.
    Qcow2(Arc<dyn ImageFile>),
    /// An image in another format, which has no backing file.
    Other(Arc<dyn Image>),
}

/// Opens the image at `path` with all its backing files. These are opened read-only.
///
/// `open` opens a file, given its path, its format and whether it is read-only. The format is always the one that
/// the image above names: if formats were probed, a guest could write a qcow2 header to a raw disk, and read files
/// of the host after the next start.
///
/// # Errors
/// If an image cannot be opened, does not name the format of its backing file, is its own backing file, or has
/// more than 63 images below it.
pub fn open_chain(
    path: &Path,
    options: Options,
    open: &mut dyn FnMut(&Path, &str, bool) -> io::Result<Layer>,
) -> Result<Qcow2, Error> {
    let mut layers = Vec::new();
    let mut paths = vec![plain(path)];
    let mut format = "qcow2".to_owned();
    let mut below: Option<Arc<dyn Image>> = None;
    while let Some(path) = paths.last() {
        let read_only = options.read_only || !layers.is_empty();
        let file = match open(path, &format, read_only).map_err(Error::io("open an image"))? {
            Layer::Qcow2(file) => file,
            Layer::Other(image) => {
                below = Some(image);
                break;
            }
        };
        let header = Header::read(&*file)?;
        let backing = header.backing().cloned();
        layers.push(file);
        let Some(backing) = backing else {
            break;
        };
        let Some(backing_format) = backing.format else {
            return Err(Error::BackingFormat(backing.name));
        };
        if layers.len() >= MAX_DEPTH {
            return Err(Error::ChainLength(MAX_DEPTH));
        }
        let folder = path.parent().unwrap_or(Path::new(""));
        let next = plain(&folder.join(&backing.name));
        if paths.contains(&next) {
            return Err(Error::BackingLoop(path.display().to_string()));
        }
        format = backing_format;
        paths.push(next);
    }
    while layers.len() > 1 {
        if let Some(file) = layers.pop() {
            let options = Options {
                read_only: true,
                backing: below.take(),
                ..options.clone()
            };
            below = Some(Arc::new(Qcow2::open(file, options)?));
        }
    }
    let file = layers.pop().ok_or(Error::Magic)?;
    Qcow2::open(
        file,
        Options {
            backing: below,
            ..options
        },
    )
}

/// Returns a path without its `.` components, so that equal ones are recognized.
fn plain(path: &Path) -> PathBuf {
    path.components()
        .filter(|part| !matches!(part, Component::CurDir))
        .collect()
}
