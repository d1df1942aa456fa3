//! What a process that runs virtual machines gives up before their guests run, so that a guest that takes over the
//! process finds nothing to take: system calls that its threads never make ([`Filter`]), files and networks that its
//! machine does not use ([`Files`]), privileges, and memory that could be read from outside ([`process`]).
//!
//! Nothing is given up unless a program asks for it, and all of it is given up for good. No step needs root.

mod apply;
mod compile;
mod files;
pub mod process;
mod role;
mod table;
mod violation;

pub use apply::{Filter, Violation};
pub use files::{Confined, Files, FilesError};
pub use role::{Networks, Role};
pub use violation::report_violations;

/// Why a filter of system calls is not in force.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The kernel has no such filters, or refuses this one.
    #[error("cannot install a filter of system calls: {0}")]
    Install(std::io::Error),
    /// The handler that reports refused calls could not be installed.
    #[error("cannot install the handler of SIGSYS: {0}")]
    Handler(std::io::Error),
}
