//! Invalid requests to a balloon.

use alloc::boxed::Box;
use alloc::vec;
use runtime::virtio::balloon::{Balloon, PAGE_SIZE};
use runtime::virtio::queue::{Buffer, Descriptor};
use runtime::virtio::{SplitQueue, device_id};

use crate::target::{Expected, Outcome, QUEUE_SIZE, Target, end_of_low_ram, wait_for_reaction};

/// A page that may be put into a balloon.
#[repr(C, align(4096))]
pub struct Page(pub [u8; PAGE_SIZE as usize]);

impl Page {
    pub fn new() -> Box<Page> {
        Box::new(Page([0xff; PAGE_SIZE as usize]))
    }

    /// Its number.
    pub fn number(&self) -> u32 {
        (&raw const self.0 as u64 / PAGE_SIZE) as u32
    }

    /// Whether it has been discarded.
    pub fn is_zero(&self) -> bool {
        // SAFETY: bytes of the page, which the device changes behind the compiler's back.
        unsafe { (&raw const self.0).read_volatile() == [0; PAGE_SIZE as usize] }
    }
}

/// The first page after the RAM below 4 GiB.
fn page_behind_ram() -> u32 {
    (end_of_low_ram() / PAGE_SIZE) as u32
}

fn readable(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: false,
    }
}

fn writable(address: u64, length: u32) -> Buffer {
    Buffer {
        address,
        length,
        writable: true,
    }
}

/// Turns a list of one valid page number, at an address, into a chain that no driver should make.
type Spoil = fn(u64) -> [Buffer; 2];

const LISTS: &[(&str, Spoil)] = &[
    ("of no bytes", |list| [readable(list, 0); 2]),
    ("of an odd length", |list| {
        [readable(list, 4), readable(list, 3)]
    }),
    ("for the device to write", |list| [writable(list, 4); 2]),
    ("with a buffer to write", |list| {
        [readable(list, 4), writable(list, 4)]
    }),
    ("that ends behind RAM", |list| {
        [readable(list, 4), readable(end_of_low_ram() - 4, 8)]
    }),
];

pub fn attack(target: &Target) {
    if target.id != device_id::BALLOON {
        return;
    }
    for (queue_name, choose) in [
        (
            "inflated",
            (|balloon| &mut balloon.inflate) as fn(&mut Balloon) -> &mut SplitQueue,
        ),
        ("deflated", |balloon| &mut balloon.deflate),
    ] {
        for (name, spoil) in LISTS {
            let name = alloc::format!("list of {queue_name} pages {name}");
            target.check(name, Expected::Notice, || {
                let mut balloon = Balloon::open(target.device, QUEUE_SIZE)?;
                let page = Page::new();
                let number = Box::new(page.number());
                let chain = spoil(&raw const *number as u64);
                choose(&mut balloon).add(&chain)?;
                let device = balloon.device;
                choose(&mut balloon).kick(&device);
                Ok(wait_for_reaction(&device, choose(&mut balloon)))
            });
        }
    }
    for number in [page_behind_ram(), u32::MAX] {
        let name = alloc::format!("page {number:#x} for the balloon");
        target.check(name, Expected::Notice, || {
            let mut balloon = Balloon::open(target.device, QUEUE_SIZE)?;
            let page = Page::new();
            let numbers = vec![page.number(), number];
            let chain = [Buffer::readable(&numbers)];
            let mut table = [Descriptor::default(); 1];
            balloon.inflate.add_indirect(&mut table, &chain)?;
            balloon.inflate.kick(&balloon.device);
            Ok(wait_for_reaction(&balloon.device, &balloon.inflate))
        });
    }
    target.check(
        "list of one page a million times",
        Expected::Anything,
        || {
            let mut balloon = Balloon::open(target.device, QUEUE_SIZE)?;
            let page = Page::new();
            let numbers = vec![page.number(); 0x4000];
            let chain = [Buffer::readable(&numbers); 64];
            let mut table = [Descriptor::default(); 64];
            balloon.inflate.add_indirect(&mut table, &chain)?;
            balloon.inflate.kick(&balloon.device);
            Ok(wait_for_reaction(&balloon.device, &balloon.inflate))
        },
    );
    attack_statistics(target);
    attack_reporting(target);
}

fn attack_statistics(target: &Target) {
    for (name, buffers) in [
        ("statistics for the device to write", [true, true]),
        ("two buffers of statistics", [false, false]),
    ] {
        target.check(name, Expected::Notice, || {
            let mut balloon = Balloon::open(target.device, QUEUE_SIZE)?;
            let Some(queue) = &mut balloon.statistics else {
                return Ok(Outcome::Refused);
            };
            let entry = Box::new([0_u8; 10]);
            for is_writable in buffers {
                queue.add(&[Buffer {
                    writable: is_writable,
                    ..Buffer::readable(&*entry)
                }])?;
            }
            queue.kick(&balloon.device);
            Ok(wait_for_reaction(&balloon.device, queue))
        });
    }
}

fn attack_reporting(target: &Target) {
    let behind = u64::from(page_behind_ram()) * PAGE_SIZE;
    for (name, buffer) in [
        ("report of no bytes", writable(behind - PAGE_SIZE, 0)),
        ("report to be read", readable(behind - PAGE_SIZE, 4096)),
        (
            "report across the end of RAM",
            writable(behind - PAGE_SIZE, 8192),
        ),
        ("report of 4 GiB", writable(0, u32::MAX)),
    ] {
        target.check(name, Expected::Notice, || {
            let mut balloon = Balloon::open(target.device, QUEUE_SIZE)?;
            let Some(queue) = &mut balloon.reporting else {
                return Ok(Outcome::Refused);
            };
            queue.add(&[buffer])?;
            queue.kick(&balloon.device);
            Ok(wait_for_reaction(&balloon.device, queue))
        });
    }
}
