//! A driver of the console device (section 5.3): a console, or a device of channels.

use alloc::boxed::Box;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::mmio::{MmioDevice, register};
use super::{
    Buffer, Completion, Error, REQUEST_TIMEOUT, SplitQueue, Transport, device_id, feature,
    wait_for_used,
};
use crate::time::Deadline;

/// Size of a receive buffer in bytes.
const BUFFER_SIZE: usize = 4096;
/// Size of a buffer for control messages in bytes.
const MESSAGE_SIZE: usize = 256;
/// Index of the control queue by which the driver receives; the other follows.
const CONTROL_QUEUE: u16 = 2;

/// Feature bits (section 5.3.3).
pub mod console_feature {
    /// `VIRTIO_CONSOLE_F_SIZE`: the configuration space has the size of the console.
    pub const SIZE: u64 = 1 << 0;
    /// `VIRTIO_CONSOLE_F_MULTIPORT`: the device has several ports, and control queues.
    pub const MULTIPORT: u64 = 1 << 1;
    /// `VIRTIO_CONSOLE_F_EMERG_WRITE`: bytes can be written to the configuration space.
    pub const EMERGENCY_WRITE: u64 = 1 << 2;
}

/// Kinds of control messages (section 5.3.6.2).
#[expect(missing_docs, reason = "named as in the standard")]
pub mod event {
    pub const DEVICE_READY: u16 = 0;
    pub const PORT_ADD: u16 = 1;
    pub const PORT_READY: u16 = 3;
    pub const PORT_OPEN: u16 = 6;
    pub const PORT_NAME: u16 = 7;
}

/// Offsets in the configuration space (section 5.3.4).
mod config {
    pub const SIZE: u64 = 0;
    pub const MAX_PORTS: u64 = 4;
    pub const EMERGENCY_WRITE: u64 = 8;
}

/// The port of messages about the device.
const NO_PORT: u32 = u32::MAX;

/// The queues of a port, and buffers that are in one of the two.
pub struct Port {
    /// Where buffers are offered.
    pub receive: SplitQueue,
    /// Where bytes are sent.
    pub transmit: SplitQueue,
    /// The buffer at each head descriptor of `receive`.
    offered: Vec<Option<Box<[u8]>>>,
    /// The buffer at each head descriptor of `transmit`.
    sending: Vec<Option<Box<[u8]>>>,
}

impl Port {
    fn open(
        device: &MmioDevice,
        first_queue: u16,
        queue_size: u16,
        features: u64,
    ) -> Result<Self, Error> {
        let mut receive = device.set_up_queue(first_queue, queue_size, features)?;
        let mut transmit = device.set_up_queue(first_queue + 1, queue_size, features)?;
        receive.want_interrupts(false);
        transmit.want_interrupts(false);
        let mut port = Self {
            offered: (0..receive.size()).map(|_| None).collect(),
            sending: (0..transmit.size()).map(|_| None).collect(),
            receive,
            transmit,
        };
        for _ in 0..port.receive.size() {
            port.offer(vec![0; BUFFER_SIZE].into_boxed_slice())?;
        }
        Ok(port)
    }

    fn offer(&mut self, mut buffer: Box<[u8]>) -> Result<(), Error> {
        let head = self.receive.add(&[Buffer::writable(&mut buffer)])?;
        self.offered[usize::from(head)] = Some(buffer);
        Ok(())
    }

    /// Sends received bytes back, and offers sent buffers again. Returns how many bytes it has
    /// received.
    ///
    /// # Errors
    ///
    /// If the device breaks the rules of the rings.
    pub fn echo(&mut self, device: &MmioDevice) -> Result<u64, Error> {
        while let Some(used) = self.transmit.take_used()? {
            self.transmit.want_interrupts(false);
            if let Some(buffer) = self.sending[usize::from(used.head)].take()
                && buffer.len() == BUFFER_SIZE
            {
                self.offer(buffer)?;
            }
        }
        self.receive.kick(device);
        let mut count = 0;
        while self.transmit.next_head(1).is_some()
            && let Some(used) = self.receive.take_used()?
        {
            self.receive.want_interrupts(false);
            let buffer = self.offered[usize::from(used.head)].take();
            let buffer = buffer.ok_or(Error::WrongChain(used.head.into()))?;
            let length = used.length as usize;
            if !(1..=buffer.len()).contains(&length) {
                return Err(Error::WrongLength(used.length));
            }
            let head = self.transmit.add(&[Buffer::readable(&buffer[..length])])?;
            self.sending[usize::from(head)] = Some(buffer);
            count += length as u64;
        }
        self.transmit.kick(device);
        Ok(count)
    }

    /// Returns whether the device has taken all that was sent.
    pub fn is_idle(&self) -> bool {
        self.sending.iter().all(Option::is_none)
    }

    /// Sends `text`, and waits until the device has taken it.
    ///
    /// # Errors
    ///
    /// If the device does not answer.
    pub fn send(&mut self, device: &MmioDevice, text: &[u8]) -> Result<(), Error> {
        let text: Box<[u8]> = text.into();
        self.transmit.add(&[Buffer::readable(&text)])?;
        self.transmit.kick(device);
        wait_for_used(device, &mut self.transmit, Completion::Polled).map(drop)
    }
}

/// A console.
pub struct Console {
    /// Its registers.
    pub device: MmioDevice,
    /// Its port.
    pub port: Port,
}

impl Console {
    /// Initialises a device of one port.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        if device.device_id() != device_id::CONSOLE {
            return Err(Error::WrongType(device.device_id()));
        }
        let wanted = console_feature::SIZE | console_feature::EMERGENCY_WRITE;
        let features = device.initialise(feature::EVENT_INDEX | wanted)?;
        let port = Port::open(&device, 0, queue_size, features)?;
        device.set_driver_ok();
        Ok(Self { device, port })
    }

    /// Returns columns and rows.
    pub fn size(&self) -> (u16, u16) {
        let size = self.device.config_32(config::SIZE);
        (size as u16, (size >> 16) as u16)
    }
}

/// Writes a byte to the configuration space, which needs no queues.
pub fn write_emergency_byte(device: &MmioDevice, byte: u8) {
    device.write(register::CONFIG + config::EMERGENCY_WRITE, byte.into());
}

/// A control message of the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Which port it is about.
    pub port: u32,
    /// What kind it is.
    pub event: u16,
    /// What it says.
    pub value: u16,
    /// What follows, if it is text.
    pub text: String,
}

/// A device of channels.
pub struct Channels {
    /// Its registers.
    pub device: MmioDevice,
    /// Its ports; the first one is not a channel.
    pub ports: Vec<Port>,
    /// Where control messages are received.
    pub control_receive: SplitQueue,
    /// Where they are sent.
    pub control_transmit: SplitQueue,
    /// Whether the host has its end of each channel open, according to the messages taken so far.
    pub is_host_open: Vec<bool>,
    messages: Vec<Option<Box<[u8]>>>,
}

impl Channels {
    /// Initialises a device of several ports.
    ///
    /// # Errors
    ///
    /// If it is not such a device or cannot be initialised.
    pub fn open(device: MmioDevice, queue_size: u16) -> Result<Self, Error> {
        if device.device_id() != device_id::CONSOLE {
            return Err(Error::WrongType(device.device_id()));
        }
        let wanted = feature::EVENT_INDEX | console_feature::MULTIPORT;
        let features = device.initialise(wanted)?;
        let count = device.config_32(config::MAX_PORTS) as u16;
        let mut ports = vec![Port::open(&device, 0, queue_size, features)?];
        let control_receive = device.set_up_queue(CONTROL_QUEUE, queue_size, features)?;
        let control_transmit = device.set_up_queue(CONTROL_QUEUE + 1, queue_size, features)?;
        for port in 1..count {
            let queue = CONTROL_QUEUE + 2 * port;
            ports.push(Port::open(&device, queue, queue_size, features)?);
        }
        device.set_driver_ok();
        let mut channels = Self {
            messages: (0..control_receive.size()).map(|_| None).collect(),
            is_host_open: vec![false; ports.len() - 1],
            device,
            ports,
            control_receive,
            control_transmit,
        };
        channels.control_receive.want_interrupts(false);
        channels.control_transmit.want_interrupts(false);
        for _ in 0..channels.control_receive.size() {
            channels.offer_message_buffer(vec![0; MESSAGE_SIZE].into_boxed_slice())?;
        }
        channels.control_receive.kick(&channels.device);
        channels.tell(NO_PORT, event::DEVICE_READY, 1)?;
        Ok(channels)
    }

    fn offer_message_buffer(&mut self, mut buffer: Box<[u8]>) -> Result<(), Error> {
        let head = self.control_receive.add(&[Buffer::writable(&mut buffer)])?;
        self.messages[usize::from(head)] = Some(buffer);
        Ok(())
    }

    /// Sends a control message, and waits until the device has taken it.
    ///
    /// # Errors
    ///
    /// If the device does not answer.
    pub fn tell(&mut self, port: u32, event: u16, value: u16) -> Result<(), Error> {
        let mut message = Vec::new();
        message.extend(port.to_le_bytes());
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        let message = message.into_boxed_slice();
        self.control_transmit.add(&[Buffer::readable(&message)])?;
        self.control_transmit.kick(&self.device);
        wait_for_used(&self.device, &mut self.control_transmit, Completion::Polled)?;
        self.control_transmit.want_interrupts(false);
        Ok(())
    }

    /// Takes a control message, if one has arrived.
    ///
    /// # Errors
    ///
    /// If the device breaks the rules of the ring, or the message is shorter than one can be.
    pub fn take_message(&mut self) -> Result<Option<Message>, Error> {
        let Some(used) = self.control_receive.take_used()? else {
            return Ok(None);
        };
        self.control_receive.want_interrupts(false);
        let buffer = self.messages[usize::from(used.head)].take();
        let buffer = buffer.ok_or(Error::WrongChain(used.head.into()))?;
        let length = used.length as usize;
        if !(8..=buffer.len()).contains(&length) {
            return Err(Error::WrongLength(used.length));
        }
        let half = |at: usize| u16::from_le_bytes([buffer[at], buffer[at + 1]]);
        let message = Message {
            port: u32::from(half(0)) | u32::from(half(2)) << 16,
            event: half(4),
            value: half(6),
            text: String::from_utf8_lossy(&buffer[8..length]).into_owned(),
        };
        let index = (message.port as usize).wrapping_sub(1);
        if message.event == event::PORT_OPEN
            && let Some(is_open) = self.is_host_open.get_mut(index)
        {
            *is_open = message.value != 0;
        }
        self.offer_message_buffer(buffer)?;
        self.control_receive.kick(&self.device);
        Ok(Some(message))
    }

    /// Answers the device's announcements until it has named all channels, and opens them. Returns
    /// their names, starting with port 1.
    ///
    /// # Errors
    ///
    /// If the device does not announce them all.
    pub fn open_all(&mut self) -> Result<Vec<String>, Error> {
        let mut names = vec![String::new(); self.ports.len() - 1];
        let deadline = Deadline::after(REQUEST_TIMEOUT);
        while names.iter().any(String::is_empty) {
            if deadline.passed() {
                return Err(Error::TimedOut);
            }
            match self.take_message()? {
                Some(Message { port, event, .. }) if event == event::PORT_ADD => {
                    self.tell(port, event::PORT_READY, 1)?;
                }
                Some(message) if message.event == event::PORT_NAME => {
                    names[message.port as usize - 1] = message.text;
                    self.tell(message.port, event::PORT_OPEN, 1)?;
                }
                Some(Message { event, .. }) if event == event::PORT_OPEN => {}
                Some(message) => return Err(Error::WrongLength(message.event.into())),
                None => core::hint::spin_loop(),
            }
        }
        Ok(names)
    }
}
