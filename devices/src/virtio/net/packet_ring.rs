//! Sending and reading several packets of a file with one system call of io_uring.

use std::io;
#[cfg(test)]
use std::os::fd::RawFd;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use io_uring::squeue::Entry;
use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};

use super::backend::NetQueue;
use super::receive_slot::ReceiveSlot;
use crate::io_uring_support::restricted_ring;
use crate::virtio::Chain;

/// Most packets at a time.
pub(super) const MAX_BATCH: usize = 16;

/// The only file that is registered with the ring.
const FILE: Fixed = Fixed(0);
/// The offset that stands for a file without positions.
const NO_OFFSET: u64 = u64::MAX;

/// An io_uring over the file of a queue.
pub(super) struct PacketRing {
    /// None once it has failed: it may then hold operations that were not submitted.
    ring: Option<IoUring>,
    /// Flags with which no operation waits for the file.
    flags: i32,
}

impl PacketRing {
    /// Makes a ring for packets to and from `file`, which must be non-blocking.
    ///
    /// # Errors
    /// If the host has no io_uring, forbids it, or lacks an operation.
    pub(super) fn new(file: BorrowedFd<'_>) -> io::Result<PacketRing> {
        let needed = [
            opcode::Read::CODE,
            opcode::Readv::CODE,
            opcode::Write::CODE,
            opcode::Writev::CODE,
        ];
        let files = [file.as_raw_fd()];
        let mut ring = restricted_ring(IoUring::builder(), MAX_BATCH as u32, &needed, &files)?;
        let flags = flags_against_waiting(&mut ring)?;
        Ok(PacketRing {
            ring: Some(ring),
            flags,
        })
    }

    /// Whether it can be used: no operation has failed to reach the kernel.
    pub(super) fn is_usable(&self) -> bool {
        self.ring.is_some()
    }

    /// Replaces a ring that has failed by another over the file of `queue`, if the host gives one.
    pub(super) fn renew(&mut self, queue: &dyn NetQueue) {
        if !self.is_usable()
            && let Some(file) = queue.packet_file()
            && let Ok(ring) = PacketRing::new(file)
        {
            *self = ring;
        }
    }

    /// Sends what each of `chains`, at most [`MAX_BATCH`], has for the device as one packet, in their
    /// order. Puts into `results` a negated error number for each that was not sent, and something
    /// else for the others.
    ///
    /// # Errors
    /// Those of `io_uring_enter`. The ring can then no longer be used, and packets without a result were not
    /// sent, which `ECANCELED` stands for.
    pub(super) fn send(&mut self, chains: &[Chain], results: &mut Vec<i32>) -> io::Result<()> {
        let flags = self.flags;
        let entries = chains.iter().map(|chain| match chain.readable.vectors() {
            [vector] => {
                let base = vector.iov_base.cast_const().cast();
                opcode::Write::new(FILE, base, vector.iov_len as u32)
                    .offset(NO_OFFSET)
                    .rw_flags(flags)
                    .build()
            }
            vectors => opcode::Writev::new(FILE, vectors.as_ptr(), vectors.len() as u32)
                .offset(NO_OFFSET)
                .rw_flags(flags)
                .build(),
        });
        // SAFETY: the vectors, and the guest memory that they cover, are those of `chains`, which are
        // borrowed until this call returns.
        unsafe { run(&mut self.ring, entries, results) }
    }

    /// Reads a packet into each of `slots`, at most [`MAX_BATCH`], in order, as far as there are packets.
    /// Puts into `results` the size of each, or a negated error number.
    ///
    /// # Errors
    /// Those of [`PacketRing::send`].
    pub(super) fn receive(
        &mut self,
        slots: &mut [ReceiveSlot],
        results: &mut Vec<i32>,
    ) -> io::Result<()> {
        let flags = self.flags;
        let entries = slots.iter_mut().map(|slot| {
            let vectors = slot.vectors_to_read_to();
            opcode::Readv::new(FILE, vectors.as_ptr(), vectors.len() as u32)
                .offset(NO_OFFSET)
                .rw_flags(flags)
                .build()
        });
        // SAFETY: the vectors, and the memory that they cover, are those of `slots`, which are borrowed
        // until this call returns, and each of which makes its vectors once.
        unsafe { run(&mut self.ring, entries, results) }
    }
}

/// Has the kernel do all operations of `entries`, of which the ring takes at most [`MAX_BATCH`], and returns
/// when they are done. Puts their results into `results`. The ring is gone if this fails.
///
/// # Safety
/// What the entries point to must be valid for the kernel's use until this returns, and none of them
/// may wait for the file.
unsafe fn run(
    place: &mut Option<IoUring>,
    entries: impl Iterator<Item = Entry>,
    results: &mut Vec<i32>,
) -> io::Result<()> {
    results.clear();
    let Some(mut ring) = place.take() else {
        return Err(io::Error::from_raw_os_error(libc::ECANCELED));
    };
    for (token, entry) in entries.enumerate().take(MAX_BATCH) {
        // SAFETY: as the caller promises. The queue, which is empty before, has room for a batch.
        let pushed = unsafe { ring.submission().push(&entry.user_data(token as u64)) };
        debug_assert!(pushed.is_ok());
        results.push(-libc::ECANCELED);
    }
    let mut missing = results.len();
    while missing > 0 {
        match ring.submit_and_wait(missing) {
            // As no operation waits, those that were submitted are completed; the rest goes with the ring.
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        for completion in ring.completion() {
            missing -= 1;
            if let Some(result) = results.get_mut(completion.user_data() as usize) {
                *result = completion.result();
            }
        }
    }
    *place = Some(ring);
    Ok(())
}

/// Returns the flags with which operations on the registered file do not wait for it. If the file supports
/// such a flag, io_uring would otherwise wait even for a non-blocking file. If it does not, the flag is an
/// error, and operations on a non-blocking file do not wait.
fn flags_against_waiting(ring: &mut IoUring) -> io::Result<i32> {
    let nothing = opcode::Read::new(FILE, ptr::null_mut(), 0)
        .offset(NO_OFFSET)
        .rw_flags(libc::RWF_NOWAIT)
        .build();
    // SAFETY: the operation refers to no memory, and the queue is empty.
    let pushed = unsafe { ring.submission().push(&nothing) };
    debug_assert!(pushed.is_ok());
    loop {
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        if let Some(completion) = ring.completion().next() {
            return Ok(match completion.result() {
                result if result == -libc::EOPNOTSUPP => 0,
                _ => libc::RWF_NOWAIT,
            });
        }
    }
}

#[cfg(test)]
impl PacketRing {
    /// Makes it one that has failed.
    pub(super) fn fail(&mut self) {
        self.ring = None;
    }
}

#[cfg(test)]
impl AsRawFd for PacketRing {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }
}

impl Drop for PacketRing {
    /// Unregisters the file. The kernel tears a ring down some time after it is closed, and a tap must not
    /// be kept that long.
    fn drop(&mut self) {
        if let Some(ring) = &self.ring {
            let _ = ring.submitter().unregister_files();
        }
    }
}
