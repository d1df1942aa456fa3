//! The io_uring that performs requests.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Instant;

use bantam_memory::GuestBuffers;
use bantam_storage::{Access, Disk, Step};
use io_uring::squeue::Entry;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::io_uring_support::restricted_ring;
use crate::virtio::Chain;

/// Entries of the submission queue: more operations than are ever left unsubmitted.
const SUBMISSION_ENTRIES: u32 = 64;

/// Most operations in progress at a time.
pub(super) const MAX_IN_FLIGHT: usize = 256;

/// The direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the disk to the guest.
    Read,
    /// From the guest to the disk; with `durable`, to stable storage.
    Write { durable: bool },
}

impl Direction {
    /// Returns the buffers that data goes to or comes from.
    pub(super) fn buffers(self, chain: &Chain) -> &GuestBuffers {
        match self {
            Direction::Read => &chain.writable,
            Direction::Write { .. } => &chain.readable,
        }
    }

    /// Returns the buffers like [`Direction::buffers`].
    pub(super) fn buffers_mut(self, chain: &mut Chain) -> &mut GuestBuffers {
        match self {
            Direction::Read => &mut chain.writable,
            Direction::Write { .. } => &mut chain.readable,
        }
    }

    fn flags(self) -> libc::c_int {
        match self {
            Direction::Write { durable: true } => libc::RWF_DSYNC,
            _ => 0,
        }
    }
}

/// An operation that the kernel has finished.
#[derive(Debug, Clone, Copy)]
pub(super) struct Completion {
    /// The token that the operation was pushed with.
    pub token: u64,
    /// The result of the corresponding system call: a count, or a negated error number.
    pub result: i32,
}

/// An io_uring over the files of one disk.
pub(super) struct Ring {
    ring: IoUring,
    unsubmitted: usize,
}

impl AsRawFd for Ring {
    /// Returns the ring's descriptor, which is readable while there are completions.
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl Ring {
    /// Makes a ring for up to [`MAX_IN_FLIGHT`] operations at a time on the files of `disk`.
    ///
    /// # Errors
    /// If the host has no io_uring, forbids it, or lacks an operation.
    pub(super) fn new(disk: &Disk) -> io::Result<Ring> {
        let files: Vec<RawFd> = match disk {
            Disk::Raw(disk) => [Access::Usual, Access::Tail]
                .into_iter()
                .filter_map(|access| disk.file(access))
                .map(AsRawFd::as_raw_fd)
                .collect(),
            Disk::Formatted(disk) => {
                let files = disk.files().iter();
                files.map(|file| file.for_transfers().as_raw_fd()).collect()
            }
        };
        Ring::over(&files)
    }

    /// Makes a ring over the files of a disk: those of a raw image in the order of [`Access`], those of another
    /// in its own order.
    pub(super) fn over(files: &[RawFd]) -> io::Result<Ring> {
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let build = |cooperative: bool| {
            let mut builder = IoUring::builder();
            builder.setup_cqsize(MAX_IN_FLIGHT as u32);
            if cooperative {
                builder.setup_coop_taskrun();
            }
            restricted_ring(builder, SUBMISSION_ENTRIES, &needed, files)
        };
        // Kernels before 5.19 refuse the flag.
        let ring = build(true).or_else(|_| build(false))?;
        Ok(Ring {
            ring,
            unsubmitted: 0,
        })
    }

    /// Adds a transfer between `buffers` and the file with this index at `offset`, or as much of it as one
    /// operation does.
    /// The buffers of a read have to be marked as filled when it is completed.
    ///
    /// # Errors
    /// Those of [`Ring::submit`].
    ///
    /// # Safety
    /// `buffers` must neither be changed nor dropped before the operation with this token is
    /// completed.
    pub(super) unsafe fn push_transfer(
        &mut self,
        direction: Direction,
        buffers: &mut GuestBuffers,
        file: u32,
        offset: u64,
        token: u64,
    ) -> io::Result<()> {
        let file = Fixed(file);
        let vectors = match direction {
            Direction::Read => buffers.vectors_to_fill(),
            Direction::Write { .. } => buffers.vectors(),
        };
        let flags = direction.flags();
        let entry = match (direction, vectors) {
            (Direction::Read, [vector]) => {
                let base = vector.iov_base.cast();
                opcode::Read::new(file, base, vector.iov_len as u32)
                    .offset(offset)
                    .build()
            }
            (Direction::Write { .. }, [vector]) => {
                let base = vector.iov_base.cast_const().cast();
                opcode::Write::new(file, base, vector.iov_len as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
            (Direction::Read, _) => {
                opcode::Readv::new(file, vectors.as_ptr(), vectors.len() as u32)
                    .offset(offset)
                    .build()
            }
            (Direction::Write { .. }, _) => {
                opcode::Writev::new(file, vectors.as_ptr(), vectors.len() as u32)
                    .offset(offset)
                    .rw_flags(flags)
                    .build()
            }
        };
        // SAFETY: the vectors and the guest memory that they cover are those of `buffers`, which the caller
        // keeps unchanged.
        let pushed = unsafe { self.push(entry.user_data(token)) };
        if pushed.is_err() {
            buffers.mark_filled(0);
        }
        pushed
    }

    /// Adds `step` of a transfer, whose bytes are at `pointer`.
    ///
    /// # Errors
    /// Those of [`Ring::submit`].
    ///
    /// # Safety
    /// The bytes must stay mapped, and nobody else use them, until the operation with this token is
    /// completed.
    pub(super) unsafe fn push_step(
        &mut self,
        direction: Direction,
        step: &Step,
        pointer: *mut u8,
        token: u64,
    ) -> io::Result<()> {
        let file = fixed(step.access);
        let len = step.bytes.len() as u32;
        let entry = match step.writes {
            true => opcode::Write::new(file, pointer, len)
                .offset(step.offset)
                .rw_flags(direction.flags())
                .build(),
            false => opcode::Read::new(file, pointer, len)
                .offset(step.offset)
                .build(),
        };
        // SAFETY: the operation refers only to the bytes at `pointer`, for which the caller vouches.
        unsafe { self.push(entry.user_data(token)) }
    }

    /// Adds a flush of everything written so far.
    ///
    /// # Errors
    /// Those of [`Ring::submit`].
    pub(super) fn push_flush(&mut self, token: u64) -> io::Result<()> {
        let entry = opcode::Fsync::new(fixed(Access::Usual))
            .flags(FsyncFlags::DATASYNC)
            .build();
        // SAFETY: the operation refers to no memory.
        unsafe { self.push(entry.user_data(token)) }
    }

    /// Adds a change of the storage of `range`, by `fallocate` with this mode.
    ///
    /// # Errors
    /// Those of [`Ring::submit`].
    pub(super) fn push_fallocate(
        &mut self,
        mode: libc::c_int,
        range: Range<u64>,
        token: u64,
    ) -> io::Result<()> {
        let entry = opcode::Fallocate::new(fixed(Access::Usual), range.end - range.start)
            .offset(range.start)
            .mode(mode)
            .build();
        // SAFETY: the operation refers to no memory.
        unsafe { self.push(entry.user_data(token)) }
    }

    /// # Safety
    /// The memory that `entry` points to must stay valid and unchanged by others until the operation is
    /// completed.
    unsafe fn push(&mut self, entry: Entry) -> io::Result<()> {
        loop {
            // SAFETY: as the caller promises.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                self.unsubmitted += 1;
                return Ok(());
            }
            self.submit()?;
        }
    }

    /// Returns how many operations were added since the last submission.
    pub(super) fn unsubmitted(&self) -> usize {
        self.unsubmitted
    }

    /// Submits all added operations to the kernel with one system call.
    ///
    /// # Errors
    /// Those of `io_uring_enter`.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        self.enter(0)
    }

    /// Submits like [`Ring::submit`], and waits until there is a completion.
    ///
    /// # Errors
    /// Those of `io_uring_enter`, and if there is none before `deadline`.
    pub(super) fn wait(&mut self, deadline: Option<Instant>) -> io::Result<()> {
        let Some(deadline) = deadline else {
            return self.enter(1);
        };
        if self.unsubmitted > 0 {
            self.submit()?;
        }
        wait_readable(&[self], Some(deadline))
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(wanted) {
                Ok(count) => {
                    self.unsubmitted = self.unsubmitted.saturating_sub(count);
                    if self.unsubmitted == 0 {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Moves the completions that there are to the end of `completions`.
    pub(super) fn take_completions(&mut self, completions: &mut Vec<Completion>) {
        completions.extend(self.ring.completion().map(|entry| Completion {
            token: entry.user_data(),
            result: entry.result(),
        }));
    }
}

impl Drop for Ring {
    /// Unregisters the files. The kernel tears a ring down some time after it is closed, and the files, which
    /// hold the lock of the disk, must not be kept that long.
    fn drop(&mut self) {
        let _ = self.ring.submitter().unregister_files();
    }
}

/// Waits until one of `descriptors` is readable.
///
/// # Errors
/// If none is by `deadline`, or the wait fails.
pub(super) fn wait_readable(
    descriptors: &[&dyn AsRawFd],
    deadline: Option<Instant>,
) -> io::Result<()> {
    let mut events: Vec<PollFd<'_>> = descriptors
        .iter()
        .map(|descriptor| {
            // SAFETY: what the caller borrows has the descriptor open for as long.
            let descriptor = unsafe { BorrowedFd::borrow_raw(descriptor.as_raw_fd()) };
            PollFd::new(descriptor, PollFlags::POLLIN)
        })
        .collect();
    loop {
        let timeout = match deadline {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(timed_out());
                }
                // Rounded up, so that this does not spin at the end. A longer time is waited for in parts.
                let left = u16::try_from(left.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
                PollTimeout::from(left)
            }
            None => PollTimeout::NONE,
        };
        match poll(&mut events, timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Makes the error of requests that take too long.
pub(super) fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "requests to the disk do not end")
}

/// Returns the index of a file in the table that is registered with the ring.
fn fixed(access: Access) -> Fixed {
    match access {
        Access::Usual => Fixed(0),
        Access::Tail => Fixed(1),
    }
}
