//! A backend that is not a file.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Mutex;

use bantam_memory::GuestBuffers;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::tap::{FrameFilter, Offloads};
use crate::virtio::net::backend::{NetBackend, NetQueue, PacketBuffer};

/// Returns each packet to its sender. Its descriptor never becomes readable.
struct Echo {
    packets: Mutex<VecDeque<Vec<u8>>>,
    event: EventFd,
}

impl NetBackend for Echo {
    fn label(&self) -> String {
        "an echo".to_owned()
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        (index == 0).then_some(self)
    }

    fn offloads(&self) -> Offloads {
        Offloads::default()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_filter(&self, _: &FrameFilter) -> io::Result<()> {
        Ok(())
    }

    fn use_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn forget_driver(&self) -> io::Result<()> {
        self.packets.lock().unwrap().clear();
        Ok(())
    }
}

impl AsRawFd for Echo {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl NetQueue for Echo {
    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()> {
        let mut bytes = vec![0; packet.len()];
        packet.read(&mut bytes);
        self.packets.lock().unwrap().push_back(bytes);
        Ok(())
    }

    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize> {
        let packet = self.packets.lock().unwrap().pop_front();
        let packet = packet.ok_or(io::ErrorKind::WouldBlock)?;
        buffer.write_at(0, &packet);
        Ok(packet.len())
    }

    fn has_packets(&self) -> bool {
        !self.packets.lock().unwrap().is_empty()
    }
}

fn machine() -> Machine {
    let echo = Arc::new(Echo {
        packets: Mutex::default(),
        event: EventFd::new(EFD_NONBLOCK).unwrap(),
    });
    let (_, unused) = stand_in();
    Machine::with(MERGE, unused, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        let rings = Arc::new(RingStore::new(echo));
        Box::new(Worker::new(rings, 1500, MAC, config, shared, None, activation).unwrap())
    })
}

#[test]
fn answers_are_delivered_without_an_event() {
    let mut machine = machine();
    machine.offer_receive_buffers(&[2000; 4]);
    machine.run();
    for seed in 1..=4 {
        let sent = packet(1000, seed);
        machine.transmit(&sent, &[12]);
        machine.run();
        assert_eq!(machine.receive.take_used().len(), 1);
        let address = DATA + u64::from(seed - 1) * 2000;
        // The packet that is sent next is put over the first buffer.
        if seed > 1 {
            assert_eq!(machine.bytes(address, 1000), received(sent, 1));
        }
    }
}

#[test]
fn answers_wait_for_buffers() {
    let mut machine = machine();
    machine.transmit(&packet(600, 7), &[12]);
    machine.run();
    assert!(machine.receive.take_used().is_empty());
    machine.offer_receive_buffers(&[400, 400]);
    machine.run();
    assert_eq!(machine.receive.take_used().len(), 2);
}
