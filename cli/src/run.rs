//! `bantam run`: one machine from start to end, and again if it reboots.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bantam_vmm::config::{MachineConfig, OnReboot, SerialConfig};
use bantam_vmm::{
    Console, Controller, ControllerOptions, ExitReason, MachineLog, Snapshot, Stream,
};

use crate::console::{OUTPUT_LIMIT_AFTER_STOP, StdioConsole};
use crate::exit_status::Ending;
use crate::main_loop::{EndedBy, Start, attend, await_build, await_end, await_restart};
use crate::message::say;
use crate::restart::Restarts;
use crate::signals::Signals;
use crate::stopping;

/// Runs a machine until it ends for good, and returns the exit status. It goes on from `snapshot` if that is given, and
/// boots otherwise, as it does when it is restarted.
pub fn run(config: &MachineConfig, snapshot: Option<Arc<Snapshot>>) -> anyhow::Result<u8> {
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = match config.uses_stdio() {
        true => Some(StdioConsole::new()?),
        false => None,
    };
    let ended = run_until_end(config, snapshot, &signals, console.as_mut());
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
    mut snapshot: Option<Arc<Snapshot>>,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
) -> anyhow::Result<Ending> {
    let log = MachineLog::default();
    let mut restarts = Restarts::new(config.restart_limit);
    loop {
        let started = Instant::now();
        let ending = run_once(
            config,
            snapshot.take(),
            signals,
            console.as_deref_mut(),
            &log,
        )?;
        let reason = ending.reason;
        let restarts_machine = ending.by == EndedBy::Guest
            && matches!(reason, ExitReason::Reboot | ExitReason::Panic)
            && config.on_reboot == OnReboot::Restart;
        if !restarts_machine {
            tracing::info!("the machine has ended: {reason}");
            return Ok(ending);
        }
        let run = started.elapsed();
        let Some(wait) = restarts.next(run) else {
            tracing::warn!("{reason}, and is not started again: that was the last restart allowed");
            return Ok(ending);
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
        if await_restart(signals, console.as_deref_mut(), wait)? == Some(EndedBy::User) {
            return Ok(Ending {
                by: EndedBy::User,
                reason: ExitReason::Stopped,
            });
        }
    }
}

/// Runs a machine until it ends.
fn run_once(
    config: &MachineConfig,
    snapshot: Option<Arc<Snapshot>>,
    signals: &Signals,
    mut console: Option<&mut StdioConsole>,
    log: &MachineLog,
) -> anyhow::Result<Ending> {
    let machine_console = match &console {
        Some(console) => console
            .for_machine()
            .context("cannot pass the serial console to the machine")?,
        None => Console::default(),
    };
    let controller = Controller::with(ControllerOptions {
        log: log.clone(),
        ..ControllerOptions::default()
    })?;
    controller.set_console(machine_console)?;
    if let Some(console) = &mut console {
        console.input.enter_terminal()?;
    }
    let start = {
        let (controller, config) = (controller.clone(), config.clone());
        move || {
            controller.configure(config)?;
            let Some(snapshot) = snapshot else {
                return controller.start();
            };
            controller.restore(&snapshot)?;
            controller.resume()
        }
    };
    let ended = match await_build(&controller, signals, console.as_deref_mut(), start)? {
        Start::Done(stop) => {
            say_pseudoterminals(config, &controller);
            let timeout = config.shutdown_timeout.get();
            let resizes = config.console == SerialConfig::Stdio;
            let console = console.as_deref_mut();
            attend(&controller, signals, console, timeout, resizes, stop)
        }
        Start::Abandoned => Ok(EndedBy::User),
    };
    if !matches!(ended, Ok(EndedBy::Guest)) {
        controller.stop();
    }
    let reason = await_end(&controller, signals, console)?;
    let by = ended?;
    Ok(match reason {
        Some(reason) => Ending { by, reason },
        None => Ending {
            by: EndedBy::User,
            reason: ExitReason::Stopped,
        },
    })
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
