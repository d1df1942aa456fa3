//! Images that are kept for machines to be made of.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;

use bantam_storage::HostFile;
use bantam_storage::tools::{Format, Purpose, open, probe};
use bantam_vmm::config::{DiskConfig, DiskFormatOption};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::files;
use crate::images::format_of;
use crate::lock::{self, Purpose as LockPurpose};
use crate::manager::Manager;
use crate::name::MachineName;

/// Begins the name of an image that is being copied.
const NEW: &str = ".new-";
/// An image that machines are made of is never written to.
const MODE: u32 = 0o444;
/// How much is copied at once, in bytes.
const CHUNK: usize = 1 << 20;

/// An image in the folder of images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct StoredImage {
    /// Its name.
    pub name: MachineName,
    /// Its format: raw or qcow2.
    pub format: String,
    /// Size of its disk in bytes.
    pub size: u64,
    /// Its file.
    pub path: PathBuf,
}

/// The SHA-256 checksum of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum([u8; 32]);

impl FromStr for Checksum {
    type Err = String;

    fn from_str(text: &str) -> Result<Checksum, String> {
        let wrong = || "it is 64 hexadecimal digits, as sha256sum prints them".to_owned();
        if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let mut bytes = [0; 32];
        for (byte, place) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[place..place + 2], 16).map_err(|_| wrong())?;
        }
        Ok(Checksum(bytes))
    }
}

impl Manager {
    /// Finds an image: a file at this path, or else the image of this name in the folder of images.
    ///
    /// # Errors
    /// If there is neither.
    pub fn find_image(&self, name: &Path) -> Result<PathBuf, Error> {
        if name.exists() && !name.is_dir() {
            return Ok(name.to_owned());
        }
        let kept = name.to_str().and_then(|name| name.parse().ok());
        match kept.and_then(|name: MachineName| self.path_of_image(&name)) {
            Some(path) => Ok(path),
            None => Err(Error::Store {
                action: "find",
                name: name.display().to_string(),
                reason: "there is neither such a file nor such a name; `bantam images list` shows the names that there are"
                    .to_owned(),
            }),
        }
    }

    /// Returns the images in the folder of images, in the order of their names.
    ///
    /// # Errors
    /// If the folder or an image cannot be read.
    pub fn stored_images(&self) -> Result<Vec<StoredImage>, Error> {
        let folder = self.folders().images();
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &folder)(error)),
        };
        let mut images = Vec::new();
        for entry in entries {
            let path = entry.map_err(Error::file("read", &folder))?.path();
            let Some((name, format)) = name_and_format(&path) else {
                continue;
            };
            let opened = open(&path, Some(format), Purpose::ReadShared);
            let opened = opened.map_err(|error| refused("read", &name, error.to_string()))?;
            images.push(StoredImage {
                name,
                format: format.to_string(),
                size: opened.image.size(),
                path,
            });
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Copies the image `source` into the folder of images, under `name` or else that of the file. Without a format its
    /// name says it.
    ///
    /// # Errors
    /// If there is an image of that name, `source` is not an image of this format or has a backing file, its checksum is
    /// another one, or the host refuses it.
    pub fn add_image(
        &self,
        source: &Path,
        name: Option<MachineName>,
        format: Option<DiskFormatOption>,
        checksum: Option<Checksum>,
    ) -> Result<StoredImage, Error> {
        const ACTION: &str = "add";
        let name = match name {
            Some(name) => name,
            None => {
                let stem = source.file_stem().unwrap_or_default().to_string_lossy();
                stem.parse()?
            }
        };
        let format = checked_format(ACTION, source, format)?;
        // Nobody writes to it while it is open.
        let opened = open(source, Some(format), Purpose::Read);
        let opened = opened.map_err(|error| refused(ACTION, &name, error.to_string()))?;
        if opened.files.len() > 1 {
            let reason = "it has a backing file; make one image of both first (bantam image convert -O qcow2)";
            return Err(refused(ACTION, &name, reason));
        }
        let size = opened.image.size();
        let folder = self.folders().images();
        files::create_folders(&folder).map_err(Error::file("create", &folder))?;
        let new = {
            let _all = self.lock_all()?;
            NewImage::create(&folder, &name)?
        };
        let found = new
            .copy(source)
            .map_err(Error::io(format!("copy '{}'", source.display())))?;
        if checksum.is_some_and(|checksum| checksum != found) {
            let reason = format!(
                "the SHA-256 checksum of '{}' is another one; fetch the file again",
                source.display()
            );
            return Err(refused(ACTION, &name, reason));
        }
        let path = folder.join(format!("{name}.{format}"));
        let _all = self.lock_all()?;
        if self.path_of_image(&name).is_some() {
            let reason = "there is one of that name; choose another (--name), or remove it first";
            return Err(refused(ACTION, &name, reason));
        }
        new.put_in_place(&path)
            .map_err(Error::file("create", &path))?;
        Ok(StoredImage {
            name,
            format: format.to_string(),
            size,
            path,
        })
    }

    /// Removes an image from the folder of images.
    ///
    /// # Errors
    /// If there is none of that name, a machine needs it, or that cannot be found out.
    pub fn remove_image(&self, name: &MachineName) -> Result<(), Error> {
        const ACTION: &str = "remove";
        let _all = self.lock_all()?;
        let Some(path) = self.path_of_image(name) else {
            let reason = "there is none; `bantam images list` shows those that there are";
            return Err(refused(ACTION, name, reason));
        };
        let real = fs::canonicalize(&path).map_err(Error::file("find", &path))?;
        for machine in self.machines()? {
            let needed = machine.needed_images();
            let machine = machine.name();
            if needed.files.contains(&real) {
                let reason = format!(
                    "machine '{machine}' needs it; undefine that first (bantam undefine {machine})"
                );
                return Err(refused(ACTION, name, reason));
            }
            if let Some(reason) = needed.unknown {
                let reason =
                    format!("it is not known whether machine '{machine}' needs it: {reason}");
                return Err(refused(ACTION, name, reason));
            }
        }
        fs::remove_file(&path).map_err(Error::file("remove", &path))
    }

    fn path_of_image(&self, name: &MachineName) -> Option<PathBuf> {
        let folder = self.folders().images();
        let paths =
            [Format::Qcow2, Format::Raw].map(|format| folder.join(format!("{name}.{format}")));
        paths.into_iter().find(|path| path.exists())
    }
}

/// Returns the format of an image that a user names: the one that is given, or else the one that its name says, unless it
/// is in fact of another.
pub(crate) fn checked_format(
    action: &'static str,
    path: &Path,
    given: Option<DiskFormatOption>,
) -> Result<Format, Error> {
    let mut disk = DiskConfig::new(path);
    disk.format = given;
    let format = format_of(&disk);
    let opened = File::open(path).map_err(Error::file("open", path))?;
    let found = probe(&HostFile::new(opened)).map_err(Error::file("read", path))?;
    if given.is_none() && found != format {
        return Err(Error::Store {
            action,
            name: path.display().to_string(),
            reason: format!(
                "its name says that it is {format}, but it looks like {found}; give its format, raw or qcow2, or convert it \
                 first (bantam image convert)"
            ),
        });
    }
    Ok(format)
}

/// Returns the name and the format of an image by its path; `None` if it is something else.
fn name_and_format(path: &Path) -> Option<(MachineName, Format)> {
    let format = match path.extension()?.to_str()? {
        "qcow2" => Format::Qcow2,
        "raw" => Format::Raw,
        _ => return None,
    };
    Some((path.file_stem()?.to_str()?.parse().ok()?, format))
}

fn refused(action: &'static str, name: &MachineName, reason: impl Into<String>) -> Error {
    Error::Store {
        action,
        name: name.to_string(),
        reason: reason.into(),
    }
}

/// An image that is being copied. It is removed with this, unless it has been put in its place.
struct NewImage {
    path: PathBuf,
    file: File,
}

impl NewImage {
    /// Makes the file, and removes those that killed commands have left.
    fn create(folder: &Path, name: &MachineName) -> Result<NewImage, Error> {
        for entry in fs::read_dir(folder).map_err(Error::file("read", folder))? {
            let path = entry.map_err(Error::file("read", folder))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let is_left = |path: &Path| {
                let file = File::open(path)?;
                lock::is_locked(&file, LockPurpose::Life).map(|is_locked| !is_locked)
            };
            if name.starts_with(NEW) && is_left(&path).unwrap_or(false) {
                files::remove_file(&path).map_err(Error::file("remove", &path))?;
            }
        }
        let path = folder.join(format!("{NEW}{}-{name}", process::id()));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(Error::file("create", &path))?;
        let new = NewImage { path, file };
        lock::try_lock(&new.file, LockPurpose::Life).map_err(Error::file("lock", &new.path))?;
        Ok(new)
    }

    /// Copies `source`, without room for zeroes, and returns its checksum.
    fn copy(&self, source: &Path) -> io::Result<Checksum> {
        let mut source = File::open(source)?;
        let mut target = &self.file;
        let mut hash = Sha256::new();
        let mut chunk = vec![0; CHUNK];
        let mut size = 0;
        loop {
            let count = match source.read(&mut chunk) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                count => count?,
            };
            if count == 0 {
                break;
            }
            let read = &chunk[..count];
            hash.update(read);
            match read.iter().all(|&byte| byte == 0) {
                true => drop(target.seek(SeekFrom::Current(count as i64))?),
                false => target.write_all(read)?,
            }
            size += count as u64;
        }
        self.file.set_len(size)?;
        self.file.sync_all()?;
        Ok(Checksum(hash.finalize().into()))
    }

    fn put_in_place(self, path: &Path) -> io::Result<()> {
        fs::set_permissions(&self.path, Permissions::from_mode(MODE))?;
        fs::rename(&self.path, path)?;
        path.parent().map_or(Ok(()), files::sync_folder)
    }
}

impl Drop for NewImage {
    fn drop(&mut self) {
        // In its place, it has another name.
        let _ = files::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn checksums_are_those_of_sha256sum() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        fs::write(&source, "abc").unwrap();
        let name = "a".parse().unwrap();
        let new = NewImage::create(folder.path(), &name).unwrap();
        let known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(new.copy(&source).unwrap(), known.parse().unwrap());
        assert_eq!(
            known.to_ascii_uppercase().parse::<Checksum>(),
            known.parse()
        );
        for text in ["", "ba78", &known.replace('b', "g"), &"é".repeat(32)] {
            assert!(text.parse::<Checksum>().is_err(), "{text}");
        }
    }

    #[test]
    fn zeroes_take_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("source");
        let mut content = vec![0; 5 * CHUNK + 7];
        content[2 * CHUNK] = 1;
        fs::write(&source, &content).unwrap();
        let new = NewImage::create(folder.path(), &"a".parse().unwrap()).unwrap();
        new.copy(&source).unwrap();
        let path = folder.path().join("a.raw");
        new.put_in_place(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), content);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 2 * CHUNK as u64);
    }

    #[test]
    fn what_a_killed_command_has_left_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let left = folder.path().join(".new-1-a");
        fs::write(&left, "x").unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let first = NewImage::create(folder.path(), &a).unwrap();
        assert!(!left.exists());
        // One that is being copied stays.
        let second = NewImage::create(folder.path(), &b).unwrap();
        assert!(first.path.exists() && second.path.exists());
        drop(first);
        drop(second);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn names_of_files_say_name_and_format() {
        let found = |path: &str| {
            let (name, format) = name_and_format(Path::new(path))?;
            Some(format!("{name} {format}"))
        };
        assert_eq!(
            found("/i/debian-12.5.qcow2").as_deref(),
            Some("debian-12.5 qcow2")
        );
        assert_eq!(found("/i/a.raw").as_deref(), Some("a raw"));
        for path in ["/i/.new-1-a.raw", "/i/a", "/i/a.img", "/i/"] {
            assert_eq!(found(path), None, "{path}");
        }
    }
}
