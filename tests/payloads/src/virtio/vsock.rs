//! A driver of the socket device (section 5.10): packets in both directions, and the accounting of
//! a connection.

use alloc::boxed::Box;
use alloc::vec;
use alloc::vec::Vec;

use super::mmio::MmioDevice;
use super::{Buffer, Error, REQUEST_TIMEOUT, SplitQueue, Transport, device_id, feature};
use crate::time::Deadline;

const RECEIVE_QUEUE: u16 = 0;
const TRANSMIT_QUEUE: u16 = 1;
const EVENT_QUEUE: u16 = 2;
/// Size of a receive buffer, header included.
const RECEIVE_SIZE: usize = 16 << 10;

/// The host's context identifier.
pub const HOST_CID: u64 = 2;
/// Stream sockets.
pub const TYPE_STREAM: u16 = 1;

/// Operations of packets (section 5.10.6).
#[expect(missing_docs, reason = "named as in the standard")]
pub mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of `SHUTDOWN`: the sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of `SHUTDOWN`: the sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// `struct virtio_vsock_hdr`, before every packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, packed(4))]
pub struct Header {
    /// CID of the sender.
    pub src_cid: u64,
    /// CID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Size of the data in bytes.
    pub length: u32,
    /// Kind of socket.
    pub socket_type: u16,
    /// Its operation.
    pub operation: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Size of the sender's buffer in bytes.
    pub buffer_size: u32,
    /// Bytes that have left the sender's buffer.
    pub forwarded: u32,
}

/// Size of [`Header`] in bytes.
pub const HEADER_SIZE: usize = size_of::<Header>();

/// A socket device.
pub struct Vsock {
    /// Its registers.
    pub device: MmioDevice,
    /// The guest's context identifier, as the device says.
    pub cid: u64,
    receive_queue: SplitQueue,
    transmit_queue: SplitQueue,
    _event_queue: SplitQueue,
    /// The buffer at each head descriptor of the receive queue.
    buffers: Vec<Option<Box<[u8]>>>,
    /// The header of the packet at each head descriptor of the transmit queue.
    headers: Vec<Header>,
}

impl Vsock {
    /// Initialises the device with queues of at most `queue_size` descriptors and one receive buffer
    /// for each.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        if device.device_id() != device_id::VSOCK {
            return Err(Error::WrongType(device.device_id()));
        }
        let features = device.initialise(feature::EVENT_INDEX)?;
        let receive_queue = device.set_up_queue(RECEIVE_QUEUE, queue_size, features)?;
        let transmit_queue = device.set_up_queue(TRANSMIT_QUEUE, queue_size, features)?;
        let event_queue = device.set_up_queue(EVENT_QUEUE, queue_size, features)?;
        device.set_driver_ok();
        let mut vsock = Self {
            cid: device.config_64(0),
            device,
            buffers: (0..receive_queue.size()).map(|_| None).collect(),
            headers: vec![Header::default(); usize::from(transmit_queue.size())],
            receive_queue,
            transmit_queue,
            _event_queue: event_queue,
        };
        vsock.receive_queue.want_interrupts(false);
        vsock.transmit_queue.want_interrupts(false);
        for _ in 0..vsock.receive_queue.size() {
            vsock.post(vec![0; RECEIVE_SIZE].into_boxed_slice())?;
        }
        vsock.receive_queue.kick(&vsock.device);
        Ok(vsock)
    }

    /// Resets the device and initialises it again, with the memory that it has.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub fn restart(&mut self) -> Result<(), Error> {
        let features = self.device.initialise(feature::EVENT_INDEX)?;
        let event_index = features & feature::EVENT_INDEX != 0;
        for queue in [
            &mut self.receive_queue,
            &mut self.transmit_queue,
            &mut self._event_queue,
        ] {
            queue.restart(event_index);
            self.device.attach_queue(queue);
        }
        self.device.set_driver_ok();
        self.receive_queue.want_interrupts(false);
        self.transmit_queue.want_interrupts(false);
        let buffers: Vec<_> = self.buffers.iter_mut().filter_map(Option::take).collect();
        for buffer in buffers {
            self.post(buffer)?;
        }
        self.receive_queue.kick(&self.device);
        Ok(())
    }

    /// Requests a connection to a port of the host to which nothing listens, and waits for the
    /// refusal.
    ///
    /// # Errors
    ///
    /// If the device does not answer.
    pub fn is_refused(&mut self, port: u32) -> Result<(), Error> {
        let request = Header {
            src_cid: self.cid,
            dst_cid: HOST_CID,
            src_port: 1,
            dst_port: port,
            socket_type: TYPE_STREAM,
            operation: operation::REQUEST,
            ..Header::default()
        };
        self.send(request, &[])?;
        self.publish_packets();
        let deadline = Deadline::after(REQUEST_TIMEOUT);
        while !deadline.passed() {
            if let Some(answer) = self.receive(|header, _| header)? {
                let is_right = answer.operation == operation::RST && answer.src_port == port;
                return is_right.then_some(()).ok_or(Error::WrongLength(0));
            }
        }
        Err(Error::TimedOut)
    }

    fn post(&mut self, mut buffer: Box<[u8]>) -> Result<(), Error> {
        let head = self.receive_queue.add(&[Buffer::writable(&mut buffer)])?;
        self.buffers[usize::from(head)] = Some(buffer);
        Ok(())
    }

    /// Takes a packet, if one has arrived, passes it to `take` and gives its buffer back.
    ///
    /// # Errors
    ///
    /// If the device claims to have written more or less than is possible.
    pub fn receive<T>(
        &mut self,
        take: impl FnOnce(Header, &[u8]) -> T,
    ) -> Result<Option<T>, Error> {
        let Some(used) = self.receive_queue.take_used()? else {
            return Ok(None);
        };
        let buffer = self.buffers[usize::from(used.head)].take();
        let buffer = buffer.ok_or(Error::WrongChain(u32::from(used.head)))?;
        let length = used.length as usize;
        if !(HEADER_SIZE..=buffer.len()).contains(&length) {
            return Err(Error::WrongLength(used.length));
        }
        // SAFETY: the buffer has at least a header, and any bytes are one.
        let header = unsafe { buffer.as_ptr().cast::<Header>().read_unaligned() };
        if header.length as usize != length - HEADER_SIZE {
            return Err(Error::WrongLength(used.length));
        }
        let taken = take(header, &buffer[HEADER_SIZE..length]);
        self.post(buffer)?;
        self.receive_queue.want_interrupts(false);
        Ok(Some(taken))
    }

    /// Tells the device of the buffers that were given back.
    pub fn publish_buffers(&mut self) {
        self.receive_queue.kick(&self.device);
    }

    /// Whether there is room for one more packet to be sent.
    ///
    /// # Errors
    ///
    /// If the device has returned a buffer that it was not given.
    pub fn can_send(&mut self) -> Result<bool, Error> {
        while self.transmit_queue.take_used()?.is_some() {
            self.transmit_queue.want_interrupts(false);
        }
        Ok(self.transmit_queue.next_head(2).is_some())
    }

    /// Sends a packet, for which there is room. The data stays as it is until the end.
    ///
    /// # Errors
    ///
    /// If there is no room.
    pub fn send(&mut self, mut header: Header, data: &'static [u8]) -> Result<(), Error> {
        let parts = if data.is_empty() { 1 } else { 2 };
        let head = self.transmit_queue.next_head(parts);
        let slot = usize::from(head.ok_or(Error::QueueFull)?);
        header.length = data.len() as u32;
        self.headers[slot] = header;
        let chain = [
            Buffer::readable(&self.headers[slot..=slot]),
            Buffer::readable(data),
        ];
        self.transmit_queue.add(&chain[..parts])?;
        Ok(())
    }

    /// Tells the device of the packets that were sent.
    pub fn publish_packets(&mut self) {
        self.transmit_queue.kick(&self.device);
    }
}
