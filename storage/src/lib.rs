//! Disk images, usable with no machine.
//!
//! An [`Image`] is what a guest sees as a disk. It is kept in one or more [`ImageFile`]s. A raw image, whose
//! bytes are those of the disk, is a [`DiskFile`]. A machine has either of them as a [`Disk`].

mod direct_file;
mod disk;
mod file;
pub mod foreign;
mod image;
pub mod job;
mod lock;
mod open;
mod opener;
mod options;
mod overlay;
mod patience;
pub mod qcow2;
mod raw;
mod raw_image;
mod released;
mod target;
pub mod tools;

pub use direct_file::LayerFile;
pub use disk::{Disk, DiskLayer, FormattedDisk};
pub use file::{HostFile, ImageFile};
pub use image::{Allocation, BlockStatus, Content, Direction, Extent, Image};
pub use lock::{Lock, LockMode, lock_file, lock_patiently};
pub use opener::{FileAccess, FileOpener, HostOpener};
pub use options::{OptionError, Options, parse_size};
pub use patience::patiently;
pub use raw::{
    Access, Bounce, CacheMode, DiskError, DiskFile, DiskOptions, ImageFormat, SECTOR_SIZE, Step,
};
pub use raw_image::RawImage;
pub use target::{ImageTarget, Target};
