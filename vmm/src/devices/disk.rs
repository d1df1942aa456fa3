//! The disks of a machine.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bantam_boot::find_root_partition;
use bantam_devices::virtio::block::{Block, BlockError, BlockOptions, Engine};
use bantam_devices::virtio::owner::DeviceHandle;
use bantam_storage::{
    CacheMode, Disk, DiskOptions, FileAccess, FileOpener, HostOpener, ImageFormat, LockMode,
};
use tracing::subscriber::{NoSubscriber, with_default};

use super::{Build, NewDevice, Opening};
use crate::config::{
    BlockEngineOption, CacheModeOption, DiskBlockSize, DiskConfig, DiskLockOption,
};
use crate::error::Error;

/// Opens the images of all disks.
pub(super) fn open(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let config = opening.config;
    let vcpu_count = config.cpus.get();
    let disks = config.disks.iter().enumerate();
    disks
        .map(|(index, disk)| {
            let image = Disk::open_by(&**opening.opener, &disk.path, &disk_options(disk))?;
            if index == 0 && config.boots_from_first_disk() {
                opening.root_partition = root_partition(&image);
            }
            let name = disk.device_name(index);
            let options = block_options(disk, vcpu_count);
            // The guest reads it as the serial number.
            let id = match &disk.id {
                Some(id) => id.as_str().to_owned(),
                None => format!("disk{index}"),
            };
            let own_thread = disk.iothread.then(|| format!("bantam-io{index}"));
            let build: Build = Box::new(move |builder| {
                let path = image.path().to_path_buf();
                let block = Block::new(image, &id, &options);
                let block = block.map_err(|error| block_error(&path, error))?;
                let threads = builder.add_disk_threads(index, name.clone(), block.image_work());
                let device = NewDevice {
                    name,
                    log_name: format!("disk '{}'", path.display()),
                    own_thread,
                    model: block,
                };
                builder.attach(device, |block, link| {
                    DeviceHandle::Disk(block.handle(link, threads))
                })
            });
            Ok(build)
        })
        .collect()
}

/// Returns the number of the partition with the root file system, if the disk has partitions.
fn root_partition(disk: &Disk) -> Option<u32> {
    let read = |bytes: &mut [u8], offset| disk.read_at(bytes, offset);
    find_root_partition(disk.logical_block_size(), read).unwrap_or_else(|error| {
        let path = disk.path().display();
        tracing::warn!("cannot look for partitions of disk '{path}': {error}");
        None
    })
}

fn block_options(config: &DiskConfig, vcpu_count: u8) -> BlockOptions {
    BlockOptions {
        engine: match config.engine {
            BlockEngineOption::Auto => Engine::Auto,
            BlockEngineOption::IoUring => Engine::IoUring,
            BlockEngineOption::Sync => Engine::Sync,
        },
        queues: config.queue_count(vcpu_count),
        polls: config.poll,
        limits: config.limits.into(),
    }
}

fn block_error(path: &Path, error: BlockError) -> Error {
    match error {
        BlockError::Ring(source) => Error::IoUring {
            path: path.to_path_buf(),
            source,
        },
        BlockError::Resource(source) => Error::Resource {
            what: "the timer and event of a disk",
            source,
        },
    }
}

/// Returns the options with which the image of a disk is opened.
fn disk_options(config: &DiskConfig) -> DiskOptions {
    DiskOptions {
        read_only: config.readonly,
        cache: match config.cache {
            CacheModeOption::Writeback => CacheMode::Writeback,
            CacheModeOption::Writethrough => CacheMode::Writethrough,
            CacheModeOption::None => CacheMode::None,
            CacheModeOption::Unsafe => CacheMode::Unsafe,
        },
        format: config.format.map(ImageFormat::from),
        backing: config.backing,
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

/// Checks that a machine could use the image of a disk, unless another program is using it. That is not
/// checked.
///
/// # Errors
/// Those with which the start of a machine with this disk would fail.
pub fn check_disk(config: &DiskConfig) -> Result<(), Error> {
    Ok(Disk::check(&config.path, &disk_options(config))?)
}

/// Returns the files that the image of a disk is kept in: the image itself, and its backing files as far as they can be
/// opened.
pub fn disk_files(config: &DiskConfig) -> Vec<PathBuf> {
    let opener = Noting::default();
    let options = DiskOptions {
        read_only: true,
        lock: LockMode::Off,
        ..disk_options(config)
    };
    // What is wrong with the image, or worth a warning, is said when the machine is started.
    with_default(NoSubscriber::default(), || {
        let _ = Disk::open_by(&opener, &config.path, &options);
    });
    let opened = opener.opened.into_inner();
    let mut files = opened.unwrap_or_else(PoisonError::into_inner);
    files.push(config.path.clone());
    files.sort();
    files.dedup();
    files
}

/// Opens files, and notes which.
#[derive(Default)]
struct Noting {
    opened: Mutex<Vec<PathBuf>>,
}

impl FileOpener for Noting {
    fn file(&self, path: &Path, access: FileAccess) -> io::Result<File> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.push(path.to_owned());
        HostOpener.file(path, access)
    }
}
