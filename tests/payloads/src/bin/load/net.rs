//! The load of a network card (section 5.1). A frame to send is made once and sent again and again;
//! a buffer that was received into is given back at once.

use alloc::format;
use alloc::string::String;
use core::ptr;

use runtime::time::{self, Duration};
use runtime::virtio::net::{HEADER_SIZE, net_feature};
use runtime::virtio::queue::{DESCRIPTOR_WRITE, Descriptor};
use runtime::virtio::{SlotQueue, Transport, feature};

use crate::buffers;
use crate::completion::Waiter;
use crate::frame::{self, ETHER_TYPE, ETHERNET_SIZE, MAX_UNCUT_SIZE};
use crate::histogram::Histogram;
use crate::outcome::Outcome;
use crate::settings::{Limit, NetMode, NetSettings, Settings};

const WANTED: u64 = net_feature::MAC | feature::EVENT_INDEX | feature::INDIRECT_DESCRIPTORS;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
/// Receive buffers of the round trip, where `depth` is what is sent.
const ROUND_TRIP_BUFFERS: u16 = 256;

const RECEIVE_BUFFER_SIZE: u64 = 2048;
/// Offset of the slot number in a sent frame: after its Ethernet header.
const SLOT_NUMBER_AT: usize = HEADER_SIZE + ETHERNET_SIZE;
/// How long frames may take to come back after the last one was sent.
const RETURN_LIMIT: Duration = Duration::from_millis(300);

/// Loads `device`.
///
/// # Errors
///
/// If it cannot do this load, or stops working.
pub fn run(
    device: &dyn Transport,
    settings: &Settings,
    net: &NetSettings,
) -> Result<Outcome, String> {
    let fail = |error| format!("cannot initialise the network card: {error}");
    let cut = net.packet_size as usize > MAX_UNCUT_SIZE;
    let offloads = net_feature::CHECKSUM | net_feature::HOST_TSO4;
    let wanted = if cut { WANTED | offloads } else { WANTED };
    let features = device.initialise(wanted).map_err(fail)?;
    if cut && features & offloads != offloads {
        return Err(format!(
            "packet-size={}: the network card does not segment TCP",
            net.packet_size
        ));
    }
    let (receive_buffers, frames) = match net.mode {
        NetMode::Transmit => (0, settings.depth),
        NetMode::Receive => (settings.depth, 0),
        NetMode::RoundTrip => (ROUND_TRIP_BUFFERS, settings.depth),
    };
    let set_up = |index, needed| device.set_up_slot_queue(index, QUEUE_SIZE, needed, features);
    let mut queues = [
        set_up(0, receive_buffers).map_err(fail)?,
        set_up(1, frames).map_err(fail)?,
    ];
    device.set_driver_ok();
    let source = if features & net_feature::MAC != 0 {
        core::array::from_fn(|index| device.config_8(index as u64))
    } else {
        [2, 0, 0, 0, 0, 3]
    };
    let first_receive_buffer = make_buffers(
        &mut queues,
        receive_buffers,
        frames,
        net.packet_size,
        source,
    )?;
    let waiter = Waiter::new(device, settings.completion, &mut queues)?;
    let mut load = Load {
        queues,
        waiter,
        receive_buffers: first_receive_buffer,
        limit: settings.limit,
        latency: Histogram::new(),
        operations: 0,
        lost: 0,
    };
    crate::say_ready();
    let (name, ticks) = match net.mode {
        NetMode::Transmit => ("net transmit", load.transmit(frames)?),
        NetMode::Receive => (
            "net receive",
            load.receive(receive_buffers, net.packet_size)?,
        ),
        NetMode::RoundTrip => ("net round trip", load.round_trip(receive_buffers, frames)?),
    };
    Ok(Outcome {
        name,
        operations: load.operations,
        bytes: load.operations * u64::from(net.packet_size),
        ticks,
        latency: load.latency,
        errors: load.lost,
        first_error: (load.lost > 0).then(|| "a frame did not come back".into()),
        doorbells: load.queues.iter().map(SlotQueue::doorbells).sum(),
    })
}

/// Makes the buffers of both queues; buffer `n` of a queue is its descriptor `n`. Returns the
/// address of the first receive buffer.
fn make_buffers(
    queues: &mut [SlotQueue; 2],
    receive_buffers: u16,
    frames: u16,
    packet_size: u32,
    source: [u8; 6],
) -> Result<u64, String> {
    let length = HEADER_SIZE as u32 + packet_size;
    let transmit_stride = u64::from(length).next_multiple_of(RECEIVE_BUFFER_SIZE);
    let receive_size = u64::from(receive_buffers) * RECEIVE_BUFFER_SIZE;
    let receive = buffers::reserve(receive_size + u64::from(frames) * transmit_stride)?;
    let transmit = receive + receive_size;
    for index in 0..receive_buffers {
        queues[RECEIVE].set_single(
            index,
            Descriptor {
                address: receive + u64::from(index) * RECEIVE_BUFFER_SIZE,
                length: RECEIVE_BUFFER_SIZE as u32,
                flags: DESCRIPTOR_WRITE,
                next: 0,
            },
        );
    }
    for index in 0..frames {
        let address = transmit + u64::from(index) * transmit_stride;
        // SAFETY: a buffer of this load's, large enough for the header and the frame.
        unsafe {
            let start = address as *mut u8;
            let frame =
                core::slice::from_raw_parts_mut(start.add(HEADER_SIZE), packet_size as usize);
            let header = frame::make(source, frame);
            ptr::write_unaligned(start.cast(), header);
            if packet_size as usize <= MAX_UNCUT_SIZE {
                ptr::write_unaligned(start.add(SLOT_NUMBER_AT).cast(), index);
            }
        }
        queues[TRANSMIT].set_single(
            index,
            Descriptor {
                address,
                length,
                flags: 0,
                next: 0,
            },
        );
    }
    Ok(receive)
}

/// A load under way.
struct Load<'a> {
    queues: [SlotQueue; 2],
    waiter: Waiter<'a>,
    /// Address of the first receive buffer.
    receive_buffers: u64,
    limit: Limit,
    latency: Histogram,
    operations: u64,
    lost: u64,
}

/// Returns when a load that began at `start` ends: a value of the time stamp counter, or a number
/// of operations.
fn end(limit: Limit, start: u64) -> (u64, u64) {
    match limit {
        Limit::Seconds(seconds) => (start + seconds * time::ticks_per_second(), u64::MAX),
        Limit::Operations(count) => (u64::MAX, count),
    }
}

/// Returns the buffer of a used chain, one of `count`.
#[inline]
fn checked(head: u32, count: u16) -> Result<u16, String> {
    match u16::try_from(head) {
        Ok(index) if index < count => Ok(index),
        _ => Err(format!("the device used chain {head}, which is none")),
    }
}

impl Load<'_> {
    /// Sends `frames` frames over and over. Returns how long it took, in ticks of the time stamp
    /// counter.
    fn transmit(&mut self, frames: u16) -> Result<u64, String> {
        let start = time::ticks();
        let (end, mut to_send) = end(self.limit, start);
        let mut started = [start; QUEUE_SIZE as usize];
        let mut under_way = 0_u64;
        for index in 0..frames {
            if to_send > 0 {
                self.queues[TRANSMIT].push(index);
                to_send -= 1;
                under_way += 1;
            }
        }
        self.queues[TRANSMIT].publish();
        let mut now = start;
        while under_way > 0 {
            let until = if to_send > 0 { end } else { u64::MAX };
            now = self.waiter.wait(&mut self.queues, until)?;
            if now >= end {
                to_send = 0;
            }
            let queue = &mut self.queues[TRANSMIT];
            let used_index = queue.used_index();
            while let Some(used) = queue.take_before(used_index) {
                let index = checked(used.head, frames)?;
                let started = &mut started[usize::from(index)];
                self.latency.record(now - *started);
                self.operations += 1;
                *started = now;
                if to_send > 0 {
                    queue.push(index);
                    to_send -= 1;
                } else {
                    under_way -= 1;
                }
            }
            queue.keep_interrupts_suppressed();
            queue.publish();
        }
        Ok(now - start)
    }

    /// Counts frames of `size` bytes. Returns how long it took from the first on, in ticks of the time
    /// stamp counter.
    fn receive(&mut self, buffers: u16, size: u32) -> Result<u64, String> {
        self.give_receive_buffers(buffers);
        let wanted_length = HEADER_SIZE as u32 + size;
        let mut start = None;
        let (mut end_time, mut wanted) = (u64::MAX, u64::MAX);
        loop {
            let now = self.waiter.wait(&mut self.queues, end_time)?;
            let queue = &mut self.queues[RECEIVE];
            let used_index = queue.used_index();
            while let Some(used) = queue.take_before(used_index) {
                let index = checked(used.head, buffers)?;
                let buffer = self.receive_buffers + u64::from(index) * RECEIVE_BUFFER_SIZE;
                if used.length == wanted_length && is_of_the_load(buffer) {
                    if start.is_none() {
                        start = Some(now);
                        (end_time, wanted) = end(self.limit, now);
                    }
                    self.operations += 1;
                }
                queue.push(index);
            }
            queue.keep_interrupts_suppressed();
            queue.publish();
            if let Some(start) = start
                && (now >= end_time || self.operations >= wanted)
            {
                return Ok(now - start);
            }
        }
    }

    /// Sends `frames` frames, and each again when it has come back. Returns how long it took, in
    /// ticks of the time stamp counter.
    fn round_trip(&mut self, buffers: u16, frames: u16) -> Result<u64, String> {
        self.give_receive_buffers(buffers);
        let start = time::ticks();
        let (end, mut to_send) = end(self.limit, start);
        let mut slots = [RoundTrip::default(); QUEUE_SIZE as usize];
        let mut under_way = 0_u64;
        for index in 0..frames {
            if to_send > 0 {
                self.send_again(&mut slots[usize::from(index)], index, start);
                to_send -= 1;
                under_way += 1;
            }
        }
        self.queues[TRANSMIT].publish();
        let mut last = start;
        while under_way > 0 {
            let until = if to_send > 0 {
                end
            } else {
                last + RETURN_LIMIT.as_millis() as u64 * time::ticks_per_second() / 1000
            };
            let now = self.waiter.wait(&mut self.queues, until)?;
            if to_send > 0 && now >= end {
                to_send = 0;
                last = now;
            } else if now >= until {
                self.lost = under_way;
                break;
            }
            let sent_index = self.queues[TRANSMIT].used_index();
            while let Some(used) = self.queues[TRANSMIT].take_before(sent_index) {
                let index = checked(used.head, frames)?;
                let slot = &mut slots[usize::from(index)];
                slot.sending = false;
                if slot.is_back && to_send > 0 {
                    self.send_again(slot, index, now);
                    to_send -= 1;
                    under_way += 1;
                }
            }
            let received_index = self.queues[RECEIVE].used_index();
            while let Some(used) = self.queues[RECEIVE].take_before(received_index) {
                let buffer = checked(used.head, buffers)?;
                let number = self.slot_number(buffer, used.length);
                self.queues[RECEIVE].push(buffer);
                let Some(slot) = slots.get_mut(number.unwrap_or(frames) as usize) else {
                    continue;
                };
                if slot.is_back {
                    continue;
                }
                slot.is_back = true;
                under_way -= 1;
                last = now;
                self.latency.record(now - slot.started);
                self.operations += 1;
                if !slot.sending && to_send > 0 {
                    self.send_again(slot, number.unwrap_or_default(), now);
                    to_send -= 1;
                    under_way += 1;
                }
            }
            for queue in &mut self.queues {
                queue.keep_interrupts_suppressed();
                queue.publish();
            }
        }
        Ok(last - start)
    }

    fn give_receive_buffers(&mut self, count: u16) {
        for index in 0..count {
            self.queues[RECEIVE].push(index);
        }
        self.queues[RECEIVE].publish();
    }

    #[inline]
    fn send_again(&mut self, slot: &mut RoundTrip, index: u16, now: u64) {
        *slot = RoundTrip {
            started: now,
            sending: true,
            is_back: false,
        };
        self.queues[TRANSMIT].push(index);
    }

    /// Returns the slot whose frame is in a receive buffer, if the frame belongs to the load.
    fn slot_number(&self, buffer: u16, length: u32) -> Option<u16> {
        let address = self.receive_buffers + u64::from(buffer) * RECEIVE_BUFFER_SIZE;
        let long_enough = length as usize >= SLOT_NUMBER_AT + size_of::<u16>();
        if !long_enough || !is_of_the_load(address) {
            return None;
        }
        // SAFETY: two bytes of a receive buffer, which the device has done with.
        Some(unsafe { ((address as usize + SLOT_NUMBER_AT) as *const u16).read_volatile() })
    }
}

/// A frame that is sent and comes back.
#[derive(Clone, Copy)]
struct RoundTrip {
    started: u64,
    /// The device has not used its buffer yet.
    sending: bool,
    is_back: bool,
}

impl Default for RoundTrip {
    fn default() -> Self {
        Self {
            started: 0,
            sending: false,
            is_back: true,
        }
    }
}

/// Returns whether the frame in a receive buffer has the EtherType of the load.
#[inline]
fn is_of_the_load(buffer: u64) -> bool {
    let place = buffer + (HEADER_SIZE + ETHERNET_SIZE - ETHER_TYPE.len()) as u64;
    // SAFETY: two bytes of a receive buffer, which the device has done with.
    unsafe { (place as *const [u8; 2]).read_volatile() == ETHER_TYPE }
}
