//! The backing file of an open image, which can be replaced while the image is in use.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use super::locks::{read, try_read, write};
use crate::Image;

/// The backing file of an image, if it has one.
///
/// It changes only while all clusters of the image are locked, so a request that holds a lock on its clusters finds
/// one backing file from its beginning to its end.
#[derive(Debug)]
pub(super) struct Backing {
    below: RwLock<Option<Below>>,
    /// Number of changes so far.
    changes: AtomicU64,
}

/// A backing file.
#[derive(Debug, Clone)]
pub(crate) struct Below {
    pub image: Arc<dyn Image>,
    /// What is added to the number of one of its files to get the number in the image above. It is more than 1 if
    /// layers between the two were removed while the image was in use: numbers of files stay what they are.
    pub distance: usize,
}

impl Backing {
    pub fn new(image: Option<Arc<dyn Image>>) -> Backing {
        Backing {
            below: RwLock::new(image.map(|image| Below { image, distance: 1 })),
            changes: AtomicU64::new(0),
        }
    }

    pub fn is_some(&self) -> bool {
        read(&self.below).is_some()
    }

    pub fn is_none(&self) -> bool {
        !self.is_some()
    }

    pub fn get(&self) -> Option<Below> {
        read(&self.below).clone()
    }

    /// Number of changes so far.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Calls `answer` with the backing file if there have been `changes` changes of it, and that is known without
    /// waiting.
    pub fn try_with<T>(&self, changes: u64, answer: impl FnOnce(Option<&Below>) -> T) -> Option<T> {
        let below = try_read(&self.below)?;
        (self.changes() == changes).then(|| answer(below.as_ref()))
    }

    /// Goes on with another backing file. The caller has locked all clusters of the image.
    pub fn replace(&self, new: Option<Below>) {
        let mut below = write(&self.below);
        // A request that sees this number also sees all entries that were stored before.
        self.changes.fetch_add(1, Ordering::Release);
        *below = new;
    }
}
