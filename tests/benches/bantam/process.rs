//! A monitor's process, and the resources that it takes from the host.

use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bantam_tests::{STATUS_POWER_CUT, STATUS_REBOOT};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Units of CPU time in `/proc` per second: `USER_HZ`, which is 100 on x86.
const CLOCK_TICKS: f64 = 100.0;

/// A running process. Dropping this before its end kills it.
pub struct Process {
    pid: Pid,
    reaped: bool,
    started: Instant,
    /// Standard output and standard error.
    output: PipeReader,
    printed: Vec<u8>,
}

/// The time that a process took from its start to its end.
#[derive(Debug)]
pub struct Ended {
    /// From just before it was started until it was reaped.
    pub wall: Duration,
    /// User and system time of all its threads.
    pub cpu: Duration,
}

impl Process {
    /// Starts a process with no input.
    #[expect(
        clippy::zombie_processes,
        reason = "it is waited for by its id, as only wait4 tells its CPU time"
    )]
    pub fn start(mut command: Command) -> Self {
        let (output, writer) = io::pipe().expect("there are file descriptors");
        let errors = writer.try_clone().expect("there are file descriptors");
        command.stdin(Stdio::null()).stdout(writer).stderr(errors);
        let started = Instant::now();
        let child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self {
            pid: Pid::from_raw(child.id().try_into().expect("process ids are positive")),
            reaped: false,
            started,
            output,
            printed: Vec::new(),
        }
    }

    /// Returns its id.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns the CPU time of all its threads so far, to a hundredth of a second.
    pub fn cpu(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.pid);
        let text = fs::read_to_string(path).expect("the process exists until it is reaped");
        // The name is in parentheses and may hold anything; after it, `utime` and `stime` are
        // fields 14 and 15 (proc_pid_stat(5)).
        let (_, fields) = text.rsplit_once(')').expect("the name is in parentheses");
        let ticks: f64 = fields
            .split_whitespace()
            .skip(11)
            .take(2)
            .map(|field| field.parse::<f64>().expect("times are numbers"))
            .sum();
        Duration::from_secs_f64(ticks / CLOCK_TICKS)
    }

    /// Returns the CPU time so far of its existing threads whose names are `wanted`.
    pub fn threads_cpu(&self, wanted: impl Fn(&str) -> bool) -> Duration {
        self.threads_time(0, wanted)
    }

    /// Returns how long its existing threads have so far been ready to run without a CPU.
    pub fn threads_cpu_wait(&self) -> Duration {
        self.threads_time(1, |_| true)
    }

    /// Returns the sum of a field of the threads' `schedstat`: the time on a CPU, then the time of
    /// waiting for one, in nanoseconds (Documentation/scheduler/sched-stats.rst).
    fn threads_time(&self, field: usize, wanted: impl Fn(&str) -> bool) -> Duration {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid))
            .expect("the process exists until it is reaped");
        let times = threads.filter_map(|thread| {
            let folder = thread.ok()?.path();
            // A thread may end meanwhile.
            let name = fs::read_to_string(folder.join("comm")).ok()?;
            let statistics = fs::read_to_string(folder.join("schedstat")).ok()?;
            let time = statistics.split_whitespace().nth(field)?.parse().ok()?;
            wanted(name.trim_end()).then(|| Duration::from_nanos(time))
        });
        times.sum()
    }

    /// Waits until it has printed `text`, and returns the time since its start.
    ///
    /// # Panics
    ///
    /// If it has not printed that by the time `limit` since its start.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Duration {
        if !self.prints(text, limit) {
            panic!("it ended without printing '{text}':\n{}", self.text());
        }
        self.started.elapsed()
    }

    /// Waits until it has printed `text`; returns `false` if it ends without.
    ///
    /// # Panics
    ///
    /// If neither has happened by the time `limit` since its start.
    pub fn prints(&mut self, text: &str, limit: Duration) -> bool {
        while !self.has_printed(text) {
            if !self.read(limit) {
                return false;
            }
        }
        true
    }

    /// Waits for its end, which must be successful.
    ///
    /// # Panics
    ///
    /// If it has not ended by the time `limit` since its start, or it failed.
    pub fn wait(mut self, limit: Duration) -> Ended {
        while self.read(limit) {}
        let (status, cpu) = self.reap();
        let wall = self.started.elapsed();
        // A guest that resets the machine, and a signal, yield a status of their own.
        let succeeded = matches!(status.code(), Some(0 | STATUS_REBOOT | STATUS_POWER_CUT));
        assert!(succeeded, "it failed, {status}:\n{}", self.text());
        Ended { wall, cpu }
    }

    /// Tells it to end and waits for its end, which must be successful.
    ///
    /// # Panics
    ///
    /// In the cases of [`Process::wait`], with `limit` counted from now.
    pub fn stop(self, limit: Duration) {
        kill(self.pid, Signal::SIGTERM).expect("the process exists until it is reaped");
        let limit = self.started.elapsed() + limit;
        self.wait(limit);
    }

    fn has_printed(&self, text: &str) -> bool {
        let mut windows = self.printed.windows(text.len());
        windows.any(|window| window == text.as_bytes())
    }

    /// Returns its output so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.printed).into_owned()
    }

    /// Waits for output and keeps it; returns `false` at its end.
    fn read(&mut self, limit: Duration) -> bool {
        let left = limit.saturating_sub(self.started.elapsed());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut events = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        match poll(&mut events, timeout) {
            Ok(0) => panic!("it did not end within {limit:?}:\n{}", self.text()),
            Ok(_) => {}
            Err(Errno::EINTR) => return true,
            Err(error) => panic!("cannot wait for output: {error}"),
        }
        let mut chunk = [0; 4096];
        let count = self.output.read(&mut chunk).expect("pipes can be read");
        self.printed.extend_from_slice(&chunk[..count]);
        count > 0
    }

    fn reap(&mut self) -> (ExitStatus, Duration) {
        let mut status = 0;
        // SAFETY: an all-zero rusage is valid, and the call writes to two places that outlive it.
        let (result, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            let result = libc::wait4(self.pid.as_raw(), &mut status, 0, &mut usage);
            (result, usage)
        };
        Errno::result(result).expect("it is a child that nobody else reaps");
        self.reaped = true;
        let cpu = duration(usage.ru_utime) + duration(usage.ru_stime);
        (ExitStatus::from_raw(status), cpu)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            // It may have become a zombie, which takes the signal too.
            let _ = kill(self.pid, Signal::SIGKILL);
            self.reap();
        }
    }
}

fn duration(time: libc::timeval) -> Duration {
    Duration::from_micros(time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64)
}
