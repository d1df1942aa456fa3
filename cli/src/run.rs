//! `bantam run`: one machine from start to end, and again if it reboots.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bantam_vmm::config::{MachineConfig, OnReboot, SerialConfig};
use bantam_vmm::{
    Arrival, Console, Controller, ControllerOptions, ExitReason, ListeningSocket, MachineLog,
    Snapshot, Stream,
};

use crate::confine;
use crate::console::{OUTPUT_LIMIT_AFTER_STOP, StdioConsole};
use crate::control::{Control, listen};
use crate::exit_status::Ending;
use crate::main_loop::{EndedBy, Start, attend, await_build, await_end, await_restart};
use crate::message::say;
use crate::restart::Restarts;
use crate::signals::Signals;
use crate::stopping;

/// Decides what becomes of a machine that has ended, and is told how it goes on.
pub trait Owner {
    /// The guest runs.
    fn started(&self) {}

    /// The machine has ended.
    fn ended(&self, _ending: Ending) {}

    /// Whether a machine that nobody has told to end is started again.
    fn restarts_after(&self, reason: ExitReason) -> bool;

    /// Whether a machine that an error has ended is started again.
    fn restarts_after_error(&self) -> bool {
        false
    }

    /// The machine is going to be started again.
    fn restarted(&self) {}
}

/// The owner of a machine that only its configuration decides about.
pub struct Foreground(pub OnReboot);

impl Owner for Foreground {
    fn restarts_after(&self, reason: ExitReason) -> bool {
        matches!(reason, ExitReason::Reboot | ExitReason::Panic) && self.0 == OnReboot::Restart
    }
}

/// What a machine starts from.
pub enum Origin {
    /// The kernel that its configuration names.
    Boot,
    /// A snapshot of another machine.
    Snapshot {
        /// The snapshot.
        snapshot: Arc<Snapshot>,
        /// Whether the machine waits until it is told to go on.
        paused: bool,
    },
    /// The machine that another process or host sends.
    Arrival {
        /// The machine.
        arrival: Box<Arrival>,
        /// Called when the machine is here, before it goes on.
        settle: Box<dyn FnOnce() -> io::Result<()> + Send>,
    },
}

/// Runs a machine until it ends for good, and returns the exit status. It starts from `origin`, and boots when it is
/// restarted, as its `owner` says. Clients of a socket at `control`, if that is given, can control it.
pub fn run(
    config: &MachineConfig,
    origin: Origin,
    control: Option<&Path>,
    owner: &dyn Owner,
) -> anyhow::Result<u8> {
    // Before signals are diverted, so that one ends the process even if the host does not answer.
    let control = control.map(listen).transpose()?;
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = match config.uses_stdio() {
        true => Some(StdioConsole::new()?),
        false => None,
    };
    let ended = run_until_end(config, origin, &signals, console.as_mut(), control, owner);
    if let Some(console) = console {
        // An error must not wait for a reader that may never read again.
        let ends_soon = stopping::is_asked() || ended.is_err();
        let limit = ends_soon.then(|| stopping::time_left(OUTPUT_LIMIT_AFTER_STOP));
        console.finish(&signals, limit);
    }
    ended.map(|ending| ending.status(config.exit_status))
}

fn run_until_end(
    config: &MachineConfig,
    origin: Origin,
    signals: &Signals,
    console: Option<&mut StdioConsole>,
    control: Option<ListeningSocket>,
    owner: &dyn Owner,
) -> anyhow::Result<Ending> {
    let log = MachineLog::default();
    let controller = new_controller(&log)?;
    let control = control
        .map(|socket| Control::start(socket, controller.clone()))
        .transpose()?;
    let ended = run_with_restarts(
        config,
        origin,
        signals,
        console,
        controller,
        &log,
        control.as_ref(),
        owner,
    );
    if let Some(control) = control {
        control.end();
    }
    ended
}

fn new_controller(log: &MachineLog) -> Result<Controller, bantam_vmm::Error> {
    Controller::with(ControllerOptions {
        log: log.clone(),
        place_keeper: confine::place_keeper(),
        thread_hook: confine::thread_hook(),
        ..ControllerOptions::default()
    })
}

#[expect(
    clippy::too_many_arguments,
    reason = "they are what the process has one of"
)]
fn run_with_restarts(
    config: &MachineConfig,
    mut origin: Origin,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    mut controller: Controller,
    log: &MachineLog,
    control: Option<&Control>,
    owner: &dyn Owner,
) -> anyhow::Result<Ending> {
    const ENDED_BY_USER: Ending = Ending {
        by: EndedBy::User,
        reason: ExitReason::Stopped,
    };
    let mut restarts = Restarts::new(config.restart_limit);
    let mut config = config.clone();
    loop {
        let started = Instant::now();
        let ended = run_once(
            &config,
            std::mem::replace(&mut origin, Origin::Boot),
            signals,
            console.as_deref_mut(),
            &controller,
            control,
            owner,
        );
        let reason = match &ended {
            Ok(ending) => {
                let reason = ending.reason;
                owner.ended(*ending);
                if ending.by == EndedBy::User || !owner.restarts_after(reason) {
                    tracing::info!("the machine has ended: {reason}");
                    return ended;
                }
                reason.to_string()
            }
            Err(error) => {
                if stopping::is_asked() || !owner.restarts_after_error() {
                    return ended;
                }
                crate::reason(error)
            }
        };
        let run = started.elapsed();
        let Some(wait) = restarts.next(run) else {
            tracing::warn!("{reason}, and is not started again: that was the last restart allowed");
            return ended;
        };
        let soon = match wait {
            Duration::ZERO => String::new(),
            wait => format!(" in {:.1} s", wait.as_secs_f64()),
        };
        tracing::warn!(
            "{reason} after {:.1} s: starting it again{soon} ({})",
            run.as_secs_f64(),
            restarts.describe()
        );
        let end_event = control.map(Control::end_event);
        let ended_by = await_restart(signals, console.as_deref_mut(), end_event, wait)?;
        if ended_by == Some(EndedBy::User) {
            return Ok(ENDED_BY_USER);
        }
        owner.restarted();
        // A snapshot keeps the images that the disks had, and they must not be written to any more.
        config = controller.configuration().unwrap_or(config);
        controller = new_controller(log)?;
        if control.is_some_and(|control| !control.replace(&controller)) {
            return Ok(ENDED_BY_USER);
        }
    }
}

/// Runs a machine until it ends.
fn run_once(
    config: &MachineConfig,
    origin: Origin,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    controller: &Controller,
    control: Option<&Control>,
    owner: &dyn Owner,
) -> anyhow::Result<Ending> {
    let machine_console = match &console {
        Some(console) => console
            .for_machine()
            .context("cannot pass the serial console to the machine")?,
        None => Console::default(),
    };
    controller.set_console(machine_console)?;
    if let Some(console) = &mut console {
        console.input.enter_terminal()?;
    }
    let start = {
        let (controller, config) = (controller.clone(), config.clone());
        move || {
            controller.configure(config)?;
            match origin {
                Origin::Boot => controller.start(),
                Origin::Arrival { arrival, settle } => arrival.receive_then(&controller, settle),
                Origin::Snapshot { snapshot, paused } => {
                    controller.restore(&snapshot)?;
                    match paused {
                        true => Ok(()),
                        false => controller.resume(),
                    }
                }
            }
        }
    };
    let end_event = control.map(Control::end_event);
    let built = await_build(
        controller,
        signals,
        console.as_deref_mut(),
        end_event,
        start,
    );
    let ended = match built {
        Ok(Start::Done(stop)) => {
            owner.started();
            say_pseudoterminals(config, controller);
            say_ports(controller);
            let timeout = config.shutdown_timeout.get();
            let resizes = config.console == SerialConfig::Stdio;
            let console = console.as_deref_mut();
            attend(controller, signals, console, timeout, resizes, stop)
        }
        Ok(Start::Abandoned) => Ok(EndedBy::User),
        // A machine that a client has stopped before is refused the start.
        Err(_) if control.is_some_and(Control::is_end_asked) => Ok(EndedBy::User),
        Err(error) => return Err(error),
    };
    let ended = ended.map(|by| control.map_or(by, |control| control.ended_by(by)));
    if !matches!(ended, Ok(EndedBy::Guest)) {
        controller.stop();
    }
    let reason = await_end(controller, signals, console)?;
    let by = ended?;
    Ok(match reason {
        Some(reason) => Ending { by, reason },
        None => Ending {
            by: EndedBy::User,
            reason: ExitReason::Stopped,
        },
    })
}

/// Prints the ports of the host that lead to the guest, if the host has chosen them.
fn say_ports(controller: &Controller) {
    let ports = controller.forwarded_ports().unwrap_or_default();
    for port in ports.iter().filter(|port| port.is_chosen) {
        say(format_args!("{port}"));
    }
}

/// Prints the paths of the pseudoterminals that the machine has opened.
fn say_pseudoterminals(config: &MachineConfig, controller: &Controller) {
    let say_pseudoterminal = |end: &SerialConfig, stream, what: &str| {
        if *end == SerialConfig::Pty
            && let Ok(Some(path)) = controller.stream_path(&stream)
        {
            say(format_args!("{what}: {}", path.display()));
        }
    };
    say_pseudoterminal(&config.serial, Stream::Serial, "serial console");
    say_pseudoterminal(&config.console, Stream::Console, "console");
    for channel in &config.channels {
        let name = &channel.name;
        let stream = Stream::Channel(name.clone());
        say_pseudoterminal(&channel.end, stream, &format!("channel '{name}'"));
    }
}
