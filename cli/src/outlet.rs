//! Lines that a separate thread writes to a descriptor, so that a descriptor that takes nothing
//! holds up no other thread.

mod queue;

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use bantam_jail::Role;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::write;

use crate::{confine, signals};
use queue::LineQueue;

/// Most bytes that wait to be written, besides those that the thread is writing.
const CAPACITY: usize = 128 << 10;
/// Most bytes written at a time: a pipe takes that many atomically (`PIPE_BUF`), so that lines of
/// several processes do not mix.
const MAX_PIECE: usize = 4096;

thread_local! {
    /// Whether this is a thread that writes. It only logs how many lines were lost, and that line
    /// always finds room.
    static IS_WRITER: Cell<bool> = const { Cell::new(false) };
}

/// A queue of lines and the thread that writes them to a descriptor. The thread ends when this is dropped
/// and everything is written, or cannot be written without a wait.
#[derive(Debug)]
pub struct Outlet {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signalled when there are lines to write, and when everything is written.
    changed: Condvar,
    /// Becomes readable when the outlet is dropped.
    dropped: EventFd,
}

#[derive(Debug)]
struct State {
    queue: LineQueue,
    is_writing: bool,
    is_dropped: bool,
}

impl Outlet {
    /// Starts the thread, called `name`, that writes to `to`. It calls `on_failure` the first time that `to`
    /// refuses lines.
    ///
    /// # Errors
    /// If the host cannot create the thread or a descriptor.
    pub fn start(
        name: &str,
        to: impl AsFd + Send + 'static,
        on_failure: impl FnOnce(Errno) + Send + 'static,
    ) -> io::Result<Outlet> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                queue: LineQueue::new(CAPACITY),
                is_writing: false,
                is_dropped: false,
            }),
            changed: Condvar::new(),
            dropped: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let thread = thread::Builder::new().name(name.to_string());
        // The main thread reads signals, even if it has not begun to yet.
        signals::while_blocked(|| {
            let shared = shared.clone();
            thread.spawn(move || {
                // If it fails, the thread is confined as the process is.
                let _ = confine::enter(Role::Writer);
                shared.write_all(to.as_fd(), on_failure);
            })
        })??;
        Ok(Outlet { shared })
    }

    /// Queues `lines`, each with its line feed, to be written. They are dropped and counted if
    /// there is no room for them.
    pub fn push(&self, lines: &[u8]) {
        let mut state = self.shared.state();
        // An empty queue takes them whatever was lost before; otherwise the loss would never be
        // reported.
        let waits_for_lines = state.queue.is_empty() && !state.is_writing;
        match IS_WRITER.get() || waits_for_lines {
            true => state.queue.push_notice(lines),
            false => state.queue.push(lines),
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Queues `lines` to be written even if there is no room for them. This is for the end of the
    /// process.
    pub fn push_last(&self, lines: &[u8]) {
        self.shared.state().queue.push_notice(lines);
        self.shared.changed.notify_all();
    }

    /// Waits until everything is written, at most for `limit`.
    pub fn flush(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.state();
        while state.is_writing || !state.queue.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.shared.state().is_dropped = true;
        // It fails only if the counter is full, and then the event is readable anyway.
        let _ = self.shared.dropped.write(1);
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what is queued until the outlet is dropped.
    fn write_all(&self, to: BorrowedFd<'_>, on_failure: impl FnOnce(Errno)) {
        IS_WRITER.set(true);
        // Whether the descriptor took the last lines: a broken one need not get the number of lost
        // lines.
        let mut works = true;
        let mut failure = None;
        let mut on_failure = Some(on_failure);
        while let Some(lines) = self.next_lines() {
            if works {
                self.report_dropped(failure);
            }
            let (written, error) = write_lines(to, &lines, self.dropped.as_fd());
            if let Some(errno) = error {
                failure = error;
                if let Some(on_failure) = on_failure.take() {
                    on_failure(errno);
                }
            }
            let lost = lines.get(written..).map_or(0, queue::count_lines);
            if lost > 0 {
                self.state().queue.count_dropped(lost);
            } else if !works {
                self.report_dropped(failure.take());
            }
            works = lost == 0;
        }
    }

    /// Waits for lines and takes them; `None` if there will be no more.
    fn next_lines(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        state.is_writing = false;
        while state.queue.is_empty() {
            if state.is_dropped {
                return None;
            }
            self.changed.notify_all();
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.is_writing = true;
        Some(state.queue.take())
    }

    /// Logs how many lines were lost, after the lines that found room before, because of `failure` if there was
    /// one.
    fn report_dropped(&self, failure: Option<Errno>) {
        let dropped = self.state().queue.dropped();
        if dropped > 0 {
            match failure {
                Some(errno) => tracing::warn!("{dropped} lines were lost here: {}", errno.desc()),
                None => {
                    tracing::warn!("{dropped} lines were lost here: nobody read them fast enough");
                }
            }
            self.state().queue.forget_dropped(dropped);
        }
    }
}

/// Writes `lines`, until `stop` becomes readable, and returns how many bytes were written, and the error that
/// ended it early.
fn write_lines(to: BorrowedFd<'_>, lines: &[u8], stop: BorrowedFd<'_>) -> (usize, Option<Errno>) {
    let mut rest = lines;
    let mut failure = None;
    while !rest.is_empty() {
        match write(to, queue::whole_lines(rest, MAX_PIECE)) {
            Ok(count @ 1..) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            // The descriptor is one of ours, or a process that shares it has made it non-blocking.
            Err(Errno::EAGAIN) => {
                let mut fds = [
                    PollFd::new(to, PollFlags::POLLOUT),
                    PollFd::new(stop, PollFlags::POLLIN),
                ];
                let polled = poll(&mut fds, PollTimeout::NONE);
                let [_, stop] = fds;
                if stop.any().unwrap_or(false) || polled.is_err_and(|error| error != Errno::EINTR) {
                    break;
                }
            }
            Ok(_) => break,
            Err(errno) => {
                failure = Some(errno);
                break;
            }
        }
    }
    (lines.len() - rest.len(), failure)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader, Read};
    use std::os::fd::OwnedFd;

    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use nix::unistd::pipe2;

    use super::*;

    /// More than it can take.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn outlet(flags: OFlag) -> (Outlet, OwnedFd) {
        let (from, to) = pipe2(OFlag::O_CLOEXEC | flags).unwrap();
        (Outlet::start("outlet", to, |_| ()).unwrap(), from)
    }

    #[test]
    fn lines_are_written_in_their_order() {
        for flags in [OFlag::empty(), OFlag::O_NONBLOCK] {
            let (outlet, from) = outlet(flags);
            let reader = thread::spawn(move || {
                let mut text = String::new();
                // Both ends of the pipe are non-blocking.
                fcntl(&from, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
                File::from(from).read_to_string(&mut text).unwrap();
                text
            });
            let mut expected = String::new();
            for number in 0..10_000 {
                let line = format!("line {number}\n");
                outlet.push(line.as_bytes());
                expected += &line;
                if number % 100 == 0 {
                    outlet.flush(PATIENCE);
                }
            }
            outlet.flush(PATIENCE);
            drop(outlet);
            assert_eq!(reader.join().unwrap(), expected);
        }
    }

    #[test]
    fn a_pipe_that_nobody_reads_holds_up_nobody() {
        for flags in [OFlag::empty(), OFlag::O_NONBLOCK] {
            let (outlet, from) = outlet(flags);
            // Far more than the pipe, the thread and the queue hold together.
            for number in 0..100_000 {
                outlet.push(format!("{number:099}\n").as_bytes());
            }
            outlet.flush(Duration::from_millis(1));
            assert!(outlet.shared.state().queue.dropped() > 0);

            // The lines that found room are there for a late reader.
            fcntl(&from, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
            let reader = thread::spawn(move || {
                let lines = BufReader::new(File::from(from)).lines();
                lines
                    .map(|line| line.unwrap().parse().unwrap())
                    .collect::<Vec<u32>>()
            });
            outlet.flush(PATIENCE);
            drop(outlet);
            let numbers = reader.join().unwrap();
            assert!(numbers.len() > 600, "{} lines", numbers.len());
            assert!(numbers.is_sorted() && numbers[0] == 0);
        }
    }

    #[test]
    fn what_cannot_be_written_is_lost_and_counted() {
        let (outlet, from) = outlet(OFlag::empty());
        drop(from);
        for lines in [&b"one\n"[..], b"two\nthree\n"] {
            outlet.push(lines);
            outlet.flush(PATIENCE);
        }
        assert_eq!(outlet.shared.state().queue.dropped(), 3);
    }

    #[test]
    fn a_file_that_refuses_lines_is_reported_once() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (sender, failures) = std::sync::mpsc::channel();
        let report = move |errno| sender.send(errno).unwrap();
        let outlet = Outlet::start("outlet", full, report).unwrap();
        for _ in 0..3 {
            outlet.push(b"a line\n");
            outlet.flush(PATIENCE);
        }
        drop(outlet);
        assert_eq!(failures.iter().collect::<Vec<_>>(), [Errno::ENOSPC]);
    }

    #[test]
    fn the_thread_ends_with_its_outlet_even_if_nobody_reads() {
        let (outlet, from) = outlet(OFlag::O_NONBLOCK);
        for _ in 0..100_000 {
            outlet.push(b"a line that nobody reads\n");
        }
        let shared = outlet.shared.clone();
        drop(outlet);
        let deadline = Instant::now() + PATIENCE;
        while Arc::strong_count(&shared) > 1 {
            assert!(Instant::now() < deadline, "the thread is still there");
            thread::yield_now();
        }
        drop(from);
    }
}
