//! New images for disks: empty ones, and overlays, whose backing file is the image of a disk that is in use.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::direct_file::LayerFile;
use crate::disk::{Disk, DiskLayer, FormattedDisk};
use crate::file::{HostFile, ImageFile};
use crate::lock::end_writing;
use crate::open::{check_direct, image_options};
use crate::opener::{FileAccess, FileOpener};
use crate::qcow2::{self, BackingName, CreateOptions, MAX_DEPTH, Qcow2, Unsynced};
use crate::raw::{
    Access, CacheMode, DiskError, DiskOptions, ImageFormat, create_locked, open_direct,
};

impl Disk {
    /// Makes an image of this `format` at `path`, which must not exist, for a copy of the disk, and opens it with the
    /// options of the disk. It has the size of the disk and reads as zeroes. Its file has the permissions of that of the
    /// present image.
    ///
    /// # Errors
    /// If the file cannot be made, or cannot be used with these options. There is no new file then.
    pub fn create_for_copy(
        &self,
        opener: &dyn FileOpener,
        path: &Path,
        format: ImageFormat,
    ) -> Result<Disk, DiskError> {
        let options = DiskOptions {
            format: Some(format),
            // The guest knows the block size, and does not read it again.
            block_size: Some(self.logical_block_size()),
            ..self.options().clone()
        };
        let with_path = |action| {
            move |source| DiskError::Io {
                path: path.to_path_buf(),
                action,
                source,
            }
        };
        let file = opener.file(path, FileAccess::Create);
        let file = file.map_err(with_path("create"))?;
        let made = self
            .share_permissions(&file)
            .map_err(with_path("set up"))
            .and_then(|()| self.make_empty(HostFile::new(file), path, format))
            .and_then(|()| sync_folder(opener, path).map_err(with_path("sync the folder of")))
            .and_then(|()| Disk::open_by(opener, path, &options));
        if made.is_err() {
            // The first error says more than a second one.
            let _ = opener.remove(path);
        }
        made
    }

    fn make_empty(
        &self,
        file: HostFile,
        path: &Path,
        format: ImageFormat,
    ) -> Result<(), DiskError> {
        let size = self.size();
        match format {
            ImageFormat::Raw => file.set_size(size).map_err(|source| DiskError::Io {
                path: path.to_path_buf(),
                action: "create",
                source,
            }),
            ImageFormat::Qcow2 => {
                let options = CreateOptions {
                    size,
                    ..CreateOptions::default()
                };
                let created = Qcow2::create(Arc::new(file), &options);
                created.map_err(|source| DiskError::Create {
                    path: path.to_path_buf(),
                    source,
                })
            }
        }
    }

    /// Lets those use `new` who can use the present image, and nobody else: it gets the same data.
    fn share_permissions(&self, new: &File) -> io::Result<()> {
        let present = match self {
            Disk::Raw(disk) => disk.file(Access::Usual),
            Disk::Formatted(disk) => disk.files().first().map(|file| &file.cached),
        };
        let Some(present) = present else {
            return Ok(());
        };
        let mode = present.metadata()?.mode() & 0o666;
        new.set_permissions(Permissions::from_mode(mode))
    }

    /// Makes a qcow2 image at `path`, which must not exist, with the present image as its backing file, and opens it
    /// as a disk. The present image is used as it is open.
    ///
    /// The first flush of the new disk flushes the present image too. Nothing may write to that once the new disk is
    /// used; [`Disk::end_writing`] makes sure of it.
    ///
    /// # Errors
    /// If this disk is read-only or has as many backing files as it can have, its path does not lead to its image any more, or the new file cannot be made. There is no new file then.
    pub fn overlay(&self, opener: &dyn FileOpener, path: &Path) -> Result<Disk, DiskError> {
        if self.is_read_only() {
            return Err(DiskError::ReadOnlyBase {
                path: self.path().to_path_buf(),
            });
        }
        if let Disk::Formatted(disk) = self
            && disk.layers().len() >= MAX_DEPTH
        {
            return Err(DiskError::Create {
                path: path.to_path_buf(),
                source: qcow2::Error::ChainLength(MAX_DEPTH),
            });
        }
        // The overlay would have another backing file the next time.
        let base = opener.file(self.path(), FileAccess::Read);
        let is_found = base.and_then(|base| self.is_same_file(&base));
        if !is_found.unwrap_or(false) {
            return Err(DiskError::Replaced {
                path: self.path().to_path_buf(),
            });
        }
        let file = create_locked(opener, path, self.options())?;
        let made = self.overlay_in(file, opener, path);
        if made.is_err() {
            // The first error says more than a second one.
            let _ = opener.remove(path);
        }
        made
    }

    fn overlay_in(
        &self,
        file: File,
        opener: &dyn FileOpener,
        path: &Path,
    ) -> Result<Disk, DiskError> {
        let with_path = |action| {
            move |source| DiskError::Io {
                path: path.to_path_buf(),
                action,
                source,
            }
        };
        let not_made = |source| DiskError::Create {
            path: path.to_path_buf(),
            source,
        };
        let base = self.to_backing(opener)?;
        let format = base.layers().first().map(|layer| layer.format);
        let format = format.unwrap_or(ImageFormat::Qcow2);
        self.share_permissions(&file).map_err(with_path("set up"))?;
        let file = open_direct(opener, path, file, self.options())?;
        let mut files = vec![file.try_clone().map_err(with_path("set up"))?];
        for file in base.files() {
            files.push(file.try_clone().map_err(with_path("set up"))?);
        }
        let mut layers = vec![DiskLayer {
            path: path.to_path_buf(),
            format: ImageFormat::Qcow2,
        }];
        layers.extend_from_slice(base.layers());
        let mut file: Arc<dyn ImageFile> = Arc::new(HostFile::from(file));
        if self.cache() == CacheMode::Unsafe {
            file = Arc::new(Unsynced(file));
        }
        let name = self
            .backing_name(path)
            .map_err(with_path("name the backing file of"))?;
        let create_options = CreateOptions {
            size: self.size(),
            backing: Some(BackingName {
                name,
                format: Some(format.name().to_owned()),
            }),
            ..CreateOptions::default()
        };
        let base = Arc::clone(base.image());
        let image_options = image_options(self.options());
        let image = Qcow2::create_overlay(file, &create_options, base, image_options);
        let image = image.map_err(not_made)?;
        if self.cache() != CacheMode::Unsafe {
            sync_folder(opener, path).map_err(with_path("sync the folder of"))?;
        }
        if let Some(file) = files.first() {
            check_direct(path, &image, file)?;
        }
        let options = DiskOptions {
            format: Some(ImageFormat::Qcow2),
            // The guest knows the block size, and does not read it again.
            block_size: Some(self.logical_block_size()),
            ..self.options().clone()
        };
        let disk = FormattedDisk::new(path, Arc::new(image), files, &options)?;
        Ok(Disk::Formatted(disk.with_layers(layers)))
    }

    /// Returns the name by which an image at `path` finds this one: a name in the same folder, or an absolute path.
    fn backing_name(&self, path: &Path) -> io::Result<String> {
        let (base, overlay) = (
            std::path::absolute(self.path())?,
            std::path::absolute(path)?,
        );
        let name = match base.file_name() {
            // A colon at the beginning would be taken for a protocol by QEMU.
            Some(name) if base.parent() == overlay.parent() && !has_colon(name) => {
                PathBuf::from(name)
            }
            _ => base,
        };
        name.into_os_string()
            .into_string()
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "its path is not UTF-8"))
    }

    /// Brings everything to stable storage and writes no more to the image, which other programs may read from then
    /// on, but not write. No request to it is under way.
    ///
    /// # Errors
    /// If the host has failed to write something. Other programs may not read the image then.
    pub fn end_writing(&self) -> io::Result<()> {
        let file = match self {
            Disk::Raw(disk) => {
                disk.flush()?;
                disk.file(Access::Usual)
            }
            Disk::Formatted(disk) => {
                disk.image().end_writing()?;
                disk.files().first().map(LayerFile::locked)
            }
        };
        file.map_or(Ok(()), end_writing)
    }
}

fn has_colon(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().contains(&b':')
}

/// Makes sure that the file at `path` is found there after a crash of the host.
fn sync_folder(opener: &dyn FileOpener, path: &Path) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    opener.file(folder, FileAccess::Read)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    use vmm_sys_util::tempdir::TempDir;

    use super::*;
    use crate::image::{BlockStatus, Content, Direction, Extent, Image};
    use crate::opener::HostOpener;
    use crate::qcow2::Header;

    const SIZE: u64 = 1 << 20;

    /// An image that reads as sevens, and counts its flushes.
    #[derive(Debug, Default)]
    struct Sevens {
        flushes: AtomicU32,
        fails: AtomicBool,
    }

    impl Image for Sevens {
        fn size(&self) -> u64 {
            SIZE
        }

        fn is_read_only(&self) -> bool {
            false
        }

        fn map(&self, range: Range<u64>, _: Direction) -> Extent {
            let len = range.end - range.start;
            Extent::Slow { len }
        }

        fn read_at(&self, bytes: &mut [u8], _: u64) -> io::Result<()> {
            bytes.fill(7);
            Ok(())
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn write_zeroes(&self, _: Range<u64>, _: bool) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn discard(&self, _: Range<u64>) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn flush(&self) -> io::Result<()> {
            self.flushes.fetch_add(1, Ordering::SeqCst);
            match self.fails.swap(false, Ordering::SeqCst) {
                true => Err(io::ErrorKind::StorageFull.into()),
                false => Ok(()),
            }
        }

        fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
            Ok(BlockStatus {
                len: range.end - range.start,
                content: Content::Data {
                    file: 0,
                    offset: range.start,
                },
                depth: Some(0),
            })
        }
    }

    fn disk(folder: &Path, image: &Arc<Sevens>) -> Disk {
        let path = folder.join("base");
        let file = File::create(&path).unwrap();
        file.set_permissions(Permissions::from_mode(0o640)).unwrap();
        let image: Arc<dyn Image> = image.clone();
        let disk = FormattedDisk::new(&path, image, vec![file.into()], &DiskOptions::default());
        Disk::Formatted(disk.unwrap())
    }

    fn image(disk: &Disk) -> &Arc<dyn Image> {
        match disk {
            Disk::Formatted(disk) => disk.image(),
            Disk::Raw(_) => panic!("it is raw"),
        }
    }

    #[test]
    fn the_first_flush_of_an_overlay_flushes_its_base() {
        let folder = TempDir::new().unwrap();
        let base = Arc::new(Sevens::default());
        let path = folder.as_path().join("overlay");
        let overlay = disk(folder.as_path(), &base)
            .overlay(&HostOpener, &path)
            .unwrap();
        assert_eq!(base.flushes.load(Ordering::SeqCst), 0);
        image(&overlay).write_at(&[1; 512], 512).unwrap();
        for _ in 0..2 {
            overlay.flush().unwrap();
            assert_eq!(base.flushes.load(Ordering::SeqCst), 1);
        }
        let mut bytes = [0; 1024];
        image(&overlay).read_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [[7; 512], [1; 512]].concat()[..]);
        let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!(mode(&path), 0o640);
        let header = Header::read(&HostFile::new(File::open(&path).unwrap())).unwrap();
        let backing = header.backing().unwrap();
        assert_eq!(backing.name, "base");
        assert_eq!(backing.format.as_deref(), Some("qcow2"));
    }

    #[test]
    fn a_flush_of_the_base_that_has_failed_is_not_forgotten() {
        let folder = TempDir::new().unwrap();
        let base = Arc::new(Sevens::default());
        base.fails.store(true, Ordering::SeqCst);
        let path = folder.as_path().join("overlay");
        let overlay = disk(folder.as_path(), &base)
            .overlay(&HostOpener, &path)
            .unwrap();
        let first = overlay.flush().unwrap_err();
        assert_eq!(first.kind(), io::ErrorKind::StorageFull);
        overlay.flush().unwrap_err();
    }

    #[test]
    fn a_chain_is_not_longer_than_one_that_can_be_opened() {
        let folder = TempDir::new().unwrap();
        let path = |number| folder.as_path().join(format!("{number}"));
        std::fs::write(path(0), vec![7; SIZE as usize]).unwrap();
        let options = DiskOptions {
            cache: CacheMode::Unsafe,
            backing: true,
            ..DiskOptions::default()
        };
        let mut disk = Disk::open_by(&HostOpener, &path(0), &options).unwrap();
        for number in 1..MAX_DEPTH {
            disk = disk.overlay(&HostOpener, &path(number)).unwrap();
        }
        let error = disk.overlay(&HostOpener, &path(MAX_DEPTH)).unwrap_err();
        let is_told = matches!(
            &error,
            DiskError::Create {
                source: qcow2::Error::ChainLength(_),
                ..
            }
        );
        assert!(is_told, "{error}");
        assert!(!path(MAX_DEPTH).exists());
        drop(disk);
        let options = DiskOptions {
            format: Some(ImageFormat::Qcow2),
            ..options
        };
        let disk = Disk::open_by(&HostOpener, &path(MAX_DEPTH - 1), &options).unwrap();
        let mut bytes = [0; 512];
        image(&disk).read_at(&mut bytes, SIZE - 512).unwrap();
        assert_eq!(bytes, [7; 512]);
    }

    #[test]
    fn an_overlay_takes_no_place_that_is_taken() {
        let folder = TempDir::new().unwrap();
        let base = Arc::new(Sevens::default());
        let path = folder.as_path().join("overlay");
        std::fs::write(&path, "here").unwrap();
        let disk = disk(folder.as_path(), &base);
        let error = disk.overlay(&HostOpener, &path).unwrap_err().to_string();
        assert!(error.starts_with("cannot create disk '"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"here");
        // Another folder is found by its whole path.
        let other = TempDir::new().unwrap();
        let path = other.as_path().join("overlay");
        disk.overlay(&HostOpener, &path).unwrap();
        let header = Header::read(&HostFile::new(File::open(&path).unwrap())).unwrap();
        let name = folder.as_path().join("base");
        assert_eq!(header.backing().unwrap().name, name.to_str().unwrap());
    }

    #[test]
    fn an_overlay_is_refused_if_its_base_would_not_be_found_again() {
        let folder = TempDir::new().unwrap();
        let disk = disk(folder.as_path(), &Arc::new(Sevens::default()));
        let [base, moved, overlay] =
            ["base", "moved", "overlay"].map(|name| folder.as_path().join(name));
        std::fs::rename(&base, &moved).unwrap();
        for makes_another in [false, true] {
            if makes_another {
                std::fs::write(&base, "another").unwrap();
            }
            let error = disk.overlay(&HostOpener, &overlay).unwrap_err();
            assert!(matches!(error, DiskError::Replaced { .. }), "{error}");
            assert!(!overlay.exists());
        }
        std::fs::rename(&moved, &base).unwrap();
        disk.overlay(&HostOpener, &overlay).unwrap();
    }
}
