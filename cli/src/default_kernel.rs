//! The kernel that was installed with Bantam.

use std::env;
use std::path::{Path, PathBuf};

/// Names the kernel in place of the one that was installed.
const VARIABLE: &str = "BANTAM_KERNEL";
/// The installed kernel, below a folder for data such as `/usr/share`.
const FILE: &str = "bantam/vmlinux";
/// Where distributions and their users install data.
const DATA_FOLDERS: [&str; 2] = ["/usr/local/share", "/usr/share"];

/// Finds the kernel that the environment names, or else the one that was installed with this program or on this host.
pub fn find() -> Option<PathBuf> {
    match env::var_os(VARIABLE) {
        Some(kernel) if !kernel.is_empty() => Some(kernel.into()),
        _ => find_data(FILE),
    }
}

/// Finds a file that was installed with this program or on this host, below a folder for data.
pub fn find_data(file: &str) -> Option<PathBuf> {
    let program = env::current_exe().ok();
    let prefix = program
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::parent);
    let own = prefix.map(|prefix| prefix.join("share"));
    let mut files = own
        .into_iter()
        .chain(DATA_FOLDERS.map(PathBuf::from))
        .map(|folder| folder.join(file));
    files.find(|file| file.is_file())
}
