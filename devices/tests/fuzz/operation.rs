//! Operations of a guest on a device.

use bolero::TypeGenerator;
use bolero::generator::{ValueGenerator, one_of, one_value_of, produce};

use crate::damage::Damage;
use crate::driver::{DATA, HEADERS, MAX_QUEUES, RINGS, RINGS_SIZE, part, register};
use crate::machine::{HOLE, MEMORY_END, SEAM};

/// One thing that a guest does, or that happens around it.
#[derive(Debug, Clone, TypeGenerator)]
pub enum Operation {
    /// Reads a register, in a width that may be wrong.
    Read {
        #[generator(any_offset())]
        offset: u64,
        #[generator(any_width())]
        width: usize,
    },
    /// Writes the low `width` bytes of `value` to a register.
    Write {
        #[generator(any_offset())]
        offset: u64,
        #[generator(any_register_value())]
        value: u64,
        #[generator(any_width())]
        width: usize,
    },
    /// Writes to memory.
    Store {
        #[generator(any_address())]
        address: u64,
        #[generator(produce::<Vec<u8>>().with().len(0..17usize))]
        bytes: Vec<u8>,
    },
    /// Writes a descriptor to the table at `table`.
    Descriptor {
        #[generator(any_table())]
        table: u64,
        #[generator(any_index())]
        index: u16,
        #[generator(any_address())]
        address: u64,
        #[generator(any_len())]
        len: u32,
        #[generator(one_of((0..8u16, 0..8u16, produce::<u16>())))]
        flags: u16,
        #[generator(any_index())]
        next: u16,
    },
    /// Makes the chain at `head` available in a queue of `size` descriptors.
    Offer {
        #[generator(0..MAX_QUEUES)]
        queue: u16,
        #[generator(any_index())]
        head: u16,
        #[generator(one_value_of([1u16, 2, 8, 256]))]
        size: u16,
    },
    /// Rings a doorbell.
    RingDoorbell {
        #[generator(0..=MAX_QUEUES)]
        queue: u16,
    },
    /// Lets the device's event loop take one turn.
    Turn,
    /// Lets the event loop run until it has nothing to do.
    Rest,
    /// The machine is paused and resumed.
    Suspend {
        /// What is done during the pause.
        meanwhile: Meanwhile,
    },
    /// The host sends a packet to the guest, or asks for something else of that size.
    HostSends {
        #[generator(14..1515u16)]
        len: u16,
    },
}

/// What happens to a paused device.
#[derive(Debug, Clone, TypeGenerator)]
pub enum Meanwhile {
    /// Nothing: it is resumed.
    Nothing,
    /// It is reset as by a reset of the machine.
    PowerCycle,
    /// It is saved, and another is restored in its place.
    Replace,
    /// It is saved, and another is restored in its place from a damaged copy of the state.
    ReplaceDamaged { damage: Damage },
    /// The host sends packets, or asks for something else.
    HostSends {
        #[generator(14..1515u16)]
        len: u16,
    },
}

fn any_offset() -> impl ValueGenerator<Output = u64> {
    let registers = || (0..0x42u64).map_gen(|index| index * 4);
    let effective = one_value_of([
        register::STATUS,
        register::QUEUE_SELECT,
        register::QUEUE_READY,
        register::QUEUE_SIZE,
        register::DRIVER_FEATURES,
        register::INTERRUPT_ACKNOWLEDGE,
    ]);
    one_of((registers(), registers(), effective, 0..0x200u64, produce()))
}

fn any_width() -> impl ValueGenerator<Output = usize> {
    one_of((4..=4usize, 4..=4usize, 4..=4usize, 0..=8usize))
}

fn any_register_value() -> impl ValueGenerator<Output = u64> {
    let statuses = one_value_of([0u64, 1, 3, 0xb, 0xf, 0x4f, 0x8f]);
    one_of((0..4u64, statuses, any_address(), produce()))
}

/// Generates addresses that a device reads or writes, the ends of memory, or any address.
fn any_address() -> impl ValueGenerator<Output = u64> {
    let near = |place: u64| (0..0x40u64).map_gen(move |offset| place.wrapping_add(offset));
    let around = |place: u64| near(place - 0x20);
    let rings = (0..u64::from(MAX_QUEUES), 0..3u64, 0..0x40u64)
        .map_gen(|(queue, ring, offset)| RINGS + queue * RINGS_SIZE + ring * part::SIZE + offset);
    let ends = one_of((around(SEAM), around(HOLE), around(MEMORY_END)));
    let data = (0..0x1_0000u64).map_gen(|offset| DATA + offset);
    one_of((rings, near(HEADERS), data, ends, produce()))
}

/// Generates the address of the table of a queue, or of an indirect descriptor.
fn any_table() -> impl ValueGenerator<Output = u64> {
    let of_queue = |queue: u64| RINGS + queue * RINGS_SIZE;
    one_value_of([RINGS, RINGS, of_queue(1), of_queue(2), of_queue(3), DATA])
}

fn any_index() -> impl ValueGenerator<Output = u16> {
    one_of((0..16u16, 0..16u16, 0..257u16, produce()))
}

fn any_len() -> impl ValueGenerator<Output = u32> {
    let usual = one_value_of([0u32, 1, 12, 16, 20, 32, 512, 1526, 4096, 0x1000 * 16]);
    one_of((usual, 0..0x100u32, 0..0x2_0000u32, produce()))
}
