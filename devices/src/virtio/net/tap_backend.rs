//! A tap as the host's side of a card.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use bantam_memory::GuestBuffers;

use super::backend::{NetBackend, NetQueue, PacketBuffer};
use crate::tap::{FrameFilter, Offloads, Tap, TapQueue};

impl NetBackend for Tap {
    fn label(&self) -> String {
        format!("tap '{}'", self.name())
    }

    fn queue_count(&self) -> usize {
        self.queues().len()
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        self.queues().get(index).map(|queue| queue as &dyn NetQueue)
    }

    fn offloads(&self) -> Offloads {
        self.offloads()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.set_offloads(offloads)
    }

    fn set_filter(&self, filter: &FrameFilter) -> io::Result<()> {
        self.set_filter(filter)
    }

    fn use_queues(&self, count: usize) -> io::Result<()> {
        self.use_queues(count)
    }

    fn forget_driver(&self) -> io::Result<()> {
        let done = self.forget_driver();
        self.discard_queued();
        done
    }

    fn remedy(&self, error: &io::Error) -> Option<String> {
        // The error of a tap that is down.
        let is_down = error.raw_os_error() == Some(libc::EIO);
        is_down.then(|| {
            let name = self.name();
            format!("as tap '{name}' is down; as root 'ip link set {name} up' brings it up")
        })
    }
}

impl NetQueue for TapQueue {
    fn packet_file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }

    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()> {
        packet.write_to(self.as_fd(), None).map(drop)
    }

    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize> {
        buffer.read_from(self.as_fd())
    }
}
