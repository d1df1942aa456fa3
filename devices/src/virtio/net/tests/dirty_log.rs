//! The pages of guest memory that packets leave in the dirty log.

use super::*;

const PAGE: u64 = 0x1000;
/// The page with the used ring of the receive queue.
const USED: u64 = RECEIVE_RINGS + 0x2000;

/// Takes the pages of the log.
fn dirty_pages(memory: &GuestMemory) -> Vec<u64> {
    let pages = memory.take_dirty().unwrap();
    pages.iter().map(|page| page.0).collect()
}

/// Sends `count` packets to the driver, and returns the pages of its buffers that are then in the log,
/// counted from the first.
fn dirty_after(machine: &mut Machine, count: usize, len: usize) -> Vec<u64> {
    machine.memory.start_dirty_log().unwrap();
    for _ in 0..count {
        machine.host_sends(&packet(len, 0));
    }
    machine.run();
    let mut pages = dirty_pages(&machine.memory);
    assert!(pages.contains(&USED));
    pages.retain(|&page| page >= DATA);
    pages.iter().map(|page| (page - DATA) / PAGE).collect()
}

#[test]
fn packets_are_in_the_log() {
    // A single packet, and several that are read together.
    for count in [1, 8] {
        let mut machine = Machine::new(0);
        // Each packet is in two pages. The device also writes to the first; only the kernel writes to the
        // second.
        for index in 0..32 {
            let address = DATA + 2 * PAGE * index + PAGE - 700;
            machine.receive.offer(&[writable(address, 1600)]);
        }
        machine.receive.ring_doorbell();
        machine.run();
        let dirty = dirty_after(&mut machine, count, 1500);
        assert_eq!(machine.receive.take_used().len(), count);
        let filled: Vec<u64> = (0..2 * count as u64).collect();
        assert_eq!(dirty, filled);
    }
}

#[test]
fn a_packet_in_several_buffers_is_in_the_log() {
    let mut machine = Machine::new(MERGE);
    machine.offer_receive_buffers(&[PAGE as u32; 64]);
    machine.run();
    // Too few buffers are taken before the packet's size is known, so a part of it is copied.
    let dirty = dirty_after(&mut machine, 1, 10_000);
    let used = machine.receive.take_used();
    let filled: Vec<u64> = used.iter().map(|&(head, _)| head.into()).collect();
    assert_eq!(dirty, filled);
    assert_eq!(filled.len(), 3);
}

#[test]
fn what_the_driver_sends_is_not_in_the_log() {
    let mut machine = Machine::new(0);
    machine.run();
    machine.transmit(&packet(5000, 1), &[12]);
    machine.memory.start_dirty_log().unwrap();
    machine.run();
    assert!(machine.host_receives().is_some());
    let dirty = dirty_pages(&machine.memory);
    assert_eq!(dirty, [TRANSMIT_RINGS + 0x2000]);
}
