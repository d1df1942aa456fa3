//! Drivers for virtio devices (virtio 1.3): small, and open enough that a hostile payload can do
//! everything a driver must not.

use core::fmt;
use core::time::Duration;

use crate::interrupts;
use crate::time::Deadline;

pub mod balloon;
pub mod block;
pub mod console;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod slot_queue;
pub mod transport;
pub mod vsock;

pub use mmio::MmioDevice;
pub use pci::PciDevice;
pub use queue::{Buffer, SplitQueue, Used};
pub use slot_queue::SlotQueue;
pub use transport::Transport;

/// Device ids (section 5).
pub mod device_id {
    /// Network card.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLOCK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Memory balloon.
    pub const BALLOON: u32 = 5;
    /// Sockets.
    pub const VSOCK: u32 = 19;
}

/// Feature bits of every device (section 6).
pub mod feature {
    /// `VIRTIO_F_INDIRECT_DESC`: a descriptor can refer to a table of descriptors.
    pub const INDIRECT_DESCRIPTORS: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`: each side says at which index the other should notify it.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`: the device follows the standard.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Bits of the device status field (section 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u32 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u32 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u32 = 4;
    /// Features are negotiated.
    pub const FEATURES_OK: u32 = 8;
    /// The device has met an error from which only a reset recovers.
    pub const NEEDS_RESET: u32 = 0x40;
    /// The driver has given up.
    pub const FAILED: u32 = 0x80;
}

/// How long a device may take for a request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(3);

/// Why a device or a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The window has no virtio-mmio device of version 2: its magic number and version.
    NotVirtio(u32, u32),
    /// The device is not of the type that the driver is for: its device id.
    WrongType(u32),
    /// The status register is not zero after a reset: its value.
    NotReset(u32),
    /// The device offers features without `VERSION_1`: what it offers.
    Legacy(u64),
    /// The device refused these features.
    FeaturesRefused(u64),
    /// The device has no such queue, or one of fewer descriptors than wanted: the most it takes.
    QueueTooSmall(u32),
    /// Too few of the driver's descriptors are free.
    QueueFull,
    /// The device set `DEVICE_NEEDS_RESET`.
    NeedsReset,
    /// Nothing happened within [`REQUEST_TIMEOUT`].
    TimedOut,
    /// The used ring returned a chain that was not made available: its head.
    WrongChain(u32),
    /// A block request ended with this status byte.
    Status(u8),
    /// The used ring reports this impossible number of bytes written.
    WrongLength(u32),
}

impl fmt::Display for Error {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotVirtio(magic, version) => {
                write!(
                    formatter,
                    "no virtio-mmio 2: magic {magic:#x}, version {version}"
                )
            }
            Self::WrongType(id) => write!(formatter, "the device's id is {id}"),
            Self::NotReset(status) => write!(formatter, "status {status:#x} after a reset"),
            Self::Legacy(offered) => write!(formatter, "no VERSION_1 in features {offered:#x}"),
            Self::FeaturesRefused(wanted) => write!(formatter, "features {wanted:#x} refused"),
            Self::QueueTooSmall(size) => write!(formatter, "the queue takes {size} descriptors"),
            Self::QueueFull => formatter.write_str("the queue has too few free descriptors"),
            Self::NeedsReset => formatter.write_str("the device needs a reset"),
            Self::TimedOut => write!(formatter, "no answer within {REQUEST_TIMEOUT:?}"),
            Self::WrongChain(head) => write!(formatter, "chain {head} was used but not available"),
            Self::Status(status) => write!(formatter, "request status {status}"),
            Self::WrongLength(length) => write!(formatter, "{length} bytes written, says the ring"),
        }
    }
}

/// How a driver learns that its request is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// By polling the used ring.
    Polled,
    /// By the device's interrupt, halted until it arrives.
    Interrupt,
    /// By an interrupt of this vector, which must come after `before` others of it.
    ///
    /// [`Completion::Interrupt`] may see the used chain before the device has decided to interrupt. Once the chain is
    /// taken, the device may omit the interrupt (virtio 1.3, section 2.7.10).
    InterruptOf {
        /// The interrupt's vector.
        vector: u8,
        /// [`interrupts::count`] of the vector before the request.
        before: u64,
    },
}

/// Waits until the device has used a chain of `queue`, and takes it.
///
/// # Errors
///
/// If the device asks for a reset or does not answer, or breaks the rules of the used ring.
pub fn wait_for_used(
    device: &MmioDevice,
    queue: &mut SplitQueue,
    completion: Completion,
) -> Result<Used, Error> {
    match completion {
        Completion::Polled => {
            let deadline = Deadline::after(REQUEST_TIMEOUT);
            let mut turns = 0_u32;
            while !queue.has_used() {
                core::hint::spin_loop();
                turns = turns.wrapping_add(1);
                // Reading the status register costs an exit.
                if turns.is_multiple_of(0x10_0000) && device.needs_reset() {
                    return Err(Error::NeedsReset);
                }
                if deadline.passed() {
                    return Err(Error::TimedOut);
                }
            }
        }
        Completion::Interrupt | Completion::InterruptOf { .. } => {
            let interrupted = || match completion {
                Completion::InterruptOf { vector, before } => interrupts::count(vector) != before,
                _ => true,
            };
            if !interrupts::wait_until(REQUEST_TIMEOUT, || queue.has_used() && interrupted()) {
                let needs_reset = device.needs_reset();
                return Err(if needs_reset {
                    Error::NeedsReset
                } else {
                    Error::TimedOut
                });
            }
            device.acknowledge_interrupt();
        }
    }
    queue.take_used()?.ok_or(Error::TimedOut)
}
