//! Descriptor chains that break the rules of section 2.7.

use alloc::boxed::Box;
use alloc::vec;
use runtime::mmio::UNUSED_PAGE;
use runtime::virtio::feature;
use runtime::virtio::queue::{DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor};

use crate::target::{Expected, Session, Target, end_of_low_ram};

/// An address without RAM: beyond the 46 bits of physical address of today's machines.
const OUTSIDE_RAM: u64 = 1 << 46;
const DESCRIPTOR_SIZE: u32 = size_of::<Descriptor>() as u32;

/// Spoils a valid request of `u16` descriptors from descriptor 0 and makes it available.
type Attack = fn(&mut Session, u16);

/// Chains of the queue's own descriptors.
const DIRECT: &[(&str, Expected, Attack)] = &[
    ("chain that loops", Expected::Notice, |session, count| {
        session.change(count - 1, |last| {
            last.flags |= DESCRIPTOR_NEXT;
            last.next = 0;
        });
        session.submit(0);
    }),
    (
        "descriptor that follows itself",
        Expected::Notice,
        |session, _| {
            session.change(0, |first| {
                first.flags |= DESCRIPTOR_NEXT;
                first.next = 0;
            });
            session.submit(0);
        },
    ),
    (
        "next descriptor just out of range",
        Expected::Notice,
        |session, count| {
            let size = session.queue.size();
            session.change(count - 1, |last| {
                last.flags |= DESCRIPTOR_NEXT;
                last.next = size;
            });
            session.submit(0);
        },
    ),
    (
        "next descriptor far out of range",
        Expected::Notice,
        |session, count| {
            session.change(count - 1, |last| {
                last.flags |= DESCRIPTOR_NEXT;
                last.next = u16::MAX;
            });
            session.submit(0);
        },
    ),
    ("head just out of range", Expected::Notice, |session, _| {
        session.submit(session.queue.size());
    }),
    ("head far out of range", Expected::Notice, |session, _| {
        session.submit(u16::MAX);
    }),
    ("buffer outside RAM", Expected::Notice, |session, _| {
        change_data(session, |buffer| buffer.address = OUTSIDE_RAM);
    }),
    (
        "buffer across the end of RAM",
        Expected::Notice,
        |session, _| {
            change_data(session, |buffer| buffer.address = end_of_low_ram() - 16);
        },
    ),
    (
        "buffer that wraps around",
        Expected::Notice,
        |session, _| {
            change_data(session, |buffer| buffer.address = u64::MAX - 15);
        },
    ),
    (
        "buffer of 4 GiB across the end of RAM",
        Expected::Notice,
        |session, _| {
            change_data(session, |buffer| {
                buffer.address = end_of_low_ram() - 16;
                buffer.length = u32::MAX;
            });
        },
    ),
    (
        "buffer in the device hole",
        Expected::Notice,
        |session, _| {
            change_data(session, |buffer| buffer.address = UNUSED_PAGE);
        },
    ),
    (
        "buffer in the device's own registers",
        Expected::Notice,
        |session, _| {
            let registers = session.device.window().address;
            change_data(session, |buffer| buffer.address = registers);
        },
    ),
    (
        "every buffer outside RAM",
        Expected::Notice,
        |session, count| {
            for index in 0..count {
                session.change(index, |buffer| buffer.address = OUTSIDE_RAM);
            }
            session.submit(0);
        },
    ),
    ("buffers of no bytes", Expected::Notice, |session, count| {
        for index in 0..count {
            session.change(index, |buffer| buffer.length = 0);
        }
        session.submit(0);
    }),
    (
        "buffers of the wrong direction",
        Expected::Notice,
        |session, count| {
            for index in 0..count {
                session.change(index, |buffer| buffer.flags ^= DESCRIPTOR_WRITE);
            }
            session.submit(0);
        },
    ),
    (
        "readable buffer after a writable one",
        Expected::Notice,
        |session, count| {
            // The valid request, moved up by one, after a buffer for the device to write.
            for index in (0..count).rev() {
                let mut descriptor = session.queue.descriptor(index);
                descriptor.next += 1;
                session.queue.set_descriptor(index + 1, descriptor);
            }
            let page = Box::leak(Box::new([0_u8; 64]));
            let writable = |flags, next| Descriptor {
                address: page.as_ptr() as u64,
                length: 64,
                flags,
                next,
            };
            session
                .queue
                .set_descriptor(0, writable(DESCRIPTOR_WRITE | DESCRIPTOR_NEXT, 1));
            session.change(count, |last| {
                last.flags |= DESCRIPTOR_NEXT;
                last.next = count + 1;
            });
            session.queue.set_descriptor(count + 1, writable(0, 0));
            session.submit(0);
        },
    ),
    (
        "available index ahead by more than the queue",
        Expected::Notice,
        |session, _| {
            let ahead = session
                .queue
                .available_index()
                .wrapping_add(session.queue.size() + 1);
            session.queue.set_available_index(ahead);
            session.notify();
        },
    ),
    (
        "available index ahead by half its range",
        Expected::Notice,
        |session, _| {
            let ahead = session.queue.available_index().wrapping_add(0x8000);
            session.queue.set_available_index(ahead);
            session.notify();
        },
    ),
    (
        "available index that goes back",
        Expected::Notice,
        |session, _| {
            let back = session.queue.available_index().wrapping_sub(1);
            session.queue.set_available_index(back);
            session.notify();
        },
    ),
    (
        "one chain in every slot of the available ring",
        Expected::Anything,
        |session, _| {
            for _ in 0..session.queue.size() {
                session.queue.make_available(0);
            }
            session.notify();
        },
    ),
];

/// Chains with indirect tables, which hold a valid request unless they are spoilt.
const INDIRECT: &[(&str, Expected, Attack)] = &[
    (
        "indirect table in an indirect table",
        Expected::Notice,
        |session, count| {
            let inner = table(session, usize::from(count));
            let outer = vec![indirect(inner)].leak();
            submit_table(session, indirect(outer));
        },
    ),
    (
        "indirect table of no bytes",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    length: 0,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table of one descriptor and a half",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count) + 1);
            submit_table(
                session,
                Descriptor {
                    length: DESCRIPTOR_SIZE * 3 / 2,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table of less than a descriptor",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    length: DESCRIPTOR_SIZE - 1,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table of 4 GiB",
        Expected::Anything,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    length: !15,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table outside RAM",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    address: OUTSIDE_RAM,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table that wraps around",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    address: u64::MAX - 15,
                    length: 48,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect table in the device hole",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            submit_table(
                session,
                Descriptor {
                    address: UNUSED_PAGE,
                    ..indirect(table)
                },
            );
        },
    ),
    (
        "indirect next out of the table",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            let last = &mut table[usize::from(count) - 1];
            last.flags |= DESCRIPTOR_NEXT;
            last.next = count;
            let descriptor = indirect(table);
            submit_table(session, descriptor);
        },
    ),
    (
        "indirect table that loops",
        Expected::Notice,
        |session, count| {
            let table = table(session, usize::from(count));
            let last = &mut table[usize::from(count) - 1];
            last.flags |= DESCRIPTOR_NEXT;
            last.next = 0;
            let descriptor = indirect(table);
            submit_table(session, descriptor);
        },
    ),
    (
        "indirect table with a next descriptor",
        Expected::Anything,
        |session, count| {
            let table = table(session, usize::from(count));
            let mut descriptor = indirect(table);
            descriptor.flags |= DESCRIPTOR_NEXT;
            descriptor.next = 1;
            submit_table(session, descriptor);
        },
    ),
    (
        "indirect chain longer than the queue",
        Expected::Anything,
        |session, count| {
            let length = 4 * usize::from(session.queue.size());
            let table = table(session, length);
            // All entries after the valid request's are empty buffers of the direction of its last
            // one.
            let last = table[usize::from(count) - 1];
            for (index, descriptor) in table.iter_mut().enumerate().skip(usize::from(count) - 1) {
                *descriptor = Descriptor { length: 0, ..last };
                descriptor.flags |= DESCRIPTOR_NEXT;
                descriptor.next = index as u16 + 1;
            }
            table[length - 1] = last;
            let descriptor = indirect(table);
            submit_table(session, descriptor);
        },
    ),
];

/// A table that begins with a valid request, in memory that lasts as long as the attack.
fn table(session: &mut Session, entries: usize) -> &'static mut [Descriptor] {
    let (descriptors, count) = session.valid_request();
    let count = usize::from(count);
    let table = vec![Descriptor::default(); entries.max(count)].leak();
    for (index, entry) in table.iter_mut().enumerate().take(count) {
        *entry = descriptors[index];
        if index + 1 < count {
            entry.flags |= DESCRIPTOR_NEXT;
            entry.next = index as u16 + 1;
        }
    }
    table
}

fn indirect(table: &[Descriptor]) -> Descriptor {
    Descriptor {
        address: table.as_ptr() as u64,
        length: size_of_val(table) as u32,
        flags: DESCRIPTOR_INDIRECT,
        next: 0,
    }
}

fn submit_table(session: &mut Session, descriptor: Descriptor) {
    session.queue.set_descriptor(0, descriptor);
    session.submit(0);
}

/// Changes the request's buffer of data, which is the second of three or the only one.
fn change_data(session: &mut Session, change: impl FnOnce(&mut Descriptor)) {
    let (_, count) = session.valid_request();
    session.change(count / 2, change);
    session.submit(0);
}

pub fn attack(target: &Target) {
    if target.request_queue().is_none() {
        return;
    }
    let indirect_offered = target.device.offered_features() & feature::INDIRECT_DESCRIPTORS != 0;
    let indirect = if indirect_offered { INDIRECT } else { &[] };
    for &(name, expected, attack) in DIRECT.iter().chain(indirect) {
        target.check(name, expected, || {
            let mut session = Session::open(target)?;
            let count = session.lay_out();
            attack(&mut session, count);
            Ok(session.wait())
        });
    }
}
