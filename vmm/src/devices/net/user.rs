//! A user network as what a network device is connected to.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};

use bantam_devices::device_log::DeviceLog;
use bantam_devices::tap::{FrameFilter, Offloads, PACKET_HEADER_SIZE};
use bantam_devices::virtio::net::{NetBackend, NetMetrics, NetQueue, PacketBuffer};
use bantam_memory::GuestBuffers;
use bantam_usernet::{ForwardedPort, FrameBuffer, GuestFrame, PartialChecksum, UserNetwork};

use crate::config::{Mtu, NetConfig};
use crate::error::Error;
use crate::lock::lock;

/// The MTU of a user network, if its configuration gives none: nearly the largest that IP has, so that the guest
/// exchanges large segments with the monitor.
const DEFAULT_MTU: u16 = 65_520;

/// The flag in the header of a packet that says that its checksum is to be completed (virtio 1.3, section
/// 5.1.6).
const NEEDS_CHECKSUM: u8 = 1;
/// Where that header says from where on the checksum is computed, and then where it belongs.
const CHECKSUM_START_OFFSET: usize = 6;

/// Returns the MTU of the user network that `config` describes.
pub(super) fn mtu(config: &NetConfig) -> u16 {
    config.mtu.map_or(DEFAULT_MTU, Mtu::get)
}

/// A user network with one queue.
pub(super) struct UserBackend {
    label: String,
    queue: UserQueue,
    ports: Vec<ForwardedPort>,
}

struct UserQueue {
    network: Mutex<UserNetwork>,
    /// The descriptor of `network`.
    fd: RawFd,
}

impl UserBackend {
    /// Opens the network that `config` describes for a guest with the address `mac`. Messages call it `label`.
    ///
    /// # Errors
    /// If a port cannot be forwarded, or the host lacks something.
    pub(super) fn open(
        config: &NetConfig,
        mac: [u8; 6],
        label: String,
    ) -> Result<UserBackend, Error> {
        let network = UserNetwork::open(&config.user_options(), mac, mtu(config))?;
        let ports = network.forwarded_ports();
        let ports = ports.map_err(Error::resource("the forwarded ports"))?;
        for port in &ports {
            tracing::info!("{port}");
        }
        Ok(UserBackend {
            label,
            queue: UserQueue {
                fd: network.as_raw_fd(),
                network: Mutex::new(network),
            },
            ports,
        })
    }

    /// Has attempts to reach what the guest may not reach counted and logged, and those to open too many
    /// connections, which are logged once.
    pub(super) fn report_refusals(&self, log: DeviceLog, metrics: Arc<NetMetrics>) {
        let mut network = lock(&self.queue.network);
        let delayed = metrics.clone();
        let label = self.label.clone();
        let mut is_known = false;
        network.observe_delays(move |limit| {
            delayed.delayed_count.add(1);
            if !std::mem::replace(&mut is_known, true) {
                tracing::warn!(
                    "{label}: the guest has {limit} connections, the most that it can have; others wait"
                );
            }
        });
        network.observe_refusals(move |refusal| {
            metrics.refused_count.add(1);
            log.warn_of_guest(format_args!("the guest may not reach {refusal}"));
        });
    }

    /// Returns the ports of the host that lead to the guest.
    pub(super) fn ports(&self) -> &[ForwardedPort] {
        &self.ports
    }
}

impl NetBackend for UserBackend {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn queue_count(&self) -> usize {
        1
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        (index == 0).then_some(&self.queue)
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            ..Offloads::default()
        }
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        lock(&self.queue.network).leave_checksums(offloads.checksum);
        Ok(())
    }

    fn set_filter(&self, _: &FrameFilter) -> io::Result<()> {
        // There are no frames for others.
        Ok(())
    }

    fn use_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn forget_driver(&self) -> io::Result<()> {
        let mut network = lock(&self.queue.network);
        network.reset();
        network.leave_checksums(false);
        Ok(())
    }
}

impl AsRawFd for UserQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

impl NetQueue for UserQueue {
    fn write(&self, packet: &mut GuestBuffers) -> io::Result<()> {
        // Whether it is segmented and has its checksum does not matter: the host's sockets see to both.
        packet.advance(PACKET_HEADER_SIZE);
        lock(&self.network).send(&mut Frame { packet, dropped: 0 });
        Ok(())
    }

    fn flush(&self) {
        lock(&self.network).flush();
    }

    fn read(&self, buffer: &mut PacketBuffer<'_>) -> io::Result<usize> {
        let written = lock(&self.network).receive(&mut Place(buffer));
        let written = written.ok_or(io::ErrorKind::WouldBlock)?;
        buffer.write_at(0, &header(written.checksum));
        Ok(PACKET_HEADER_SIZE + written.size)
    }

    fn has_packets(&self) -> bool {
        lock(&self.network).has_frames()
    }
}

/// Returns the header of a packet.
fn header(checksum: Option<PartialChecksum>) -> [u8; PACKET_HEADER_SIZE] {
    let mut header = [0; PACKET_HEADER_SIZE];
    if let Some(PartialChecksum { start, offset }) = checksum {
        header[0] = NEEDS_CHECKSUM;
        header[CHECKSUM_START_OFFSET..][..2].copy_from_slice(&start.to_le_bytes());
        header[CHECKSUM_START_OFFSET + 2..][..2].copy_from_slice(&offset.to_le_bytes());
    }
    header
}

/// A frame of the guest.
struct Frame<'a> {
    packet: &'a mut GuestBuffers,
    /// How many bytes at its front have been dropped.
    dropped: usize,
}

impl GuestFrame for Frame<'_> {
    fn size(&self) -> usize {
        self.dropped + self.packet.len()
    }

    fn read_at(&self, offset: usize, bytes: &mut [u8]) -> usize {
        let offset = offset.checked_sub(self.dropped);
        offset.map_or(0, |offset| self.packet.read_at(offset, bytes))
    }

    fn send_at(&mut self, offset: usize, size: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let skipped = offset.saturating_sub(self.dropped);
        self.packet.advance(skipped);
        self.dropped += skipped;
        self.packet.truncate(size);
        let sent = self.packet.send_to(socket)?;
        self.dropped += sent;
        Ok(sent)
    }
}

/// The place for a frame behind the header of a packet.
struct Place<'a, 'b>(&'a mut PacketBuffer<'b>);

impl FrameBuffer for Place<'_, '_> {
    fn size(&self) -> usize {
        self.0.size().saturating_sub(PACKET_HEADER_SIZE)
    }

    fn write_at(&mut self, offset: usize, bytes: &[u8]) {
        self.0.write_at(PACKET_HEADER_SIZE + offset, bytes);
    }

    fn read_back(&self, offset: usize, bytes: &mut [u8]) {
        self.0.read_back(PACKET_HEADER_SIZE + offset, bytes);
    }

    fn receive_at(
        &mut self,
        offset: usize,
        size: usize,
        rest: &mut [u8],
        socket: BorrowedFd<'_>,
        flags: libc::c_int,
    ) -> io::Result<usize> {
        self.0
            .receive_at(PACKET_HEADER_SIZE + offset, size, rest, socket, flags)
    }
}
