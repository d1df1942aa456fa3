//! What a disk needs of the owner of its machine.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::ImageWork;

/// Starts threads of a disk, and removes files, for commands to the disk while its guest uses it.
pub trait DiskOwner: Send + Sync {
    /// Has a thread call [`ImageWork::run`].
    ///
    /// # Errors
    /// If the thread cannot be started.
    fn start_image_thread(&self, work: Arc<ImageWork>) -> io::Result<()>;

    /// Has a thread call `work`, which copies data of the disk. There is one such thread at a time.
    ///
    /// # Errors
    /// If the thread cannot be started.
    fn start_job(&self, work: Box<dyn FnOnce() + Send>) -> io::Result<()>;

    /// Removes a file that a command has made, and that is of no use.
    ///
    /// # Errors
    /// If it cannot be removed.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
}
