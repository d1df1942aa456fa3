//! Signals to the process, which its main thread reads one by one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::getpid;

/// Signals that ask for the end of the process, unless they were ignored when it was started, as by
/// nohup and shells without job control.
const STOP_SIGNALS: [Signal; 4] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To end, by this signal.
    Stop(Signal),
    /// To restore the terminal and sleep.
    Suspend,
    /// To go on after such a sleep.
    Continue,
    /// To read the size of the terminal, which has changed.
    Resize,
}

/// The queue of signals that this process reads.
#[derive(Debug)]
pub struct Signals {
    queue: SignalFd,
}

impl Signals {
    /// Diverts signals into the queue. Only threads started later follow the calling thread, so
    /// it must be the only one.
    pub fn block() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        for signal in STOP_SIGNALS.into_iter().chain([Signal::SIGTSTP]) {
            if !is_ignored(signal)? {
                mask.add(signal);
            }
        }
        mask.add(Signal::SIGCONT);
        mask.add(Signal::SIGWINCH);
        let mut blocked = mask;
        // A disk that may not grow further must fail one request, not end the process.
        blocked.add(Signal::SIGXFSZ);
        blocked.thread_block()?;
        let queue = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Self { queue })
    }

    /// Returns what the next signal in the queue asks for.
    pub fn next(&self) -> io::Result<Option<Request>> {
        let Some(info) = self.queue.read_signal()? else {
            return Ok(None);
        };
        let signal = i32::try_from(info.ssi_signo).ok().map(Signal::try_from);
        Ok(match signal {
            Some(Ok(Signal::SIGTSTP)) => Some(Request::Suspend),
            Some(Ok(Signal::SIGCONT)) => Some(Request::Continue),
            Some(Ok(Signal::SIGWINCH)) => Some(Request::Resize),
            Some(Ok(signal)) => Some(Request::Stop(signal)),
            _ => None,
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

/// Blocks the signals that ask for the end of the process, and returns them. Only threads started later follow the
/// calling thread, so it must be the only one.
pub fn block_stop_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    for signal in STOP_SIGNALS {
        if !is_ignored(signal)? {
            signals.add(signal);
        }
    }
    signals.thread_block()?;
    Ok(signals)
}

/// Puts the process to sleep until it is told to continue.
pub fn sleep_until_continued() -> io::Result<()> {
    Ok(kill(getpid(), Signal::SIGSTOP)?)
}

/// Runs `start` with the signals blocked that [`Signals`] can read, so that they stay blocked on
/// threads that it starts.
pub fn while_blocked<T>(start: impl FnOnce() -> T) -> io::Result<T> {
    let mut blocked = SigSet::empty();
    let others = [
        Signal::SIGTSTP,
        Signal::SIGCONT,
        Signal::SIGWINCH,
        Signal::SIGXFSZ,
    ];
    for signal in STOP_SIGNALS.into_iter().chain(others) {
        blocked.add(signal);
    }
    let before = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let started = start();
    before.thread_set_mask()?;
    Ok(started)
}

fn is_ignored(signal: Signal) -> io::Result<bool> {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: a null action only asks; the kernel fills in `action` if the call succeeds.
    let action = unsafe {
        nix::errno::Errno::result(libc::sigaction(
            signal as libc::c_int,
            std::ptr::null(),
            action.as_mut_ptr(),
        ))?;
        action.assume_init()
    };
    Ok(action.sa_sigaction == libc::SIG_IGN)
}
