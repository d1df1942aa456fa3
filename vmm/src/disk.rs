//! Disk images as a configuration describes them.

use bantam_devices::disk::{CacheMode, DiskFile, DiskOptions, ImageFormat, LockMode};

use crate::config::{CacheModeOption, DiskBlockSize, DiskConfig, DiskFormatOption, DiskLockOption};
use crate::error::Error;

/// How the image of a disk is opened.
pub(crate) fn disk_options(config: &DiskConfig) -> DiskOptions {
    DiskOptions {
        read_only: config.readonly,
        cache: match config.cache {
            CacheModeOption::Writeback => CacheMode::Writeback,
            CacheModeOption::Writethrough => CacheMode::Writethrough,
            CacheModeOption::None => CacheMode::None,
            CacheModeOption::Unsafe => CacheMode::Unsafe,
        },
        format: config.format.map(|DiskFormatOption::Raw| ImageFormat::Raw),
        block_size: config.block_size.map(DiskBlockSize::get),
        lock: match config.lock {
            DiskLockOption::On => LockMode::On,
            DiskLockOption::WherePossible => LockMode::WherePossible,
            DiskLockOption::Warn => LockMode::Warn,
            DiskLockOption::Off => LockMode::Off,
        },
        any_size: config.any_size,
    }
}

/// Finds out whether a machine could use the image of a disk, unless another uses it then.
///
/// # Errors
/// What the start of a machine with this disk would fail with.
pub fn check_disk(config: &DiskConfig) -> Result<(), Error> {
    Ok(DiskFile::check(&config.path, &disk_options(config))?)
}
