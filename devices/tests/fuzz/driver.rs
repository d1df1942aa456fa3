//! A driver that follows the rules: it does what Linux does to a device, operation by operation.

use bolero::TypeGenerator;
use bolero::generator::one_value_of;

use crate::operation::Operation;

/// Most queues of a device that a driver sets up.
pub const MAX_QUEUES: u16 = 5;
/// Address of the descriptor table and rings of queue 0; those of the others follow.
pub const RINGS: u64 = 0x1000;
/// Memory of one queue's table and rings, in bytes.
pub const RINGS_SIZE: u64 = 3 * part::SIZE;
/// Address of the headers and status bytes of requests.
pub const HEADERS: u64 = 0x400;
/// Address of the data of requests.
pub const DATA: u64 = 0x1_0000;

/// Offsets from a queue's descriptor table, with room for 256 descriptors.
pub mod part {
    pub const SIZE: u64 = 0x1000;
    pub const AVAILABLE: u64 = SIZE;
    pub const USED: u64 = 2 * SIZE;
}

/// Registers (section 4.2.2).
pub mod register {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x24;
    pub const QUEUE_SELECT: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESCRIPTORS: u64 = 0x80;
    pub const QUEUE_DRIVER: u64 = 0x90;
    pub const QUEUE_DEVICE: u64 = 0xa0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status (section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 0x40;
    pub const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
}

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_VERSION_1: u64 = 1 << 32;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A part of a request.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

pub fn readable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: false,
    }
}

pub fn writable(address: u64, len: u32) -> Buffer {
    Buffer {
        address,
        len,
        writable: true,
    }
}

/// What a device offers to its driver.
#[derive(Debug, Clone, Copy)]
pub struct DeviceOffer {
    pub features: u64,
    /// Most descriptors that any of its queues can have.
    pub queue_size: u16,
}

/// A driver of a device with up to [`MAX_QUEUES`] queues, and its choices where the rules leave some.
#[derive(Debug, Clone, TypeGenerator)]
pub struct Driver {
    /// The features that it knows.
    features: u64,
    #[generator(one_value_of([8u16, 16, 256]))]
    queue_size: u16,
    #[generator(1..=MAX_QUEUES)]
    queue_count: u16,
    #[generator(bolero::generator::constant([0; MAX_QUEUES as usize]))]
    next_descriptor: [u16; MAX_QUEUES as usize],
}

impl Driver {
    /// Makes a driver of this many queues that supports only the features that it must.
    pub fn plain(queue_count: u16) -> Driver {
        Driver::with_features(queue_count, 0)
    }

    /// Makes a driver of this many queues that supports `features`.
    pub fn with_features(queue_count: u16, features: u64) -> Driver {
        Driver {
            features,
            queue_size: 256,
            queue_count,
            next_descriptor: [0; MAX_QUEUES as usize],
        }
    }

    /// Initializes the device (section 3.1.1) in the order in which Linux does it.
    pub fn initialize(&mut self, offer: DeviceOffer) -> Vec<Operation> {
        self.next_descriptor = [0; MAX_QUEUES as usize];
        self.queue_size = self.queue_size.min(offer.queue_size);
        let features = offer.features & (self.features | F_VERSION_1);
        let mut operations = vec![
            read(register::MAGIC),
            read(register::VERSION),
            read(register::DEVICE_ID),
            read(register::VENDOR),
            write(register::STATUS, 0),
            read(register::STATUS),
            write(register::STATUS, status::ACKNOWLEDGE),
            write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER),
        ];
        for half in [1, 0] {
            operations.push(write(register::DEVICE_FEATURES_SELECT, half));
            operations.push(read(register::DEVICE_FEATURES));
        }
        for (half, bits) in [(1, features >> 32), (0, features)] {
            operations.push(write(register::DRIVER_FEATURES_SELECT, half));
            operations.push(write(register::DRIVER_FEATURES, bits as u32));
        }
        let negotiated = status::READY & !status::DRIVER_OK;
        operations.extend([
            write(register::STATUS, negotiated),
            read(register::STATUS),
            read(register::CONFIG_GENERATION),
            read(register::CONFIG),
            read(register::CONFIG + 4),
            read(register::CONFIG_GENERATION),
        ]);
        for queue in 0..self.queue_count {
            let descriptors = RINGS + u64::from(queue) * RINGS_SIZE;
            operations.extend([
                write(register::QUEUE_SELECT, queue.into()),
                read(register::QUEUE_READY),
                read(register::QUEUE_SIZE_MAX),
                write(register::QUEUE_SIZE, self.queue_size.into()),
            ]);
            for (register, address) in [
                (register::QUEUE_DESCRIPTORS, descriptors),
                (register::QUEUE_DRIVER, descriptors + part::AVAILABLE),
                (register::QUEUE_DEVICE, descriptors + part::USED),
            ] {
                operations.push(write(register, address as u32));
                operations.push(write(register + 4, (address >> 32) as u32));
            }
            operations.push(write(register::QUEUE_READY, 1));
        }
        operations.push(write(register::STATUS, status::READY));
        operations.push(read(register::STATUS));
        operations
    }

    /// Makes a chain of `buffers` available, rings the doorbell, lets the device work and handles
    /// its interrupt.
    pub fn request(&mut self, queue: u16, buffers: &[Buffer]) -> Vec<Operation> {
        let mut operations = self.offer(queue, buffers);
        operations.extend([
            Operation::RingDoorbell { queue },
            Operation::Turn,
            read(register::INTERRUPT_STATUS),
            write(register::INTERRUPT_ACKNOWLEDGE, 1),
        ]);
        operations
    }

    /// Makes a request like [`Driver::request`], with an indirect table at `table` if the driver supports
    /// them.
    pub fn indirect_request(
        &mut self,
        queue: u16,
        table: u64,
        buffers: &[Buffer],
    ) -> Vec<Operation> {
        if self.features & F_INDIRECT_DESC == 0 {
            return self.request(queue, buffers);
        }
        let size = buffers.len() as u16;
        let mut operations = chain(table, size, 0, buffers);
        let descriptors = RINGS + u64::from(queue) * RINGS_SIZE;
        let head = self.take_descriptors(queue, 1);
        operations.extend([
            Operation::Descriptor {
                table: descriptors,
                index: head,
                address: table,
                len: u32::from(size) * 16,
                flags: INDIRECT,
                next: 0,
            },
            self.make_available(queue, head),
            Operation::RingDoorbell { queue },
            Operation::Turn,
        ]);
        operations
    }

    /// Makes a chain of `buffers` available.
    pub fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> Vec<Operation> {
        let table = RINGS + u64::from(queue) * RINGS_SIZE;
        let head = self.take_descriptors(queue, buffers.len() as u16);
        let mut operations = chain(table, self.queue_size, head, buffers);
        operations.push(self.make_available(queue, head));
        operations
    }

    /// Takes descriptors in turn: there are never more requests in progress than there is room for.
    fn take_descriptors(&mut self, queue: u16, count: u16) -> u16 {
        let next = &mut self.next_descriptor[usize::from(queue)];
        let head = *next;
        *next = (head + count) % self.queue_size;
        head
    }

    fn make_available(&self, queue: u16, head: u16) -> Operation {
        let size = self.queue_size;
        Operation::Offer { queue, head, size }
    }
}

/// Writes the descriptors of `buffers` from `head` on, in a table of `size` descriptors.
fn chain(table: u64, size: u16, head: u16, buffers: &[Buffer]) -> Vec<Operation> {
    let last = buffers.len().saturating_sub(1);
    buffers
        .iter()
        .enumerate()
        .map(|(position, buffer)| {
            let index = (head + position as u16) % size;
            let write = if buffer.writable { WRITE } else { 0 };
            let next = if position < last { NEXT } else { 0 };
            Operation::Descriptor {
                table,
                index,
                address: buffer.address,
                len: buffer.len,
                flags: write | next,
                next: (index + 1) % size,
            }
        })
        .collect()
}

fn read(offset: u64) -> Operation {
    Operation::Read { offset, width: 4 }
}

fn write(offset: u64, value: u32) -> Operation {
    Operation::Write {
        offset,
        value: value.into(),
        width: 4,
    }
}
