//! What the threads of a machine have in common: whether its vCPUs run, are paused or have to end,
//! and why the machine has ended.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bantam_devices::PowerControl;
use bantam_state::SaveError;
use nix::sys::pthread::{Pthread, pthread_self};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::error::Error;
use crate::events::EventSender;
use crate::exit_reason::ExitReason;
use crate::kvm::VcpuState;
use crate::lock::{lock, wait};
use crate::state::State;

/// How often a machine is looked after.
const TICK: Duration = Duration::from_secs(1);

/// How long a guest that has panicked may take to say the last it has to say, and to restart.
const PANIC_TIME: Duration = Duration::from_secs(10);

/// What the vCPU threads of a machine are doing.
#[derive(Default)]
struct VcpuThreads {
    /// Those that can be kicked out of the guest.
    kickable: Vec<Pthread>,
    /// How many of them wait for the end of a pause.
    parked: usize,
    /// For each vCPU, whether it has halted for good, as far as it has answered. Empty if nobody asks.
    halted: Vec<Option<bool>>,
    /// For each vCPU its state, as far as it has answered. Empty if nobody asks.
    states: Vec<Option<Result<VcpuState, SaveError>>>,
}

/// The vCPUs' common orders, and the end of the machine.
pub(crate) struct RunControl {
    stopping: AtomicBool,
    pausing: AtomicBool,
    panicked: AtomicBool,
    outcome: Mutex<Option<Result<ExitReason, Error>>>,
    threads: Mutex<VcpuThreads>,
    /// Signalled when a thread has parked, when a pause is over, and when the machine ends.
    changed: Condvar,
    exit_event: EventFd,
    events: EventSender,
    alarm: Mutex<Alarm>,
}

/// When the machine is looked after next.
struct Alarm {
    timer: TimerFd,
    /// When its power is to be cut.
    cut: Option<Instant>,
}

impl RunControl {
    /// The control of a machine whose end is sent to `events`.
    pub(crate) fn new(events: EventSender) -> io::Result<RunControl> {
        Ok(RunControl {
            events,
            stopping: AtomicBool::new(false),
            pausing: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            outcome: Mutex::new(None),
            threads: Mutex::new(VcpuThreads::default()),
            changed: Condvar::new(),
            exit_event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            alarm: Mutex::new(Alarm {
                timer: TimerFd::new()?,
                cut: None,
            }),
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

    /// Waits on the thread of vCPU `index` for as long as the machine is paused, and answers with `save` if
    /// [`RunControl::save_vcpus`] asks meanwhile. `true` where it was.
    ///
    /// A vCPU thread calls this before it enters the guest for the first time, and whenever it was
    /// kicked out of it.
    pub(crate) fn wait_while_paused(
        &self,
        index: u8,
        save: impl Fn() -> Result<VcpuState, SaveError>,
    ) -> bool {
        if !self.pausing.load(Ordering::SeqCst) {
            return false;
        }
        let mut threads = lock(&self.threads);
        threads.parked += 1;
        self.changed.notify_all();
        let index = usize::from(index);
        while self.pausing.load(Ordering::SeqCst) && !self.is_stopping() {
            if !matches!(threads.states.get(index), Some(None)) {
                threads = wait(&self.changed, threads);
                continue;
            }
            // All vCPUs save at the same time.
            drop(threads);
            let state = save();
            threads = lock(&self.threads);
            if let Some(answer) = threads.states.get_mut(index) {
                *answer = Some(state);
            }
            self.changed.notify_all();
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

    /// Has all `vcpu_count` vCPUs, which must be paused and stay so, save their state. `None` if the machine
    /// ends meanwhile.
    ///
    /// Their threads do it, as KVM's requests for a vCPU are made on the thread that runs it.
    pub(crate) fn save_vcpus(
        &self,
        vcpu_count: usize,
    ) -> Option<Result<Vec<VcpuState>, SaveError>> {
        let mut threads = lock(&self.threads);
        threads.states = (0..vcpu_count).map(|_| None).collect();
        self.changed.notify_all();
        while threads.states.iter().any(Option::is_none) && !self.is_stopping() {
            threads = wait(&self.changed, threads);
        }
        let states = std::mem::take(&mut threads.states);
        let states: Option<Vec<_>> = states.into_iter().collect();
        states.map(|states| states.into_iter().collect())
    }

    /// Has each of `vcpu_count` vCPUs taken out of the guest for a moment, to say whether it has halted for
    /// good. [`RunControl::halt_answer`] gives what they say.
    pub(crate) fn ask_whether_halted(&self, vcpu_count: usize) {
        let mut threads = lock(&self.threads);
        // The threads of a machine that is stopping may have been joined.
        if self.is_stopping() {
            return;
        }
        threads.halted = vec![None; vcpu_count];
        kick(&threads.kickable);
    }

    /// Answers for vCPU `index`, if [`RunControl::ask_whether_halted`] has asked. Called on its thread.
    pub(crate) fn tell_whether_halted(&self, index: u8, has_halted: impl FnOnce() -> bool) {
        if let Some(answer) = lock(&self.threads).halted.get_mut(usize::from(index)) {
            *answer = Some(has_halted());
        }
    }

    /// Whether all vCPUs have halted for good, once all of them have answered, or one has that it has not.
    pub(crate) fn halt_answer(&self) -> Option<bool> {
        let threads = lock(&self.threads);
        if threads.halted.contains(&Some(false)) {
            return Some(false);
        }
        (!threads.halted.contains(&None)).then_some(true)
    }

    /// Has the power cut after `time`, unless that is to happen earlier or the machine ends by itself.
    pub(crate) fn cut_power_after(&self, time: Duration) {
        // No time that a program waits for is beyond what the clock can tell.
        if let Some(cut) = Instant::now().checked_add(time) {
            let mut alarm = lock(&self.alarm);
            alarm.cut = Some(alarm.cut.map_or(cut, |earlier| earlier.min(cut)));
        }
        self.set_alarm();
    }

    /// Readable when [`RunControl::set_alarm`] is to be called again.
    pub(crate) fn alarm(&self) -> RawFd {
        lock(&self.alarm).timer.as_raw_fd()
    }

    /// Cuts the power if it is time, and sets the alarm: for that, or to [`TICK`] if that is earlier.
    pub(crate) fn set_alarm(&self) {
        let mut alarm = lock(&self.alarm);
        let left = alarm
            .cut
            .map(|cut| cut.saturating_duration_since(Instant::now()));
        let next = left.filter(|left| !left.is_zero());
        let set = alarm
            .timer
            .reset(next.map_or(TICK, |left| left.min(TICK)), None);
        drop(alarm);
        if let Err(error) = &set {
            tracing::error!("cannot set a timer: {error}");
        }
        if left.is_some_and(|left| left.is_zero() || set.is_err()) {
            self.finish(Ok(ExitReason::Stopped));
        }
    }

    /// Keeps vCPUs whose threads start from then on out of the guest, until [`RunControl::resume_vcpus`].
    pub(crate) fn hold_vcpus(&self) {
        self.pausing.store(true, Ordering::SeqCst);
    }

    /// Lets paused vCPUs go on.
    pub(crate) fn resume_vcpus(&self) {
        let _threads = lock(&self.threads);
        self.pausing.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Ends the machine for the reason `outcome`, unless it has ended already. A machine whose guest has
    /// panicked ends for that reason, unless the guest gives a number itself.
    pub(crate) fn finish(&self, outcome: Result<ExitReason, Error>) {
        // Held throughout: whoever comes second returns, and may join threads, only when the first
        // has kicked all of them. A thread that registers later sees that the machine is stopping.
        let threads = lock(&self.threads);
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        let outcome = match outcome {
            Ok(ExitReason::Number(_)) | Err(_) => outcome,
            Ok(_) if self.has_panicked() => Ok(ExitReason::Panic),
            Ok(_) => outcome,
        };
        *lock(&self.outcome) = Some(outcome);
        kick(&threads.kickable);
        self.changed.notify_all();
        drop(threads);
        self.events.send_state(State::Stopped);
        // It fails only when the counter is full, and then it is readable as wanted.
        let _ = self.exit_event.write(1);
    }

    /// Whether the guest has told the panic device.
    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::SeqCst)
    }

    /// Why the machine has ended; `None` before that, and after the first call.
    pub(crate) fn take_outcome(&self) -> Option<Result<ExitReason, Error>> {
        lock(&self.outcome).take()
    }
}

/// The signal that takes a vCPU out of the guest. It is blocked on vCPU threads but for the time in
/// the guest, where it has no effect beyond ending it, so no disposition is touched.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
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
pub(crate) struct EndOnPanic(pub(crate) Arc<RunControl>);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.finish(Err(Error::Panic));
        }
    }
}

impl PowerControl for RunControl {
    fn power_off(&self) {
        self.finish(Ok(ExitReason::PowerOff));
    }

    fn reset(&self) {
        self.finish(Ok(ExitReason::Reboot));
    }

    fn exit(&self, number: u8) {
        self.finish(Ok(ExitReason::Number(number)));
    }

    fn panicked(&self, handled_by_guest: bool) {
        if !handled_by_guest {
            self.cut_power_after(PANIC_TIME);
        }
        // A guest may say it without end; the log hears of the first.
        if self.panicked.swap(true, Ordering::SeqCst) {
            return;
        }
        if handled_by_guest {
            tracing::warn!("the guest has panicked, and goes on with its crash kernel");
        } else {
            tracing::warn!("the guest has panicked");
        }
    }
}
