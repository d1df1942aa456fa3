//! Groups that a user names, with values for files that the user names: what Firecracker's jailer makes.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::process;
use std::str::FromStr;

use crate::host::{Hierarchy, Host};
use crate::{Error, SUBTREE, Version, join};

/// The controller of version 1 whose groups take no process before they have processors and memory.
const CPUSET: &str = "cpuset";

/// A value for a file of a group, written `FILE=VALUE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileValue {
    file: String,
    value: String,
}

impl FileValue {
    /// The name of a file begins with the name of its controller.
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }

    fn write(&self, folder: &Path) -> Result<(), Error> {
        let path = folder.join(&self.file);
        fs::write(&path, &self.value).map_err(|source| Error::Limit {
            path,
            value: self.value.clone(),
            source,
        })
    }
}

impl FromStr for FileValue {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<FileValue, &'static str> {
        let (file, value) = text
            .split_once('=')
            .ok_or("it must be FILE=VALUE, such as cpu.shares=512")?;
        let is_file = |text: &str| {
            let mut bytes = text.bytes();
            bytes.all(|it| it.is_ascii_alphanumeric() || b"._-".contains(&it))
        };
        match file.split_once('.') {
            Some((controller, rest))
                if !controller.is_empty() && !rest.is_empty() && is_file(file) =>
            {
                Ok(FileValue {
                    file: file.into(),
                    value: value.into(),
                })
            }
            _ => Err("a file of a group is CONTROLLER.NAME, such as cpu.shares"),
        }
    }
}

/// Moves this process into a group of its own with `values`, for good: the group `path`, below the root of each hierarchy of
/// this version that has a controller for one of them. Groups that do not exist are made. Without values, nothing happens.
///
/// # Errors
/// If `path` leads out of the hierarchy, the host has not mounted a controller, or the kernel refuses a group, a value, or the
/// process. What was made by then stays.
pub fn enter_named(version: Version, path: &Path, values: &[FileValue]) -> Result<(), Error> {
    let path = below_root(path)?;
    let host = Host::read()?;
    let mut folders: Vec<(&Hierarchy, PathBuf)> = Vec::new();
    for value in values {
        let controller = value.controller();
        let found = host
            .hierarchies()
            .find(|it| it.version == version && it.has(controller))
            .ok_or_else(|| Error::NoController {
                controller: controller.into(),
            })?;
        let folder = found.mount.join(path);
        make(found, path, controller)?;
        value.write(&folder)?;
        if folders.iter().all(|(known, _)| *known != found) {
            folders.push((found, folder));
        }
    }
    folders.iter().try_for_each(|(_, folder)| move_into(folder))
}

/// Moves this process into the group `path` of version 2, which exists, for good.
///
/// # Errors
/// If `path` leads out of the hierarchy, the host has not mounted it, or the kernel does not take the process.
pub fn enter_existing(path: &Path) -> Result<(), Error> {
    let path = below_root(path)?;
    let host = Host::read()?;
    let unified = host.hierarchies().find(|it| it.version == Version::Two);
    let unified = unified.ok_or_else(|| Error::NoController {
        controller: "of version 2".into(),
    })?;
    move_into(&unified.mount.join(path))
}

fn below_root(path: &Path) -> Result<&Path, Error> {
    let mut components = path.components();
    match components.all(|it| matches!(it, Component::Normal(_))) {
        true => Ok(path),
        false => Err(Error::Outside { path: path.into() }),
    }
}

fn move_into(folder: &Path) -> Result<(), Error> {
    join(folder, process::id()).map_err(|source| Error::Refused {
        parent: folder.into(),
        source,
    })
}

/// Makes the group and those above it, and has the controller apply to it.
fn make(hierarchy: &Hierarchy, path: &Path, controller: &str) -> Result<(), Error> {
    let mut folder = hierarchy.mount.clone();
    for name in path {
        let parent = folder.clone();
        folder.push(name);
        let refused = |source| Error::Refused {
            parent: parent.clone(),
            source,
        };
        if hierarchy.version == Version::Two {
            fs::write(parent.join(SUBTREE), format!("+{controller}")).map_err(refused)?;
        }
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(refused(error));
            }
            _ => {}
        }
        if hierarchy.version == Version::One && controller == CPUSET {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                inherit(&parent, &folder, file).map_err(refused)?;
            }
        }
    }
    Ok(())
}

/// Gives a group what the group above it has in a file, if it has nothing there.
fn inherit(parent: &Path, folder: &Path, file: &str) -> io::Result<()> {
    let own = folder.join(file);
    match fs::read_to_string(&own)?.trim().is_empty() {
        true => fs::write(own, fs::read(parent.join(file))?),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_for_files_of_a_group() {
        let value: FileValue = "cpuset.cpus=0-1,3".parse().unwrap();
        assert_eq!(value.controller(), "cpuset");
        assert_eq!((&*value.file, &*value.value), ("cpuset.cpus", "0-1,3"));
        assert_eq!("memory.max=".parse::<FileValue>().unwrap().value, "");
        for text in [
            "",
            "cpu.shares",
            "shares=1",
            ".x=1",
            "cpu.=1",
            "../x.y=1",
            "a/b.c=1",
        ] {
            assert!(text.parse::<FileValue>().is_err(), "{text}");
        }
    }

    #[test]
    fn groups_are_below_the_root_of_a_hierarchy() {
        for path in ["/cpu", "../x", "a/../../b", "."] {
            let error = enter_named(Version::One, Path::new(path), &[]).unwrap_err();
            assert!(matches!(error, Error::Outside { .. }), "{error}");
            assert!(enter_existing(Path::new(path)).is_err());
        }
        enter_named(Version::Two, Path::new("a/b"), &[]).unwrap();
    }
}
