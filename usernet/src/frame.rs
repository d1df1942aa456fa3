//! Frames as the owner of a network passes them: where the bytes are is its own affair.

use std::io;
use std::os::fd::BorrowedFd;

/// A frame of the guest. Its checksums may be left open, and it may be a segment that is larger than the
/// network's MTU.
pub trait GuestFrame {
    /// Returns the size in bytes.
    fn size(&self) -> usize;

    /// Copies bytes from `offset` on, and returns their number, which is smaller than that of `bytes` only if
    /// the frame ends before.
    fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize;

    /// Sends the `size` bytes from `offset` on to a non-blocking socket, by one call.
    ///
    /// # Errors
    /// Those of `sendmsg`.
    fn send_at(&mut self, offset: usize, size: usize, socket: BorrowedFd<'_>) -> io::Result<usize>;
}

/// A place for one frame to the guest.
pub trait FrameBuffer {
    /// Returns the most bytes that a frame can have.
    fn size(&self) -> usize;

    /// Copies `bytes` to `offset`, as far as they have a place.
    fn write_at(&mut self, offset: usize, bytes: &[u8]);

    /// Copies bytes that were put to `offset` back to `bytes`. The guest may have changed them meanwhile.
    fn read_back(&self, offset: usize, bytes: &mut [u8]);

    /// Receives at most `size` bytes from a non-blocking socket to `offset`, and what is left to `rest`, by one call
    /// with `flags`.
    ///
    /// # Errors
    /// Those of `recvmsg`.
    fn receive_at(
        &mut self,
        offset: usize,
        size: usize,
        rest: &mut [u8],
        socket: BorrowedFd<'_>,
        flags: libc::c_int,
    ) -> io::Result<usize>;
}

/// A frame to the guest that has been written to a [`FrameBuffer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenFrame {
    /// Its size in bytes.
    pub size: usize,
    /// The checksum that the guest's driver has to complete.
    pub checksum: Option<PartialChecksum>,
}

/// A checksum that is left to the guest's driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialChecksum {
    /// From where on it is computed.
    pub start: u16,
    /// How far behind that it belongs. The sum of the pseudo-header is there.
    pub offset: u16,
}
