//! How a machine comes to its end: the first to say so decides why, and all vCPUs stop.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bantam_devices::PowerControl;
use nix::sys::pthread::{Pthread, pthread_self};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::Error;
use crate::vcpu::kick_signal;

/// Why a machine has ended as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest switched it off.
    PowerOff,
    /// The guest asked for a restart.
    Reboot,
    /// It was stopped from outside, by [`Machine::stop`](crate::Machine::stop).
    Stopped,
}

/// The end of a machine, shared by its threads.
pub(crate) struct Control {
    stopping: AtomicBool,
    outcome: Mutex<Option<Result<ExitReason, Error>>>,
    vcpu_threads: Mutex<Vec<Pthread>>,
    exit_event: EventFd,
}

impl Control {
    pub(crate) fn new() -> io::Result<Control> {
        Ok(Control {
            stopping: AtomicBool::new(false),
            outcome: Mutex::new(None),
            vcpu_threads: Mutex::new(Vec::new()),
            exit_event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Readable once the machine has ended.
    pub(crate) fn exit_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the event exists, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.exit_event.as_raw_fd()) }
    }

    /// Whether vCPUs must not enter the guest any more.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Makes the calling thread, which runs a vCPU, one that is kicked out of the guest at the end.
    pub(crate) fn register_vcpu_thread(&self) {
        lock(&self.vcpu_threads).push(pthread_self());
    }

    /// Ends the machine for the reason `outcome`, unless it has ended already.
    pub(crate) fn finish(&self, outcome: Result<ExitReason, Error>) {
        // Held throughout: whoever comes second returns, and may join threads, only when the first
        // has kicked all of them. A thread that registers later sees that the machine is stopping.
        let threads = lock(&self.vcpu_threads);
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        *lock(&self.outcome) = Some(outcome);
        for &thread in &*threads {
            // SAFETY: the thread has registered itself, and has not been joined, as said above. It
            // blocks the signal but in the guest, so all that the signal does is to end that.
            let error = unsafe { libc::pthread_kill(thread, kick_signal()) };
            if error != 0 {
                let error = io::Error::from_raw_os_error(error);
                tracing::error!("cannot stop a vCPU thread: {error}");
            }
        }
        drop(threads);
        // It fails only when the counter is full, and then it is readable as wanted.
        let _ = self.exit_event.write(1);
    }

    /// Why the machine has ended; `None` before that, and after the first call.
    pub(crate) fn take_outcome(&self) -> Option<Result<ExitReason, Error>> {
        lock(&self.outcome).take()
    }
}

/// Ends the machine if the thread that holds it panics: nobody waits for a machine that has lost
/// one of its threads.
pub(crate) struct EndOnPanic(pub(crate) Arc<Control>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.finish(Err(Error::Panic));
        }
    }
}

impl PowerControl for Control {
    fn power_off(&self) {
        self.finish(Ok(ExitReason::PowerOff));
    }

    fn reset(&self) {
        self.finish(Ok(ExitReason::Reboot));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
