//! Virtio devices (Virtual I/O Device version 1.3) and the transport that carries them.
//!
//! A device has two halves. The front, a [`VirtioDevice`], stays with the transport: it says what
//! the device is and holds its configuration space. Once the driver is ready, the transport
//! activates it: the device makes a worker that owns the queues, and the worker moves to an event
//! loop, where it lives until the driver resets the device.

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

// A fuzzer instruments the unit tests too, and this brings what its instrumentation calls.
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

/// What every device of this crate offers, whatever its type.
pub const COMMON_FEATURES: u64 = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX;

/// The front of a virtio device: what it is and its configuration space.
///
/// Its methods are called by the transport, on whichever vCPU thread the driver runs.
pub trait VirtioDevice: Send {
    /// Device type (section 5).
    fn device_id(&self) -> u32;

    /// Feature bits offered to the driver, [`COMMON_FEATURES`] among them.
    fn features(&self) -> u64;

    /// Largest size of each queue in descriptors, a power of two; as many entries as queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device-specific configuration space.
    fn config(&self) -> &ConfigSpace;

    /// The driver has written `data` at `offset` of its field of the configuration space. Gives what the
    /// owner of the machine may want to know of it.
    fn driver_wrote_config(&mut self, _offset: u64, _data: &[u8]) -> Option<DeviceNotice<'static>> {
        None
    }

    /// Makes the worker that serves the driver's queues, from what was negotiated.
    ///
    /// Called when the driver sets `DRIVER_OK`, and again after each reset; and when a device that was
    /// restored is resumed, with the state of the worker that was saved. The worker is dropped on
    /// reset; it must leave nothing of a request undone that it has taken.
    ///
    /// # Errors
    /// One line that says why the device cannot work; it then asks the driver for a reset.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn VirtioWorker>, String>;

    /// Takes what the front knows beside its configuration space to what it is after power-on. There
    /// is no worker.
    fn reset(&mut self) {}

    /// What the front knows beside its configuration space, which the transport saves.
    ///
    /// # Errors
    /// If that cannot leave the process.
    fn save(&self) -> Result<Option<Section>, SaveError> {
        Ok(None)
    }

    /// Takes over what [`VirtioDevice::save`] gave, if `config`, the configuration space that was
    /// saved with it, is one that this device can have. The transport then writes that space.
    ///
    /// # Errors
    /// If the two are not of such a device.
    fn restore(&mut self, _config: &[u8], _state: Option<&Section>) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// What a device is given to work with.
pub struct Activation {
    /// Memory of the guest.
    pub memory: Arc<GuestMemory>,
    /// Feature bits that both sides accepted.
    pub features: u64,
    /// All queues of the device, those the driver left unused among them.
    pub queues: Vec<VirtQueue>,
    /// The way to tell the driver of used buffers and of trouble.
    pub link: Arc<DriverLink>,
    /// What the worker of the saved device knew, if this one takes its place.
    pub state: Option<Section>,
}
