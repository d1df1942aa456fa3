//! Files that a command makes.

use std::path::Path;

use bantam_storage::FileOpener;

/// New files, which are removed with this unless they are kept.
pub(super) struct NewFiles<'a> {
    opener: &'a dyn FileOpener,
    paths: Vec<&'a Path>,
}

impl<'a> NewFiles<'a> {
    pub(super) fn new(opener: &'a dyn FileOpener) -> NewFiles<'a> {
        NewFiles {
            opener,
            paths: Vec::new(),
        }
    }

    /// Adds the file at `path`, which has been made.
    pub(super) fn add(&mut self, path: &'a Path) {
        self.paths.push(path);
    }

    pub(super) fn keep(mut self) {
        self.paths.clear();
    }
}

impl Drop for NewFiles<'_> {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = self.opener.remove(path) {
                let path = path.display();
                tracing::warn!("cannot remove the new disk '{path}', which is not used: {error}");
            }
        }
    }
}
