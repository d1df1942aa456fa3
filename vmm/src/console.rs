//! The program's own end of a byte stream of the guest.

use std::io;
use std::os::fd::OwnedFd;

/// The program's own end of the serial port, console or channel that is configured as `stdio`.
///
/// Both descriptors must be non-blocking, or regular files; pipes of the program's own are the usual choice.
/// The start of a machine refuses any other, because the thread that serves them serves all devices. Bantam
/// does not set the flag itself, as that would set it for every process that shares the open file.
#[derive(Debug, Default)]
pub struct Console {
    /// Where the guest's input comes from.
    pub input: Option<OwnedFd>,
    /// Where the guest's output goes.
    pub output: Option<OwnedFd>,
}

impl Console {
    /// Duplicates both descriptors.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn try_clone(&self) -> io::Result<Console> {
        let clone = |end: &Option<OwnedFd>| end.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Console {
            input: clone(&self.input)?,
            output: clone(&self.output)?,
        })
    }
}
