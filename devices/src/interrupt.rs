//! How a device raises an interrupt.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line of the guest's interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge.
    ///
    /// # Errors
    /// When the host refuses to deliver it.
    fn trigger(&self) -> io::Result<()>;
}

/// The event that the hypervisor turns into an edge of the line it is bound to (an irqfd).
impl InterruptLine for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}
