//! Accesses of any size to any offset of a device's registers, in random order.

use alloc::vec;
use runtime::mmio;
use runtime::random::Random;
use runtime::virtio::Transport;
use runtime::virtio::mmio::register;

use crate::target::{Expected, Outcome, Target, end_of_low_ram};

/// Registers and the configuration space of every device there is.
const WINDOW: u64 = 0x200;
/// How many accesses there are between two resets.
const BATCH: u64 = 50;
/// Memory that a device may overwrite, from zero and in the middle of RAM.
const PLAYGROUND_SIZE: usize = 0x4000;
const LOW_PLAYGROUND_SIZE: usize = 0x1000;

const VALUES: &[u64] = &[
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    0xb,
    0xf,
    0x10,
    0x40,
    0x80,
    0xff,
    0x100,
    0xffff,
    0x8000_0000,
    u64::MAX,
];

pub fn attack(target: &Target, random: &mut Random, rounds: u64) {
    let mut left = rounds;
    while left > 0 {
        let batch = left.min(BATCH);
        left -= batch;
        let name = alloc::format!("{batch} random accesses to its registers");
        target.check(name, Expected::Anything, || {
            let playground = vec![0_u64; PLAYGROUND_SIZE / 8];
            clear_low_playground();
            for _ in 0..batch {
                access(target, random, playground.as_ptr() as u64);
            }
            let needs_reset = target.device.needs_reset();
            target.device.reset()?;
            Ok(if needs_reset {
                Outcome::NeedsReset
            } else {
                Outcome::Silent
            })
        });
    }
}

/// A queue whose addresses are not set is at address zero: let it be empty there.
fn clear_low_playground() {
    for address in (0..LOW_PLAYGROUND_SIZE as u64).step_by(8) {
        // SAFETY: conventional memory that holds nothing since the boot information is read.
        unsafe { mmio::write_64(address, 0) };
    }
}

fn access(target: &Target, random: &mut Random, playground: u64) {
    let mut offset = random.below(WINDOW);
    // Most accesses at random offsets hit nothing.
    if random.below(4) != 0 {
        offset &= !3;
    }
    let is_address = (register::QUEUE_DESCRIPTORS_LOW & !7..register::QUEUE_DEVICE_HIGH + 4)
        .contains(&(offset & !3));
    // A queue must not end up in this program's own memory.
    let value = if !is_address {
        match random.below(3) {
            0 => random.next_u64(),
            _ => random.choose(VALUES),
        }
    } else if offset & 4 == 0 {
        random.choose(&[
            playground,
            playground + 0x1000,
            playground + 0x2001,
            end_of_low_ram(),
            mmio::UNUSED_PAGE,
            0xffff_f000,
            0xffff_ffff,
            target.device.window().address,
        ])
    } else {
        random.choose(&[0, 0, 0xffff_ffff, 0x8000])
    };
    let address = target.device.window().address + offset;
    // SAFETY: the device's registers; what it is told of memory is not this program's.
    unsafe {
        match (random.below(4), random.below(4)) {
            (0, 0) => drop(mmio::read_8(address)),
            (0, 1) => drop(mmio::read_16(address)),
            (0, 2) => drop(mmio::read_64(address)),
            (0, _) => drop(mmio::read_32(address)),
            (_, 0) => mmio::write_8(address, value as u8),
            (_, 1) => mmio::write_16(address, value as u16),
            (1, 2) => mmio::write_64(address, value & 0xffff_ffff),
            _ => mmio::write_32(address, value as u32),
        }
    }
}
