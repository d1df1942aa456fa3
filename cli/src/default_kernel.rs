//! The kernel that a machine boots if it is given none: the one that was installed with Bantam.

use std::env;
use std::path::{self, Path, PathBuf};

use anyhow::bail;
use bantam_vmm::config::{self, MachineTable};
use serde::Serialize;

/// Names the kernel to boot in place of the one that was installed.
const VARIABLE: &str = "BANTAM_KERNEL";

/// The installed kernel, below a folder for data such as `/usr/share`. It is a link to the latest version.
const FILE: &str = "bantam/vmlinux";

/// Where distributions and their users install data.
const DATA_FOLDERS: [&str; 2] = ["/usr/local/share", "/usr/share"];

/// The keys of a machine file that give a kernel something to start from.
const ROOTS: [&str; 2] = ["disk", "initrd"];

/// Adds the installed kernel to a machine without one that has a disk or an initrd, or `has_image`.
///
/// # Errors
/// If none is installed.
pub fn complete(table: MachineTable, has_image: bool) -> anyhow::Result<MachineTable> {
    let has_root = has_image || ROOTS.into_iter().any(|key| table.has(key));
    if table.has("kernel") || !has_root {
        return Ok(table);
    }
    let Some(kernel) = find() else {
        bail!(
            "no kernel given, and none is installed: add '--kernel FILE', or install Bantam's kernel (make install), or \
             have {VARIABLE} name one"
        );
    };
    let kernel = MachineTable::from_options(&Kernel { kernel: &kernel })?;
    Ok(table.over(kernel))
}

/// The key of a machine file.
#[derive(Serialize)]
struct Kernel<'a> {
    #[serde(serialize_with = "config::path::serialize")]
    kernel: &'a Path,
}

/// Finds the kernel that the environment names, or else the one that was installed with this program or on this host.
pub fn find() -> Option<PathBuf> {
    match env::var_os(VARIABLE) {
        Some(kernel) if !kernel.is_empty() => {
            let kernel = PathBuf::from(kernel);
            // Without a current folder there is nothing better to say.
            Some(path::absolute(&kernel).unwrap_or(kernel))
        }
        _ => find_data(FILE),
    }
}

/// Finds a file that was installed with this program or on this host, by its path below a folder for data.
pub fn find_data(file: &str) -> Option<PathBuf> {
    let program = env::current_exe().ok();
    installed(file, program.as_deref(), &DATA_FOLDERS.map(Path::new))
}

/// Finds a file beside `program`, or else in one of the folders for data.
fn installed(file: &str, program: Option<&Path>, data_folders: &[&Path]) -> Option<PathBuf> {
    let prefix = program.and_then(Path::parent).and_then(Path::parent);
    let own = prefix.map(|prefix| prefix.join("share"));
    let folders = own.iter().map(PathBuf::as_path);
    let mut files = folders
        .chain(data_folders.iter().copied())
        .map(|folder| folder.join(file));
    files.find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::*;

    #[test]
    fn the_kernel_of_the_programs_own_installation_comes_first() {
        let host = TempDir::new().unwrap();
        let data = host.path().join("data");
        let program = host.path().join("own/bin/bantam");
        let find = || installed(FILE, Some(&program), &[&data]);
        assert_eq!(find(), None);
        for prefix in [data.as_path(), &host.path().join("own/share")] {
            let kernel = prefix.join(FILE);
            fs::create_dir_all(kernel.parent().unwrap()).unwrap();
            // A folder is not a kernel.
            fs::create_dir(&kernel).unwrap();
            assert_ne!(find().as_ref(), Some(&kernel));
            fs::remove_dir(&kernel).unwrap();
            fs::write(&kernel, "").unwrap();
            assert_eq!(find(), Some(kernel));
        }
        assert_eq!(installed(FILE, None, &[&data]), Some(data.join(FILE)));
    }

    #[test]
    fn only_a_machine_with_something_to_boot_gets_a_kernel() {
        let table = |text: &str| MachineTable::from_toml(text, Path::new("")).unwrap();
        for text in ["", "kernel = 'k'", "kernel = 'k'\ndisk = [{path = 'd'}]"] {
            let table = table(text);
            assert_eq!(complete(table.clone(), false).unwrap(), table);
        }
    }
}
