//! What the threads of a machine have in common: whether its vCPUs run, are paused or have to end,
//! and why the machine has ended.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// It was stopped from outside, by [`Command::Stop`](crate::Command::Stop).
    Stopped,
}

/// What the vCPU threads of a machine are doing.
#[derive(Default)]
struct VcpuThreads {
    /// Those that can be kicked out of the guest.
    kickable: Vec<Pthread>,
    /// How many of them wait for the end of a pause.
    parked: usize,
}

/// The vCPUs' common orders, and the end of the machine.
pub(crate) struct Control {
    stopping: AtomicBool,
    pausing: AtomicBool,
    outcome: Mutex<Option<Result<ExitReason, Error>>>,
    threads: Mutex<VcpuThreads>,
    /// Signalled when a thread has parked, when a pause is over, and when the machine ends.
    changed: Condvar,
    exit_event: EventFd,
}

impl Control {
    pub(crate) fn new() -> io::Result<Control> {
        Ok(Control {
            stopping: AtomicBool::new(false),
            pausing: AtomicBool::new(false),
            outcome: Mutex::new(None),
            threads: Mutex::new(VcpuThreads::default()),
            changed: Condvar::new(),
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

    /// Makes the calling thread, which runs a vCPU, one that is kicked out of the guest.
    pub(crate) fn register_vcpu_thread(&self) {
        lock(&self.threads).kickable.push(pthread_self());
    }

    /// Waits on a vCPU thread for as long as the machine is paused. `true` where it was.
    ///
    /// A vCPU thread calls this before it enters the guest for the first time, and whenever it was
    /// kicked out of it.
    pub(crate) fn wait_while_paused(&self) -> bool {
        if !self.pausing.load(Ordering::SeqCst) {
            return false;
        }
        let mut threads = lock(&self.threads);
        threads.parked += 1;
        self.changed.notify_all();
        while self.pausing.load(Ordering::SeqCst) && !self.is_stopping() {
            threads = wait(&self.changed, threads);
        }
        threads.parked -= 1;
        true
    }

    /// Takes all `vcpu_count` vCPUs out of the guest. `false`, with the vCPUs running on, when they
    /// have not all come in time or the machine has ended.
    pub(crate) fn pause_vcpus(&self, vcpu_count: usize, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut threads = lock(&self.threads);
        // The threads of a machine that is stopping may have been joined.
        if self.is_stopping() {
            return false;
        }
        // A thread that registers later sees it before it enters the guest.
        self.pausing.store(true, Ordering::SeqCst);
        kick(&threads.kickable);
        while threads.parked < vcpu_count {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.is_stopping() {
                self.pausing.store(false, Ordering::SeqCst);
                self.changed.notify_all();
                return false;
            }
            threads = self
                .changed
                .wait_timeout(threads, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Lets paused vCPUs go on.
    pub(crate) fn resume_vcpus(&self) {
        let _threads = lock(&self.threads);
        self.pausing.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Ends the machine for the reason `outcome`, unless it has ended already.
    pub(crate) fn finish(&self, outcome: Result<ExitReason, Error>) {
        // Held throughout: whoever comes second returns, and may join threads, only when the first
        // has kicked all of them. A thread that registers later sees that the machine is stopping.
        let threads = lock(&self.threads);
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        *lock(&self.outcome) = Some(outcome);
        kick(&threads.kickable);
        self.changed.notify_all();
        drop(threads);
        // It fails only when the counter is full, and then it is readable as wanted.
        let _ = self.exit_event.write(1);
    }

    /// Why the machine has ended; `None` before that, and after the first call.
    pub(crate) fn take_outcome(&self) -> Option<Result<ExitReason, Error>> {
        lock(&self.outcome).take()
    }
}

/// Takes vCPU threads out of the guest, which have registered themselves. None has been joined: that
/// happens only when the machine is stopping, which it begins to do under the lock that callers hold.
fn kick(threads: &[Pthread]) {
    for &thread in threads {
        // SAFETY: the thread has not been joined, as said above. It blocks the signal but in the guest, so all
        // that the signal does is to end that.
        let error = unsafe { libc::pthread_kill(thread, kick_signal()) };
        if error != 0 {
            let error = io::Error::from_raw_os_error(error);
            tracing::error!("cannot take a vCPU out of the guest: {error}");
        }
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

/// What a mutex guards, also after a thread has panicked with it: each change of it is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for `changed`, as [`lock`].
pub(crate) fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}
