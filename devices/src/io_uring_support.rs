//! What the host's io_uring can do, and what a ring is for.

use std::io;
use std::os::fd::RawFd;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{IoUring, Probe, cqueue, squeue};

/// `IORING_UNREGISTER_FILES` (`linux/io_uring.h`).
const UNREGISTER_FILES: u8 = 3;

/// How a ring is made.
type Builder = io_uring::Builder<squeue::Entry, cqueue::Entry>;

/// Makes a ring of `entries` that takes the operations with these codes on these files until they are unregistered, and
/// nothing else ever: filters of system calls do not see what a ring does.
///
/// # Errors
/// `EOPNOTSUPP` if an operation is missing, `EINVAL` before Linux 5.10, or another error of the kernel.
pub(crate) fn restricted_ring(
    mut builder: Builder,
    entries: u32,
    codes: &[u8],
    files: &[RawFd],
) -> io::Result<IoUring> {
    let ring = builder.setup_r_disabled().build(entries)?;
    let submitter = ring.submitter();
    let mut probe = Probe::new();
    submitter.register_probe(&mut probe)?;
    if !codes.iter().all(|&code| probe.is_supported(code)) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    submitter.register_files(files)?;
    let registered = Flags::FIXED_FILE.bits();
    let mut restrictions: Vec<_> = codes
        .iter()
        .map(|&code| Restriction::sqe_op(code))
        .collect();
    restrictions.push(Restriction::sqe_flags_required(registered));
    restrictions.push(Restriction::register_op(UNREGISTER_FILES));
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()?;
    Ok(ring)
}
