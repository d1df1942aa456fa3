//! Endpoints within the monitor that a guest reaches on a network device.

use std::io;
use std::time::{Duration, Instant};

/// Bytes from the start of a frame that [`LocalEndpoint::claims`] is given, unless the frame is shorter: an
/// Ethernet header with an ARP packet for IPv4, or with an IPv4 header and more.
pub const FRAME_START_SIZE: usize = 14 + 28;

/// An endpoint of a network device's Ethernet segment that is a part of the monitor. It claims frames that
/// the driver transmits, which then do not reach the tap, and has frames for the driver.
///
/// Frames are Ethernet frames without the header of virtio. Checksums may be left to the device.
pub trait LocalEndpoint: Send {
    /// Whether the frame that begins with `start`, [`FRAME_START_SIZE`] bytes or a whole shorter frame, is
    /// for the endpoint.
    fn claims(&self, start: &[u8]) -> bool;

    /// Size of the largest frame that the endpoint accepts, in bytes.
    fn max_frame_size(&self) -> usize;

    /// Takes a frame that the endpoint has claimed. It may change the frame, which is of no use afterwards.
    /// The work that follows from it is left to [`LocalEndpoint::poll`].
    fn accept(&mut self, frame: &mut [u8], now: Instant);

    /// Drops a frame that the endpoint has claimed, but that is larger than
    /// [`LocalEndpoint::max_frame_size`].
    fn reject(&mut self);

    /// Does the work that is due, as far as there is room for frames to the driver.
    fn poll(&mut self, now: Instant);

    /// Returns the time until [`LocalEndpoint::poll`] has work again, or `None` if it has none before a frame
    /// is accepted or taken.
    fn wait_time(&mut self, now: Instant) -> Option<Duration>;

    /// Returns the next frame for the driver, if there is one.
    fn next_frame(&self) -> Option<&[u8]>;

    /// Removes that frame. `delivered` says whether the driver has received it; otherwise it was dropped, as
    /// the driver's buffers were too small.
    fn take_frame(&mut self, delivered: bool);
}

type Connect = dyn Fn(u16, Instant) -> io::Result<Box<dyn LocalEndpoint>> + Send;

/// A service of the monitor that a network device offers to its driver. Each driver gets a new
/// [`LocalEndpoint`] of it, so that a reset of the device ends what the previous driver has begun.
pub struct LocalService {
    name: &'static str,
    connect: Box<Connect>,
}

impl LocalService {
    /// Makes a service that messages call `name`, such as "the metadata service". `connect` makes an endpoint
    /// for packets of up to the given number of bytes, as of the given time.
    pub fn new(
        name: &'static str,
        connect: impl Fn(u16, Instant) -> io::Result<Box<dyn LocalEndpoint>> + Send + 'static,
    ) -> LocalService {
        LocalService {
            name,
            connect: Box::new(connect),
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn connect(&self, mtu: u16, now: Instant) -> io::Result<Box<dyn LocalEndpoint>> {
        (self.connect)(mtu, now)
    }
}
