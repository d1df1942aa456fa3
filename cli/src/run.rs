//! `bantam run`: one machine from start to end, and again if it reboots.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use anyhow::Context;
use bantam_vmm::config::{MachineConfig, OnReboot, SerialConfig};
use bantam_vmm::{Console, Controller, ExitReason};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::console::{Input, StdioConsole};
use crate::say;
use crate::signals::{Request, Signals, sleep_until_continued};

/// How long a user who wants to stop waits for a reader that does not take the last output.
const OUTPUT_LIMIT_AFTER_STOP: Duration = Duration::from_secs(1);

/// Who ended the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndedBy {
    Guest,
    User,
}

/// Runs a machine until it ends for good.
pub fn run(config: &MachineConfig) -> anyhow::Result<()> {
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = match config.serial {
        SerialConfig::Stdio => Some(StdioConsole::new()?),
        _ => None,
    };
    let ended = run_until_end(config, &signals, console.as_mut());
    if let Some(console) = console {
        let limit = matches!(ended, Ok(EndedBy::User)).then_some(OUTPUT_LIMIT_AFTER_STOP);
        console.finish(&signals, limit);
    }
    ended.map(|_| ())
}

fn run_until_end(
    config: &MachineConfig,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
) -> anyhow::Result<EndedBy> {
    loop {
        let machine_console = match &console {
            Some(console) => console
                .for_machine()
                .context("cannot pass the serial console to the machine")?,
            None => Console {
                input: None,
                output: None,
            },
        };
        let controller = Controller::new()?;
        controller.configure(config.clone(), machine_console)?;
        if let Some(console) = &mut console {
            console.input.enter_terminal()?;
        }
        controller.start()?;
        if config.serial == SerialConfig::Pty
            && let Ok(Some(path)) = controller.serial_path()
        {
            say(format_args!("serial console: {}", path.display()));
        }
        let ended = attend(&controller, signals, console.as_deref_mut());
        if !matches!(ended, Ok(EndedBy::Guest)) {
            controller.stop();
        }
        let reason = controller.wait()?;
        let ended = ended?;
        if ended == EndedBy::Guest
            && reason == ExitReason::Reboot
            && config.on_reboot == OnReboot::Restart
        {
            tracing::info!("the guest has rebooted: starting it again");
            continue;
        }
        tracing::info!("the machine has ended: {reason:?}");
        return Ok(ended);
    }
}

/// Passes on input and signals until the machine ends or the user wants it to.
fn attend(
    controller: &Controller,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
) -> anyhow::Result<EndedBy> {
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
                }
                None => {}
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
