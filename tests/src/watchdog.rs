//! A time limit for a process group.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// Kills a process group when its time is over.
pub(crate) struct Watchdog {
    cancel: Sender<()>,
    thread: JoinHandle<bool>,
}

impl Watchdog {
    /// Kills `group` when `limit` has passed from now. Its leader must not be reaped before
    /// [`Watchdog::stop`], so that its id is not reused.
    pub(crate) fn start(group: Pid, limit: Duration) -> Watchdog {
        let (cancel, cancelled) = mpsc::channel();
        let thread = thread::spawn(move || {
            let expired = cancelled.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if expired {
                kill_group(group);
            }
            expired
        });
        Watchdog { cancel, thread }
    }

    /// Stops the watchdog. Returns whether the time was over before.
    pub(crate) fn stop(self) -> bool {
        drop(self.cancel);
        self.thread.join().expect("the watchdog does not panic")
    }
}

/// Kills all processes of a group that still exists.
pub(crate) fn kill_group(group: Pid) {
    match killpg(group, Signal::SIGKILL) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("cannot kill process group {group}: {error}"),
    }
}
