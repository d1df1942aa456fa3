//! Files that name file systems and partitions by their identifiers: fstab, and those of boot loaders.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use crate::files::BOOT_FOLDERS;
use crate::identifiers::{Replacement, replace_identifiers};
use crate::root::Root;

/// Files of a system.
const SYSTEM_FILES: [&str; 6] = [
    "/etc/fstab",
    "/etc/crypttab",
    "/etc/default/grub",
    "/etc/kernel/cmdline",
    "/etc/dracut.conf",
    "/etc/lilo.conf",
];

/// Folders of a system all of whose files are such files.
const SYSTEM_FOLDERS: [&str; 5] = [
    "/etc/default/grub.d",
    "/etc/cmdline.d",
    "/etc/initramfs-tools/conf.d",
    "/etc/dracut.conf.d",
    "/etc/systemd/system",
];

/// Files in the folder of a boot loader.
const BOOT_FILES: [&str; 8] = [
    "grub/grub.cfg",
    "grub/custom.cfg",
    "grub/grubenv",
    "grub2/grub.cfg",
    "grub2/grubenv",
    "extlinux/extlinux.conf",
    "syslinux/syslinux.cfg",
    "cmdline.txt",
];

/// How the names of the files in folders of EFI programs end that are such files.
const EFI_FILES: [&str; 2] = ["grub.cfg", "grubenv"];

/// An edit of such a file.
#[derive(Debug)]
pub(crate) struct Edit {
    pub(crate) path: PathBuf,
    content: Vec<u8>,
}

impl Edit {
    pub(crate) fn apply(&self, root: &Root) -> io::Result<()> {
        root.overwrite(&self.path, &self.content).map(drop)
    }
}

/// What keeps identifiers from being changed: a file that may name them and cannot follow, and why.
pub(crate) type Obstacle = (PathBuf, String);

/// Returns the edits that make a system follow, or what keeps it from doing so. Nothing is written.
pub(crate) fn plan_system(
    root: &Root,
    replacements: &[Replacement],
) -> Result<Vec<Edit>, Vec<Obstacle>> {
    let mut plan = Plan::new(root, replacements);
    for path in SYSTEM_FILES {
        plan.file(Path::new(path));
    }
    for folder in SYSTEM_FOLDERS {
        plan.folder(Path::new(folder), |_| true);
    }
    for folder in BOOT_FOLDERS {
        plan.boot_folder(Path::new(folder));
    }
    plan.finish()
}

/// The same for a file system with a boot loader that is not mounted in the system.
pub(crate) fn plan_boot(
    root: &Root,
    replacements: &[Replacement],
) -> Result<Vec<Edit>, Vec<Obstacle>> {
    let mut plan = Plan::new(root, replacements);
    plan.boot_folder(Path::new("/"));
    plan.finish()
}

struct Plan<'a> {
    root: &'a Root,
    replacements: &'a [Replacement],
    edits: Vec<Edit>,
    obstacles: Vec<Obstacle>,
}

impl<'a> Plan<'a> {
    fn new(root: &'a Root, replacements: &'a [Replacement]) -> Plan<'a> {
        Plan {
            root,
            replacements,
            edits: Vec::new(),
            obstacles: Vec::new(),
        }
    }

    fn file(&mut self, path: &Path) {
        match self.root.read(path) {
            Ok(None) => {}
            Ok(Some(content)) => {
                if let Some(content) = replace_identifiers(&content, self.replacements) {
                    let path = path.to_path_buf();
                    self.edits.push(Edit { path, content });
                }
            }
            Err(error) => self.obstacles.push((path.to_path_buf(), error.to_string())),
        }
    }

    /// Returns the paths of the entries of a folder, with the kinds of the entries.
    fn entries(&mut self, folder: &Path) -> Vec<(PathBuf, FileType)> {
        match self.root.list(folder) {
            Ok(entries) => entries
                .into_iter()
                .map(|entry| (folder.join(entry.name), entry.kind))
                .collect(),
            Err(error) => {
                self.obstacles
                    .push((folder.to_path_buf(), error.to_string()));
                Vec::new()
            }
        }
    }

    fn folder(&mut self, folder: &Path, is_wanted: impl Fn(&Path) -> bool) {
        for (path, kind) in self.entries(folder) {
            // Links lead to files that are read for themselves, or, in folders of units, to files of packages.
            if kind == FileType::RegularFile && is_wanted(&path) {
                self.file(&path);
            }
        }
    }

    fn boot_folder(&mut self, folder: &Path) {
        for name in BOOT_FILES {
            self.file(&folder.join(name));
        }
        self.folder(&folder.join("loader"), |path| ends_with(path, ".conf"));
        self.folder(&folder.join("loader/entries"), |path| {
            ends_with(path, ".conf")
        });
        for (program, kind) in self.entries(&folder.join("EFI")) {
            if kind == FileType::Directory {
                let is_file = |path: &Path| EFI_FILES.iter().any(|name| ends_with(path, name));
                self.folder(&program, is_file);
            }
        }
        for (path, _) in self.entries(&folder.join("EFI/Linux")) {
            if ends_with(&path, ".efi") {
                let reason = "a unified kernel image has its command line inside";
                self.obstacles.push((path, reason.to_owned()));
            }
        }
    }

    fn finish(self) -> Result<Vec<Edit>, Vec<Obstacle>> {
        match self.obstacles.is_empty() {
            true => Ok(self.edits),
            false => Err(self.obstacles),
        }
    }
}

fn ends_with(path: &Path, end: &str) -> bool {
    path.to_string_lossy().ends_with(end)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::IdentifierKind;

    const OLD: &str = "0b2f3d6e-11a2-4c3b-8a77-0123456789ab";
    const NEW: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

    fn replacements() -> [Replacement; 1] {
        [Replacement {
            kind: IdentifierKind::FileSystem,
            old: OLD.to_owned(),
            new: NEW.to_owned(),
        }]
    }

    #[test]
    fn all_boot_loaders_follow() {
        let folder = tempfile::tempdir().unwrap();
        let files = [
            "etc/fstab",
            "etc/kernel/cmdline",
            "etc/default/grub.d/50-cloud.cfg",
            "boot/grub/grub.cfg",
            "boot/efi/EFI/debian/grub.cfg",
            "efi/loader/entries/debian.conf",
            "boot/loader/loader.conf",
        ];
        for path in files {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("options root=UUID={OLD} ro")).unwrap();
        }
        fs::write(folder.path().join("etc/motd"), OLD).unwrap();
        let root = Root::open(folder.path()).unwrap();
        let edits = plan_system(&root, &replacements()).unwrap();
        assert_eq!(edits.len(), files.len());
        for edit in edits {
            edit.apply(&root).unwrap();
        }
        for path in files {
            let text = fs::read_to_string(folder.path().join(path)).unwrap();
            assert_eq!(text, format!("options root=UUID={NEW} ro"));
        }
        assert_eq!(
            fs::read_to_string(folder.path().join("etc/motd")).unwrap(),
            OLD
        );
    }

    #[test]
    fn a_file_that_cannot_follow_is_an_obstacle() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("etc")).unwrap();
        let fstab = fs::File::create(folder.path().join("etc/fstab")).unwrap();
        let root = Root::open(folder.path()).unwrap();
        fstab.set_len(100 << 20).unwrap();
        let obstacles = plan_system(&root, &replacements()).unwrap_err();
        assert_eq!(obstacles[0].0, Path::new("/etc/fstab"));
        fstab.set_len(0).unwrap();
        assert!(plan_system(&root, &replacements()).unwrap().is_empty());
        fs::create_dir_all(folder.path().join("efi/EFI/Linux")).unwrap();
        fs::write(folder.path().join("efi/EFI/Linux/debian.efi"), "").unwrap();
        assert_eq!(plan_system(&root, &replacements()).unwrap_err().len(), 1);
        assert_eq!(
            plan_boot(
                &Root::open(&folder.path().join("efi")).unwrap(),
                &replacements()
            )
            .unwrap_err()
            .len(),
            1
        );
        symlink("boot", folder.path().join("boot")).unwrap();
        assert!(plan_system(&root, &replacements()).unwrap_err().len() > 1);
    }
}
