//! What is done to images as a whole: converted, compared, mapped, measured.
//!
//! An operation that takes long gets a [`Job`], by which its caller sees how far it is and can stop it.

mod check;
mod compare;
mod copy;
mod formats;
mod map;
mod measure;
mod qcow2_target;
mod rebase;
mod zeroes;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use thiserror::Error;

pub use check::check_blocks;
pub use compare::{Difference, compare};
pub use copy::{CopyOptions, copy};
pub use formats::{
    CreateError, Created, Format, NewContent, OpenImageError, Opened, PREALLOCATIONS, Purpose,
    UnknownFormat, amend_help, create, describe_options, open, open_alone, open_file_of_qcow2,
    open_target, option_help, probe, resize,
};
pub use map::{MapEntry, map};
pub use measure::{Measured, measure_qcow2};
pub use qcow2_target::qcow2_options;
pub use rebase::copy_differences;

/// How an operation tells its caller how far it is, and learns that it has to stop.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// Called with the share that is done, from 0 to 1. It may be called from any thread.
    pub progress: &'a (dyn Fn(f64) + Sync),
    /// Stops the operation once it is set.
    pub cancelled: &'a AtomicBool,
}

impl Job<'_> {
    /// # Errors
    /// If the operation has to stop.
    fn check(&self) -> Result<(), ToolError> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(ToolError::Cancelled),
            false => Ok(()),
        }
    }

    /// Tells that `done` of `total` is done.
    fn report(&self, done: u64, total: u64) {
        let share = match total {
            0 => 1.0,
            _ => done as f64 / total as f64,
        };
        (self.progress)(share);
    }
}

/// Why an operation has failed.
#[derive(Debug, Error)]
pub enum ToolError {
    /// An image cannot be read.
    #[error("cannot read {image} at offset {offset}: {error}")]
    Read {
        /// Which image.
        image: &'static str,
        /// Where in the disk.
        offset: u64,
        /// The reason.
        error: io::Error,
    },

    /// An image cannot be written.
    #[error("cannot write the target at offset {offset}: {error}")]
    Write {
        /// Where in the disk.
        offset: u64,
        /// The reason.
        error: io::Error,
    },

    /// The caller has stopped the operation.
    #[error("interrupted")]
    Cancelled,
}
