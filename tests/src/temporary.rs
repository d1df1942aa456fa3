//! Temporary folders.

use std::path::Path;

use tempfile::TempDir;

/// Returns a folder in memory, for files that are written so often that a disk would take most of the time of a test; on a host
/// without `/dev/shm` it is where other temporary files are.
///
/// # Panics
/// If there is no room.
pub fn memory_folder() -> TempDir {
    let memory = Path::new("/dev/shm");
    let folder = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    folder.expect("there is room")
}
