//! Virtio devices (Virtual I/O Device version 1.3) and the transport that carries them.
//!
//! A device has two halves. The front, a [`VirtioDevice`], stays with the transport: it describes the device
//! and holds its configuration space. Once the driver is ready, the transport activates it: the device makes
//! a worker that owns the queues, and the worker moves to an event loop, where it lives until the driver
//! resets the device.

pub mod balloon;
pub mod block;
mod config_space;
pub mod console;
mod driver_link;
pub mod net;
#[cfg(test)]
mod no_io_uring_test;
pub mod owner;
mod queue;
mod queue_set;
mod rings;
pub mod rng;
#[cfg(test)]
mod suspend_test;
#[cfg(test)]
mod test_driver;
#[cfg(test)]
mod test_event_loop;
mod throttle;
pub mod transport;
pub mod vsock;

// A fuzzer instruments the unit tests too, and this crate provides the functions that its instrumentation
// calls.
#[cfg(test)]
use bolero as _;

use std::sync::Arc;

use bantam_memory::GuestMemory;
use bantam_state::{RestoreError, SaveError, Section};

pub use config_space::ConfigSpace;
pub use driver_link::{DriverLink, Notify};
pub use queue::{Chain, MAX_TURN, QueueError, VirtQueue};
pub use queue_set::{MAX_QUEUES, QueueSet};
use throttle::Throttle;

use crate::notice::DeviceNotice;
use crate::worker::VirtioWorker;

/// `VIRTIO_F_INDIRECT_DESC` (section 6): a descriptor may refer to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX` (section 6): notifications are suppressed by index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1` (section 6): the device follows the standard, not its predecessors.
pub const F_VERSION_1: u64 = 1 << 32;

/// Device types (section 5).
pub mod device_id {
    /// Network card.
    pub const NETWORK: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const ENTROPY: u32 = 4;
    /// Memory balloon, the traditional one.
    pub const BALLOON: u32 = 5;
    /// Sockets.
    pub const SOCKET: u32 = 19;
}

/// Features that every device of this crate offers.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// The front of a virtio device: its description and its configuration space.
///
/// The transport calls its methods on the vCPU thread that the driver happens to run on.
pub trait VirtioDevice: Send {
    /// Returns the device type (section 5).
    fn device_id(&self) -> u32;

    /// Returns the feature bits offered to the driver, including [`COMMON_FEATURES`].
    fn features(&self) -> u64;

    /// Returns the largest size of each queue in descriptors, a power of two; one entry for each queue.
    fn queue_max_sizes(&self) -> &[u16];

    /// Returns the device-specific configuration space.
    fn config(&self) -> &ConfigSpace;

    /// Handles a write of the driver: it has written `data` at `offset` of the configuration space, within
    /// its field. Returns a notice for the owner of the machine if there is one.
    fn driver_wrote_config(&mut self, _offset: u64, _data: &[u8]) -> Option<DeviceNotice<'static>> {
        None
    }

    /// Makes the worker that serves the driver's queues, as negotiated.
    ///
    /// Called when the driver sets `DRIVER_OK`, and again after each reset; and when a restored device is
    /// resumed, with the state of the worker that was saved. The worker is dropped on reset; it must not
    /// leave a request half done.
    ///
    /// # Errors
    /// One line that says why the device cannot work. The device then asks the driver for a reset.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String>;

    /// Puts the front's state outside its configuration space into what it is after power-on. There is no
    /// worker.
    fn reset(&mut self) {}

    /// Returns the front's state outside its configuration space, which the transport saves.
    ///
    /// # Errors
    /// If that state cannot leave the process.
    fn save(&self) -> Result<Option<Section>, SaveError> {
        Ok(None)
    }

    /// Takes over what [`VirtioDevice::save`] returned, if this device can have `config`, the configuration
    /// space that was saved with it. The transport then writes that space.
    ///
    /// # Errors
    /// If the two are not from such a device.
    fn restore(&mut self, _config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        Ok(())
    }

    /// Changes what is not to be as it was saved in the configuration space, after that has been restored.
    fn config_restored(&self) {}
}

/// What the transport gives a device when it activates it.
pub struct Activation {
    /// Memory of the guest.
    pub memory: Arc<GuestMemory>,
    /// Feature bits that both sides accepted.
    pub features: u64,
    /// All queues of the device, including those that the driver left unused.
    pub queues: Vec<VirtQueue>,
    /// The link through which the driver is told of used buffers and failures.
    pub link: Arc<DriverLink>,
    /// The state of the saved device's worker, if this device takes its place.
    pub state: Option<Section>,
}
