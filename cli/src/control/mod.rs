//! The control socket: `--control`, by which a machine has one, and `bantam control`, a client of it.

mod args;
mod output;
mod serving;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Error};
use bantam_control::{ControlClient, ControlError};
use bantam_vmm::{Command, Event, State};

pub use args::{ControlArgs, ControlCommand, Output};
pub use serving::{Control, listen};

use crate::{is_broken_pipe, named};

/// Has the machine execute a command, and prints the answer.
pub fn control(args: ControlArgs) -> anyhow::Result<()> {
    match execute(args) {
        // A reader that closes early, such as `head`, has seen enough.
        Err(error) if is_broken_pipe(&error) => Ok(()),
        result => result,
    }
}

/// Connects to the control socket of a machine: the one at this path, or if there is none, that of the named machine.
pub fn connect(socket: &Path) -> anyhow::Result<ControlClient> {
    if let Some(machine) = named::running_machine(socket) {
        return Ok(machine.connect("control")?);
    }
    ControlClient::connect(socket).map_err(|error| match error {
        // The line is whole.
        ControlError::Refused(_) => Error::from(error),
        error => Error::from(error).context(format!(
            "cannot control a machine by '{}'",
            socket.display()
        )),
    })
}

fn execute(args: ControlArgs) -> anyhow::Result<()> {
    let mut client = connect(&args.socket)?;
    let command = match args.command {
        ControlCommand::Pause => Command::Pause,
        ControlCommand::Resume => Command::Resume,
        ControlCommand::Stop => Command::Stop,
        ControlCommand::Shutdown { timeout } => Command::ShutDown {
            timeout: Some(timeout.get()),
        },
        ControlCommand::PowerButton => Command::PressPowerButton,
        ControlCommand::CtrlAltDel => Command::PressCtrlAltDel,
        ControlCommand::Query => Command::Query,
        ControlCommand::Config => Command::Configuration,
        ControlCommand::Metrics => Command::Metrics,
        ControlCommand::Events => return follow(client, args.output),
        ControlCommand::Json { command } => {
            // It may be one that takes long.
            client.set_answer_time(Duration::MAX);
            let answer = client.execute(*command)?;
            return print(&output::answer(&answer, Output::Json)?);
        }
    };
    let answer = client.execute(command)?;
    print(&output::answer(&answer, args.output)?)
}

/// Prints events until the connection ends.
fn follow(mut client: ControlClient, format: Output) -> anyhow::Result<()> {
    client.subscribe()?;
    let mut has_ended = false;
    loop {
        let event = match client.next_event(None) {
            Ok(Some(event)) => event,
            Ok(None) => continue,
            Err(ControlError::Ended) if has_ended => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if let Event::State { state } = event {
            has_ended = state == State::Stopped;
        }
        print(&output::event(&event, format)?)?;
    }
}

/// Describes an event for people.
pub fn describe_event(event: &Event) -> serde_json::Result<String> {
    output::event(event, Output::Human)
}

/// Prints a line, or several, at once.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let printed = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    printed.context("cannot write to standard output")
}
