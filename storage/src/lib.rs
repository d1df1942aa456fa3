//! Disk images, usable with no machine.
//!
//! An [`Image`] is what a guest sees as a disk. It is kept in one or more [`ImageFile`]s.

mod file;
pub mod foreign;
mod image;
mod options;
mod raw_image;
mod target;
pub mod tools;

pub use file::{HostFile, ImageFile};
pub use image::{BlockStatus, Content, Direction, Extent, Image};
pub use options::{OptionError, Options, parse_size};
pub use raw_image::RawImage;
pub use target::{ImageTarget, Target};
