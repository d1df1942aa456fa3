//! The port of a local endpoint, which connects it to the queues of a card.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use bantam_memory::GuestBuffers;
use vmm_sys_util::timerfd::TimerFd;

use super::DriverError;
use super::dropped::DroppedPackets;
use super::flow::Flow;
use super::local_endpoint::{FRAME_START_SIZE, LocalEndpoint, LocalService};
use super::receive::Receiver;
use crate::tap::PACKET_HEADER_SIZE;
use crate::virtio::{DriverLink, MAX_TURN};

/// The shortest time that a timer can be set to.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// A local endpoint that takes frames from the transmit queues of a card, and whose frames go to a
/// receive queue.
pub(super) struct LocalPort {
    endpoint: Box<dyn LocalEndpoint>,
    /// The endpoint's name in messages.
    name: &'static str,
    timer: TimerFd,
    /// Buffer for a packet, header included.
    packet: Vec<u8>,
    /// Whether frames were taken that have not been served yet.
    has_taken: bool,
}

impl LocalPort {
    /// Makes a port for `service` on a card with an MTU of `mtu` bytes.
    ///
    /// # Errors
    /// If the host cannot create a timer, or the service an endpoint.
    pub(super) fn new(service: &LocalService, mtu: u16) -> io::Result<LocalPort> {
        Ok(LocalPort {
            endpoint: service.connect(mtu, Instant::now())?,
            name: service.name(),
            timer: TimerFd::new()?,
            packet: Vec::new(),
            has_taken: false,
        })
    }

    /// Returns the timer, which becomes readable when it is time for [`LocalPort::serve`].
    pub(super) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Takes a packet of the driver, if it is for the endpoint.
    pub(super) fn take(&mut self, packet: &GuestBuffers) -> bool {
        let mut start = [0; FRAME_START_SIZE];
        let size = packet.read_at(PACKET_HEADER_SIZE, &mut start);
        if !self.endpoint.claims(&start[..size]) {
            return false;
        }
        // The offloads in the header do not matter: the endpoint takes as much of a segment as it has room
        // for, and verifies no checksum.
        let size = packet.len().saturating_sub(PACKET_HEADER_SIZE);
        if size > self.endpoint.max_frame_size() {
            self.endpoint.reject();
            return true;
        }
        self.packet.resize(size, 0);
        packet.read_at(PACKET_HEADER_SIZE, &mut self.packet);
        self.endpoint.accept(&mut self.packet, Instant::now());
        self.has_taken = true;
        true
    }

    /// Whether there is work for [`LocalPort::serve`] because packets were taken.
    pub(super) fn has_taken(&self) -> bool {
        self.has_taken
    }

    /// Whether there is work for [`LocalPort::serve`] as soon as the driver has buffers.
    pub(super) fn has_frames(&self) -> bool {
        self.endpoint.next_frame().is_some()
    }

    /// Has the endpoint do its work, and delivers its frames as far as the driver has buffers, for one turn
    /// at most; for the rest the timer expires at once. `true` if there were any frames.
    pub(super) fn serve(
        &mut self,
        receiver: &mut Receiver,
        flow: &mut Flow,
        link: &DriverLink,
        dropped: &mut DroppedPackets,
    ) -> Result<bool, DriverError> {
        self.has_taken = false;
        let mut unreported = 0;
        let mut delivered = false;
        let start = Instant::now();
        let mut is_over;
        let result = loop {
            let now = Instant::now();
            is_over = now - start >= MAX_TURN;
            if is_over {
                break Ok(delivered);
            }
            // Each delivered frame makes room for another.
            self.endpoint.poll(now);
            match self.deliver(receiver, flow, dropped, &mut unreported) {
                Ok(true) => delivered = true,
                Ok(false) => break Ok(delivered),
                Err(error) => break Err(error),
            }
        };
        receiver.report(&mut unreported, link);
        if let Err(error) = self.set_timer(is_over) {
            link.warn_of_host(format_args!("{} cannot set its timer: {error}", self.name));
        }
        result
    }

    /// Delivers all frames that are there, as far as the driver has buffers. `true` if there were any.
    fn deliver(
        &mut self,
        receiver: &mut Receiver,
        flow: &mut Flow,
        dropped: &mut DroppedPackets,
        unreported: &mut usize,
    ) -> Result<bool, DriverError> {
        let mut any = false;
        while let Some(frame) = self.endpoint.next_frame() {
            // A header of zeroes: no work on the packet is left to the driver.
            self.packet.clear();
            self.packet.resize(PACKET_HEADER_SIZE, 0);
            self.packet.extend_from_slice(frame);
            match receiver.insert(&self.packet, flow, dropped, unreported)? {
                Some(delivered) => self.endpoint.take_frame(delivered),
                None => break,
            }
            any = true;
        }
        Ok(any)
    }

    fn set_timer(&mut self, at_once: bool) -> io::Result<()> {
        if at_once {
            return Ok(self.timer.reset(AT_ONCE, None)?);
        }
        match self.endpoint.wait_time(Instant::now()) {
            Some(wait) => self.timer.reset(wait, None)?,
            None => self.timer.clear()?,
        }
        Ok(())
    }
}
