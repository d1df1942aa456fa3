//! Notices from a device to the owner of its machine.

use std::fmt;

use crate::virtio::owner::JobStatus;

/// Something that happened to a device and that its owner may want to know.
pub enum DeviceNotice<'a> {
    /// The device has stopped, and its driver must reset it.
    NeedsReset {
        /// The driver's fault, or the host's failure.
        reason: &'a dyn fmt::Display,
    },
    /// Something that the device needs failed on the host.
    HostError {
        /// What failed, and why.
        text: fmt::Arguments<'a>,
    },
    /// The driver has changed the number of pages in the balloon.
    MemoryReturned {
        /// The balloon's size in MiB now, rounded down.
        mib: u32,
    },
    /// The job of a disk is ready, or has ended.
    Job {
        /// How far it is.
        status: &'a JobStatus,
    },
}

impl fmt::Debug for dyn DeviceObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceObserver")
    }
}

/// Receives the notices of one device.
///
/// It is called on vCPU threads and event loops, as often as the guest likes, so it must neither wait nor
/// keep all notices.
pub trait DeviceObserver: Send + Sync {
    /// Receives a notice.
    fn notice(&self, notice: DeviceNotice<'_>);
}
