//! The state that the threads of a machine share: whether its vCPUs run, are paused or have to end, and
//! why the machine has ended.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use bantam_arch::layout::MAX_VCPUS;
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
use crate::vcpu::ParkedVcpu;

/// What the thread of a vCPU does for another thread, while its vCPU is out of the guest.
type Work = Box<dyn FnOnce(&ParkedVcpu<'_>) + Send>;

/// A set of vCPUs: bit N stands for vCPU N.
pub(crate) type VcpuSet = u32;

const _: () = assert!(MAX_VCPUS as u32 <= VcpuSet::BITS);

/// How often the machine is checked.
const TICK: Duration = Duration::from_secs(1);

/// How long a guest that has panicked may take to print its last messages and restart.
const PANIC_TIME: Duration = Duration::from_secs(10);

/// What the vCPU threads of a machine are doing.
#[derive(Default)]
struct VcpuThreads {
    /// The threads that can be kicked out of the guest, each with the index of its vCPU.
    kickable: Vec<(u8, Pthread)>,
    /// The vCPUs whose threads wait until they may go on.
    parked: VcpuSet,
    /// For each vCPU whether it has halted for good, `None` until it answers. Empty until they are asked.
    halted: Vec<Option<bool>>,
    /// Work for threads that are parked, each piece with the index of the vCPU.
    work: Vec<(u8, Work)>,
}

impl VcpuThreads {
    /// Takes the vCPUs out of the guest. Those that are parked see by themselves what has changed when they are
    /// about to go on, and must not gather signals meanwhile.
    fn kick_running(&self) {
        let running = self.kickable.iter();
        for (_, thread) in running.filter(|(index, _)| self.parked & (1 << index) == 0) {
            kick(*thread);
        }
    }

    fn take_work(&mut self, index: u8) -> Option<Work> {
        let place = self.work.iter().position(|(of, _)| *of == index)?;
        Some(self.work.remove(place).1)
    }
}

/// What all vCPUs are to do, and the end of the machine.
pub(crate) struct RunControl {
    stopping: AtomicBool,
    pausing: AtomicBool,
    /// Whether the vCPUs are kept out of the guest for a while, to slow it down.
    throttled: AtomicBool,
    /// The vCPUs that a debugger keeps out of the guest.
    held: AtomicU32,
    panicked: AtomicBool,
    outcome: Mutex<Option<Result<ExitReason, Error>>>,
    threads: Mutex<VcpuThreads>,
    /// Signalled when a thread has parked or has work, when a vCPU may go on, and when the machine ends.
    changed: Condvar,
    exit_event: EventFd,
    events: EventSender,
    alarm: Mutex<Alarm>,
}

/// When the machine is checked next.
struct Alarm {
    timer: TimerFd,
    /// When its power is to be cut, if it is.
    cut: Option<Instant>,
}

impl RunControl {
    /// Creates the control of a machine whose end is sent to `events`.
    pub(crate) fn new(events: EventSender) -> io::Result<RunControl> {
        Ok(RunControl {
            events,
            stopping: AtomicBool::new(false),
            pausing: AtomicBool::new(false),
            throttled: AtomicBool::new(false),
            held: AtomicU32::new(0),
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

    /// Returns a descriptor that is readable once the machine has ended.
    pub(crate) fn exit_event(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open for as long as the event exists, which is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.exit_event.as_raw_fd()) }
    }

    /// Whether vCPUs must not enter the guest any more.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Whether vCPUs are kept out of the guest by a pause.
    pub(crate) fn is_pausing(&self) -> bool {
        self.pausing.load(Ordering::SeqCst)
    }

    /// Registers the calling thread, which runs vCPU `index`, so that it can be kicked out of the guest.
    pub(crate) fn register_vcpu_thread(&self, index: u8) {
        lock(&self.threads).kickable.push((index, pthread_self()));
    }

    /// Waits on the thread of `vcpu` for as long as the machine is paused or a debugger holds the vCPU, and
    /// meanwhile does the work that [`RunControl::on_parked_vcpus`] asks for. Returns whether it had to wait.
    ///
    /// A vCPU thread calls this before it enters the guest for the first time, and whenever it was
    /// kicked out of it.
    pub(crate) fn wait_while_held(&self, vcpu: &ParkedVcpu<'_>) -> bool {
        if !self.is_held(vcpu.index) {
            return false;
        }
        let mut threads = lock(&self.threads);
        threads.parked |= 1 << vcpu.index;
        self.changed.notify_all();
        while self.is_held(vcpu.index) && !self.is_stopping() {
            let Some(work) = threads.take_work(vcpu.index) else {
                threads = wait(&self.changed, threads);
                continue;
            };
            // All vCPUs work at the same time.
            drop(threads);
            work(vcpu);
            threads = lock(&self.threads);
        }
        threads.parked &= !(1 << vcpu.index);
        true
    }

    fn is_held(&self, index: u8) -> bool {
        self.is_pausing()
            || self.throttled.load(Ordering::SeqCst)
            || self.held.load(Ordering::SeqCst) & (1 << index) != 0
    }

    /// Takes all `vcpu_count` vCPUs out of the guest. Returns `false`, and lets the vCPUs run on, if they
    /// have not all left it in time or the machine has ended.
    pub(crate) fn pause_vcpus(&self, vcpu_count: usize, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let threads = lock(&self.threads);
        // The threads of a machine that is stopping may have been joined.
        if self.is_stopping() {
            return false;
        }
        // A thread that registers later sees this before it enters the guest.
        self.pausing.store(true, Ordering::SeqCst);
        threads.kick_running();
        let (_threads, parked) = self.wait_until_parked(threads, vcpu_count, Some(deadline));
        if !parked {
            self.pausing.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
        parked
    }

    /// Waits until `vcpu_count` vCPUs are out of the guest. Returns `false` with the lock if they are not by
    /// `deadline`, or the machine has ended.
    fn wait_until_parked<'a>(
        &'a self,
        mut threads: MutexGuard<'a, VcpuThreads>,
        vcpu_count: usize,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, VcpuThreads>, bool) {
        while (threads.parked.count_ones() as usize) < vcpu_count {
            if self.is_stopping() {
                return (threads, false);
            }
            threads = match deadline {
                None => wait(&self.changed, threads),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return (threads, false);
                    }
                    let waited = self.changed.wait_timeout(threads, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        (threads, true)
    }

    /// Takes all vCPUs out of the guest for a debugger, independently of a pause. They stay out until
    /// [`RunControl::release_vcpus`].
    pub(crate) fn hold_all_vcpus(&self) {
        let threads = lock(&self.threads);
        self.held.store(VcpuSet::MAX, Ordering::SeqCst);
        // The threads of a machine that is stopping may have been joined.
        if !self.is_stopping() {
            threads.kick_running();
        }
    }

    /// Waits until all `vcpu_count` vCPUs, which must be held, are out of the guest. Returns `false` if the
    /// machine ends first. A vCPU that accesses a device which waits for the host holds this up.
    pub(crate) fn await_held_vcpus(&self, vcpu_count: usize) -> bool {
        let threads = lock(&self.threads);
        self.wait_until_parked(threads, vcpu_count, None).1 && !self.is_stopping()
    }

    /// Lets `vcpus`, which a debugger holds, go on, unless the machine is paused.
    pub(crate) fn release_vcpus(&self, vcpus: VcpuSet) {
        let _threads = lock(&self.threads);
        self.held.fetch_and(!vcpus, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Whether a debugger holds any vCPU, so that the guest as a whole does not answer.
    pub(crate) fn is_held_by_debugger(&self) -> bool {
        self.held.load(Ordering::SeqCst) != 0
    }

    /// Has the threads of `vcpus`, which must be out of the guest and stay so, call `work`, and returns the
    /// answers in order. Returns `None` if the machine ends meanwhile.
    ///
    /// KVM's requests for a vCPU are made on the thread that runs it. All of these threads work at the same time.
    pub(crate) fn on_parked_vcpus<T: Send + 'static>(
        &self,
        vcpus: Range<u8>,
        work: impl Fn(&ParkedVcpu<'_>) -> T + Send + Sync + 'static,
    ) -> Option<Vec<T>> {
        let work = Arc::new(work);
        let (sender, answers) = mpsc::channel();
        let mut threads = lock(&self.threads);
        if self.is_stopping() {
            return None;
        }
        for index in vcpus.clone() {
            let (sender, work) = (sender.clone(), work.clone());
            // The receiver is there until all have answered.
            let work = move |vcpu: &ParkedVcpu<'_>| drop(sender.send((index, work(vcpu))));
            threads.work.push((index, Box::new(work)));
        }
        self.changed.notify_all();
        drop(threads);
        drop(sender);
        // This ends when no sender is left: all have answered, or the machine's end has dropped the work.
        let mut answers: Vec<(u8, T)> = answers.iter().collect();
        if answers.len() < vcpus.len() {
            return None;
        }
        answers.sort_unstable_by_key(|(index, _)| *index);
        Some(answers.into_iter().map(|(_, answer)| answer).collect())
    }

    /// Has all `vcpu_count` vCPUs, which must be paused and stay so, save their state. Returns `None` if the
    /// machine ends meanwhile.
    pub(crate) fn save_vcpus(
        &self,
        vcpu_count: usize,
    ) -> Option<Result<Vec<VcpuState>, SaveError>> {
        let vcpus = 0..u8::try_from(vcpu_count).unwrap_or(MAX_VCPUS);
        let states = self.on_parked_vcpus(vcpus, |vcpu| {
            VcpuState::save(vcpu.fd, vcpu.index, vcpu.state_support)
        })?;
        Some(states.into_iter().collect())
    }

    /// Takes each of `vcpu_count` vCPUs out of the guest for a moment, to ask whether it has halted for good.
    /// [`RunControl::halt_answer`] returns the answer.
    pub(crate) fn ask_whether_halted(&self, vcpu_count: usize) {
        let mut threads = lock(&self.threads);
        // The threads of a machine that is stopping may have been joined.
        if self.is_stopping() {
            return;
        }
        threads.halted = vec![None; vcpu_count];
        for (_, thread) in &threads.kickable {
            kick(*thread);
        }
    }

    /// Answers for vCPU `index`, on its thread, if [`RunControl::ask_whether_halted`] has asked.
    pub(crate) fn tell_whether_halted(&self, index: u8, has_halted: impl FnOnce() -> bool) {
        if let Some(answer) = lock(&self.threads).halted.get_mut(usize::from(index)) {
            *answer = Some(has_halted());
        }
    }

    /// Returns whether all vCPUs have halted for good; `None` until all have answered, or one of them that it
    /// has not.
    pub(crate) fn halt_answer(&self) -> Option<bool> {
        let threads = lock(&self.threads);
        if threads.halted.contains(&Some(false)) {
            return Some(false);
        }
        (!threads.halted.contains(&None)).then_some(true)
    }

    /// Cuts the power after `time`, unless an earlier cut is due or the machine ends by itself.
    pub(crate) fn cut_power_after(&self, time: Duration) {
        // A time beyond the range of the clock never comes.
        if let Some(cut) = Instant::now().checked_add(time) {
            let mut alarm = lock(&self.alarm);
            alarm.cut = Some(alarm.cut.map_or(cut, |earlier| earlier.min(cut)));
        }
        self.set_alarm();
    }

    /// Returns a descriptor that is readable when [`RunControl::set_alarm`] must be called again.
    pub(crate) fn alarm(&self) -> RawFd {
        lock(&self.alarm).timer.as_raw_fd()
    }

    /// Cuts the power if it is time, and sets the alarm to when it will be, or to [`TICK`] if that is
    /// earlier and the machine is not paused: then it costs the host nothing.
    pub(crate) fn set_alarm(&self) {
        let mut alarm = lock(&self.alarm);
        let left = alarm
            .cut
            .map(|cut| cut.saturating_duration_since(Instant::now()));
        // Read under the lock, as a machine that is resumed sets the alarm after it has said so.
        let tick = (!self.is_pausing()).then_some(TICK);
        let next = left.filter(|left| !left.is_zero());
        let set = match next.into_iter().chain(tick).min() {
            Some(next) => alarm.timer.reset(next, None),
            None => alarm.timer.clear(),
        };
        drop(alarm);
        if let Err(error) = &set {
            tracing::error!("cannot set a timer: {error}");
        }
        if left.is_some_and(|left| left.is_zero() || set.is_err()) {
            self.finish(Ok(ExitReason::Stopped));
        }
    }

    /// Takes all vCPUs out of the guest, or lets them go on, unless they are paused. Nobody waits until they are out.
    pub(crate) fn throttle(&self, is_stopped: bool) {
        let threads = lock(&self.threads);
        // The threads of a machine that is stopping may have been joined.
        if self.is_stopping() {
            return;
        }
        self.throttled.store(is_stopped, Ordering::SeqCst);
        match is_stopped {
            true => threads.kick_running(),
            false => self.changed.notify_all(),
        }
    }

    /// Whether [`RunControl::throttle`] keeps the vCPUs out of the guest now.
    #[cfg(test)]
    pub(crate) fn is_throttled(&self) -> bool {
        self.throttled.load(Ordering::SeqCst)
    }

    /// Keeps vCPUs whose threads start from now on out of the guest until [`RunControl::resume_vcpus`].
    pub(crate) fn hold_vcpus(&self) {
        self.pausing.store(true, Ordering::SeqCst);
    }

    /// Lets paused vCPUs go on.
    pub(crate) fn resume_vcpus(&self) {
        {
            let _threads = lock(&self.threads);
            self.pausing.store(false, Ordering::SeqCst);
            self.changed.notify_all();
        }
        self.set_alarm();
    }

    /// Ends the machine for the reason `outcome`, unless it has ended already. If the guest has panicked,
    /// that is the reason, unless the guest gives a number itself or the machine has failed.
    pub(crate) fn finish(&self, outcome: Result<ExitReason, Error>) {
        // Held throughout: a second caller returns, and may join threads, only when the first has kicked
        // all of them. A thread that registers later sees that the machine is stopping.
        let mut threads = lock(&self.threads);
        if self.stopping.swap(true, Ordering::SeqCst) {
            return;
        }
        let outcome = match outcome {
            Ok(ExitReason::Number(_) | ExitReason::Moved) | Err(_) => outcome,
            Ok(_) if self.has_panicked() => Ok(ExitReason::Panic),
            Ok(_) => outcome,
        };
        *lock(&self.outcome) = Some(outcome);
        // Nobody does it any more, and the threads that wait for it have to see that.
        threads.work.clear();
        threads.kick_running();
        self.changed.notify_all();
        drop(threads);
        self.events.send_state(State::Stopped);
        // This fails only if the counter is full, and then the event is readable anyway.
        let _ = self.exit_event.write(1);
    }

    /// Whether the guest has reported a panic to the panic device.
    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::SeqCst)
    }

    /// Returns why the machine has ended, `Some(None)` for an error; `None` before its end, and after
    /// [`RunControl::take_outcome`].
    pub(crate) fn exit_reason(&self) -> Option<Option<ExitReason>> {
        let outcome = lock(&self.outcome);
        outcome
            .as_ref()
            .map(|outcome| outcome.as_ref().ok().copied())
    }

    /// Returns why the machine has ended; `None` before its end, and after the first call.
    pub(crate) fn take_outcome(&self) -> Option<Result<ExitReason, Error>> {
        lock(&self.outcome).take()
    }
}

/// Returns the signal that takes a vCPU out of the guest. vCPU threads block it except in the guest, where
/// its only effect is to end the run of the guest, so no signal disposition is touched.
pub(crate) fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Takes a registered vCPU thread out of the guest. It has not been joined: that happens only when the machine
/// is stopping, which begins under the lock that callers hold.
fn kick(thread: Pthread) {
    // SAFETY: the thread has not been joined, as said above. It blocks the signal except in the guest, where
    // the signal only ends the run of the guest.
    let error = unsafe { libc::pthread_kill(thread, kick_signal()) };
    if error != 0 {
        let error = io::Error::from_raw_os_error(error);
        tracing::error!("cannot take a vCPU out of the guest: {error}");
    }
}

/// Ends the machine if the thread that holds this panics, so that nothing waits for a machine that has lost
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
        // A guest may report panics without end; only the first is logged.
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::thread::{self, JoinHandle};

    use bantam_memory::GuestMemory;
    use vm_memory::GuestAddress;

    use super::*;
    use crate::host::open_kvm;
    use crate::kvm::StateSupport;
    use crate::vm::Vm;

    const TIME: Duration = Duration::from_secs(10);

    /// Threads that do everything with their vCPUs but enter the guest.
    struct Threads {
        threads: Vec<JoinHandle<()>>,
        /// How often each would have entered the guest.
        entries: Arc<[AtomicUsize; 2]>,
    }

    impl Threads {
        /// Returns `None` if there is no KVM here.
        fn start(control: &Arc<RunControl>) -> Option<Threads> {
            let Ok(kvm) = open_kvm() else {
                eprintln!("skipped: there is no KVM here");
                return None;
            };
            let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
            let vm = Arc::new(Vm::new(&kvm, Arc::new(memory), false).unwrap());
            let entries = Arc::<[AtomicUsize; 2]>::default();
            let start = |index: u8| {
                let (control, entries) = (control.clone(), entries.clone());
                let fd = vm.create_vcpu(index).unwrap();
                let state_support = StateSupport::new(&kvm).unwrap();
                thread::spawn(move || {
                    while !control.is_stopping() {
                        control.wait_while_held(&ParkedVcpu {
                            index,
                            fd: &fd,
                            state_support: &state_support,
                        });
                        entries[usize::from(index)].fetch_add(1, Ordering::SeqCst);
                        thread::sleep(Duration::from_millis(1));
                    }
                })
            };
            let threads = (0..2).map(start).collect();
            Some(Threads { threads, entries })
        }

        /// Waits until the vCPU enters the guest.
        fn await_entry(&self, index: usize) {
            let count = || self.entries[index].load(Ordering::SeqCst);
            let (begin, before) = (Instant::now(), count());
            while count() == before {
                assert!(begin.elapsed() < TIME, "vCPU {index} does not go on");
                thread::sleep(Duration::from_millis(1));
            }
        }

        /// Checks that the vCPU stays out of the guest.
        fn assert_held(&self, index: usize) {
            let count = || self.entries[index].load(Ordering::SeqCst);
            let before = count();
            thread::sleep(Duration::from_millis(20));
            assert_eq!(count(), before, "vCPU {index} goes on");
        }
    }

    fn control() -> Arc<RunControl> {
        Arc::new(RunControl::new(EventSender::default()).unwrap())
    }

    #[test]
    fn a_paused_machine_wakes_only_to_have_its_power_cut() {
        let control = control();
        let is_armed = || lock(&control.alarm).timer.is_armed().unwrap();
        control.set_alarm();
        assert!(is_armed());
        control.hold_vcpus();
        control.set_alarm();
        assert!(!is_armed());
        control.resume_vcpus();
        assert!(is_armed());
        control.hold_vcpus();
        control.cut_power_after(TIME);
        assert!(is_armed());
    }

    #[test]
    fn a_vcpu_goes_on_when_neither_a_pause_nor_a_debugger_holds_it() {
        let control = control();
        control.hold_all_vcpus();
        let Some(threads) = Threads::start(&control) else {
            return;
        };
        assert!(control.await_held_vcpus(2));
        assert!(control.pause_vcpus(2, TIME));
        control.release_vcpus(VcpuSet::MAX);
        assert!(!control.is_held_by_debugger());
        threads.assert_held(0);
        control.hold_all_vcpus();
        control.resume_vcpus();
        threads.assert_held(1);
        // Only the second.
        control.release_vcpus(0b10);
        threads.await_entry(1);
        threads.assert_held(0);
        assert!(control.is_held_by_debugger());
        assert!(control.pause_vcpus(2, TIME));
        threads.assert_held(1);
        control.release_vcpus(VcpuSet::MAX);
        control.resume_vcpus();
        threads.await_entry(0);
        threads.await_entry(1);
        control.finish(Ok(ExitReason::Stopped));
        threads
            .threads
            .into_iter()
            .for_each(|it| it.join().unwrap());
    }

    #[test]
    fn a_vcpu_that_is_throttled_can_be_paused_meanwhile() {
        let control = control();
        let Some(threads) = Threads::start(&control) else {
            return;
        };
        threads.await_entry(0);
        control.throttle(true);
        assert!(control.pause_vcpus(2, TIME));
        control.throttle(false);
        threads.assert_held(0);
        control.throttle(true);
        control.resume_vcpus();
        threads.assert_held(1);
        control.throttle(false);
        threads.await_entry(0);
        threads.await_entry(1);
        control.throttle(true);
        control.finish(Ok(ExitReason::Stopped));
        threads
            .threads
            .into_iter()
            .for_each(|it| it.join().unwrap());
    }

    #[test]
    fn parked_vcpus_work_on_their_own_threads_until_the_end() {
        let control = control();
        control.hold_all_vcpus();
        let Some(threads) = Threads::start(&control) else {
            return;
        };
        assert!(control.await_held_vcpus(2));
        let work = |vcpu: &ParkedVcpu<'_>| (vcpu.index, thread::current().id());
        let ids: Vec<_> = threads.threads.iter().map(|it| it.thread().id()).collect();
        let answers = control.on_parked_vcpus(0..2, work);
        assert_eq!(answers, Some(vec![(0, ids[0]), (1, ids[1])]));
        assert_eq!(control.on_parked_vcpus(1..2, work), Some(vec![(1, ids[1])]));
        assert_eq!(control.save_vcpus(2).unwrap().unwrap().len(), 2);

        // The end interrupts a wait for a vCPU that never answers.
        let waiting = {
            let control = control.clone();
            thread::spawn(move || control.on_parked_vcpus(0..3, work))
        };
        thread::sleep(Duration::from_millis(20));
        assert_eq!(control.exit_reason(), None);
        control.finish(Ok(ExitReason::Stopped));
        assert_eq!(waiting.join().unwrap(), None);
        assert_eq!(control.on_parked_vcpus(0..1, work), None);
        assert_eq!(control.exit_reason(), Some(Some(ExitReason::Stopped)));
        assert!(!control.await_held_vcpus(3));
        threads
            .threads
            .into_iter()
            .for_each(|it| it.join().unwrap());
    }
}
