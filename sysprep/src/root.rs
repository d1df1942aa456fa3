//! Files of a system, below its own root: no path or symbolic link of it leads anywhere else.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, mkdirat, openat2, statat, symlinkat,
    unlinkat,
};
use rustix::io::Errno;

/// The largest file that is read.
pub(crate) const MAX_FILE: u64 = 1 << 20;
/// The largest number of entries of a folder that are looked at.
const MAX_ENTRIES: usize = 1 << 16;
/// How deep a folder is removed or searched.
const MAX_DEPTH: usize = 32;

/// The root of a system.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

/// An entry of a folder.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) name: PathBuf,
    pub(crate) kind: FileType,
}

/// Returns `None` for what is not there.
fn if_there<T>(result: Result<T, Errno>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

impl Root {
    /// Opens a folder as the root.
    pub(crate) fn open(folder: &Path) -> io::Result<Root> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root(rustix::fs::open(folder, flags, Mode::empty())?))
    }

    fn open_at(&self, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let flags = match flags.contains(OFlags::PATH) {
            true => flags | OFlags::CLOEXEC,
            // Without O_NONBLOCK, a FIFO would wait for its other end.
            false => flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK,
        };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.0, path, flags, mode, resolve)
    }

    /// Opens a folder, and returns the last component of the path beside it.
    fn parent<'a>(&self, path: &'a Path) -> io::Result<Option<(OwnedFd, &'a Path)>> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let folder = path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new("/"));
        let opened = self.open_at(folder, OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        Ok(if_there(opened)?.map(|opened| (opened, Path::new(name))))
    }

    /// Returns what is at a path, without following a link there.
    pub(crate) fn kind(&self, path: impl AsRef<Path>) -> io::Result<Option<FileType>> {
        let Some((folder, name)) = self.parent(path.as_ref())? else {
            return Ok(None);
        };
        let stat = if_there(statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW))?;
        Ok(stat.map(|stat| FileType::from_raw_mode(stat.st_mode)))
    }

    /// Returns whether there is something at a path, even a link that leads nowhere.
    pub(crate) fn has(&self, path: impl AsRef<Path>) -> bool {
        matches!(self.kind(path), Ok(Some(_)))
    }

    /// Opens a regular file.
    pub(crate) fn file(&self, path: impl AsRef<Path>, flags: OFlags) -> io::Result<Option<File>> {
        let Some(file) = if_there(self.open_at(path.as_ref(), flags, Mode::empty()))? else {
            return Ok(None);
        };
        let file = File::from(file);
        match file.metadata()?.is_file() {
            true => Ok(Some(file)),
            false => Err(io::Error::other("it is not a regular file")),
        }
    }

    /// Reads a file.
    pub(crate) fn read(&self, path: impl AsRef<Path>) -> io::Result<Option<Vec<u8>>> {
        let Some(file) = self.file(path, OFlags::RDONLY)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        match bytes.len() as u64 > MAX_FILE {
            true => Err(io::Error::other("it is larger than 1 MiB")),
            false => Ok(Some(bytes)),
        }
    }

    /// Gives a file that exists another content. Its owner, mode and attributes stay. Returns `false` if it does not exist.
    pub(crate) fn overwrite(&self, path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<bool> {
        let Some(file) = self.file(path, OFlags::WRONLY)? else {
            return Ok(false);
        };
        file.set_len(bytes.len() as u64)?;
        file.write_all_at(bytes, 0)?;
        Ok(true)
    }

    /// Makes a file that does not exist, in a folder that does.
    pub(crate) fn create(&self, path: impl AsRef<Path>, bytes: &[u8]) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
        let file = self.open_at(path.as_ref(), flags, Mode::from_raw_mode(0o644))?;
        File::from(file).write_all_at(bytes, 0)
    }

    /// Makes a folder if it does not exist, in a folder that does.
    pub(crate) fn create_folder(&self, path: impl AsRef<Path>) -> io::Result<()> {
        let parent = self.parent(path.as_ref())?;
        let (folder, name) = parent.ok_or(Errno::NOENT)?;
        match mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
            Err(Errno::EXIST) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Makes a symbolic link.
    pub(crate) fn link(&self, target: &str, path: impl AsRef<Path>) -> io::Result<()> {
        let parent = self.parent(path.as_ref())?;
        let (folder, name) = parent.ok_or(Errno::NOENT)?;
        Ok(symlinkat(target, &folder, name)?)
    }

    /// Removes a file or a link. Returns whether there was one.
    pub(crate) fn remove(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        let Some((folder, name)) = self.parent(path.as_ref())? else {
            return Ok(false);
        };
        Ok(if_there(unlinkat(&folder, name, AtFlags::empty()))?.is_some())
    }

    /// Returns the entries of a folder; none if it does not exist.
    pub(crate) fn list(&self, path: impl AsRef<Path>) -> io::Result<Vec<Entry>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        match if_there(self.open_at(path.as_ref(), flags, Mode::empty()))? {
            Some(folder) => entries(folder),
            None => Ok(Vec::new()),
        }
    }

    /// Removes a folder, or a file, with all that is in it. Links are removed, not followed. Returns whether there was one.
    pub(crate) fn remove_all(&self, path: impl AsRef<Path>) -> io::Result<bool> {
        match self.parent(path.as_ref())? {
            Some((folder, name)) => remove_all(folder.as_fd(), name, MAX_DEPTH),
            None => Ok(false),
        }
    }

    /// Returns the paths of all regular files below a folder, without following links.
    pub(crate) fn files_below(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut waiting = vec![(folder.to_path_buf(), 0)];
        while let Some((folder, depth)) = waiting.pop() {
            for entry in self.list(&folder)? {
                let path = folder.join(&entry.name);
                match entry.kind {
                    FileType::RegularFile => found.push(path),
                    FileType::Directory if depth < MAX_DEPTH => waiting.push((path, depth + 1)),
                    _ => {}
                }
                if found.len() + waiting.len() > MAX_ENTRIES {
                    return Err(io::Error::other("it has too many files"));
                }
            }
        }
        found.sort();
        Ok(found)
    }

    /// Opens a folder as a place to mount something on.
    pub(crate) fn mount_point(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        if_there(self.open_at(path, flags, Mode::empty()))
    }
}

/// Returns the entries of a folder that is open for reading.
fn entries(folder: OwnedFd) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for entry in Dir::read_from(&folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if matches!(name, b"." | b"..") {
            continue;
        }
        if entries.len() == MAX_ENTRIES {
            return Err(io::Error::other("it has too many entries"));
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = statat(&folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        let name = OsString::from_vec(name.to_vec()).into();
        entries.push(Entry { name, kind });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

fn remove_all(folder: impl AsFd, name: &Path, depth: usize) -> io::Result<bool> {
    match unlinkat(&folder, name, AtFlags::empty()) {
        Err(Errno::ISDIR) => {}
        result => return Ok(if_there(result)?.is_some()),
    }
    if depth == 0 {
        return Err(io::Error::other("it is too deep"));
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let inner = rustix::fs::openat(&folder, name, flags, Mode::empty())?;
    for entry in entries(inner.try_clone()?)? {
        remove_all(&inner, &entry.name, depth - 1)?;
    }
    unlinkat(&folder, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn links_lead_to_nothing_outside() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "secret").unwrap();
        let inside = folder.path().join("inside");
        fs::create_dir_all(inside.join("real")).unwrap();
        fs::write(inside.join("real/file"), "own").unwrap();
        symlink(&outside, inside.join("absolute")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        symlink("/../../real", inside.join("own")).unwrap();
        symlink("loop", inside.join("loop")).unwrap();
        let root = Root::open(&inside).unwrap();
        for path in [
            "/absolute/file",
            "relative/file",
            "../outside/file",
            "/real/../../outside/file",
        ] {
            assert_eq!(root.read(path).unwrap(), None, "{path}");
            assert!(!root.remove(path).unwrap(), "{path}");
            assert!(!root.overwrite(path, b"x").unwrap(), "{path}");
        }
        assert!(root.create("/absolute/new", b"x").is_err());
        assert_eq!(
            root.read("/own/file").unwrap().as_deref(),
            Some(&b"own"[..])
        );
        assert!(root.read("/loop/file").is_err());
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
        // A link is removed, not what it leads to.
        assert!(root.remove_all("/absolute").unwrap());
        assert!(outside.join("file").exists());
    }

    #[test]
    fn what_is_no_regular_file_or_too_large_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let root = Root::open(folder.path()).unwrap();
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        fs::create_dir(folder.path().join("folder")).unwrap();
        assert!(root.read("fifo").is_err());
        assert!(root.overwrite("fifo", b"x").is_err());
        assert!(root.read("folder").is_err());
        let large = File::create(folder.path().join("large")).unwrap();
        large.set_len(MAX_FILE).unwrap();
        assert!(root.read("large").is_ok());
        large.set_len(100 << 20).unwrap();
        assert!(
            root.read("large")
                .unwrap_err()
                .to_string()
                .contains("larger")
        );
    }

    #[test]
    fn folders_are_removed_with_all_that_is_in_them() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("a/b/c")).unwrap();
        fs::write(folder.path().join("a/b/file"), "x").unwrap();
        fs::write(folder.path().join("a/log"), "x").unwrap();
        let root = Root::open(folder.path()).unwrap();
        let files = root.files_below(Path::new("/a")).unwrap();
        assert_eq!(files, [Path::new("/a/b/file"), Path::new("/a/log")]);
        assert!(root.remove_all("/a").unwrap());
        assert!(!root.remove_all("/a").unwrap());
        assert!(!root.has("/a"));
        let deep: PathBuf = std::iter::repeat_n("d", 50).collect();
        fs::create_dir_all(folder.path().join(&deep)).unwrap();
        assert!(root.remove_all("d").is_err());
    }
}
