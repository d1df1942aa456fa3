//! The program's own end of a stream of the guest.

use std::io;
use std::os::fd::OwnedFd;

/// The program's own end of the serial port, console or channel that is configured as `stdio`.
///
/// Both descriptors must be non-blocking, or regular files; pipes of the program's own are the usual choice.
/// A machine is not started with others: the thread that serves them serves all devices. Bantam does not set
/// the flag itself, as it would be set for everybody who shares the open file.
#[derive(Debug, Default)]
pub struct Console {
    /// Where the guest's input comes from.
    pub input: Option<OwnedFd>,
    /// Where the guest's output goes.
    pub output: Option<OwnedFd>,
}

impl Console {
    /// The same ends once more.
    ///
    /// # Errors
    /// When the host gives no file descriptors.
    pub fn try_clone(&self) -> io::Result<Console> {
        let clone = |end: &Option<OwnedFd>| end.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Console {
            input: clone(&self.input)?,
            output: clone(&self.output)?,
        })
    }
}
