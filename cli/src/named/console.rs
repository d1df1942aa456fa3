//! `bantam console`: the terminal at the console of a named machine.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bantam_manager::Machine;
use bantam_vmm::config::{DeviceName, SerialConfig};
use bantam_vmm::{Command, DeviceCommand};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

use super::args::ConsoleArgs;
use super::detach::{DetachFilter, HELP, Keys, Wish};
use super::machine;
use crate::message::say;
use crate::signals::{Request, Signals, sleep_until_continued};
use crate::terminal::{self, RawTerminal};

/// How long a machine may take until its console can be connected to: when it is started, and when its guest reboots.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// How often it is tried.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// Most bytes of keys that wait for the guest; more are not read.
const MAX_KEYS: usize = 64 << 10;
/// How much is read at once.
const CHUNK_SIZE: usize = 16 << 10;

pub fn console(args: &ConsoleArgs) -> anyhow::Result<()> {
    attach(&machine(&args.name)?)
}

/// Connects standard input and output to the console of a machine until the user detaches, or the machine ends. Says when it
/// does so, and which keys detach.
pub fn attach(machine: &Machine) -> anyhow::Result<()> {
    let name = machine.name();
    let told = |is_terminal| {
        if is_terminal {
            say(format_args!(
                "connected to '{name}'; Ctrl-] or Ctrl-A d detaches"
            ));
        }
    };
    match connect_until_end(machine, Keys::Own, told)? {
        End::Detached => say(format_args!("detached from '{name}'")),
        End::Disconnected => say(format_args!("machine '{name}' has ended")),
    }
    Ok(())
}

/// Does the same without a word, and with one key that detaches.
pub fn attach_silently(machine: &Machine, escape: u8) -> anyhow::Result<()> {
    connect_until_end(machine, Keys::Escape(escape), |_| ()).map(drop)
}

/// Connects standard input and output to the console of a machine, and returns how that has ended for good. `begin` is told
/// whether standard input is a terminal.
fn connect_until_end(
    machine: &Machine,
    keys: Keys,
    begin: impl FnOnce(bool),
) -> anyhow::Result<End> {
    let name = machine.name();
    let Some(mut stream) = connect(machine)? else {
        bail!("machine '{name}' is not running; start it first (bantam start {name})");
    };
    let signals = Signals::block().context("cannot divert signals")?;
    let terminal = RawTerminal::enter().context("cannot set up the terminal on standard input")?;
    begin(terminal.is_some());
    let mut session = Session {
        machine,
        signals,
        terminal,
        filter: DetachFilter::new(keys),
        keys: VecDeque::new(),
        is_open: true,
        has_size: has_size(machine),
    };
    session.tell_size();
    loop {
        if let End::Detached = session.run(&stream)? {
            return Ok(End::Detached);
        }
        // The guest has rebooted, or the machine has ended.
        match connect(machine)? {
            Some(next) => stream = next,
            None => return Ok(End::Disconnected),
        }
    }
}

/// Connects to the console, and returns `None` if the machine does not run.
fn connect(machine: &Machine) -> anyhow::Result<Option<UnixStream>> {
    let begin = Instant::now();
    let path = machine.console_socket();
    loop {
        let error = match UnixStream::connect(&path) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) => error,
        };
        if !machine.is_active()? {
            return Ok(None);
        }
        let is_early = matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::ConnectionRefused
        );
        if is_early && begin.elapsed() < CONNECT_TIME {
            thread::sleep(CONNECT_INTERVAL);
            continue;
        }
        let config = machine.config();
        if is_early && config.is_ok_and(|config| !config.uses_stdio()) {
            bail!(
                "machine '{}' has no console here: nothing in its machine file leads to stdio",
                machine.name()
            );
        }
        return Err(error).with_context(|| format!("cannot connect to '{}'", path.display()));
    }
}

/// Whether the guest can be told the size of the terminal, as the console here is a virtio console.
fn has_size(machine: &Machine) -> bool {
    let config = machine.config();
    config.is_ok_and(|config| config.console == SerialConfig::Stdio)
}

/// How a connection ends.
enum End {
    /// The user has detached.
    Detached,
    /// The machine has closed it.
    Disconnected,
}

struct Session<'a> {
    machine: &'a Machine,
    signals: Signals,
    terminal: Option<RawTerminal>,
    filter: DetachFilter,
    /// Keys on their way to the guest.
    keys: VecDeque<u8>,
    /// Whether standard input has not ended yet.
    is_open: bool,
    has_size: bool,
}

impl Session<'_> {
    /// Copies both ways until the connection ends.
    fn run(&mut self, mut stream: &UnixStream) -> anyhow::Result<End> {
        stream
            .set_nonblocking(true)
            .context("cannot use the socket of the console")?;
        let mut chunk = vec![0; CHUNK_SIZE];
        loop {
            let ready = self.wait(stream)?;
            if ready.signal && self.take_signal()? {
                return Ok(End::Detached);
            }
            if ready.output {
                match stream.read(&mut chunk) {
                    Ok(0) => return Ok(End::Disconnected),
                    Ok(count) => write_all(chunk.get(..count).unwrap_or_default())?,
                    Err(error) if is_no_error(&error) => {}
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                        return Ok(End::Disconnected);
                    }
                    Err(error) => return Err(error).context("cannot read from the console"),
                }
            }
            if ready.keys && self.take_keys(&mut chunk)? {
                return Ok(End::Detached);
            }
            while !self.keys.is_empty() {
                match stream.write(self.keys.as_slices().0) {
                    Ok(count) => drop(self.keys.drain(..count)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // What it has sent before may still be there to be read.
                    Err(_) => self.keys.clear(),
                }
            }
        }
    }

    fn wait(&self, stream: &UnixStream) -> anyhow::Result<Ready> {
        let stdin = io::stdin();
        let wants_keys = self.is_open
            && self.keys.len() < MAX_KEYS
            && self
                .terminal
                .as_ref()
                .is_none_or(RawTerminal::in_foreground);
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.keys.is_empty());
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(stream.as_fd(), flags),
        ];
        if wants_keys {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(io::Error::from(errno)).context("cannot wait for events"),
        }
        let is_ready = |index: usize| {
            let found = fds.get(index).and_then(PollFd::any);
            found.unwrap_or(false)
        };
        Ok(Ready {
            signal: is_ready(0),
            output: is_ready(1),
            keys: is_ready(2),
        })
    }

    /// Takes a signal, and returns whether it asks for the end.
    fn take_signal(&mut self) -> anyhow::Result<bool> {
        match self.signals.next().context("cannot read signals")? {
            Some(Request::Stop(_)) => return Ok(true),
            Some(Request::Suspend) => {
                if let Some(terminal) = &self.terminal {
                    terminal.suspend();
                }
                sleep_until_continued().context("cannot suspend")?;
            }
            Some(Request::Continue) => {
                if let Some(terminal) = &self.terminal {
                    terminal
                        .resume()
                        .context("cannot set up the terminal again")?;
                }
                self.tell_size();
            }
            Some(Request::Resize) => self.tell_size(),
            None => {}
        }
        Ok(false)
    }

    /// Takes keys, and returns whether the user wants to detach.
    fn take_keys(&mut self, chunk: &mut [u8]) -> anyhow::Result<bool> {
        let typed = match read(io::stdin(), chunk) {
            Ok(0) => {
                // A terminal that is gone is a user that is gone.
                self.is_open = false;
                return Ok(self.terminal.is_some());
            }
            Ok(count) => chunk.get(..count).unwrap_or_default(),
            Err(Errno::EINTR | Errno::EAGAIN) => return Ok(false),
            Err(errno) => {
                return Err(io::Error::from(errno)).context("cannot read standard input");
            }
        };
        if self.terminal.is_none() {
            self.keys.extend(typed);
            return Ok(false);
        }
        let mut keys = Vec::new();
        let wish = self.filter.take(typed, &mut keys);
        self.keys.extend(keys);
        if wish == Some(Wish::Help) {
            say(format_args!("{HELP}"));
        }
        Ok(wish == Some(Wish::Detach))
    }

    /// Tells the guest the size of the terminal, if it has a console that has a size.
    fn tell_size(&self) {
        if let Some((columns, rows)) = terminal::size().filter(|_| self.has_size) {
            let command = Command::Device {
                name: DeviceName::console(),
                command: DeviceCommand::ResizeConsole { columns, rows },
            };
            // Without it the guest has the size that it had before.
            let _ = self.machine.execute("resize the console of", command);
        }
    }
}

/// What there is to do.
struct Ready {
    signal: bool,
    output: bool,
    keys: bool,
}

fn is_no_error(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn write_all(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(bytes).and_then(|()| stdout.flush());
    // The reason must be the error itself, so that a reader that closes early is recognized.
    Ok(written?)
}
