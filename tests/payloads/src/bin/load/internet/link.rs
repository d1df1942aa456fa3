//! The network card as a way to pass IPv4 packets. A frame is written into a free slot of the transmit queue; a
//! buffer that was received into is given back at once.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::net::Ipv4Addr;
use core::ptr;

use runtime::time::{self, Duration};
use runtime::virtio::net::{HEADER_SIZE, Header, net_feature};
use runtime::virtio::queue::{DESCRIPTOR_WRITE, Descriptor};
use runtime::virtio::{Completion, SlotQueue, Transport, feature};

use super::packet::{self, ETHERNET_SIZE, IP_AND_TCP_SIZE, Offloads};
use crate::buffers;
use crate::completion::Waiter;

const WANTED: u64 = net_feature::MAC
    | net_feature::MTU
    | net_feature::CHECKSUM
    | net_feature::HOST_TSO4
    | net_feature::GUEST_CHECKSUM
    | feature::EVENT_INDEX
    | feature::INDIRECT_DESCRIPTORS;
/// Offset of the MTU in the card's configuration (virtio 1.3, section 5.1.4).
const MTU_OFFSET: u64 = 10;
/// The MTU of a card that says nothing about it.
const DEFAULT_MTU: u16 = 1500;
/// The largest IPv4 packet.
const MAX_PACKET_SIZE: usize = u16::MAX as usize;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Most memory of the buffers of a queue; large buffers are fewer. It is about what Linux uses, so that caches work
/// as for its drivers.
const MAX_MEMORY: usize = 2 << 20;
/// How long the gateway may take to tell its address, and how often it is asked.
const ARP_LIMIT: Duration = Duration::from_secs(3);
const ARP_INTERVAL: Duration = Duration::from_millis(100);

/// Buffers of equal size, one after the other.
#[derive(Clone, Copy)]
struct Buffers {
    start: u64,
    size: usize,
    count: u16,
}

impl Buffers {
    /// Describes as many buffers for packets of up to `packet_size` bytes as fit, from `start` on.
    fn new(start: u64, packet_size: usize) -> Self {
        let size = (HEADER_SIZE + ETHERNET_SIZE + packet_size).next_multiple_of(2048);
        Self {
            start,
            size,
            count: QUEUE_SIZE.min((MAX_MEMORY / size) as u16),
        }
    }

    fn total(self) -> u64 {
        self.size as u64 * u64::from(self.count)
    }

    fn address(self, index: u16) -> u64 {
        self.start + u64::from(index) * self.size as u64
    }

    /// Returns a buffer's memory.
    fn bytes(self, index: u16) -> &'static mut [u8] {
        assert!(index < self.count);
        // SAFETY: memory of this load's, which is never freed. The device has no buffer while its bytes are used
        // here, as callers know from its used ring.
        unsafe { core::slice::from_raw_parts_mut(self.address(index) as *mut u8, self.size) }
    }
}

/// A network card that is running.
pub struct Link<'a> {
    queues: [SlotQueue; 2],
    waiter: Waiter<'a>,
    received: Buffers,
    sent: Buffers,
    /// Transmit buffers that the device does not have.
    free: Vec<u16>,
    /// The card's address.
    pub mac: [u8; 6],
    /// Largest IP packet that is sent whole, in bytes.
    pub mtu: u16,
    /// What the device does for the driver.
    pub offloads: Offloads,
}

impl<'a> Link<'a> {
    /// Starts the network card.
    ///
    /// # Errors
    ///
    /// If it cannot be initialised, or there is too little memory for its buffers.
    pub fn open(device: &'a dyn Transport, completion: Completion) -> Result<Self, String> {
        let fail = |error| format!("cannot initialise the network card: {error}");
        let features = device.initialise(WANTED).map_err(fail)?;
        let has = |feature| features & feature != 0;
        let mtu = if has(net_feature::MTU) {
            let bytes = [MTU_OFFSET, MTU_OFFSET + 1].map(|offset| device.config_8(offset));
            u16::from_le_bytes(bytes)
        } else {
            DEFAULT_MTU
        };
        let offloads = Offloads {
            checksum: has(net_feature::CHECKSUM),
            segmentation: has(net_feature::HOST_TSO4),
        };
        let sent_size = if offloads.segmentation {
            MAX_PACKET_SIZE
        } else {
            mtu.into()
        };
        let mut received = Buffers::new(0, mtu.into());
        let mut sent = Buffers::new(0, sent_size);
        received.start = buffers::reserve(received.total() + sent.total())?;
        sent.start = received.start + received.total();
        let set_up = |index| device.set_up_slot_queue(index, QUEUE_SIZE, QUEUE_SIZE, features);
        let mut queues = [set_up(0).map_err(fail)?, set_up(1).map_err(fail)?];
        device.set_driver_ok();
        let mac = if has(net_feature::MAC) {
            core::array::from_fn(|index| device.config_8(index as u64))
        } else {
            [2, 0, 0, 0, 0, 3]
        };
        for index in 0..received.count {
            let descriptor = Descriptor {
                address: received.address(index),
                length: received.size as u32,
                flags: DESCRIPTOR_WRITE,
                next: 0,
            };
            queues[RECEIVE].set_single(index, descriptor);
            queues[RECEIVE].push(index);
        }
        let waiter = Waiter::new(device, completion, &mut queues)?;
        queues[RECEIVE].publish();
        Ok(Self {
            queues,
            waiter,
            received,
            sent,
            free: (0..sent.count).collect(),
            mac,
            mtu,
            offloads,
        })
    }

    /// Returns the largest TCP payload that the device takes at once.
    pub fn max_payload(&self) -> usize {
        let packet_size = if self.offloads.segmentation {
            MAX_PACKET_SIZE
        } else {
            self.mtu.into()
        };
        packet_size - IP_AND_TCP_SIZE
    }

    /// Asks the gateway for its Ethernet address.
    ///
    /// # Errors
    ///
    /// If it does not answer.
    pub fn resolve(&mut self, guest: Ipv4Addr, gateway: Ipv4Addr) -> Result<[u8; 6], String> {
        let mac = self.mac;
        let start = time::ticks();
        let ticks = |time: Duration| time.as_millis() as u64 * time::ticks_per_second() / 1000;
        let mut next_request = start;
        loop {
            let mut answer = None;
            self.receive(|frame| {
                if let Some(mac) = packet::read_arp_answer(frame, gateway) {
                    answer = Some(mac);
                }
                Ok(())
            })?;
            if let Some(mac) = answer {
                return Ok(mac);
            }
            let now = time::ticks();
            if now - start > ticks(ARP_LIMIT) {
                return Err(format!(
                    "the gateway {gateway} does not answer ARP requests"
                ));
            }
            if now >= next_request {
                next_request = now + ticks(ARP_INTERVAL);
                self.send(|frame| {
                    let size = packet::write_arp_request(frame, mac, guest, gateway);
                    (Header::default(), size)
                })?;
            }
            self.publish();
            self.wait(next_request)?;
        }
    }

    /// Sends the frame that `write` writes, of the size that it returns, once it is published. `false` if there is
    /// no free buffer.
    ///
    /// # Errors
    ///
    /// If the device has broken the rules of its queue.
    #[inline]
    pub fn send(
        &mut self,
        write: impl FnOnce(&mut [u8]) -> (Header, usize),
    ) -> Result<bool, String> {
        if self.free.is_empty() {
            self.reclaim()?;
        }
        let Some(index) = self.free.pop() else {
            return Ok(false);
        };
        let bytes = self.sent.bytes(index);
        let (header, size) = write(&mut bytes[HEADER_SIZE..]);
        // SAFETY: a header is smaller than any buffer.
        unsafe { ptr::write_unaligned(bytes.as_mut_ptr().cast(), header) };
        let queue = &mut self.queues[TRANSMIT];
        queue.set_single(
            index,
            Descriptor {
                address: self.sent.address(index),
                length: (HEADER_SIZE + size) as u32,
                flags: 0,
                next: 0,
            },
        );
        queue.push(index);
        Ok(true)
    }

    /// Takes back the buffers that the device has sent.
    ///
    /// # Errors
    ///
    /// If the device has broken the rules of its queue.
    pub fn reclaim(&mut self) -> Result<(), String> {
        let queue = &mut self.queues[TRANSMIT];
        let used_index = queue.used_index();
        while let Some(used) = queue.take_before(used_index) {
            match u16::try_from(used.head) {
                Ok(index) if index < self.sent.count => self.free.push(index),
                _ => {
                    return Err(format!(
                        "the device used chain {}, which is none",
                        used.head
                    ));
                }
            }
        }
        queue.keep_interrupts_suppressed();
        Ok(())
    }

    /// Whether the device has buffers to send, apart from those that it has told are sent.
    pub fn is_sending(&self) -> bool {
        self.free.len() < usize::from(self.sent.count)
    }

    /// Returns how often a doorbell was rung.
    pub fn doorbells(&self) -> u64 {
        self.queues.iter().map(SlotQueue::doorbells).sum()
    }

    /// Passes each frame that has come to `take`.
    ///
    /// # Errors
    ///
    /// Those of `take`, and if the device has broken the rules of its queue.
    pub fn receive(
        &mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        let queue = &mut self.queues[RECEIVE];
        let used_index = queue.used_index();
        while let Some(used) = queue.take_before(used_index) {
            let length = used.length as usize;
            let index = match u16::try_from(used.head) {
                Ok(index) if index < self.received.count && length <= self.received.size => index,
                _ => {
                    return Err(format!(
                        "the device used chain {} for {length} bytes, which is none",
                        used.head
                    ));
                }
            };
            let bytes = self.received.bytes(index);
            if let Some(frame) = bytes[..length].get(HEADER_SIZE..)
                && frame.len() >= ETHERNET_SIZE
            {
                take(frame)?;
            }
            queue.push(index);
        }
        queue.keep_interrupts_suppressed();
        Ok(())
    }

    /// Lets the device see what was sent, and the buffers that were given back.
    pub fn publish(&mut self) {
        for queue in &mut self.queues {
            queue.publish();
        }
    }

    /// Waits until something was received or sent, or until `end`. Returns the time. Both are values of the time
    /// stamp counter.
    ///
    /// # Errors
    ///
    /// If the device is silent for too long.
    #[inline]
    pub fn wait(&mut self, end: u64) -> Result<u64, String> {
        self.waiter.wait(&mut self.queues, end)
    }
}
