//! How a device raises an interrupt.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// The line of a device that is paused at times. What would be raised meanwhile is raised at the resume.
///
/// The device calls it with its own lock held.
pub(crate) struct PausableLine {
    line: Box<dyn InterruptLine>,
    is_paused: AtomicBool,
    is_due: AtomicBool,
}

impl PausableLine {
    pub(crate) fn new(line: Box<dyn InterruptLine>) -> PausableLine {
        PausableLine {
            line,
            is_paused: AtomicBool::new(false),
            is_due: AtomicBool::new(false),
        }
    }

    pub(crate) fn pause(&self) {
        self.is_paused.store(true, Ordering::Relaxed);
    }

    /// Raises the edge that is due, if there is one.
    ///
    /// # Errors
    /// As [`InterruptLine::trigger`].
    pub(crate) fn resume(&self) -> io::Result<()> {
        self.is_paused.store(false, Ordering::Relaxed);
        if self.is_due.swap(false, Ordering::Relaxed) {
            self.line.trigger()?;
        }
        Ok(())
    }

    /// Forgets the edge that is due.
    pub(crate) fn reset(&self) {
        self.is_due.store(false, Ordering::Relaxed);
    }
}

impl InterruptLine for PausableLine {
    fn trigger(&self) -> io::Result<()> {
        if self.is_paused.load(Ordering::Relaxed) {
            self.is_due.store(true, Ordering::Relaxed);
            return Ok(());
        }
        self.line.trigger()
    }
}
