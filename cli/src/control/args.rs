//! The command line of `bantam control`.

use std::path::PathBuf;

use bantam_vmm::Command;
use bantam_vmm::config::ShutdownTimeout;
use clap::{Args, Subcommand, ValueEnum};

#[derive(Debug, Args)]
pub struct ControlArgs {
    /// The control socket that the machine was started with (--control), or the name of a machine
    pub socket: PathBuf,

    /// How the answer is printed
    #[arg(
        long,
        value_name = "FORMAT",
        value_enum,
        default_value_t,
        global = true
    )]
    pub output: Output,

    #[command(subcommand)]
    pub command: ControlCommand,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Human,
    /// As one line of JSON, and an event as one line each
    Json,
}

#[derive(Clone, Debug, Subcommand)]
pub enum ControlCommand {
    /// Pauses the machine: its guest stands still
    Pause,
    /// Lets a paused machine go on
    Resume,
    /// Ends the machine as if its power were cut
    Stop,
    /// Asks the guest to shut itself down
    ///
    /// The guest is asked by the ACPI power button or by Ctrl-Alt-Del. Its power is cut if it has not ended
    /// in time, and at once if it listens to neither. This command does not wait for the end.
    Shutdown {
        /// How long the guest may take: a number of seconds, or with a unit: 500ms, 10s, 2m
        #[arg(
            long,
            value_name = "TIME",
            default_value = "10s",
            allow_hyphen_values = true
        )]
        timeout: ShutdownTimeout,
    },
    /// Presses the ACPI power button
    PowerButton,
    /// Presses Ctrl-Alt-Del
    CtrlAltDel,
    /// Prints the state of the machine
    Query,
    /// Prints the configuration with all changes since the start, as a machine file
    Config,
    /// Prints the counters of the machine and its devices
    Metrics,
    /// Prints what happens to the machine from now on, until it has ended
    Events,
    /// Executes a command that is given as JSON, and prints the answer as JSON
    ///
    /// See docs/control.md for the commands.
    Json {
        /// The command
        #[arg(value_name = "COMMAND", value_parser = json)]
        command: Box<Command>,
    },
}

fn json(text: &str) -> Result<Box<Command>, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}
