//! Queues that no device can serve.

use runtime::mmio::UNUSED_PAGE;
use runtime::virtio::Transport;
use runtime::virtio::mmio::{QueueAddresses, register};

use crate::target::{Expected, Outcome, Session, Target, end_of_low_ram};

const OUTSIDE_RAM: u64 = 1 << 46;

/// Where to put one part of a queue, given its correct place.
type Placement = fn(&Session, u64) -> u64;

const PLACEMENTS: &[(&str, Expected, Placement)] = &[
    ("outside RAM", Expected::Notice, |_, _| OUTSIDE_RAM),
    ("across the end of RAM", Expected::Notice, |_, _| {
        end_of_low_ram() - 16
    }),
    (
        "at the end of the address space",
        Expected::Notice,
        |_, _| u64::MAX - 15,
    ),
    ("in the device hole", Expected::Notice, |_, _| UNUSED_PAGE),
    (
        "in the device's own registers",
        Expected::Notice,
        |session, _| session.device.window().address,
    ),
    ("unaligned", Expected::Notice, |_, address| address + 1),
];

type Part = fn(&mut QueueAddresses) -> &mut u64;

const PARTS: &[(&str, Part)] = &[
    ("descriptor table", |addresses| &mut addresses.descriptors),
    ("available ring", |addresses| &mut addresses.available),
    ("used ring", |addresses| &mut addresses.used),
];

pub fn attack(target: &Target) {
    for size in [0, 3, 17, 0x1_0000, 0x8000_0000, u32::MAX] {
        let name = alloc::format!("queue of {size} descriptors");
        target.check(name, Expected::Notice, || {
            let session = Session::prepare(target)?;
            let addresses = session.queue.addresses();
            Ok(start(session, size, addresses))
        });
    }
    let max = target
        .device
        .queue_size_max(target.request_queue().unwrap_or(0));
    target.check(
        "queue of twice the most descriptors",
        Expected::Notice,
        || {
            let session = Session::prepare(target)?;
            let addresses = session.queue.addresses();
            Ok(start(session, 2 * max, addresses))
        },
    );
    for (part_name, part) in PARTS {
        for &(place_name, expected, placement) in PLACEMENTS {
            let name = alloc::format!("{part_name} {place_name}");
            target.check(name, expected, || {
                let session = Session::prepare(target)?;
                let mut addresses = session.queue.addresses();
                let address = part(&mut addresses);
                *address = placement(&session, *address);
                let size = u32::from(session.queue.size());
                Ok(start(session, size, addresses))
            });
        }
    }
    target.check("parts of a queue in one place", Expected::Anything, || {
        let session = Session::prepare(target)?;
        let address = session.queue.addresses().descriptors;
        let addresses = QueueAddresses {
            descriptors: address,
            available: address,
            used: address,
        };
        let size = u32::from(session.queue.size());
        Ok(start(session, size, addresses))
    });
    target.check(
        "queue that is ready with nothing else set",
        Expected::Anything,
        || {
            let session = Session::prepare(target)?;
            session.device.write(register::QUEUE_READY, 1);
            session.device.set_driver_ok();
            session.notify();
            Ok(if session.device.needs_reset() {
                Outcome::NeedsReset
            } else {
                Outcome::Silent
            })
        },
    );
}

/// Gives the device its queue, starts it, and submits a valid request if its effect is visible.
fn start(mut session: Session, size: u32, addresses: QueueAddresses) -> Outcome {
    session
        .device
        .write_queue(u32::from(session.queue.index()), size, addresses);
    if session.device.read(register::QUEUE_READY) == 0 {
        return Outcome::Refused;
    }
    session.device.set_driver_ok();
    session.lay_out();
    session.submit(0);
    session.wait()
}
