//! Reset of a Linux system's identity on the disks of a machine: host name, machine id, SSH host keys, UUIDs.
//!
//! A copy of a disk holds a system that takes itself for the original. What makes a system unique is changed before the copy is
//! started, by [`Operation`]s. No kernel or program of the host parses the file systems of a guest: a *helper machine* does,
//! which has the disks and nothing else of the host.
//!
//! The host writes a [`Task`] to a small disk, the *exchange disk*, and reads an [`Outcome`] from it when the helper machine
//! has ended ([`exchange`]). In the helper machine, [`guest::serve`] is the first process. A guest's file system may have taken
//! over the helper machine's kernel by then, so the host reads the outcome as hostile bytes.

#![forbid(unsafe_code)]

mod boot_files;
mod content;
pub mod exchange;
mod files;
mod fstab;
pub mod guest;
mod identifiers;
mod operation;
mod partitions;
mod root;
mod system;
mod task;

pub use identifiers::{IdentifierKind, Replacement, replace_identifiers};
pub use operation::{Operation, OperationError, OperationSet};
pub use task::{Change, Left, Outcome, Report, Task, TaskDisk};
