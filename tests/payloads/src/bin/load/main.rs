//! Loads one virtio device at full speed, and prints the result in one line of JSON.
//!
//! `test=block` loads the first block device:
//! - `mode=read|write|mixed` (`read`; `mixed` is half and half) `pattern=seq|random` (`random`)
//! - `block-size=BYTES` (4096), a power of two from 512 to 1M; `span=BYTES`, the part of the disk from
//!   its start that is used (all of it)
//! - `depth=N` (32): requests in flight in each of `queues=N` (1) queues, 1 to 256 and 1 to 4
//! - `verify`: every word written says where it belongs, and what is read is checked for that.
//!   Blocks must then have been written with `verify` and the same `seed=N` (0) before they are
//!   read; `mixed` writes a block before it reads it
//!
//! `test=net` loads the first network card with frames of `packet-size=BYTES` (64), each of its
//! Ethernet header and what follows, up to 1514; above that, up to 65536, with `mode=transmit` only,
//! they are TCP segments for the device to cut:
//! - `mode=transmit|receive|round-trip` (`transmit`). `receive` counts the frames of the EtherType
//!   0x88b5 that come, from the first on; `round-trip` waits for its own to come back, whatever their
//!   addresses
//! - `depth=N` (32): frames under way, or receive buffers
//!
//! `test=tcp` loads the network behind the card, with connections to `peer=ADDRESS:PORT`:
//! - `mode=send|receive|connect|round-trip` (`send`): bytes to the peer, or from it; `depth=N` (32) connections at
//!   a time, each of which the peer ends; or a byte to the peer and back, again and again. Operations of the first
//!   two are bytes
//!
//! `test=udp` sends datagrams there, in frames of `packet-size=BYTES` (64).
//!
//! Both take `address=ADDRESS` (10.0.2.15) and `gateway=ADDRESS` (10.0.2.2), the peer itself if it is on the
//! same network.
//!
//! All: `seconds=N` (1) or `operations=N`, and `completion=polled|interrupt` (`polled`). Numbers of
//! bytes may end in `K` or `M`. The line `load: ready` comes before the first operation. One
//! processor does everything, in ring 3.

#![no_std]
#![no_main]

extern crate alloc;

mod block;
mod buffers;
mod completion;
mod frame;
mod histogram;
mod internet;
mod net;
mod outcome;
mod settings;
mod stamp;

use alloc::boxed::Box;
use alloc::format;
use alloc::string::String;

use runtime::virtio::{MmioDevice, PciDevice, Transport, device_id};
use runtime::{arguments, payload, println, report, time};

use crate::outcome::Outcome;
use crate::settings::{Settings, Test};

payload!(load);

fn load() {
    match run() {
        Ok(outcome) => outcome.print(),
        Err(reason) => report::fail("load", reason),
    }
}

fn run() -> Result<Outcome, String> {
    let settings = Settings::from_command_line()?;
    // Before the first measurement, as it takes milliseconds.
    time::ticks_per_second();
    let card = || find(device_id::NET, "network card");
    match &settings.test {
        Test::Tcp(ends, mode) => internet::run_tcp(&*card()?, &settings, ends, *mode),
        Test::Udp(ends, size) => internet::run_udp(&*card()?, &settings, ends, *size),
        Test::Net(net) => net::run(&*card()?, &settings, net),
        Test::Block(block) => {
            block::run(&*find(device_id::BLOCK, "block device")?, &settings, block)
        }
    }
}

/// Prints that operations begin.
fn say_ready() {
    println!("load: ready");
}

/// Returns the first device of this type, among those on the command line or else on PCI.
fn find(id: u32, name: &str) -> Result<Box<dyn Transport>, String> {
    let mut passed_over = String::new();
    for window in arguments::virtio_mmio_windows() {
        match MmioDevice::probe(window) {
            Ok(device) if device.device_id() == id => return Ok(Box::new(device)),
            Ok(_) => {}
            Err(reason) => passed_over = format!("; at {:#x} is {reason}", window.address),
        }
    }
    let mut on_pci = PciDevice::all().into_iter();
    match on_pci.find(|device| device.device_id() == id) {
        Some(device) => Ok(Box::new(device)),
        None => Err(format!("there is no {name}{passed_over}")),
    }
}
