//! What the main thread does while a machine runs: passes on keys and signals.

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::Context;
use bantam_vmm::Controller;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::console::{Input, StdioConsole};
use crate::signals::{Request, Signals, sleep_until_continued};
use crate::terminal;

/// Who ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndedBy {
    Guest,
    User,
}

/// Passes on signals until the machine is started, which makes `started` readable. Gives who ended it
/// before that, if anybody did.
pub fn await_start(
    controller: &Controller,
    signals: &Signals,
    started: BorrowedFd<'_>,
) -> anyhow::Result<Option<EndedBy>> {
    loop {
        let mut fds = [signals.as_fd(), controller.exit_event(), started]
            .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error).context("cannot wait for events"),
        }
        let [signal, exit, started] = fds.map(|fd| fd.any().unwrap_or(false));
        if signal {
            match signals.next().context("cannot read signals")? {
                Some(Request::Stop(signal)) => {
                    tracing::info!("stopping: {signal}");
                    return Ok(Some(EndedBy::User));
                }
                Some(Request::Suspend) => sleep_until_continued().context("cannot suspend")?,
                Some(Request::Continue | Request::Resize) | None => {}
            }
            continue;
        }
        if started {
            return Ok(None);
        }
        if exit {
            return Ok(Some(EndedBy::Guest));
        }
    }
}

/// Passes on input and signals until the machine ends or the user wants it to. `resizes` says whether
/// the guest is told the size of the terminal.
pub fn attend(
    controller: &Controller,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    resizes: bool,
) -> anyhow::Result<EndedBy> {
    if resizes {
        resize(controller);
    }
    loop {
        let ready = wait_for_events(signals, controller.exit_event(), console.as_deref())?;
        if ready.signal {
            match signals.next().context("cannot read signals")? {
                Some(Request::Stop(signal)) => {
                    tracing::info!("stopping the machine: {signal}");
                    return Ok(EndedBy::User);
                }
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
                    // It may have changed meanwhile.
                    if resizes {
                        resize(controller);
                    }
                }
                Some(Request::Resize) if resizes => resize(controller),
                Some(Request::Resize) | None => {}
            }
            // What is ready may have changed hands while the process was stopped.
            continue;
        }
        if let Some(console) = &mut console {
            if ready.destination {
                console.input.write();
            }
            if ready.source && console.input.read() {
                return Ok(EndedBy::User);
            }
        }
        if ready.exit {
            return Ok(EndedBy::Guest);
        }
    }
}

/// Tells the guest the size of the terminal.
fn resize(controller: &Controller) {
    if let Some((columns, rows)) = terminal::size()
        && let Err(error) = controller.resize_console(columns, rows)
    {
        tracing::debug!("{error}");
    }
}

/// What there is to do.
#[derive(Debug, Default)]
struct Ready {
    signal: bool,
    exit: bool,
    source: bool,
    destination: bool,
}

fn wait_for_events(
    signals: &Signals,
    exit_event: BorrowedFd<'_>,
    console: Option<&StdioConsole>,
) -> anyhow::Result<Ready> {
    let input = console.map(|console| &console.input);
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let writable = |fd| PollFd::new(fd, PollFlags::POLLOUT);
    let mut ready = Ready::default();
    let (mut fds, flags): (Vec<_>, Vec<_>) = [
        (Some(readable(signals.as_fd())), &mut ready.signal),
        (Some(readable(exit_event)), &mut ready.exit),
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
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(_) => {}
        Err(Errno::EINTR) => return Ok(Ready::default()),
        Err(error) => return Err(error).context("cannot wait for events"),
    }
    for (fd, flag) in fds.iter().zip(flags) {
        // An error or hang-up shows when the descriptor is used.
        *flag = fd.any().unwrap_or(false);
    }
    Ok(ready)
}
