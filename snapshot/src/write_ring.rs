//! Writes guest memory to a file, many requests at a time.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use bantam_memory::{FilePosition, GuestBuffers};
use io_uring::types::Fd;
use io_uring::{IoUring, opcode};

/// Requests in flight at a time.
const DEPTH: u32 = 32;

/// Writes to one file. What has been begun is complete only after [`WriteRing::finish`].
pub(crate) struct WriteRing<'a> {
    file: &'a File,
    /// `None` if the host has no io_uring or forbids it; each write is then done at once.
    ring: Option<IoUring>,
    requests: Vec<Option<Request>>,
    in_flight: usize,
}

/// A write of guest memory that is under way.
struct Request {
    buffers: GuestBuffers,
    offset: u64,
}

impl<'a> WriteRing<'a> {
    /// Creates a ring for writes to `file`.
    pub(crate) fn new(file: &'a File) -> WriteRing<'a> {
        let ring = IoUring::new(DEPTH);
        let ring = ring.inspect_err(|error| tracing::debug!("writing without io_uring: {error}"));
        WriteRing {
            file,
            ring: ring.ok(),
            requests: (0..DEPTH).map(|_| None).collect(),
            in_flight: 0,
        }
    }

    /// Begins to write `buffers` at `offset`.
    ///
    /// # Errors
    /// Those of this write, or of earlier ones.
    pub(crate) fn write(&mut self, mut buffers: GuestBuffers, mut offset: u64) -> io::Result<()> {
        if self.ring.is_none() {
            while !buffers.is_empty() {
                let position = FilePosition { offset, flags: 0 };
                match buffers.write_to(self.file.as_fd(), Some(position)) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(count) => offset += count as u64,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            return Ok(());
        }
        while self.in_flight == self.requests.len() {
            self.wait()?;
        }
        let index = self.requests.iter().position(Option::is_none);
        let index = index.ok_or(io::ErrorKind::OutOfMemory)?;
        self.requests[index] = Some(Request { buffers, offset });
        self.in_flight += 1;
        self.submit(index)
    }

    /// Gives the request at `index` to the kernel.
    fn submit(&mut self, index: usize) -> io::Result<()> {
        let (Some(ring), Some(request)) = (&mut self.ring, &self.requests[index]) else {
            return Ok(());
        };
        let vectors = request.buffers.vectors();
        let entry = opcode::Writev::new(
            Fd(self.file.as_raw_fd()),
            vectors.as_ptr(),
            vectors.len() as u32,
        );
        let entry = entry.offset(request.offset).build().user_data(index as u64);
        // SAFETY: the request keeps vectors and memory where they are until its completion has been taken: it is
        // changed only then, and dropped only when nothing is in flight.
        let pushed = unsafe { ring.submission().push(&entry) };
        // There is an entry for each request.
        pushed.map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        match ring.submit() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            result => result.map(drop),
        }
    }

    /// Waits for at least one request to complete.
    fn wait(&mut self) -> io::Result<()> {
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        let completions: Vec<_> = ring
            .completion()
            .map(|entry| (entry.user_data() as usize, entry.result()))
            .collect();
        let mut outcome = Ok(());
        for (index, result) in completions {
            outcome = outcome.and(self.complete(index, result));
        }
        outcome
    }

    fn complete(&mut self, index: usize, result: i32) -> io::Result<()> {
        let Some(request) = &mut self.requests[index] else {
            return Ok(());
        };
        let outcome = match usize::try_from(result) {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                request.buffers.advance(count);
                request.offset += count as u64;
                if !request.buffers.is_empty() {
                    return self.submit(index);
                }
                Ok(())
            }
            Err(_) if [-libc::EINTR, -libc::EAGAIN].contains(&result) => return self.submit(index),
            Err(_) => Err(io::Error::from_raw_os_error(-result)),
        };
        self.requests[index] = None;
        self.in_flight -= 1;
        outcome
    }

    /// Waits until everything is written.
    ///
    /// # Errors
    /// Those of a write.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.drain()
    }

    fn drain(&mut self) -> io::Result<()> {
        let mut outcome = Ok(());
        while self.in_flight > 0 {
            outcome = outcome.and(self.wait());
        }
        outcome
    }
}

impl Drop for WriteRing<'_> {
    fn drop(&mut self) {
        // The kernel still reads the buffers of what is in flight.
        let _ = self.drain();
    }
}
