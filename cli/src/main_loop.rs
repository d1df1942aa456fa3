//! The loop of the main thread while a machine runs: it passes on keys and signals.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bantam_vmm::config::DeviceName;
use bantam_vmm::{Controller, DeviceCommand, ExitReason, ShutDown, State};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::pipe2;

use crate::console::{Input, StdioConsole};
use crate::message::say;
use crate::signals::{Request, Signals, sleep_until_continued};
use crate::{own_code, stopping, terminal};

/// How long a machine may take to end once its user has asked for it. Most take a few milliseconds.
const END_TIME: Duration = Duration::from_secs(1);
/// How long a machine takes to end if nothing holds it up.
const USUAL_END_TIME: Duration = Duration::from_millis(50);
/// How often a machine that takes longer is looked at.
const END_INTERVAL: Duration = Duration::from_millis(20);
/// After what time the user is told what a machine that ends by itself waits for.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many milliseconds a start may take to end when a signal arrives, if the guest runs already.
const START_END_TIME_MS: u16 = 300;

/// Who ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    Guest,
    User,
}

/// What ends the wait for a machine that has the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Awaited {
    /// It has been started.
    Started,
    /// The machine has ended, or cannot be started any more.
    Ended,
    /// A signal asks for the end. A machine without the console may run.
    Stop(Signal),
}

/// Waits until a machine that has the console is started, which makes `started` readable.
pub fn await_start(
    controller: &Controller,
    signals: &Signals,
    started: BorrowedFd<'_>,
) -> anyhow::Result<Awaited> {
    loop {
        let mut fds = [signals.as_fd(), controller.exit_event(), started]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(io::Error::from(errno)).context("cannot wait for events"),
        }
        let [signal, exit, started] = fds.map(|fd| fd.any().unwrap_or(false));
        // A signal that has come after the start is for the machine, so the caller reads it.
        if started {
            return Ok(Awaited::Started);
        }
        if signal {
            match signals.next().context("cannot read signals")? {
                Some(Request::Stop(signal)) => return Ok(Awaited::Stop(signal)),
                Some(Request::Suspend) => sleep_until_continued().context("cannot suspend")?,
                Some(Request::Continue | Request::Resize) | None => {}
            }
            continue;
        }
        if exit {
            return Ok(Awaited::Ended);
        }
    }
}

/// Passes on input and signals until the machine has ended or its power has to be cut. If the user
/// asks for the end, the guest is first asked to shut itself down within `timeout`; a second
/// request, or SIGQUIT, cuts the power. `resizes` says whether the guest is told the size of the
/// terminal, and `stop` is a signal that has already asked for the end.
pub fn attend(
    controller: &Controller,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    timeout: Duration,
    resizes: bool,
    mut stop: Option<Signal>,
) -> anyhow::Result<EndedBy> {
    own_code::release_pages();
    if resizes {
        resize(controller);
    }
    let mut ended_by = EndedBy::Guest;
    loop {
        let exit_event = Some(controller.exit_event());
        let turn = match stop.take() {
            Some(signal) => Turn::Stop(signal),
            None => turn(signals, [exit_event, None], console.as_deref_mut(), None)?,
        };
        match turn {
            Turn::Stop(signal) => {
                tracing::info!("stopping the machine: {signal}");
                let at_once = ended_by == EndedBy::User || signal == Signal::SIGQUIT;
                ended_by = EndedBy::User;
                if at_once || !ask_to_shut_down(controller, timeout) {
                    stopping::ask();
                    return Ok(ended_by);
                }
            }
            Turn::Quit => {
                stopping::ask();
                return Ok(EndedBy::User);
            }
            Turn::Exit => {
                if ended_by == EndedBy::User {
                    stopping::ask();
                }
                return Ok(ended_by);
            }
            Turn::Resize if resizes => resize(controller),
            Turn::Resize | Turn::Other => {}
        }
    }
}

/// Asks the guest to shut itself down, and prints that. Returns `false` if its power is cut
/// instead.
fn ask_to_shut_down(controller: &Controller, timeout: Duration) -> bool {
    let is_paused = matches!(controller.state(), State::Pausing | State::Paused);
    let how = match controller.shut_down(Some(timeout)) {
        ShutDown::PowerButton => "the power button",
        ShutDown::CtrlAltDel => "Ctrl-Alt-Del",
        ShutDown::PowerCut | ShutDown::Unheard => {
            if is_paused && !timeout.is_zero() {
                say(format_args!(
                    "the machine is paused, so its guest cannot shut down: its power is cut"
                ));
            }
            return false;
        }
    };
    say(format_args!(
        "asking the guest by {how} to shut down; its power is cut in {} s, or at another signal",
        timeout.as_secs_f64()
    ));
    true
}

/// What has become of the start of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The machine runs, and this signal has asked for its end already.
    Done(Option<Signal>),
    /// The user has ended it.
    Abandoned,
}

/// Builds and starts a machine by `start`, on another thread, so that a signal ends the wait even
/// if the host does not answer, and so does a client of the control socket, which makes `end_event`
/// readable.
pub fn await_build(
    controller: &Controller,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    end_event: Option<BorrowedFd<'_>>,
    start: impl FnOnce() -> Result<(), bantam_vmm::Error> + Send + 'static,
) -> anyhow::Result<Start> {
    // It hangs up when the thread has ended.
    let (started, starting) =
        pipe2(OFlag::O_CLOEXEC).context("cannot create a pipe for the start of the machine")?;
    let thread = thread::Builder::new()
        .name("bantam-start".into())
        .spawn(move || {
            let result = start();
            drop(starting);
            result
        })
        .context("cannot start the thread that builds the machine")?;
    let stop = loop {
        let ends = [Some(started.as_fd()), end_event];
        match turn(signals, ends, console.as_deref_mut(), None)? {
            Turn::Stop(signal) if ends_soon(started.as_fd()) => break Some(signal),
            Turn::Exit if ends_soon(started.as_fd()) => break None,
            end @ (Turn::Stop(_) | Turn::Quit | Turn::Exit) => {
                if let Turn::Stop(signal) = end {
                    tracing::info!("the machine is not started: {signal}");
                }
                stopping::ask();
                controller.stop();
                return Ok(Start::Abandoned);
            }
            Turn::Resize | Turn::Other => {}
        }
    };
    match thread.join() {
        Ok(result) => Ok(result.map(|()| Start::Done(stop))?),
        Err(_) => {
            bail!("the start of the machine panicked: this is a bug, please report it with the log")
        }
    }
}

/// Waits a moment for the end of a start, which hangs up `started`: the guest may run a little
/// before that, and then it is for the guest to shut down.
fn ends_soon(started: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(started, PollFlags::POLLIN)];
    let time = PollTimeout::from(START_END_TIME_MS);
    poll(&mut fds, time).is_ok_and(|count| count > 0)
}

/// Waits until a machine that has ended, or whose power has been cut, has been taken down, and
/// returns why it ended. If the user has asked for the end, or does so meanwhile, the wait is short:
/// this then prints what does not come to an end, and returns `None`. The process must end now.
pub fn await_end(
    controller: &Controller,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
) -> anyhow::Result<Option<ExitReason>> {
    let begin = Instant::now();
    let mut deadline = None;
    let mut has_told = false;
    let mut wait = USUAL_END_TIME;
    loop {
        if let Some(reason) = controller.wait_within(wait)? {
            return Ok(Some(reason));
        }
        wait = Duration::ZERO;
        if stopping::is_asked() {
            let end = || Instant::now() + stopping::time_left(END_TIME);
            if Instant::now() >= *deadline.get_or_insert_with(end) {
                say_unfinished(controller);
                return Ok(None);
            }
        } else if begin.elapsed() >= PATIENCE && !std::mem::replace(&mut has_told, true) {
            tracing::warn!(
                "the machine has ended, but {} has not finished: waiting for it, at most until a signal",
                unfinished(controller)
            );
        }
        let no_event = [None, None];
        match turn(
            signals,
            no_event,
            console.as_deref_mut(),
            Some(END_INTERVAL),
        )? {
            Turn::Stop(_) | Turn::Quit => stopping::ask(),
            Turn::Exit | Turn::Resize | Turn::Other => {}
        }
    }
}

fn say_unfinished(controller: &Controller) {
    say(format_args!(
        "{} does not answer: ending without it; what it had not written may be lost",
        unfinished(controller)
    ));
}

/// Names what keeps a machine from ending.
fn unfinished(controller: &Controller) -> String {
    let devices = controller.held_up();
    match devices.is_empty() {
        true => "a thread of the machine".to_owned(),
        false => devices.join(", "),
    }
}

/// Passes on input and signals while a machine waits to be started again. Returns who ended the
/// wait, if anyone: a client of the control socket does so by making `end_event` readable.
pub fn await_restart(
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    end_event: Option<BorrowedFd<'_>>,
    wait: Duration,
) -> anyhow::Result<Option<EndedBy>> {
    let end = Instant::now() + wait;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let ends = [end_event, None];
        match turn(signals, ends, console.as_deref_mut(), Some(left))? {
            Turn::Stop(signal) => {
                stopping::ask();
                tracing::info!("the machine is not started again: {signal}");
                return Ok(Some(EndedBy::User));
            }
            Turn::Quit | Turn::Exit => {
                stopping::ask();
                return Ok(Some(EndedBy::User));
            }
            Turn::Resize | Turn::Other if left.is_zero() => return Ok(None),
            Turn::Resize | Turn::Other => {}
        }
    }
}

/// The result of one turn of the main loop.
enum Turn {
    /// A signal asks for the end.
    Stop(Signal),
    /// Keys ask for the end.
    Quit,
    /// The machine has ended, or what else was waited for has happened.
    Exit,
    /// The terminal has, or may have, a new size.
    Resize,
    /// Nothing that concerns the machine.
    Other,
}

/// Waits for events, at most for `timeout`, and passes on input.
fn turn(
    signals: &Signals,
    exit_events: [Option<BorrowedFd<'_>>; 2],
    mut console: Option<&mut StdioConsole>,
    timeout: Option<Duration>,
) -> anyhow::Result<Turn> {
    let ready = wait_for_events(signals, exit_events, console.as_deref(), timeout)?;
    if ready.signal {
        match signals.next().context("cannot read signals")? {
            Some(Request::Stop(signal)) => return Ok(Turn::Stop(signal)),
            Some(Request::Suspend) => {
                if let Some(console) = &console {
                    console.input.suspend();
                }
                sleep_until_continued().context("cannot suspend")?;
            }
            Some(Request::Continue) => {
                if let Some(console) = &console {
                    console.input.resume()?;
                }
                // The size may have changed meanwhile.
                return Ok(Turn::Resize);
            }
            Some(Request::Resize) => return Ok(Turn::Resize),
            None => {}
        }
        // Another process may have read the input while this one was stopped.
        return Ok(Turn::Other);
    }
    if let Some(console) = &mut console {
        if ready.destination {
            console.input.write();
        }
        if ready.source && console.input.read() {
            return Ok(Turn::Quit);
        }
    }
    Ok(match ready.exits {
        [false, false] => Turn::Other,
        _ => Turn::Exit,
    })
}

/// Tells the guest the size of the terminal.
fn resize(controller: &Controller) {
    if let Some((columns, rows)) = terminal::size()
        && let Err(error) = controller.device(
            &DeviceName::console(),
            DeviceCommand::ResizeConsole { columns, rows },
        )
    {
        tracing::debug!("{error}");
    }
}

/// What there is to do.
#[derive(Debug, Default)]
struct Ready {
    signal: bool,
    exits: [bool; 2],
    source: bool,
    destination: bool,
}

fn wait_for_events(
    signals: &Signals,
    exit_events: [Option<BorrowedFd<'_>>; 2],
    console: Option<&StdioConsole>,
    timeout: Option<Duration>,
) -> anyhow::Result<Ready> {
    let input = console.map(|console| &console.input);
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let writable = |fd| PollFd::new(fd, PollFlags::POLLOUT);
    let mut ready = Ready::default();
    let [exit, other_exit] = &mut ready.exits;
    let [exit_event, other_exit_event] = exit_events;
    let (mut fds, flags): (Vec<_>, Vec<_>) = [
        (Some(readable(signals.as_fd())), &mut ready.signal),
        (exit_event.map(readable), exit),
        (other_exit_event.map(readable), other_exit),
        (
            input.and_then(Input::source).map(readable),
            &mut ready.source,
        ),
        (
            input.and_then(Input::destination).map(writable),
            &mut ready.destination,
        ),
    ]
    .into_iter()
    .filter_map(|(fd, flag)| Some((fd?, flag)))
    .unzip();
    let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
        // Rounded up, or the last fraction of a millisecond would be a busy loop.
        let timeout = timeout + Duration::from_nanos(999_999);
        PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut fds, timeout) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(Ready::default()),
        Err(errno) => return Err(io::Error::from(errno)).context("cannot wait for events"),
    }
    for (fd, flag) in fds.iter().zip(flags) {
        // Using the descriptor reports an error or hang-up.
        *flag = fd.any().unwrap_or(false);
    }
    Ok(ready)
}
