//! What a network card needs of the host's side of it: a tap, or another way to pass packets.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use bantam_memory::GuestBuffers;
use libc::iovec;

use super::MAX_PACKET_SIZE;
use crate::tap::{FrameFilter, Offloads};

/// The host's side of a network card: where the guest's packets go, and where those for it come from.
///
/// Packets begin with the header of virtio, [`crate::tap::PACKET_HEADER_SIZE`] bytes.
pub trait NetBackend: Send + Sync {
    /// Returns what messages call it, such as "tap 'tap0'".
    fn label(&self) -> String;

    /// Returns the number of queues, at least one.
    fn queue_count(&self) -> usize;

    /// Returns the queue at `index`.
    fn queue(&self, index: usize) -> Option<&dyn NetQueue>;

    /// Returns the work that can be left to the guest's driver.
    fn offloads(&self) -> Offloads;

    /// Whether the driver may leave work on its packets to the backend: checksums, and segments of TCP that are
    /// larger than the MTU.
    fn takes_unfinished_packets(&self) -> bool {
        true
    }

    /// Sets which work is left to the driver from now on.
    ///
    /// # Errors
    /// If that cannot be left to it.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Sets which frames are for the driver from now on. It is not an error to pass on more.
    ///
    /// # Errors
    /// If the filter cannot be set.
    fn set_filter(&self, filter: &FrameFilter) -> io::Result<()>;

    /// Uses the first `count` queues from now on.
    ///
    /// # Errors
    /// If they cannot be used.
    fn use_queues(&self, count: usize) -> io::Result<()>;

    /// Undoes all settings made on behalf of a driver, and drops the packets that wait for it.
    ///
    /// # Errors
    /// If that is not possible.
    fn forget_driver(&self) -> io::Result<()>;

    /// Whether the other side can come back after it is gone.
    fn can_reconnect(&self) -> bool {
        false
    }

    /// Tries to reach the other side again after it is gone, without waiting for it. Descriptors of queues may be
    /// others then.
    ///
    /// # Errors
    /// If it cannot be reached now.
    fn reconnect(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Returns why `error`, with which a packet was dropped, occurs and what helps, if it is known.
    fn remedy(&self, _error: &io::Error) -> Option<String> {
        None
    }
}

/// One queue of a [`NetBackend`]. Nothing that it does waits; its descriptor becomes readable when there may be
/// packets, and writable when it takes some after it has not.
pub trait NetQueue: AsRawFd + Send + Sync {
    /// Returns the file of which each read and each write is one packet, if there is one. Several packets are
    /// then passed by one call.
    fn packet_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Takes a packet of the driver. It may take bytes off the front of the packet, unless it fails.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if it cannot be taken now. Others drop the packet; `EBADFD` and `ENODEV`
    /// mean that the other side is gone.
    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()>;

    /// Passes on packets of the driver that were kept back to go together with more. It is called after each run of
    /// [`NetQueue::write`].
    fn flush(&self) {}

    /// Puts the next packet into `buffer`, and returns its size.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is none. Others are as for [`NetQueue::write`].
    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize>;

    /// Whether there may be packets for the driver, although the descriptor is not readable. It is asked after
    /// packets were written, and when a turn of reading has ended before the packets did.
    fn has_packets(&self) -> bool {
        false
    }
}

/// A place for a packet to the driver.
pub struct PacketBuffer<'a> {
    vectors: &'a [iovec],
    size: usize,
    /// The memory that the vectors cover is borrowed.
    memory: PhantomData<&'a mut [u8]>,
}

impl PacketBuffer<'_> {
    /// Makes a place of `vectors`, whose first `size` bytes are enough for any packet that the driver can take.
    ///
    /// # Safety
    /// The vectors must cover memory that may be read and written to as long as this exists, and to which nobody
    /// has references.
    pub(super) unsafe fn new(vectors: &[iovec], size: usize) -> PacketBuffer<'_> {
        PacketBuffer {
            vectors,
            size: size.min(MAX_PACKET_SIZE),
            memory: PhantomData,
        }
    }

    /// Returns the most bytes that the driver takes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Copies `bytes` to `offset`, as far as there is room.
    pub fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        let mut left = bytes;
        for vector in self.part(offset, bytes.len()) {
            let (now, later) = left.split_at(vector.iov_len.min(left.len()));
            // SAFETY: the vector covers that many bytes, which are valid for writes as `new` demands.
            unsafe { std::ptr::copy(now.as_ptr(), vector.iov_base.cast(), now.len()) };
            left = later;
        }
    }

    /// Reads a packet from `file` by one call.
    ///
    /// # Errors
    /// Those of `readv`.
    pub fn read_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let count = self.vectors.len() as libc::c_int;
        // SAFETY: the vectors cover memory that is valid for writes as `new` demands.
        let result = unsafe { libc::readv(file.as_raw_fd(), self.vectors.as_ptr(), count) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Copies what was put to `offset` back to `bytes`, as far as there is room for it. The guest may have changed it
    /// meanwhile.
    pub fn read_back(&self, offset: usize, bytes: &mut [u8]) {
        let mut left = bytes;
        for vector in self.part(offset, left.len()) {
            let (now, later) = left.split_at_mut(vector.iov_len.min(left.len()));
            // SAFETY: the vector covers that many bytes, which are valid for reads too as `new` demands.
            unsafe { std::ptr::copy(vector.iov_base.cast(), now.as_mut_ptr(), now.len()) };
            left = later;
        }
    }

    /// Receives at most `size` bytes from a socket to `offset`, and what is left to `rest`, by one call with `flags`.
    ///
    /// # Errors
    /// Those of `recvmsg`.
    pub fn receive_at(
        &mut self,
        offset: usize,
        size: usize,
        rest: &mut [u8],
        socket: BorrowedFd<'_>,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        let mut vectors: Vec<iovec> = self.part(offset, size).collect();
        vectors.push(iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        // SAFETY: `msghdr` consists of integers and pointers, all of which may be zero.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        // SAFETY: the vectors cover memory that is valid for writes as `new` demands, and `rest`.
        let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Returns vectors for at most `size` bytes from `offset` on.
    fn part(&self, offset: usize, size: usize) -> impl Iterator<Item = iovec> + use<'_> {
        let mut skip = offset;
        let mut left = size.min(self.size.saturating_sub(offset));
        self.vectors.iter().filter_map(move |vector| {
            let skipped = skip.min(vector.iov_len);
            skip -= skipped;
            let iov_len = (vector.iov_len - skipped).min(left);
            left -= iov_len;
            let base = vector.iov_base.cast::<u8>().wrapping_add(skipped);
            (iov_len > 0).then_some(iovec {
                iov_base: base.cast(),
                iov_len,
            })
        })
    }
}

/// Whether `error`, of a read or a write, says that the other side is gone.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_are_put_at_any_offset() {
        let mut memory = vec![0u8; 12];
        let (first, second) = memory.split_at_mut(5);
        let vectors = [first, second].map(|part| iovec {
            iov_base: part.as_mut_ptr().cast(),
            iov_len: part.len(),
        });
        // SAFETY: the vectors cover `memory`, which is not used before the buffer is gone.
        let mut buffer = unsafe { PacketBuffer::new(&vectors, 10) };
        assert_eq!(buffer.size(), 10);
        buffer.write_at(0, b"ab");
        buffer.write_at(4, b"cd");
        buffer.write_at(9, b"xyz");
        buffer.write_at(50, b"!");
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(b"123456").unwrap();
        let mut rest = [0; 3];
        assert_eq!(buffer.receive_at(6, 2, &mut [], far.as_fd(), 0).unwrap(), 2);
        assert_eq!(
            buffer.receive_at(8, 50, &mut rest, far.as_fd(), 0).unwrap(),
            4
        );
        assert_eq!(&rest, b"56\0");
        let mut back = [0; 4];
        buffer.read_back(4, &mut back);
        assert_eq!(&back, b"cd12");
        assert_eq!(memory, b"ab\0\0cd1234\0\0");
    }
}
