//! Files of the host that a machine needs.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::fcntl::OFlag;

use crate::fault::Fault;

/// Checks that a file can be read, so that a client hears at once of one that the start would miss.
pub(crate) fn check_readable(what: &'static str, path: &Path) -> Result<(), Fault> {
    // It does not wait for the writer of a pipe.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path);
    opened
        .map(drop)
        .map_err(|error| Fault::file(what, path, &error))
}
