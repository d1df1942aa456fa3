//! `bantam run`: one machine from start to end, and again if it reboots.

use std::time::Duration;

use anyhow::Context;
use bantam_vmm::config::{MachineConfig, OnReboot, SerialConfig};
use bantam_vmm::{Console, Controller, ExitReason};

use crate::attend::{EndedBy, attend};
use crate::console::StdioConsole;
use crate::say;
use crate::signals::Signals;

/// How long a user who wants to stop waits for a reader that does not take the last output.
pub const OUTPUT_LIMIT_AFTER_STOP: Duration = Duration::from_secs(1);

/// Runs a machine until it ends for good.
pub fn run(config: &MachineConfig) -> anyhow::Result<()> {
    let signals = Signals::block().context("cannot divert signals")?;
    let mut console = match config.uses_stdio() {
        true => Some(StdioConsole::new()?),
        false => None,
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
        say_pseudoterminals(config, &controller);
        let resizes = config.console == SerialConfig::Stdio;
        let ended = attend(&controller, signals, console.as_deref_mut(), resizes);
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

/// Says where the pseudoterminals are that the machine has made.
fn say_pseudoterminals(config: &MachineConfig, controller: &Controller) {
    if config.serial == SerialConfig::Pty
        && let Ok(Some(path)) = controller.serial_path()
    {
        say(format_args!("serial console: {}", path.display()));
    }
    if config.console == SerialConfig::Pty
        && let Ok(Some(path)) = controller.console_path()
    {
        say(format_args!("console: {}", path.display()));
    }
    for (index, channel) in config.channels.iter().enumerate() {
        if channel.end == SerialConfig::Pty
            && let Ok(Some(path)) = controller.channel_path(index)
        {
            let name = &channel.name;
            say(format_args!("channel '{name}': {}", path.display()));
        }
    }
}
