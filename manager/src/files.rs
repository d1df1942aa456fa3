//! Files that are there as a whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// The end of the name of a file that is not complete yet.
const NEW: &str = ".new";

/// Puts `bytes` into the file at `path`, in place of an earlier one. If this fails, or the host loses its power, the
/// earlier file is still there.
pub(crate) fn replace(path: &Path, bytes: impl AsRef<[u8]>) -> io::Result<()> {
    write_over(path, bytes.as_ref(), true)
}

/// The same for what need not outlive a loss of power.
pub(crate) fn replace_quickly(path: &Path, text: &str) -> io::Result<()> {
    write_over(path, text.as_bytes(), false)
}

fn write_over(path: &Path, bytes: &[u8], is_durable: bool) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    let new = Path::new(&name);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let written = options.open(new).and_then(|mut file| {
        file.write_all(bytes)?;
        match is_durable {
            true => file.sync_all(),
            false => Ok(()),
        }
    });
    let replaced = written.and_then(|()| fs::rename(new, path));
    if replaced.is_err() {
        // The first error says more.
        let _ = fs::remove_file(new);
    }
    replaced?;
    match (is_durable, path.parent()) {
        (true, Some(folder)) => sync_folder(folder),
        _ => Ok(()),
    }
}

/// Puts the names of the files in `folder` on stable storage.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// Makes a folder, and those above it, for its user alone.
pub(crate) fn create_folders(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Removes a folder with all that is in it, if it exists.
pub(crate) fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a file if it exists.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Returns the text of a file, or `None` if it does not exist.
pub(crate) fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        assert_eq!(read(&path).unwrap(), None);
        replace(&path, "one").unwrap();
        replace_quickly(&path, "two").unwrap();
        assert_eq!(read(&path).unwrap().as_deref(), Some("two"));
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().collect();
        assert_eq!(names.len(), 1);
        assert!(replace(&folder.path().join("absent/file"), "x").is_err());
        remove_file(&path).unwrap();
        remove_file(&path).unwrap();
    }
}
