//! Packets that go to a tap together, by one system call of io_uring.

use std::io;
use std::os::fd::AsRawFd;

use io_uring::types::Fixed;
use io_uring::{IoUring, Probe, opcode};

use crate::tap::TapQueue;
use crate::virtio::Chain;

/// Most packets at a time.
pub(super) const MAX_BATCH: usize = 16;

/// The only file that is registered with the ring.
const TAP: Fixed = Fixed(0);
/// The offset that stands for a file without places.
const NO_OFFSET: u64 = u64::MAX;

/// An io_uring over one queue of a tap.
pub(super) struct PacketRing {
    /// None once it has failed: it may then hold operations that were not submitted.
    ring: Option<IoUring>,
}

impl PacketRing {
    /// A ring that sends packets to `tap`, which must be non-blocking.
    ///
    /// # Errors
    /// When the host has no io_uring, forbids it, or lacks an operation.
    pub(super) fn new(tap: &TapQueue) -> io::Result<PacketRing> {
        let ring = IoUring::new(MAX_BATCH as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !probe.is_supported(opcode::Write::CODE) || !probe.is_supported(opcode::Writev::CODE) {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        ring.submitter().register_files(&[tap.as_raw_fd()])?;
        Ok(PacketRing { ring: Some(ring) })
    }

    /// Sends what each of `chains`, at most [`MAX_BATCH`], has for the device as one packet, in their
    /// order. Puts into `results` a negated error number for each that was not sent, and something
    /// else for the others.
    ///
    /// # Errors
    /// As `io_uring_enter`. The ring is of no more use then, and packets without a result were not
    /// sent, which `ECANCELED` stands for.
    pub(super) fn send(&mut self, chains: &[Chain], results: &mut Vec<i32>) -> io::Result<()> {
        results.clear();
        results.resize(chains.len(), -libc::ECANCELED);
        let Some(mut ring) = self.ring.take() else {
            return Err(io::Error::from_raw_os_error(libc::ECANCELED));
        };
        for (token, chain) in chains.iter().enumerate().take(MAX_BATCH) {
            let entry = match chain.readable.vectors() {
                [vector] => {
                    let base = vector.iov_base.cast_const().cast();
                    opcode::Write::new(TAP, base, vector.iov_len as u32)
                        .offset(NO_OFFSET)
                        .build()
                }
                vectors => opcode::Writev::new(TAP, vectors.as_ptr(), vectors.len() as u32)
                    .offset(NO_OFFSET)
                    .build(),
            };
            // SAFETY: the vectors, and the guest memory that they cover, are those of `chains`, which
            // are borrowed until all operations are completed. The queue has room for a batch, and
            // is empty before each.
            let pushed = unsafe { ring.submission().push(&entry.user_data(token as u64)) };
            debug_assert!(pushed.is_ok());
        }
        let mut missing = chains.len().min(MAX_BATCH);
        while missing > 0 {
            match ring.submit_and_wait(missing) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    // A non-blocking tap takes a packet or refuses it at once: what was submitted is
                    // completed, and the rest goes with the ring.
                    return Err(error);
                }
                _ => {}
            }
            for completion in ring.completion() {
                missing -= 1;
                if let Some(result) = results.get_mut(completion.user_data() as usize) {
                    *result = completion.result();
                }
            }
        }
        self.ring = Some(ring);
        Ok(())
    }
}

impl Drop for PacketRing {
    /// The kernel takes a ring down some time after it is closed; the tap is not to be kept that long.
    fn drop(&mut self) {
        if let Some(ring) = &self.ring {
            let _ = ring.submitter().unregister_files();
        }
    }
}
