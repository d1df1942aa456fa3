//! The load of a block device (section 5.2). Each slot has one request under way at all times: its
//! header, chain and buffer are made once, and a finished request is made available again with
//! another sector.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use runtime::random::Random;
use runtime::time;
use runtime::virtio::block::{
    RequestHeader, RequestType, SECTOR_SIZE, STATUS_OK, STATUS_UNTOUCHED, block_feature,
};
use runtime::virtio::queue::{DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor};
use runtime::virtio::{SlotQueue, Transport, feature};

use crate::buffers;
use crate::completion::Waiter;
use crate::histogram::Histogram;
use crate::outcome::Outcome;
use crate::settings::{BlockMode, BlockSettings, Limit, Pattern, Settings};
use crate::stamp::Stamps;

const WANTED: u64 = block_feature::FLUSH
    | block_feature::READ_ONLY
    | block_feature::MULTIQUEUE
    | feature::EVENT_INDEX
    | feature::INDIRECT_DESCRIPTORS;
/// Offset of the number of queues in the configuration.
const CONFIG_QUEUE_COUNT: u64 = 34;

/// Descriptors of a request: header, data, status.
const CHAIN_LENGTH: u16 = 3;
/// The most requests in flight that a queue is set up for, times [`CHAIN_LENGTH`], as a power of two.
const MAX_QUEUE_SIZE: u16 = 1024;

/// The parts of a request that the device reads and writes besides its data. Device and driver use
/// separate cache lines.
#[repr(C, align(64))]
struct Shared {
    table: [Descriptor; CHAIN_LENGTH as usize],
    header: RequestHeader,
    status: Line,
}

#[repr(C, align(64))]
struct Line(u8);

/// The driver's part of a request.
struct Slot {
    /// The descriptor of its data.
    data_descriptor: *mut Descriptor,
    shared: *mut Shared,
    buffer: *mut u64,
    /// Time stamp counter when it was made available.
    started: u64,
    block: u64,
    writes: bool,
}

/// Picks the requests.
struct Requests<'a> {
    settings: &'a BlockSettings,
    random: Random,
    blocks: u64,
    next: u64,
    stamps: Option<Stamps>,
}

impl Requests<'_> {
    /// Where the next request goes, and whether it writes.
    #[inline]
    fn next(&mut self) -> (u64, bool) {
        let mut block = match self.settings.pattern {
            Pattern::Sequential => {
                let block = self.next;
                self.next = if block + 1 < self.blocks {
                    block + 1
                } else {
                    0
                };
                block
            }
            Pattern::Random => {
                let random = u128::from(self.random.next_u64());
                ((random * u128::from(self.blocks)) >> 64) as u64
            }
        };
        if let Some(stamps) = &mut self.stamps {
            block = stamps.take(block);
        }
        let writes = match self.settings.mode {
            BlockMode::Read => false,
            BlockMode::Write => true,
            BlockMode::Mixed => {
                let unwritten = self
                    .stamps
                    .as_ref()
                    .is_some_and(|all| !all.is_written(block));
                unwritten || self.random.next_u64() & 1 == 0
            }
        };
        (block, writes)
    }
}

/// Loads `device`.
///
/// # Errors
///
/// If it cannot do this load, or stops working.
pub fn run(
    device: &dyn Transport,
    settings: &Settings,
    block: &BlockSettings,
) -> Result<Outcome, String> {
    let fail = |error| format!("cannot initialise the block device: {error}");
    let features = device.initialise(WANTED).map_err(fail)?;
    let requests = requests(device, features, settings, block)?;
    let indirect = features & feature::INDIRECT_DESCRIPTORS != 0;
    let stride = if indirect { 1 } else { CHAIN_LENGTH };
    let needed = settings.depth * stride;
    let mut queues = (0..block.queues)
        .map(|index| device.set_up_slot_queue(index, MAX_QUEUE_SIZE, needed, features))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| {
            let depth = settings.depth;
            format!("depth={depth} takes {needed} descriptors of a queue: {error}")
        })?;
    device.set_driver_ok();
    let slots = make_slots(&mut queues, settings.depth, stride, block.block_size)?;
    let waiter = Waiter::new(device, settings.completion, &mut queues)?;
    let mut load = Load {
        queues,
        slots,
        depth: usize::from(settings.depth),
        stride,
        requests,
        sectors_per_block: u64::from(block.block_size) / SECTOR_SIZE as u64,
        buffer_words: block.block_size as usize / size_of::<u64>(),
        latency: Histogram::new(),
        operations: 0,
        errors: 0,
        first_error: None,
    };
    crate::say_ready();
    let ticks = load.run(&waiter, settings.limit)?;
    Ok(Outcome {
        name: match block.mode {
            BlockMode::Read => "block read",
            BlockMode::Write => "block write",
            BlockMode::Mixed => "block read and write",
        },
        operations: load.operations,
        bytes: load.operations * u64::from(block.block_size),
        ticks,
        latency: load.latency,
        errors: load.errors,
        first_error: load.first_error,
        doorbells: load.queues.iter().map(SlotQueue::doorbells).sum(),
    })
}

/// Checks the settings against the device.
fn requests<'a>(
    device: &dyn Transport,
    features: u64,
    settings: &Settings,
    block: &'a BlockSettings,
) -> Result<Requests<'a>, String> {
    if block.mode != BlockMode::Read && features & block_feature::READ_ONLY != 0 {
        return Err("the block device is read-only: expected mode=read".into());
    }
    let queues = if features & block_feature::MULTIQUEUE != 0 {
        u16::from_le_bytes([0, 1].map(|byte| device.config_8(CONFIG_QUEUE_COUNT + byte)))
    } else {
        1
    };
    if block.queues > queues {
        return Err(format!(
            "queues={}: the block device has {queues}",
            block.queues
        ));
    }
    let sectors = u64::from(device.config_32(0)) | u64::from(device.config_32(4)) << 32;
    let capacity = sectors.saturating_mul(SECTOR_SIZE as u64);
    let span = block.span.unwrap_or(capacity);
    if span > capacity {
        return Err(format!(
            "span={span}: the block device has {capacity} bytes"
        ));
    }
    let blocks = span / u64::from(block.block_size);
    let in_flight = u64::from(settings.depth) * u64::from(block.queues);
    if blocks == 0 || (block.verify && blocks < in_flight) {
        return Err(format!(
            "{span} bytes of disk are too few for {in_flight} requests of {} bytes",
            block.block_size
        ));
    }
    let stamps = if block.verify {
        Some(Stamps::new(block.seed, blocks)?)
    } else {
        None
    };
    Ok(Requests {
        settings: block,
        random: Random::new(block.seed),
        blocks,
        next: 0,
        stamps,
    })
}

/// Makes the requests of all queues, those of a queue together.
fn make_slots(
    queues: &mut [SlotQueue],
    depth: u16,
    stride: u16,
    block_size: u32,
) -> Result<Vec<Slot>, String> {
    let size = queues.len() as u64 * u64::from(depth) * u64::from(block_size);
    let first_buffer = buffers::reserve(size)?;
    let mut slots = Vec::with_capacity(queues.len() * usize::from(depth));
    for queue in queues {
        let shared: Vec<Shared> = (0..depth).map(|_| Shared::new()).collect();
        for (index, shared) in Vec::leak(shared).iter_mut().enumerate() {
            let head = index as u16 * stride;
            let buffer = first_buffer + slots.len() as u64 * u64::from(block_size);
            let table = if stride == 1 {
                queue.set_indirect(head, shared.table.as_ptr(), u32::from(CHAIN_LENGTH));
                shared.table.as_mut_ptr()
            } else {
                // SAFETY: the queue has as many descriptors as all its slots take.
                unsafe { queue.descriptors().add(usize::from(head)) }
            };
            let first_index = if stride == 1 { 0 } else { head };
            let descriptor = |address, length, flags, position| Descriptor {
                address,
                length,
                flags,
                next: if flags & DESCRIPTOR_NEXT != 0 {
                    first_index + position + 1
                } else {
                    0
                },
            };
            let header = &raw const shared.header as u64;
            let header_size = size_of::<RequestHeader>() as u32;
            let status = &raw const shared.status.0 as u64;
            // SAFETY: a table of three descriptors, of the slot or of the queue's table.
            unsafe {
                table.write(descriptor(header, header_size, DESCRIPTOR_NEXT, 0));
                table
                    .add(1)
                    .write(descriptor(buffer, block_size, DESCRIPTOR_NEXT, 1));
                table
                    .add(2)
                    .write(descriptor(status, 1, DESCRIPTOR_WRITE, 2));
            }
            slots.push(Slot {
                // SAFETY: as above.
                data_descriptor: unsafe { table.add(1) },
                shared,
                buffer: buffer as *mut u64,
                started: 0,
                block: 0,
                writes: false,
            });
        }
    }
    Ok(slots)
}

impl Shared {
    fn new() -> Self {
        Self {
            table: [Descriptor::default(); CHAIN_LENGTH as usize],
            header: RequestHeader::default(),
            status: Line(STATUS_UNTOUCHED),
        }
    }
}

/// A load under way.
struct Load<'a> {
    queues: Vec<SlotQueue>,
    /// Those of the first queue, then those of the next.
    slots: Vec<Slot>,
    /// Slots of a queue.
    depth: usize,
    /// Descriptors of a slot in its queue's table.
    stride: u16,
    requests: Requests<'a>,
    sectors_per_block: u64,
    buffer_words: usize,
    latency: Histogram,
    operations: u64,
    errors: u64,
    first_error: Option<String>,
}

impl Load<'_> {
    /// Returns how long it took, in ticks of the time stamp counter.
    fn run(&mut self, waiter: &Waiter<'_>, limit: Limit) -> Result<u64, String> {
        let start = time::ticks();
        let (end, mut to_start) = match limit {
            Limit::Seconds(seconds) => (start + seconds * time::ticks_per_second(), u64::MAX),
            Limit::Operations(count) => (u64::MAX, count),
        };
        let mut in_flight = 0_u64;
        let mut now = start;
        for queue in 0..self.queues.len() {
            for slot in 0..self.depth {
                if to_start > 0 {
                    self.start(queue, queue * self.depth + slot, now);
                    to_start -= 1;
                    in_flight += 1;
                }
            }
            self.queues[queue].publish();
        }
        while in_flight > 0 {
            now = waiter.wait(&mut self.queues, if to_start > 0 { end } else { u64::MAX })?;
            if now >= end {
                to_start = 0;
            }
            for queue in 0..self.queues.len() {
                let used_index = self.queues[queue].used_index();
                while let Some(used) = self.queues[queue].take_before(used_index) {
                    let index = used.head / u32::from(self.stride);
                    if index as usize >= self.depth {
                        let head = used.head;
                        return Err(format!("the device used chain {head}, which is none"));
                    }
                    let slot = queue * self.depth + index as usize;
                    self.end(slot, now);
                    if to_start > 0 {
                        self.start(queue, slot, now);
                        to_start -= 1;
                    } else {
                        in_flight -= 1;
                    }
                }
                let queue = &mut self.queues[queue];
                queue.keep_interrupts_suppressed();
                queue.publish();
            }
        }
        Ok(now - start)
    }

    /// Makes a new request of a slot available, unpublished.
    #[inline]
    fn start(&mut self, queue: usize, slot: usize, now: u64) {
        let (block, writes) = self.requests.next();
        let head = (slot - queue * self.depth) as u16 * self.stride;
        let slot = &mut self.slots[slot];
        (slot.started, slot.block, slot.writes) = (now, block, writes);
        let (kind, data_flags) = if writes {
            (RequestType::Write, DESCRIPTOR_NEXT)
        } else {
            (RequestType::Read, DESCRIPTOR_NEXT | DESCRIPTOR_WRITE)
        };
        let header = RequestHeader {
            kind: kind as u32,
            reserved: 0,
            sector: block * self.sectors_per_block,
        };
        // SAFETY: parts of the slot, which the device does not look at while it is not available.
        unsafe {
            (&raw mut (*slot.shared).header).write_volatile(header);
            (&raw mut (*slot.data_descriptor).flags).write_volatile(data_flags);
        }
        if let Some(stamps) = &mut self.requests.stamps {
            // SAFETY: the slot's buffer and status, likewise.
            unsafe {
                (&raw mut (*slot.shared).status.0).write_volatile(STATUS_UNTOUCHED);
                let data = core::slice::from_raw_parts_mut(slot.buffer, self.buffer_words);
                if writes {
                    stamps.fill(block, data);
                } else {
                    data.fill(0);
                }
            }
        }
        self.queues[queue].push(head);
    }

    /// Checks the result of a slot's request.
    #[inline]
    fn end(&mut self, slot: usize, now: u64) {
        let slot = &self.slots[slot];
        // SAFETY: a byte of the slot, which the device wrote behind the compiler's back.
        let status = unsafe { (&raw const (*slot.shared).status.0).read_volatile() };
        let mut result = Ok(());
        if status != STATUS_OK {
            result = Err(format!("request status {status}"));
        }
        if let Some(stamps) = &mut self.requests.stamps {
            if !slot.writes && result.is_ok() {
                // SAFETY: the slot's buffer, which the device has done with.
                let data = unsafe { core::slice::from_raw_parts(slot.buffer, self.buffer_words) };
                result = stamps.check(slot.block, data);
            }
            stamps.release(slot.block);
        }
        match result {
            Ok(()) => {
                self.operations += 1;
                self.latency.record(now - slot.started);
            }
            Err(reason) => {
                self.errors += 1;
                self.first_error.get_or_insert(reason);
            }
        }
    }
}
