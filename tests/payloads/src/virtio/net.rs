//! A driver of the network card (section 5.1), without mergeable receive buffers.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use super::{
    Buffer, Completion, Error, MmioDevice, SplitQueue, Transport, device_id, feature, wait_for_used,
};

/// Feature bits.
pub mod net_feature {
    /// `VIRTIO_NET_F_CSUM`: the device completes checksums of frames sent.
    pub const CHECKSUM: u64 = 1 << 0;
    /// `VIRTIO_NET_F_GUEST_CSUM`: the driver takes frames with incomplete checksums.
    pub const GUEST_CHECKSUM: u64 = 1 << 1;
    /// `VIRTIO_NET_F_MTU`: the configuration has the largest IP packet of the network.
    pub const MTU: u64 = 1 << 3;
    /// `VIRTIO_NET_F_MAC`: the configuration has the card's address.
    pub const MAC: u64 = 1 << 5;
    /// `VIRTIO_NET_F_GUEST_TSO4`: the driver takes large TCP frames of IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// `VIRTIO_NET_F_HOST_TSO4`: the device segments large TCP frames of IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// `VIRTIO_NET_F_STATUS`: the configuration has the link's state.
    pub const STATUS: u64 = 1 << 16;
}

/// Features of checksum and segmentation offload, in both directions.
pub const OFFLOADS: u64 = net_feature::CHECKSUM
    | net_feature::GUEST_CHECKSUM
    | net_feature::GUEST_TSO4
    | net_feature::HOST_TSO4;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
/// A frame of 1500 bytes of payload, or of the most that segmentation offload makes
/// (section 5.1.6.3.1), each with its header.
const BUFFER_SIZE: usize = 1526;
const LARGE_BUFFER_SIZE: usize = 65_562;

/// Size of [`Header`] in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// `struct virtio_net_hdr`, before every frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Header {
    /// Bit 0: the checksum is incomplete. Bit 1: it has been verified.
    pub flags: u8,
    /// How to segment the frame; zero means not at all.
    pub segmentation: u8,
    /// Size of the headers that every segment repeats.
    pub header_length: u16,
    /// Payload of a segment in bytes.
    pub segment_size: u16,
    /// Where the checksum starts.
    pub checksum_start: u16,
    /// Where to store it, counted from its start.
    pub checksum_offset: u16,
    /// How many buffers the frame takes.
    pub buffer_count: u16,
}

/// A network card.
pub struct Net {
    /// Its registers.
    pub device: MmioDevice,
    /// The queue of buffers for received frames.
    pub receive_queue: SplitQueue,
    /// The queue of frames to send.
    pub transmit_queue: SplitQueue,
    /// Negotiated features.
    pub features: u64,
    /// The buffer at each head descriptor of the receive queue.
    buffers: Vec<Option<Box<[u8]>>>,
}

impl Net {
    /// Initialises the card with queues of at most `queue_size` descriptors and one receive buffer
    /// for each, negotiating no more than `MAC`, `STATUS` and the features of `wanted`.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16, wanted: u64) -> Result<Self, Error> {
        if device.device_id() != device_id::NET {
            return Err(Error::WrongType(device.device_id()));
        }
        let features = device.initialise(
            wanted
                | net_feature::MAC
                | net_feature::STATUS
                | feature::EVENT_INDEX
                | feature::INDIRECT_DESCRIPTORS,
        )?;
        let receive_queue = device.set_up_queue(RECEIVE_QUEUE, queue_size, features)?;
        let transmit_queue = device.set_up_queue(TRANSMIT_QUEUE, queue_size, features)?;
        device.set_driver_ok();
        let buffers = (0..receive_queue.size()).map(|_| None).collect();
        let mut net = Self {
            device,
            receive_queue,
            transmit_queue,
            features,
            buffers,
        };
        let large = features & net_feature::GUEST_TSO4 != 0;
        let size = if large {
            LARGE_BUFFER_SIZE
        } else {
            BUFFER_SIZE
        };
        for _ in 0..net.receive_queue.size() {
            net.post(vec![0; size].into_boxed_slice())?;
        }
        net.receive_queue.kick(&net.device);
        Ok(net)
    }

    fn post(&mut self, mut buffer: Box<[u8]>) -> Result<(), Error> {
        let head = self.receive_queue.add(&[Buffer::writable(&mut buffer)])?;
        self.buffers[usize::from(head)] = Some(buffer);
        Ok(())
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        core::array::from_fn(|index| {
            self.device
                .read_byte(super::mmio::register::CONFIG + index as u64)
        })
    }

    /// Whether the card has a link.
    pub fn has_link(&self) -> bool {
        // The low byte of the status, behind the address.
        let status = super::mmio::register::CONFIG + 6;
        self.device.read_byte(status) & 1 != 0
    }

    /// Waits for a frame, passes it to `take`, and gives its buffer back to the card.
    ///
    /// # Errors
    ///
    /// If none arrives, or the card claims to have written more or less than is possible.
    pub fn receive<T>(
        &mut self,
        completion: Completion,
        take: impl FnOnce(Header, &mut [u8]) -> T,
    ) -> Result<T, Error> {
        let used = wait_for_used(&self.device, &mut self.receive_queue, completion)?;
        let buffer = self.buffers[usize::from(used.head)].take();
        let mut buffer = buffer.ok_or(Error::WrongChain(u32::from(used.head)))?;
        let length = used.length as usize;
        if !(HEADER_SIZE..=buffer.len()).contains(&length) {
            return Err(Error::WrongLength(used.length));
        }
        // SAFETY: the buffer has at least a header, and any bytes are one.
        let header = unsafe { buffer.as_ptr().cast::<Header>().read_unaligned() };
        let taken = take(header, &mut buffer[HEADER_SIZE..length]);
        self.post(buffer)?;
        self.receive_queue.kick(&self.device);
        Ok(taken)
    }

    /// Sends a frame and waits until the card has taken it.
    ///
    /// # Errors
    ///
    /// If the card does not answer.
    pub fn send(
        &mut self,
        header: Header,
        frame: &[u8],
        completion: Completion,
    ) -> Result<(), Error> {
        let header = [header];
        self.transmit_queue
            .add(&[Buffer::readable(&header), Buffer::readable(frame)])?;
        self.transmit_queue.kick(&self.device);
        wait_for_used(&self.device, &mut self.transmit_queue, completion)?;
        Ok(())
    }
}
