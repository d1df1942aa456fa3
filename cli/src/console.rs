//! The guest's serial port on standard input and output.
//!
//! Two pipes connect them, so that neither a slow reader of the output nor a guest that reads no
//! input holds up the machine or the main thread.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use bantam_jail::Role;
use bantam_vmm::Console;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{pipe2, read, write};

use crate::confine;
use crate::escape::{CTRL_A, EscapeFilter, HELP, Key};
use crate::message::say;
use crate::signals::{Request, Signals};
use crate::terminal::RawTerminal;

/// How long the end waits for a reader that does not take the last output, once the user wants to
/// stop.
pub const OUTPUT_LIMIT_AFTER_STOP: Duration = Duration::from_secs(1);

/// Most bytes of keys that are kept until the guest takes them, beside the content of the pipe. Up
/// to this limit the terminal is read whether or not the guest reads, so that the user can quit;
/// beyond it the terminal waits too.
const PENDING_KEYS_CAPACITY: usize = 1 << 20;
/// Most bytes copied at a time.
const CHUNK_SIZE: usize = 4096;

/// Standard input and output as the host's end of a serial port.
#[derive(Debug)]
pub struct StdioConsole {
    /// The machine's ends of the pipes. They outlive a machine, so that the next one goes on where
    /// the last ended.
    machine_input: OwnedFd,
    machine_output: OwnedFd,
    output: Output,
    /// Keys and piped input on their way to the guest.
    pub input: Input,
}

impl StdioConsole {
    /// Starts to copy output. The main loop decides when input is copied.
    pub fn new() -> anyhow::Result<Self> {
        let pipes = || -> io::Result<_> {
            let (machine_input, input) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
            let (output, machine_output) = pipe2(OFlag::O_CLOEXEC)?;
            fcntl(&machine_output, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok((machine_input, input, output, machine_output))
        };
        let (machine_input, input, output, machine_output) =
            pipes().context("cannot create the pipes of the serial console")?;
        Ok(Self {
            machine_input,
            machine_output,
            output: Output::start(output)
                .context("cannot start the thread of the serial console")?,
            input: Input::new(input),
        })
    }

    /// Returns the ends of the pipes for one machine.
    pub fn for_machine(&self) -> io::Result<Console> {
        Ok(Console {
            input: Some(self.machine_input.try_clone()?),
            output: Some(self.machine_output.try_clone()?),
        })
    }

    /// Restores the terminal and waits until all output is copied, at most for `limit` or until a
    /// signal asks for the end.
    pub fn finish(self, signals: &Signals, limit: Option<Duration>) {
        drop(self.input);
        drop(self.machine_output);
        self.output.wait_until_copied(signals, limit);
    }
}

/// A thread that copies output from a pipe to standard output.
#[derive(Debug)]
struct Output {
    /// Hangs up when the thread has copied everything.
    copied: OwnedFd,
}

impl Output {
    fn start(from: OwnedFd) -> io::Result<Self> {
        let (copied, copying) = pipe2(OFlag::O_CLOEXEC)?;
        thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                match confine::enter(Role::Writer) {
                    Ok(()) => copy_output(&from, &io::stdout()),
                    Err(error) => tracing::error!("the serial console has no output: {error}"),
                }
                drop(copying);
            })?;
        Ok(Self { copied })
    }

    fn wait_until_copied(&self, signals: &Signals, limit: Option<Duration>) {
        let deadline = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            let mut fds = [
                PollFd::new(self.copied.as_fd(), PollFlags::POLLIN),
                PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, timeout) {
                Ok(0) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    let error = io::Error::from(errno);
                    tracing::warn!(
                        "serial console: cannot wait for the rest of the output: {error}"
                    );
                    return;
                }
            }
            let [copied, _] = fds.map(|fd| fd.any().unwrap_or(false));
            // Signals that do not ask for the end, such as for a new size of the terminal, are
            // ignored.
            if copied || matches!(signals.next(), Ok(Some(Request::Stop(_))) | Err(_)) {
                return;
            }
        }
    }
}

/// Copies until the pipe's other end is closed. If nothing reads the output any more, it is
/// dropped, and the guest goes on.
fn copy_output(from: &OwnedFd, to: &impl AsFd) {
    let mut chunk = [0; CHUNK_SIZE];
    let mut taken = true;
    loop {
        let bytes = match read(from, &mut chunk) {
            Ok(0) => return,
            Ok(count) => chunk.get(..count).unwrap_or_default(),
            Err(Errno::EINTR) => continue,
            Err(errno) => {
                let error = io::Error::from(errno);
                return tracing::error!("serial console: cannot read output: {error}");
            }
        };
        if taken && let Err(error) = write_all(to.as_fd(), bytes) {
            taken = false;
            tracing::warn!(
                "serial console: cannot write to standard output: {error}: output is dropped"
            );
        }
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match write(to, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::EINTR) => {}
            // A process that shares standard output with this one may have made it non-blocking.
            Err(Errno::EAGAIN) => {
                poll(
                    &mut [PollFd::new(to, PollFlags::POLLOUT)],
                    PollTimeout::NONE,
                )?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Standard input on its way to the guest.
#[derive(Debug)]
pub struct Input {
    stdin: io::Stdin,
    to_guest: OwnedFd,
    terminal: Option<RawTerminal>,
    filter: EscapeFilter,
    pending: VecDeque<u8>,
    /// Whether standard input has not ended yet.
    open: bool,
    /// Whether the user has been told that no keys are read, since the guest last had read all of
    /// them.
    has_told: bool,
}

impl Input {
    fn new(to_guest: OwnedFd) -> Self {
        Self {
            stdin: io::stdin(),
            to_guest,
            terminal: None,
            filter: EscapeFilter::default(),
            pending: VecDeque::new(),
            open: true,
            has_told: false,
        }
    }

    /// Makes the terminal raw, if standard input is one.
    pub fn enter_terminal(&mut self) -> anyhow::Result<()> {
        if self.terminal.is_none() {
            self.terminal =
                RawTerminal::enter().context("cannot set up the terminal on standard input")?;
        }
        Ok(())
    }

    /// Restores the terminal before the process is stopped.
    pub fn suspend(&self) {
        if let Some(terminal) = &self.terminal {
            terminal.suspend();
        }
    }

    /// Makes the terminal raw again when the process goes on.
    pub fn resume(&self) -> anyhow::Result<()> {
        match &self.terminal {
            Some(terminal) => terminal
                .resume()
                .context("cannot set up the terminal again"),
            None => Ok(()),
        }
    }

    /// Returns standard input, if there is room for more.
    pub fn source(&self) -> Option<BorrowedFd<'_>> {
        let wanted = match &self.terminal {
            Some(terminal) => self.has_room_for_keys() && terminal.in_foreground(),
            None => self.pending.is_empty(),
        };
        (self.open && wanted).then(|| self.stdin.as_fd())
    }

    /// Returns the pipe to the guest, if there is input for it.
    pub fn destination(&self) -> Option<BorrowedFd<'_>> {
        (!self.pending.is_empty()).then(|| self.to_guest.as_fd())
    }

    /// Reads the available standard input, and passes it on as far as the guest has room. Returns
    /// whether the user wants to quit.
    pub fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK_SIZE];
        let bytes = match read(&self.stdin, &mut chunk) {
            Ok(0) => {
                tracing::info!("serial console: standard input has ended");
                self.open = false;
                return false;
            }
            Ok(count) => chunk.get(..count).unwrap_or_default(),
            Err(Errno::EINTR | Errno::EAGAIN) => return false,
            Err(errno) => {
                let error = io::Error::from(errno);
                tracing::warn!("serial console: cannot read standard input: {error}");
                self.open = false;
                return false;
            }
        };
        let quit = self.accept(bytes);
        self.write();
        quit
    }

    fn accept(&mut self, bytes: &[u8]) -> bool {
        if self.terminal.is_none() {
            self.pending.extend(bytes);
            return false;
        }
        self.type_keys(bytes)
    }

    /// Takes keys, and returns whether the user wants to quit.
    fn type_keys(&mut self, keys: &[u8]) -> bool {
        for &key in keys {
            match self.filter.next(key) {
                Key::Prefix => {}
                Key::Guest(key) => self.pending.push_back(key),
                Key::NoCommand(key) => self.pending.extend([CTRL_A, key]),
                Key::Help => say(format_args!("{HELP}")),
                Key::Quit => return true,
            }
        }
        if !self.has_room_for_keys() && !std::mem::replace(&mut self.has_told, true) {
            say(format_args!(
                "the guest has yet to read {} KiB of input: no more keys are read until it does, not \
                 even Ctrl-A x",
                PENDING_KEYS_CAPACITY >> 10
            ));
        }
        false
    }

    fn has_room_for_keys(&self) -> bool {
        // Each byte of one read may need a prefix.
        self.pending.len() + 2 * CHUNK_SIZE <= PENDING_KEYS_CAPACITY
    }

    /// Passes on input as far as the guest has room.
    pub fn write(&mut self) {
        while !self.pending.is_empty() {
            match write(&self.to_guest, self.pending.as_slices().0) {
                Ok(count) => drop(self.pending.drain(..count)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(errno) => {
                    let error = io::Error::from(errno);
                    tracing::warn!("serial console: cannot pass input on: {error}");
                    self.pending.clear();
                    self.open = false;
                }
            }
        }
        // A paste may have taken much memory.
        self.pending.shrink_to(CHUNK_SIZE);
        self.has_told = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_is_copied_to_its_end() {
        let (from, source) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (sink, to) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let written: Vec<u8> = (0..=255).cycle().take(3 * CHUNK_SIZE + 7).collect();
        write_all(source.as_fd(), &written).unwrap();
        drop(source);
        copy_output(&from, &to);
        drop(to);
        let mut copied = Vec::new();
        io::Read::read_to_end(&mut std::fs::File::from(sink), &mut copied).unwrap();
        assert_eq!(copied, written);
    }

    #[test]
    fn output_that_nobody_takes_is_dropped_and_the_guest_goes_on() {
        let (from, source) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (sink, to) = pipe2(OFlag::O_CLOEXEC).unwrap();
        drop(sink);
        let copier = thread::spawn(move || copy_output(&from, &to));
        // More than the pipe holds: it would stall if nothing read it.
        write_all(source.as_fd(), &vec![0; 1 << 20]).unwrap();
        drop(source);
        copier.join().unwrap();
    }

    fn input() -> (Input, OwnedFd) {
        let (from, to_guest) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        (Input::new(to_guest), from)
    }

    #[test]
    fn piped_input_has_no_commands() {
        let (mut input, from) = input();
        assert!(!input.accept(b"\x01x\x01\x01"));
        input.write();
        let mut bytes = [0; 8];
        let count = read(&from, &mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"\x01x\x01\x01");
        assert!(input.destination().is_none());
    }

    #[test]
    fn piped_input_waits_for_the_guest() {
        let (mut input, from) = input();
        while input.destination().is_none() {
            input.accept(&[0; CHUNK_SIZE]);
            input.write();
        }
        assert!(input.source().is_none());
        read(&from, &mut [0; 2 * CHUNK_SIZE]).unwrap();
        input.write();
        assert!(input.source().is_some());
    }

    #[test]
    fn keys_that_a_guest_does_not_take_are_bounded_and_none_is_lost() {
        let (mut input, from) = input();
        let chunk: Vec<u8> = (b'a'..=b'z').cycle().take(CHUNK_SIZE).collect();
        let mut typed = Vec::new();
        while input.has_room_for_keys() {
            assert!(!input.type_keys(&chunk));
            typed.extend_from_slice(&chunk);
            assert!(input.pending.len() <= PENDING_KEYS_CAPACITY);
        }
        assert!(typed.len() >= PENDING_KEYS_CAPACITY - 3 * CHUNK_SIZE);
        // Ctrl-A works before that.
        input.write();
        assert!(input.has_room_for_keys());
        assert!(input.type_keys(b"\x01x"));

        let mut taken = Vec::new();
        let mut chunk = [0; CHUNK_SIZE];
        while taken.len() < typed.len() {
            input.write();
            let count = read(&from, &mut chunk).unwrap();
            taken.extend_from_slice(&chunk[..count]);
        }
        assert!(taken == typed);
        input.write();
        assert!(input.pending.capacity() <= 2 * CHUNK_SIZE);
    }
}
