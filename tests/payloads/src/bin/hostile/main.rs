//! Attacks every virtio device, and the ports of the other devices. After each attack the device
//! must have asked for a reset or failed the request, and after a reset it must work.
//!
//! Arguments: `seed=N` (1 by default) seeds the random numbers; `rounds=N` (500) sets how many
//! random accesses each device gets; `only=registers|queues|chains|driver|ports` leaves out the
//! others; `lenient` lets a device overlook an attack, as long as a reset brings it back. Block
//! devices are only read.

#![no_std]
#![no_main]

extern crate alloc;

mod balloon;
mod chains;
mod console;
mod driver;
mod ports;
mod queues;
mod registers;
mod target;

use runtime::random::Random;
use runtime::virtio::MmioDevice;
use runtime::{arguments, payload, println, report};
use target::Target;

const DEFAULT_SEED: u64 = 1;
const DEFAULT_ROUNDS: u64 = 500;

payload!(attack_all);

fn attack_all() {
    let seed = arguments::parsed("seed").unwrap_or(DEFAULT_SEED);
    let rounds = arguments::parsed("rounds").unwrap_or(DEFAULT_ROUNDS);
    let only = arguments::value("only");
    let wanted = |part| only.is_none_or(|only| only == part);
    println!("seed {seed}, {rounds} rounds");
    let mut random = Random::new(seed);
    if wanted("ports") {
        ports::attack(&mut random, rounds);
    }
    for window in arguments::virtio_mmio_windows() {
        let target = match MmioDevice::probe(window) {
            Ok(device) => Target::new(device),
            Err(reason) => {
                report::fail(format_args!("device at {:#x}", window.address), reason);
                continue;
            }
        };
        if wanted("driver") {
            driver::attack(&target);
        }
        if wanted("queues") {
            queues::attack(&target);
        }
        if wanted("chains") {
            chains::attack(&target);
            balloon::attack(&target);
            console::attack(&target);
        }
        if wanted("registers") {
            registers::attack(&target, &mut random, rounds);
        }
    }
}
