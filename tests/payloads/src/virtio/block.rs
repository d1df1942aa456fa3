//! A driver of the block device (section 5.2): many requests at a time, or a single one and its
//! result.

use alloc::vec::Vec;

use super::{
    Buffer, Completion, Error, MmioDevice, SplitQueue, Transport, Used, device_id, feature,
    wait_for_used,
};

/// Size of the sectors that requests count in.
pub const SECTOR_SIZE: usize = 512;
/// Size of what [`Block::read_id`] returns.
pub const ID_SIZE: usize = 20;

/// Feature bits.
pub mod block_feature {
    /// `VIRTIO_BLK_F_SEG_MAX`: the configuration says how many segments a request can have.
    pub const SEGMENT_MAX: u64 = 1 << 2;
    /// `VIRTIO_BLK_F_RO`: the device is read-only.
    pub const READ_ONLY: u64 = 1 << 5;
    /// `VIRTIO_BLK_F_BLK_SIZE`: the configuration has the block size.
    pub const BLOCK_SIZE: u64 = 1 << 6;
    /// `VIRTIO_BLK_F_FLUSH`: the device has a cache and takes flush requests.
    pub const FLUSH: u64 = 1 << 9;
    /// `VIRTIO_BLK_F_MQ`: the device has more queues.
    pub const MULTIQUEUE: u64 = 1 << 12;
    /// `VIRTIO_BLK_F_DISCARD`: the device takes discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// `VIRTIO_BLK_F_WRITE_ZEROES`: the device takes write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

const WANTED: u64 = block_feature::SEGMENT_MAX
    | block_feature::READ_ONLY
    | block_feature::BLOCK_SIZE
    | block_feature::FLUSH
    | block_feature::DISCARD
    | block_feature::WRITE_ZEROES
    | feature::EVENT_INDEX
    | feature::INDIRECT_DESCRIPTORS;

/// `VIRTIO_BLK_S_OK`.
pub const STATUS_OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`.
pub const STATUS_IO_ERROR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`.
pub const STATUS_UNSUPPORTED: u8 = 2;
/// Initial value of the status byte, which no device writes.
pub const STATUS_UNTOUCHED: u8 = 0xff;

/// The type of a request (`type` of `struct virtio_blk_req`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RequestType {
    /// Reads sectors.
    Read = 0,
    /// Writes sectors.
    Write = 1,
    /// Makes what was written durable.
    Flush = 4,
    /// Reads the device's id string.
    GetId = 8,
    /// Gives sectors back.
    Discard = 11,
    /// Makes sectors zero.
    WriteZeroes = 13,
}

/// Start of a request.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct RequestHeader {
    /// A [`RequestType`], or an invalid value.
    pub kind: u32,
    /// Reserved.
    pub reserved: u32,
    /// First sector of a read or write.
    pub sector: u64,
}

/// `struct virtio_blk_discard_write_zeroes`: what to discard or make zero.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SectorRange {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub count: u32,
    /// Bit 0: write-zeroes may also give the sectors back.
    pub flags: u32,
}

/// A request that the device has completed.
#[derive(Debug, Clone, Copy)]
pub struct Completed {
    /// Head of its chain, as [`Block::submit`] returned it.
    pub head: u16,
    /// How many bytes the device says it wrote, the status byte included, or how it failed.
    pub result: Result<u32, Error>,
}

/// The driver's part of a request that the device may be working on.
#[repr(C, align(32))]
struct Slot {
    header: RequestHeader,
    status: u8,
}

/// A block device.
pub struct Block {
    /// Its registers.
    pub device: MmioDevice,
    /// Its first queue.
    pub queue: SplitQueue,
    /// Negotiated features.
    pub features: u64,
    /// Header and status of the request at each head descriptor.
    slots: Vec<Slot>,
}

impl Block {
    /// Initialises the device with a queue of at most `queue_size` descriptors; a request takes
    /// two or three.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        Self::open_with(device, queue_size, WANTED)
    }

    /// Initialises the device like [`open`](Self::open), negotiating at most the features in
    /// `wanted`.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn open_with(device: MmioDevice, queue_size: u16, wanted: u64) -> Result<Self, Error> {
        if device.device_id() != device_id::BLOCK {
            return Err(Error::WrongType(device.device_id()));
        }
        let features = device.initialise(wanted)?;
        let queue = device.set_up_queue(0, queue_size, features)?;
        device.set_driver_ok();
        let slots = (0..queue.size())
            .map(|_| Slot {
                header: RequestHeader::default(),
                status: STATUS_UNTOUCHED,
            })
            .collect();
        Ok(Self {
            device,
            queue,
            features,
            slots,
        })
    }

    /// Size of the device in sectors.
    pub fn capacity(&self) -> u64 {
        self.device.config_64(0)
    }

    /// Makes a request available without ringing the doorbell, and returns the head of its chain.
    /// `data` must stay where it is until the request is complete.
    ///
    /// # Errors
    ///
    /// If the queue is full.
    pub fn submit(
        &mut self,
        kind: RequestType,
        sector: u64,
        data: Option<Buffer>,
    ) -> Result<u16, Error> {
        self.submit_header(
            RequestHeader {
                kind: kind as u32,
                reserved: 0,
                sector,
            },
            data,
        )
    }

    /// Makes a request with any header available; see [`submit`](Self::submit).
    ///
    /// # Errors
    ///
    /// If the queue is full.
    pub fn submit_header(
        &mut self,
        header: RequestHeader,
        data: Option<Buffer>,
    ) -> Result<u16, Error> {
        let length = if data.is_some() { 3 } else { 2 };
        let slot = self.queue.next_head(length).ok_or(Error::QueueFull)?;
        let slot = &mut self.slots[usize::from(slot)];
        slot.header = header;
        slot.status = STATUS_UNTOUCHED;
        let header = Buffer::readable(core::slice::from_ref(&slot.header));
        let status = Buffer::writable(core::slice::from_mut(&mut slot.status));
        match data {
            Some(data) => self.queue.add(&[header, data, status]),
            None => self.queue.add(&[header, status]),
        }
    }

    /// Rings the doorbell for what was submitted, if the device wants that.
    pub fn kick(&mut self) -> bool {
        self.queue.kick(&self.device)
    }

    /// Takes a request that the device has completed.
    ///
    /// # Errors
    ///
    /// If the device breaks the rules of the used ring.
    pub fn complete(&mut self) -> Result<Option<Completed>, Error> {
        let used = self.queue.take_used()?;
        Ok(used.map(|used| Completed {
            head: used.head,
            result: self.result(used),
        }))
    }

    /// The status byte of a request that the device has completed.
    pub fn status_of(&self, used: Used) -> u8 {
        let status = &raw const self.slots[usize::from(used.head)].status;
        // SAFETY: a byte of the slot, which the device wrote behind the compiler's back.
        unsafe { status.read_volatile() }
    }

    fn result(&self, used: Used) -> Result<u32, Error> {
        match self.status_of(used) {
            STATUS_OK => Ok(used.length),
            status => Err(Error::Status(status)),
        }
    }

    /// Executes one request, and returns how many bytes the device reports to have written, its
    /// status byte included. No other request may be under way.
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn request(
        &mut self,
        kind: RequestType,
        sector: u64,
        data: Option<Buffer>,
        completion: Completion,
    ) -> Result<u32, Error> {
        let head = self.submit(kind, sector, data)?;
        self.kick();
        let used = wait_for_used(&self.device, &mut self.queue, completion)?;
        if used.head != head {
            return Err(Error::WrongChain(u32::from(used.head)));
        }
        self.result(used)
    }

    /// Reads sectors into `bytes`, whose length is a multiple of [`SECTOR_SIZE`].
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn read(
        &mut self,
        sector: u64,
        bytes: &mut [u8],
        completion: Completion,
    ) -> Result<(), Error> {
        let length = bytes.len() as u32 + 1;
        match self.request(
            RequestType::Read,
            sector,
            Some(Buffer::writable(bytes)),
            completion,
        )? {
            written if written == length => Ok(()),
            written => Err(Error::WrongLength(written)),
        }
    }

    /// Writes sectors from `bytes`, whose length is a multiple of [`SECTOR_SIZE`].
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn write(
        &mut self,
        sector: u64,
        bytes: &[u8],
        completion: Completion,
    ) -> Result<(), Error> {
        self.request(
            RequestType::Write,
            sector,
            Some(Buffer::readable(bytes)),
            completion,
        )?;
        Ok(())
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn flush(&mut self, completion: Completion) -> Result<(), Error> {
        self.request(RequestType::Flush, 0, None, completion)?;
        Ok(())
    }

    /// Reads the device's id string.
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn read_id(&mut self, completion: Completion) -> Result<[u8; ID_SIZE], Error> {
        let mut id = [0; ID_SIZE];
        self.request(
            RequestType::GetId,
            0,
            Some(Buffer::writable(&mut id)),
            completion,
        )?;
        Ok(id)
    }

    /// Discards sectors, or makes them zero.
    ///
    /// # Errors
    ///
    /// If the request fails or the device does not answer.
    pub fn clear(
        &mut self,
        kind: RequestType,
        range: SectorRange,
        completion: Completion,
    ) -> Result<(), Error> {
        let range = [range];
        self.request(kind, 0, Some(Buffer::readable(&range)), completion)?;
        Ok(())
    }
}
