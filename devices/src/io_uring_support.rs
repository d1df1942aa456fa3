//! What the host's io_uring can do.

use std::io;

use io_uring::{IoUring, Probe};

/// Checks that the host's kernel supports the operations with these codes.
///
/// # Errors
/// `EOPNOTSUPP` if one is missing, or the error with which the kernel answers the query.
pub(crate) fn require_operations(ring: &IoUring, codes: &[u8]) -> io::Result<()> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    if codes.iter().all(|&code| probe.is_supported(code)) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
    }
}
