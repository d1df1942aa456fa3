//! How a device raises an interrupt.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line of the guest's interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Raises one edge.
    ///
    /// # Errors
    /// If the host refuses to deliver it.
    fn trigger(&self) -> io::Result<()>;
}

/// An irqfd: the hypervisor turns the event into an edge of the line that it is bound to.
impl InterruptLine for EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}

/// The interrupt line of a device that can be paused. An edge that falls into a pause is raised by the
/// resume.
///
/// The device calls its methods with its own lock held.
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
    /// Those of [`InterruptLine::trigger`].
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
