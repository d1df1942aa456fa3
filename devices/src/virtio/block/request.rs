//! Block requests (section 5.2.6): parsing them from descriptor chains, and performing them.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bantam_memory::{GuestBuffers, GuestMemory};
use bantam_storage::{CacheMode, Disk, DiskFile, SECTOR_SIZE};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::GuestAddress;

use super::{BlockMetrics, ID_SIZE, MAX_DATA_SIZE, MAX_RANGE_SECTORS};
use crate::device_log::Repeat;
use crate::virtio::{Chain, DriverLink, QueueError};

/// Size of `struct virtio_blk_req` before its data.
const HEADER_SIZE: usize = 16;
/// Size of `struct virtio_blk_discard_write_zeroes`.
const RANGE_SIZE: usize = 16;

/// Why a request cannot even be answered by its status byte.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(
        "the descriptor chain at {head} is not a block request: it has {readable} bytes to read and {writable} to write"
    )]
    NoRequest {
        head: u16,
        readable: usize,
        writable: usize,
    },
    #[error("the status byte at {0:#x} cannot be written")]
    Status(u64),
    #[error("cannot use io_uring: {0}")]
    Ring(#[from] io::Error),
}

/// Why a request failed, which becomes the status that the driver sees.
#[derive(Debug)]
pub(super) enum Failure {
    /// The request is malformed, goes beyond the end of the disk, or is too large.
    Invalid,
    /// The device does not support this request, or it was not negotiated.
    Unsupported,
    /// The host could not do it.
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure::Host(error)
    }
}

/// How a request has ended; `None` if it has not.
pub(super) type Outcome = Option<Result<(), Failure>>;

/// What a request asks for, checked to be within the disk.
#[derive(Debug, Clone, Copy)]
pub(super) enum Operation {
    Read { offset: u64 },
    Write { offset: u64 },
    Flush,
    GetId,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

impl Operation {
    /// Returns the range of the disk that it changes without data, if it does that.
    pub(super) fn range(self) -> Option<Range<u64>> {
        match self {
            Operation::Discard { offset, len } | Operation::WriteZeroes { offset, len, .. } => {
                Some(offset..offset + len)
            }
            _ => None,
        }
    }

    /// Returns the mode with which `fallocate` does it to a raw disk, if it changes a range and `fallocate` can.
    pub(super) fn fallocate_mode(self, disk: &DiskFile) -> Option<libc::c_int> {
        match self {
            Operation::Discard { len: 1.., .. } => disk.discard_mode(),
            Operation::WriteZeroes {
                len: 1.., unmap, ..
            } => Some(disk.zero_mode(unmap)),
            _ => None,
        }
    }

    /// Whether the time that the host takes for it follows from its size.
    pub(super) fn is_transfer(self) -> bool {
        matches!(self, Operation::Read { .. } | Operation::Write { .. })
    }
}

/// What is needed to return a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Request {
    /// Index of the chain's first descriptor.
    pub(super) head: u16,
    /// How many bytes of the chain's writable buffers the driver may read.
    pub(super) written: u32,
    /// How many bytes of data from the driver are written to the disk.
    pub(super) readable: u32,
    status_address: GuestAddress,
}

impl Request {
    /// Returns how many bytes of data the driver gets, if the request is a read.
    pub(super) fn data_to_driver(&self) -> u32 {
        // The last byte is the status.
        self.written.saturating_sub(1)
    }
}

/// Parses requests from their chains, performs those that can be done at once, and writes their status.
pub(super) struct RequestHandler {
    disk: Arc<Disk>,
    id: [u8; ID_SIZE],
    features: u64,
    memory: Arc<GuestMemory>,
    link: Arc<DriverLink>,
    /// When a failure was last logged.
    warning: Repeat,
}

impl RequestHandler {
    pub(super) fn new(
        disk: Arc<Disk>,
        id: [u8; ID_SIZE],
        features: u64,
        memory: Arc<GuestMemory>,
        link: Arc<DriverLink>,
    ) -> RequestHandler {
        RequestHandler {
            disk,
            id,
            features,
            memory,
            link,
            warning: Repeat::default(),
        }
    }

    /// Parses the request in `chain`, whose buffers are then left with only its data. Returns its operation,
    /// or why it cannot be done.
    pub(super) fn parse(
        &self,
        chain: &mut Chain,
    ) -> Result<(Request, Result<Operation, Failure>), RequestError> {
        let no_request = RequestError::NoRequest {
            head: chain.head,
            readable: chain.readable.len(),
            writable: chain.writable.len(),
        };
        let header = chain.readable.read_array();
        let (Some(header), Some(status_address)) = (header, chain.last_writable_byte) else {
            return Err(no_request);
        };
        let written = chain.writable.len();
        chain.writable.truncate(written - 1);
        let request = Request {
            head: chain.head,
            // Neither number is truncated for an operation that is performed: it has at most MAX_DATA_SIZE
            // bytes of data.
            written: written as u32,
            readable: chain.readable.len() as u32,
            status_address,
        };
        let operation = self.operation(&header, chain);
        if let Ok(Operation::Read { offset }) = operation {
            self.disk.fill_beyond_end(&mut chain.writable, offset);
        }
        Ok((request, operation))
    }

    fn operation(
        &self,
        header: &[u8; HEADER_SIZE],
        chain: &mut Chain,
    ) -> Result<Operation, Failure> {
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = *header;
        let sector = u64::from_le_bytes(sector);
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Ok(Operation::Read {
                offset: self.data_offset(sector, chain.writable.len())?,
            }),
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                Ok(Operation::Write {
                    offset: self.data_offset(sector, chain.readable.len())?,
                })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            VIRTIO_BLK_T_DISCARD if self.negotiated(VIRTIO_BLK_F_DISCARD) => {
                let (offset, len, _) = self.range(&mut chain.readable, 0)?;
                Ok(Operation::Discard { offset, len })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.negotiated(VIRTIO_BLK_F_WRITE_ZEROES) => {
                let known_flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let (offset, len, flags) = self.range(&mut chain.readable, known_flags)?;
                let unmap = flags != 0;
                Ok(Operation::WriteZeroes { offset, len, unmap })
            }
            _ => Err(Failure::Unsupported),
        }
    }

    /// Returns the disk that requests are performed on.
    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Performs requests on `disk` from now on.
    pub(super) fn set_disk(&mut self, disk: Arc<Disk>) {
        self.disk = disk;
    }

    /// Performs `operation` with the data in `chain`, and returns when it is done. If the image is not raw,
    /// this is only for flushes and the serial number.
    pub(super) fn perform(&self, operation: Operation, chain: &mut Chain) -> Result<(), Failure> {
        let Chain {
            readable, writable, ..
        } = chain;
        match (operation, &*self.disk) {
            (Operation::GetId, _) if writable.len() < ID_SIZE => return Err(Failure::Invalid),
            (Operation::GetId, _) => {
                writable.write(&self.id);
            }
            (Operation::Flush, disk) => disk.flush()?,
            (Operation::Read { offset }, Disk::Raw(disk)) => disk.read(writable, offset)?,
            (Operation::Write { offset }, Disk::Raw(disk)) => {
                disk.write(readable, offset, self.writes_are_durable())?;
            }
            (Operation::Discard { offset, len }, Disk::Raw(disk)) => {
                if len > 0 {
                    disk.discard(offset, len)?;
                }
                self.flush_durable()?;
            }
            (Operation::WriteZeroes { offset, len, unmap }, Disk::Raw(disk)) => {
                if len > 0 {
                    disk.write_zeroes(offset, len, unmap)?;
                }
                self.flush_durable()?;
            }
            (_, Disk::Formatted(_)) => return Err(Failure::Unsupported),
        }
        Ok(())
    }

    /// Writes the status of a request that has ended.
    pub(super) fn finish(
        &mut self,
        request: &Request,
        result: &Result<(), Failure>,
        metrics: &BlockMetrics,
    ) -> Result<(), RequestError> {
        let status = match result {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(failure @ (Failure::Invalid | Failure::Unsupported)) => {
                metrics.invalid_reqs_count.add(1);
                match failure {
                    Failure::Unsupported => VIRTIO_BLK_S_UNSUPP,
                    _ => VIRTIO_BLK_S_IOERR,
                }
            }
            Err(Failure::Host(error)) => {
                metrics.execute_fails.add(1);
                self.warn_of_failure(error);
                VIRTIO_BLK_S_IOERR
            }
        };
        let address = request.status_address;
        let byte = self.memory.range(address, 1);
        let byte = byte.ok_or(RequestError::Status(address.0))?;
        byte.store(0, [status as u8], Ordering::Relaxed);
        Ok(())
    }

    /// Whether a write must be on stable storage before it is acknowledged: a driver that cannot flush takes
    /// a completed write to be durable (section 5.2.6.2).
    pub(super) fn writes_are_durable(&self) -> bool {
        match self.disk.cache() {
            CacheMode::Writethrough => true,
            CacheMode::Unsafe => false,
            CacheMode::Writeback | CacheMode::None => !self.negotiated(VIRTIO_BLK_F_FLUSH),
        }
    }

    /// Brings a change without data to stable storage, if it must be there before it is acknowledged.
    fn flush_durable(&self) -> io::Result<()> {
        if self.writes_are_durable() {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Reads the range of a discard or write-zeroes request: its offset and length in bytes, and its flags.
    fn range(
        &self,
        readable: &mut GuestBuffers,
        known_flags: u32,
    ) -> Result<(u64, u64, u32), Failure> {
        self.check_writable()?;
        if readable.len() != RANGE_SIZE {
            return Err(Failure::Invalid);
        }
        let bytes: [u8; RANGE_SIZE] = readable.read_array().ok_or(Failure::Invalid)?;
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, flags @ ..] = bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes(flags);
        if flags & !known_flags != 0 {
            return Err(Failure::Unsupported);
        }
        if count > MAX_RANGE_SECTORS {
            return Err(Failure::Invalid);
        }
        let len = u64::from(count) * SECTOR_SIZE;
        Ok((self.offset(sector, len)?, len, flags))
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.disk.is_read_only() {
            return Err(Failure::Invalid);
        }
        Ok(())
    }

    fn negotiated(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    fn data_offset(&self, sector: u64, len: usize) -> Result<u64, Failure> {
        let len = len as u64;
        if !len.is_multiple_of(SECTOR_SIZE) || len > MAX_DATA_SIZE {
            return Err(Failure::Invalid);
        }
        self.offset(sector, len)
    }

    /// Returns the byte offset of `sector`, if `len` bytes from there are all on the disk.
    fn offset(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        sector
            .checked_mul(SECTOR_SIZE)
            .filter(|offset| {
                offset
                    .checked_add(len)
                    .is_some_and(|end| end <= self.disk.size())
            })
            .ok_or(Failure::Invalid)
    }

    /// Logs a failure of the disk from time to time, as a failing disk fails often.
    fn warn_of_failure(&mut self, error: &io::Error) {
        if self.warning.is_due() {
            self.link.warn_of_host(format_args!(
                "a request failed, and the guest was told so: {error}"
            ));
        }
    }
}
