//! The guest memory that a descriptor chain names, as host I/O vectors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::copy::{copy_from_guest, copy_to_guest};
use crate::{GuestMemory, PAGE_SIZE};

/// Most vectors that the kernel takes in one call (`IOV_MAX`).
pub const MAX_VECTORS_PER_CALL: usize = 1024;

/// Why a buffer cannot be used.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BufferError {
    /// Part of the buffer is not guest RAM.
    #[error("a buffer of {len:#x} bytes at {address:#x} is not in guest memory")]
    OutsideMemory {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Size in bytes.
        len: u32,
    },
}

/// A place in a file, and how it is accessed.
#[derive(Debug, Clone, Copy)]
pub struct FilePosition {
    /// Offset in bytes.
    pub offset: u64,
    /// Flags of `preadv2` and `pwritev2`.
    pub flags: libc::c_int,
}

/// A list of byte ranges of guest memory that is read or written from front to back.
///
/// The list keeps the memory alive, so its vectors stay valid. The guest may change the bytes at
/// any time: the host's kernel or this type copies them, and nothing borrows them. Writes are
/// marked in the dirty log.
pub struct GuestBuffers {
    memory: Arc<GuestMemory>,
    vectors: Vec<iovec>,
    /// Index of the first vector with bytes left.
    front: usize,
    /// Bytes left.
    len: usize,
    /// Whether the vectors were lent to be filled, and [`GuestBuffers::mark_filled`] has yet to say
    /// how far they were.
    is_lent: bool,
}

// SAFETY: the raw pointers in `vectors` point into `memory`, which is shared between threads
// already and outlives them as this struct owns a reference to it.
unsafe impl Send for GuestBuffers {}

impl GuestBuffers {
    /// Makes an empty list over `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> GuestBuffers {
        GuestBuffers {
            memory,
            vectors: Vec::new(),
            front: 0,
            len: 0,
            is_lent: false,
        }
    }

    /// Empties the list; its allocation is kept for the next chain.
    pub fn clear(&mut self) {
        self.check_change();
        self.vectors.clear();
        self.front = 0;
        self.len = 0;
    }

    /// Appends the `len` bytes at `address`.
    ///
    /// # Errors
    /// If they are not all guest memory.
    pub fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), BufferError> {
        self.check_change();
        let outside = BufferError::OutsideMemory {
            address: address.0,
            len,
        };
        if let Some(pointer) = self.memory.host_range(address, len as usize) {
            self.vectors.push(iovec {
                iov_base: pointer.as_ptr().cast(),
                iov_len: len as usize,
            });
            self.len += len as usize;
            return Ok(());
        }
        // RAM may be read and written alike, so the direction of access does not matter.
        let Ok(slices) = self
            .memory
            .get_slices(address, len as usize, Permissions::ReadWrite)
        else {
            return Err(outside);
        };
        for slice in slices {
            let Ok(slice) = slice else {
                return Err(outside);
            };
            self.vectors.push(iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.len += slice.len();
        }
        Ok(())
    }

    /// Moves the content of `other`, a list over the same memory, to the end of this list.
    pub fn append(&mut self, other: &mut GuestBuffers) {
        self.check_change();
        self.vectors
            .extend_from_slice(other.vectors.get(other.front..).unwrap_or_default());
        self.len += other.len;
        other.clear();
    }

    /// Moves the first `len` bytes, or all if there are fewer, to the end of `other`, a list over the
    /// same memory.
    pub fn move_front(&mut self, len: usize, other: &mut GuestBuffers) {
        other.check_change();
        let mut left = len.min(self.len);
        other.len += left;
        for vector in &self.vectors[self.front..] {
            let iov_len = vector.iov_len.min(left);
            if iov_len > 0 {
                other.vectors.push(iovec { iov_len, ..*vector });
            }
            left -= iov_len;
            if left == 0 {
                break;
            }
        }
        self.advance(len);
    }

    /// Bytes left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Drops bytes from the end so that at most `len` are left.
    pub fn truncate(&mut self, len: usize) {
        self.check_change();
        while self.len > len {
            let excess = self.len - len;
            match self.vectors.last_mut() {
                Some(last) if last.iov_len > excess => {
                    last.iov_len -= excess;
                    self.len = len;
                }
                Some(last) => {
                    self.len -= last.iov_len;
                    self.vectors.pop();
                }
                None => self.len = 0,
            }
        }
    }

    /// Drops `count` bytes from the front, or all if there are fewer.
    pub fn advance(&mut self, count: usize) {
        self.check_change();
        let mut left = count.min(self.len);
        self.len -= left;
        while let Some(vector) = self.vectors.get_mut(self.front) {
            if vector.iov_len > left {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(left).cast();
                vector.iov_len -= left;
                break;
            }
            left -= vector.iov_len;
            self.front += 1;
        }
        // A list that is appended to without end must not grow without end.
        if self.front == self.vectors.len() {
            self.vectors.clear();
            self.front = 0;
        } else if self.front > self.vectors.len() / 2 {
            self.vectors.drain(..self.front);
            self.front = 0;
        }
    }

    /// Takes `N` bytes from the front, if that many are left.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        match self.vectors.get(self.front) {
            Some(vector) if vector.iov_len >= N => {
                // SAFETY: the vector covers at least `N` bytes of guest memory, which `self.memory`
                // keeps mapped.
                unsafe { copy_from_guest(vector.iov_base.cast(), &mut bytes) };
                self.advance(N);
            }
            _ if self.len < N => return None,
            _ => {
                self.read(&mut bytes);
            }
        }
        Some(bytes)
    }

    /// Copies bytes from the front into `bytes`, drops them, and returns their number, which is
    /// smaller than `bytes.len()` only if the list ends before.
    pub fn read(&mut self, bytes: &mut [u8]) -> usize {
        let count = self.read_at(0, bytes);
        self.advance(count);
        count
    }

    /// Copies bytes from `offset` bytes after the front into `bytes`, without dropping any, and
    /// returns their number, which is smaller than `bytes.len()` only if the list ends before.
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize {
        self.copy(offset, bytes.len(), |guest, range| {
            // SAFETY: `copy` passes a pointer to `range.len()` bytes of guest memory, which
            // `self.memory` keeps mapped.
            unsafe { copy_from_guest(guest, &mut bytes[range]) }
        })
    }

    /// Copies `bytes` to the front of the list, drops the bytes written, and returns their number,
    /// which is smaller than `bytes.len()` only if the list ends before.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let count = self.write_at(0, bytes);
        self.advance(count);
        count
    }

    /// Copies `bytes` to `offset` bytes after the front, without dropping any, and returns their
    /// number, which is smaller than `bytes.len()` only if the list ends before.
    pub fn write_at(&mut self, offset: usize, bytes: &[u8]) -> usize {
        self.copy(offset, bytes.len(), |guest, range| {
            let len = range.len();
            // SAFETY: as in `read_at`; all guest memory is mapped writable.
            unsafe { copy_to_guest(guest, &bytes[range]) }
            self.memory.mark_host(guest, len);
        })
    }

    /// Calls `piece` for each contiguous part of the `len` bytes that start `offset` bytes after
    /// the front, with the part's range within them, and returns the number of bytes covered.
    fn copy(
        &self,
        offset: usize,
        len: usize,
        mut piece: impl FnMut(*mut u8, std::ops::Range<usize>),
    ) -> usize {
        let mut skip = offset;
        let mut done = 0;
        for vector in self.vectors.iter().skip(self.front) {
            if done == len {
                break;
            }
            let skipped = vector.iov_len.min(skip);
            skip -= skipped;
            let count = (vector.iov_len - skipped).min(len - done);
            let start = vector.iov_base.cast::<u8>().wrapping_add(skipped);
            piece(start, done..done + count);
            done += count;
        }
        done
    }

    /// Waits until none of the pages is missing ([`MissingPages`](crate::MissingPages)). Returns `false` if the content of one
    /// may have been lost.
    ///
    /// What is done with the bytes afterwards, by the host's kernel for example, is done with those that the guest has written.
    #[inline]
    pub fn await_pages(&self) -> bool {
        if self.memory.is_missing_pages() {
            self.touch_pages();
            return !self.memory.is_lost();
        }
        true
    }

    #[cold]
    #[inline(never)]
    fn touch_pages(&self) {
        for vector in self.vectors.iter().skip(self.front) {
            let start = vector.iov_base.addr();
            let first = (start / PAGE_SIZE + 1) * PAGE_SIZE;
            let pages = (first..start + vector.iov_len).step_by(PAGE_SIZE);
            for address in [start].into_iter().chain(pages) {
                if vector.iov_len > 0 {
                    let byte = vector.iov_base.cast::<u8>().wrapping_add(address - start);
                    let mut bytes = [0];
                    // SAFETY: the byte is one of the vector, which covers guest memory that `self.memory` keeps mapped.
                    unsafe { copy_from_guest(byte, &mut bytes) };
                    std::hint::black_box(bytes);
                }
            }
        }
    }

    /// Fills the list from `fd`, at `position` if given, by one system call.
    ///
    /// # Errors
    /// Those of `preadv2` or `readv`.
    pub fn read_from(
        &mut self,
        fd: BorrowedFd<'_>,
        position: Option<FilePosition>,
    ) -> io::Result<usize> {
        let vectors = self.vectors_to_fill();
        let (fd, count) = (fd.as_raw_fd(), vectors.len() as libc::c_int);
        // SAFETY: the vectors cover guest memory that is mapped and writable for as long as
        // `self.memory` lives.
        let result = unsafe {
            match position {
                Some(FilePosition { offset, flags }) => {
                    let offset = offset as libc::off_t;
                    libc::preadv2(fd, vectors.as_ptr(), count, offset, flags)
                }
                None => libc::readv(fd, vectors.as_ptr(), count),
            }
        };
        let result = usize::try_from(result).map_err(|_| io::Error::last_os_error());
        self.mark_filled(match (&result, position) {
            // Storage may have written more than it reports, or before it failed.
            (_, Some(_)) => usize::MAX,
            (Ok(count), None) => *count,
            (Err(_), None) => 0,
        });
        self.finish_call(result)
    }

    /// Writes the list to `fd`, at `position` if given, by one system call.
    ///
    /// # Errors
    /// Those of `pwritev2` or `writev`.
    pub fn write_to(
        &mut self,
        fd: BorrowedFd<'_>,
        position: Option<FilePosition>,
    ) -> io::Result<usize> {
        let vectors = self.vectors();
        let (fd, count) = (fd.as_raw_fd(), vectors.len() as libc::c_int);
        // SAFETY: as in `read_from`; the kernel only reads the memory.
        let result = unsafe {
            match position {
                Some(FilePosition { offset, flags }) => {
                    let offset = offset as libc::off_t;
                    libc::pwritev2(fd, vectors.as_ptr(), count, offset, flags)
                }
                None => libc::writev(fd, vectors.as_ptr(), count),
            }
        };
        let result = usize::try_from(result).map_err(|_| io::Error::last_os_error());
        self.finish_call(result)
    }

    /// Gives the whole pages at the front of the list back to the host, and drops the bytes of
    /// those pages and before them, even on failure. The pages read as zero until they are written
    /// to.
    ///
    /// One call covers at most `limit` bytes, rounded to whole pages and at least one, and at most
    /// the first range of the list. It returns how many bytes were given back: pages that are only
    /// partly in the range are kept.
    ///
    /// # Errors
    /// As `madvise`.
    pub fn discard_front(&mut self, limit: usize) -> io::Result<usize> {
        let Some(vector) = self.vectors().first().copied() else {
            return Ok(0);
        };
        let page = self.memory.backing().page_size();
        let limit = limit.max(page) & !(page - 1);
        let before_page = vector.iov_base.addr().wrapping_neg() & (page - 1);
        let size = before_page.saturating_add(limit).min(vector.iov_len);
        self.advance(size);
        self.memory.discard_host(vector.iov_base.cast(), size)
    }

    /// Sends the list to the socket `fd` by one system call, without raising `SIGPIPE`.
    ///
    /// # Errors
    /// Those of `sendmsg`.
    pub fn send_to(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: `msghdr` consists of integers and pointers, all of which may be zero.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        let vectors = self.vectors();
        message.msg_iov = vectors.as_ptr().cast_mut();
        message.msg_iovlen = vectors.len() as _;
        // SAFETY: as in `write_to`; the kernel does not change the vectors either.
        let result = unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) };
        let result = usize::try_from(result).map_err(|_| io::Error::last_os_error());
        self.finish_call(result)
    }

    /// Returns the vectors that are left, up to the most that one call takes, for the kernel to
    /// read. The vectors are valid until the list changes, and the memory that they cover as long
    /// as the list lives.
    pub fn vectors(&self) -> &[iovec] {
        let left = self.vectors.get(self.front..).unwrap_or_default();
        left.get(..MAX_VECTORS_PER_CALL).unwrap_or(left)
    }

    /// Returns the vectors that are left, up to the most that one call takes, for the kernel to
    /// write to.
    ///
    /// When the kernel is done, or has certainly written nothing, the caller calls
    /// [`GuestBuffers::mark_filled`]; it does not change the list before that.
    pub fn vectors_to_fill(&mut self) -> &[iovec] {
        self.is_lent = true;
        self.vectors()
    }

    /// Marks the first `count` bytes of [`GuestBuffers::vectors_to_fill`] as written, or all if
    /// there are fewer. It drops none.
    #[inline]
    pub fn mark_filled(&mut self, count: usize) {
        self.is_lent = false;
        if self.memory.is_logging() {
            self.mark_logged(count);
        }
    }

    #[cold]
    #[inline(never)]
    fn mark_logged(&self, count: usize) {
        let mut left = count;
        for vector in self.vectors() {
            let count = vector.iov_len.min(left);
            self.memory.mark_host(vector.iov_base.cast(), count);
            left -= count;
        }
    }

    /// Checks that the vectors are not lent to be filled, as the list is about to change.
    #[inline]
    fn check_change(&self) {
        debug_assert!(
            !self.is_lent,
            "the buffers were lent to be filled, and it was not said how far they were"
        );
    }

    /// Returns whether each range starts at a multiple of `address` and has a multiple of `size`
    /// bytes; both are powers of two.
    pub fn are_aligned(&self, address: usize, size: usize) -> bool {
        self.vectors().iter().all(|vector| {
            vector.iov_base.addr() & (address - 1) == 0 && vector.iov_len & (size - 1) == 0
        })
    }

    fn finish_call(&mut self, result: io::Result<usize>) -> io::Result<usize> {
        let count = result?;
        self.advance(count);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::Bytes;

    use super::*;
    use crate::PAGE_SIZE;

    const REGION_SIZE: usize = 0x1000;

    /// Two regions that touch, then a hole, then a third.
    fn memory() -> Arc<GuestMemory> {
        let regions = [
            (GuestAddress(0), REGION_SIZE),
            (GuestAddress(0x1000), REGION_SIZE),
            (GuestAddress(0x4000), REGION_SIZE),
        ];
        Arc::new(GuestMemory::from_ranges(&regions).unwrap())
    }

    #[test]
    fn bytes_cross_buffers_and_regions() {
        let memory = memory();
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0xffe), 4).unwrap();
        buffers.push(GuestAddress(0x20), 0).unwrap();
        buffers.push(GuestAddress(0x4000), 3).unwrap();
        assert_eq!(buffers.len(), 7);
        assert_eq!(buffers.write(b"abc"), 3);
        assert_eq!(buffers.write(b"defghi"), 4);
        assert!(buffers.is_empty());
        let mut bytes = [0; 4];
        memory.read_slice(&mut bytes, GuestAddress(0xffe)).unwrap();
        assert_eq!(&bytes, b"abcd");
        memory.read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
        assert_eq!(&bytes, b"efg\0");

        buffers.clear();
        buffers.push(GuestAddress(0xffe), 4).unwrap();
        let mut bytes = [0; 8];
        assert_eq!(buffers.read(&mut bytes[..1]), 1);
        assert_eq!(buffers.read(&mut bytes[1..]), 3);
        assert_eq!(&bytes[..4], b"abcd");
    }

    #[test]
    fn only_guest_memory_is_taken() {
        let mut buffers = GuestBuffers::new(memory());
        for (address, len) in [
            (0x1fff, 2),
            (0x2000, 1),
            (0x3fff, 2),
            (0x5000, 1),
            (u64::MAX, 1),
            (u64::MAX - 1, 0x10),
            (0, u32::MAX),
        ] {
            assert_eq!(
                buffers.push(GuestAddress(address), len),
                Err(BufferError::OutsideMemory { address, len }),
            );
        }
    }

    #[test]
    fn truncating_keeps_the_front() {
        let mut buffers = GuestBuffers::new(memory());
        buffers.push(GuestAddress(0), 4).unwrap();
        buffers.push(GuestAddress(8), 4).unwrap();
        buffers.truncate(9);
        assert_eq!(buffers.len(), 8);
        buffers.truncate(4);
        assert_eq!(buffers.len(), 4);
        buffers.truncate(1);
        assert_eq!(buffers.write(b"xyz"), 1);
        buffers.truncate(0);
        assert_eq!(buffers.write(b"xyz"), 0);
    }

    #[test]
    fn the_front_moves_to_another_list() {
        let memory = memory();
        let mut buffers = GuestBuffers::new(memory.clone());
        let mut front = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0), 3).unwrap();
        buffers.push(GuestAddress(0x100), 3).unwrap();
        buffers.advance(1);
        buffers.move_front(3, &mut front);
        assert_eq!((front.len(), buffers.len()), (3, 2));
        front.write(b"abc");
        buffers.write(b"d");
        buffers.move_front(9, &mut front);
        assert_eq!((front.len(), buffers.len()), (1, 0));
        front.write(b"e");
        let mut bytes = [0; 3];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(&bytes, b"\0ab");
        memory.read_slice(&mut bytes, GuestAddress(0x100)).unwrap();
        assert_eq!(&bytes, b"cde");
    }

    #[test]
    fn bytes_are_written_at_an_offset() {
        let memory = memory();
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0x100), 3).unwrap();
        buffers.push(GuestAddress(0x200), 3).unwrap();
        buffers.advance(1);
        assert_eq!(buffers.write_at(1, b"abc"), 3);
        assert_eq!(buffers.write_at(4, b"de"), 1);
        assert_eq!(buffers.write_at(5, b"x"), 0);
        assert_eq!(buffers.len(), 5);
        let mut bytes = [0; 3];
        memory.read_slice(&mut bytes, GuestAddress(0x100)).unwrap();
        assert_eq!(&bytes, b"\0\0a");
        memory.read_slice(&mut bytes, GuestAddress(0x200)).unwrap();
        assert_eq!(&bytes, b"bcd");
    }

    #[test]
    fn whole_pages_are_discarded_in_pieces() {
        let regions = [(GuestAddress(0), 8 * PAGE_SIZE)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        let ones = vec![1; 8 * PAGE_SIZE];
        memory.write_slice(&ones, GuestAddress(0)).unwrap();
        let mut buffers = GuestBuffers::new(memory.clone());
        let page = PAGE_SIZE as u32;
        // Pages 1 to 4, and parts of those around them; then no whole page; then page 7.
        let address = u64::from(page) - 8;
        buffers
            .push(GuestAddress(address), 8 + 4 * page + 8)
            .unwrap();
        let address = u64::from(5 * page) + 1;
        buffers.push(GuestAddress(address), 2 * page - 2).unwrap();
        let address = u64::from(7 * page);
        buffers.push(GuestAddress(address), page).unwrap();
        let mut discarded = Vec::new();
        while !buffers.is_empty() {
            discarded.push(buffers.discard_front(3 * PAGE_SIZE).unwrap());
        }
        assert_eq!(discarded, [3 * PAGE_SIZE, PAGE_SIZE, 0, PAGE_SIZE]);
        assert_eq!(buffers.discard_front(PAGE_SIZE).unwrap(), 0);
        let mut bytes = vec![0; 8 * PAGE_SIZE];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        for (number, page) in bytes.chunks(PAGE_SIZE).enumerate() {
            let expected = u8::from(!matches!(number, 1..=4 | 7));
            assert!(page.iter().all(|&byte| byte == expected), "page {number}");
        }
    }

    #[test]
    fn a_list_in_steady_use_does_not_grow() {
        let mut buffers = GuestBuffers::new(memory());
        buffers.push(GuestAddress(0), 4).unwrap();
        for _ in 0..1000 {
            buffers.push(GuestAddress(8), 4).unwrap();
            buffers.advance(4);
            assert_eq!(buffers.len(), 4);
        }
        assert!(buffers.vectors.len() < 4, "{}", buffers.vectors.len());
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let memory = memory();
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        memory.write_slice(b"hello", GuestAddress(0x100)).unwrap();
        let at_7 = Some(FilePosition {
            offset: 7,
            flags: 0,
        });
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0x100), 2).unwrap();
        buffers.push(GuestAddress(0x102), 3).unwrap();
        assert_eq!(buffers.write_to(file.as_fd(), at_7).unwrap(), 5);
        assert!(buffers.is_empty());

        buffers.clear();
        buffers.push(GuestAddress(0x4000), 3).unwrap();
        buffers.push(GuestAddress(0x200), 10).unwrap();
        assert_eq!(buffers.read_from(file.as_fd(), at_7).unwrap(), 5);
        assert_eq!(buffers.len(), 8, "a short read leaves the rest");
        let mut bytes = [0; 3];
        memory.read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
        assert_eq!(&bytes, b"hel");
    }
}
