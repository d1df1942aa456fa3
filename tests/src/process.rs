//! The monitor as a process of its own.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal, kill, signal};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, geteuid};

use crate::artefacts::{Kernel, monitor, payload};
use crate::linux::{LinuxSlot, linux_slot};
use crate::watchdog::{Watchdog, kill_group};

/// How long a bare-metal guest may take: thousands of times as long as it needs, for busy hosts.
const PAYLOAD_LIMIT: Duration = Duration::from_secs(60);
/// How long a Linux guest may take.
const LINUX_LIMIT: Duration = Duration::from_secs(300);

/// Exit status of `bantam run` if the guest rebooted.
pub const STATUS_REBOOT: i32 = 120;
/// Exit status if keys or a signal cut the guest's power.
pub const STATUS_POWER_CUT: i32 = 123;
/// Exit status if there was an error.
pub const STATUS_ERROR: i32 = 125;

/// A monitor to be started. Its standard input is empty unless a test says otherwise.
pub struct Bantam {
    launcher: Vec<OsString>,
    arguments: Vec<OsString>,
    kernel_words: Vec<String>,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
    limit: Duration,
    slot: Option<LinuxSlot>,
}

impl Bantam {
    /// Runs `bantam` with these arguments.
    pub fn new<S: Into<OsString>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self {
            launcher: Vec::new(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            kernel_words: Vec::new(),
            stdin: Stdio::null(),
            stdout: Stdio::piped(),
            stderr: Stdio::piped(),
            limit: PAYLOAD_LIMIT,
            slot: None,
        }
    }

    /// Runs `bantam run` with a kernel image.
    pub fn run(kernel: impl AsRef<Path>) -> Self {
        Self::new(["run"]).option("--kernel", kernel.as_ref())
    }

    /// Runs `bantam run` with one of the bare-metal guests.
    pub fn payload(name: &str) -> Self {
        Self::run(payload(name))
    }

    /// Runs `bantam api` on a socket.
    pub fn api(socket: &Path) -> Self {
        Self::new(["api"]).option("--api-sock", socket)
    }

    /// Runs `bantam run` with a Linux kernel. Waits until there is a free [`LinuxSlot`].
    pub fn linux(kernel: Kernel) -> Self {
        let mut bantam = Self::run(kernel.vmlinux()).limit(LINUX_LIMIT);
        bantam.slot = Some(linux_slot());
        bantam
    }

    /// Adds an argument.
    #[must_use]
    pub fn argument(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().into());
        self
    }

    /// Adds an option and its value.
    #[must_use]
    pub fn option(self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.argument(name).argument(value)
    }

    /// Adds a `--disk`: a path, and its options, such as `,ro`.
    #[must_use]
    pub fn disk(self, path: &Path, suffix: &str) -> Self {
        let mut disk = path.as_os_str().to_owned();
        disk.push(suffix);
        self.option("--disk", disk)
    }

    /// Adds words to the kernel command line.
    #[must_use]
    pub fn append(mut self, words: impl Into<String>) -> Self {
        self.kernel_words.push(words.into());
        self
    }

    /// Lets `launcher`, a program and its first arguments, start the monitor: the monitor's path
    /// and arguments are the launcher's last arguments.
    #[must_use]
    pub fn launcher<S: Into<OsString>>(mut self, launcher: impl IntoIterator<Item = S>) -> Self {
        self.launcher = launcher.into_iter().map(Into::into).collect();
        self
    }

    /// Connects standard input.
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdin = stdin.into();
        self
    }

    /// Connects standard output, which is then not captured.
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdout = stdout.into();
        self
    }

    /// Connects standard error, which is then not captured.
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stderr = stderr.into();
        self
    }

    /// Sets how long the process may live.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Starts the process.
    ///
    /// # Panics
    ///
    /// If it cannot be started.
    pub fn start(self) -> Running {
        let runs = self
            .arguments
            .first()
            .is_some_and(|command| command == "run" || command == "restore");
        let receives = self.arguments.iter().any(|word| word == "--receive");
        let error_status = if runs || receives { STATUS_ERROR } else { 1 };
        let mut line = self.launcher;
        line.push(monitor().into());
        line.extend(self.arguments);
        if !self.kernel_words.is_empty() {
            line.push("--append".into());
            line.push(self.kernel_words.join(" ").into());
        }
        let (program, arguments) = line.split_first().expect("it has the monitor");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(self.stdin)
            .stdout(self.stdout)
            .stderr(self.stderr)
            .process_group(0);
        // SAFETY: between fork and exec the closure only calls sigaction, which is async-signal-safe.
        unsafe { command.pre_exec(end_by_interrupt) };
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {}: {error}", program.display()));
        let pid = Pid::from_raw(child.id().try_into().expect("process ids are positive"));
        Running {
            stdout: Capture::start(child.stdout.take()),
            stderr: Capture::start(child.stderr.take()),
            child,
            pid,
            error_status,
            limit: self.limit,
            watchdog: Some(Watchdog::start(pid, self.limit)),
            started: Instant::now(),
            _slot: self.slot,
        }
    }

    /// Starts the process and waits for its end.
    ///
    /// # Panics
    ///
    /// In the cases of [`Bantam::start`] and [`Running::wait`].
    pub fn finish(self) -> Ended {
        self.start().wait()
    }
}

/// Makes an interrupt signal end this process. A shell starts background jobs, tests included, with
/// that signal ignored, and processes inherit that.
fn end_by_interrupt() -> std::io::Result<()> {
    // SAFETY: the default action runs no code of this process.
    unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }?;
    Ok(())
}

/// A running monitor. It is killed with its process group when its time is over or when this is
/// dropped.
pub struct Running {
    child: Child,
    pid: Pid,
    stdout: Capture,
    stderr: Capture,
    error_status: i32,
    limit: Duration,
    watchdog: Option<Watchdog>,
    started: Instant,
    _slot: Option<LinuxSlot>,
}

impl Running {
    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends a signal to the process.
    ///
    /// # Panics
    ///
    /// If it has been reaped.
    pub fn signal(&self, signal: Signal) {
        kill(self.pid, signal).expect("the process is not reaped before it is waited for");
    }

    /// Writes to the process's standard input, which must be piped.
    ///
    /// # Panics
    ///
    /// If it is not, or the process does not read any more.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("standard input is piped");
        stdin.write_all(bytes).expect("the process reads its input");
    }

    /// Waits until standard output contains `text`, and returns all output so far.
    ///
    /// # Panics
    ///
    /// If the output ends without it.
    pub fn wait_for_output(&self, text: &str) -> String {
        self.wait_for(&self.stdout, text)
    }

    /// Waits until standard error contains `text`, and returns all of it so far.
    ///
    /// # Panics
    ///
    /// If it ends without it.
    pub fn wait_for_error(&self, text: &str) -> String {
        self.wait_for(&self.stderr, text)
    }

    /// Returns what standard error has so far.
    pub fn error_text(&self) -> String {
        self.stderr.text()
    }

    fn wait_for(&self, capture: &Capture, text: &str) -> String {
        capture.wait_for(text).unwrap_or_else(|| {
            panic!(
                "it ended (or was killed after {:?}) before it printed '{text}'\n\
                 --- standard output\n{}\n--- standard error\n{}",
                self.limit,
                self.stdout.text(),
                self.stderr.text()
            )
        })
    }

    /// Closes standard input and waits for the process to end.
    ///
    /// # Panics
    ///
    /// If its time was over before.
    pub fn wait(mut self) -> Ended {
        drop(self.child.stdin.take());
        wait_unreaped(self.pid);
        let duration = self.started.elapsed();
        let (status, killed) = self.reap();
        let ended = Ended {
            status,
            stdout: self.stdout.finish(),
            stderr: String::from_utf8_lossy(&self.stderr.finish()).into_owned(),
            duration,
            error_status: self.error_status,
        };
        if killed {
            panic!("it did not end within {:?}\n{ended}", self.limit);
        }
        ended
    }

    /// Kills the rest of the process group, and returns whether the watchdog was faster.
    fn reap(&mut self) -> (ExitStatus, bool) {
        let killed = self.watchdog.take().is_some_and(Watchdog::stop);
        // The group exists until its leader is reaped.
        kill_group(self.pid);
        (self.child.wait().expect("it is a child"), killed)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.watchdog.is_some() {
            self.reap();
        }
    }
}

/// Waits until a child has ended, but leaves it there as a zombie.
fn wait_unreaped(pid: Pid) {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::Pid(pid), flags) {
            Err(Errno::EINTR) => {}
            result => {
                result.expect("it is a child");
                return;
            }
        }
    }
}

/// A thread that reads a stream to its end.
struct Capture {
    shared: Arc<(Mutex<Captured>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Captured {
    bytes: Vec<u8>,
    ended: bool,
}

impl Capture {
    fn start<R: Read + Send + 'static>(stream: Option<R>) -> Capture {
        let shared = Arc::<(Mutex<Captured>, Condvar)>::default();
        let thread = thread::spawn({
            let shared = shared.clone();
            move || read_to_end(stream, &shared)
        });
        Capture {
            shared,
            thread: Some(thread),
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.shared.0).bytes).into_owned()
    }

    fn wait_for(&self, text: &str) -> Option<String> {
        let (captured, grown) = &*self.shared;
        let contains = |captured: &Captured| find(&captured.bytes, text.as_bytes());
        let captured = grown
            .wait_while(lock(captured), |captured| {
                !captured.ended && !contains(captured)
            })
            .unwrap_or_else(PoisonError::into_inner);
        contains(&captured).then(|| String::from_utf8_lossy(&captured.bytes).into_owned())
    }

    fn finish(&mut self) -> Vec<u8> {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("reading does not panic");
        }
        std::mem::take(&mut lock(&self.shared.0).bytes)
    }
}

fn read_to_end(stream: Option<impl Read>, (captured, grown): &(Mutex<Captured>, Condvar)) {
    if let Some(mut stream) = stream {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = stream.read(&mut chunk) {
            lock(captured).bytes.extend_from_slice(&chunk[..count]);
            grown.notify_all();
        }
    }
    lock(captured).ended = true;
    grown.notify_all();
}

fn lock(captured: &Mutex<Captured>) -> MutexGuard<'_, Captured> {
    captured.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// The result of a monitor that has ended. It displays as all its output, for the messages of
/// failed tests.
pub struct Ended {
    /// How the process ended.
    pub status: ExitStatus,
    /// What it wrote to standard output: the guest's serial port, unless that leads elsewhere.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    /// How long it ran.
    pub duration: Duration,
    /// Its exit status if there was an error.
    error_status: i32,
}

impl Ended {
    /// Returns standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Checks that there was no error and that the guest has not failed: it has powered off or
    /// rebooted, or its power was cut because the test asked for that. [`Ended::has_status`] checks
    /// which of these it was.
    ///
    /// # Panics
    ///
    /// If that is not so.
    #[track_caller]
    pub fn succeeded(&self) -> &Self {
        let runs = self.error_status == STATUS_ERROR;
        let succeeded = match self.status.code() {
            Some(STATUS_REBOOT | STATUS_POWER_CUT) => runs,
            status => status == Some(0),
        };
        assert!(succeeded, "{self}");
        self
    }

    /// Checks the exit status.
    ///
    /// # Panics
    ///
    /// If it is another.
    #[track_caller]
    pub fn has_status(&self, status: i32) -> &Self {
        assert_eq!(self.status.code(), Some(status), "{self}");
        self
    }

    /// Checks that a bare-metal guest has found no fault: its verdict is `PASS`, and it has
    /// [succeeded](Ended::succeeded).
    ///
    /// # Panics
    ///
    /// If that is not so.
    #[track_caller]
    pub fn passed(&self) -> &Self {
        let text = self.text();
        let verdict = text.lines().rev().find(|line| !line.is_empty());
        assert_eq!(verdict, Some("PASS"), "{self}");
        self.succeeded()
    }

    /// Checks that standard output contains `text`.
    ///
    /// # Panics
    ///
    /// If it does not.
    #[track_caller]
    pub fn printed(&self, text: &str) -> &Self {
        assert!(self.text().contains(text), "no '{text}' in\n{self}");
        self
    }

    /// Checks that the exit status is that of an error with a reason in the last line of standard error, which is
    /// returned.
    ///
    /// # Panics
    ///
    /// If that is not so, or the monitor panicked.
    #[track_caller]
    pub fn failed(&self) -> &str {
        assert_eq!(self.status.code(), Some(self.error_status), "{self}");
        assert!(!self.stderr.contains("panicked"), "{self}");
        let reason = self.stderr.lines().next_back().unwrap_or_default();
        reason
            .strip_prefix("error: ")
            .unwrap_or_else(|| panic!("no reason on standard error\n{self}"))
    }

    /// Checks that there was an error and that only its reason was printed; returns the reason.
    ///
    /// # Panics
    ///
    /// If that is not so.
    #[track_caller]
    pub fn failed_with_one_line(&self) -> &str {
        let reason = self.failed();
        assert_eq!(self.stderr.lines().count(), 1, "{self}");
        assert!(self.stdout.is_empty(), "{self}");
        reason
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} after {:?}\n--- standard output\n{}\n--- standard error\n{}",
            self.status,
            self.duration,
            self.text(),
            self.stderr
        )
    }
}

/// A [`Bantam::launcher`] that removes all capabilities from the monitor, so that file permissions
/// apply and network interfaces are out of reach even for root. It is empty for other users, who
/// have no capabilities.
pub fn unprivileged() -> Vec<&'static str> {
    if geteuid().is_root() {
        vec!["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"]
    } else {
        Vec::new()
    }
}

/// A [`Bantam::launcher`] that runs the monitor without capabilities, and with a `/dev` that
/// `setup`, a shell command, has filled. That takes `CAP_SYS_ADMIN` or user namespaces.
pub fn with_devices(setup: &str) -> Vec<String> {
    let mut launcher = with_mounts(&format!("mount -t tmpfs tmpfs /dev && {setup}"));
    let unprivileged = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"];
    launcher.extend(unprivileged.map(str::to_owned));
    launcher
}

/// A [`Bantam::launcher`] that runs the monitor after `setup`, a shell command whose mounts are
/// private. That takes `CAP_SYS_ADMIN` or user namespaces.
pub fn with_mounts(setup: &str) -> Vec<String> {
    let script = format!("{setup} && exec \"$@\"");
    let namespaces: &[&str] = if geteuid().is_root() {
        &["--mount"]
    } else {
        &["--mount", "--user", "--map-root-user"]
    };
    ["unshare"]
        .iter()
        .chain(namespaces)
        .chain(&["sh", "-c", &script, "sh"])
        .map(|word| (*word).to_owned())
        .collect()
}

/// A [`Bantam::launcher`] that lets the monitor write only to the first `size` bytes of files;
/// writes beyond are errors (`RLIMIT_FSIZE`).
pub fn with_file_size_limit(size: u64) -> Vec<String> {
    let script = format!("exec prlimit --fsize={size} -- \"$@\"");
    ["sh", "-c", &script, "sh"].map(str::to_owned).into()
}
