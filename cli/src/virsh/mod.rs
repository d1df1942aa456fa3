//! `bantam virsh`, and Bantam under the name virsh: virsh's command lines, tables and messages for named machines.
//!
//! A command is an entry of a table ([`commands`]) with the options that it takes, and a function that does the work by the
//! crates of machines and networks. What a command prints is collected until it ends, as an empty line comes after it.

mod args;
mod commands;
mod domains;
mod escape;
mod help;
mod host;
mod information;
mod lacking;
mod migrate;
mod networks;
mod snapshots;
mod table;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use nix::unistd::geteuid;

pub use host::print_node_information;

use args::Arguments;
use commands::Command;
use escape::Escape;

use crate::message::say_last;
use crate::named::print;
use crate::{is_broken_pipe, reason};

// A description here would take the place of the one in the help.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub struct VirshArgs {
    /// Options and commands of virsh; `help` lists them
    #[arg(
        value_name = "ARGUMENT",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    arguments: Vec<OsString>,
}

/// What is the same for all commands of one call.
#[derive(Debug, Default)]
struct Session {
    /// Messages, headings of tables and empty lines are left out.
    is_quiet: bool,
    /// Nothing may be changed.
    is_read_only: bool,
    /// The connection that the caller has named.
    uri: Option<String>,
    /// The key that leaves a console.
    escape: Escape,
    /// What the command has printed.
    text: String,
}

/// The options before the command, and the commands.
#[derive(Debug)]
enum Call {
    Help,
    Version,
    LongVersion,
    Commands(Session, Vec<Vec<String>>),
}

/// A command with its options; without them it is to be described.
#[derive(Debug)]
struct Parsed {
    command: &'static Command,
    arguments: Option<Arguments>,
}

impl Parsed {
    /// Reads the words of a command.
    ///
    /// # Errors
    /// If there is no such command, or it has no such options.
    fn of(words: &[String]) -> anyhow::Result<Parsed> {
        let (name, words) = words.split_first().context("there is no command")?;
        let command = commands::find(name).ok_or_else(|| anyhow!(lacking::refusal(name)))?;
        let arguments = match words.iter().any(|word| word == "--help") {
            true => None,
            false => Some(Arguments::parse(command, words)?),
        };
        Ok(Parsed { command, arguments })
    }
}

/// Whether the program was started as virsh, by a link or a copy with that name.
pub fn is_virsh(program: &OsString) -> bool {
    Path::new(program).file_name() == Some("virsh".as_ref())
}

/// Executes the commands of a command line, and returns the exit status.
pub fn run(args: VirshArgs) -> ExitCode {
    execute(args.arguments)
}

/// Executes the commands after the name of the program, and returns the exit status.
pub fn execute(arguments: Vec<OsString>) -> ExitCode {
    let done = read_call(arguments).and_then(|call| match call {
        Call::Help => print(&help::of_all()).map(|()| true),
        Call::Version => print(concat!(env!("CARGO_PKG_VERSION"), "\n")).map(|()| true),
        Call::LongVersion => print(concat!(
            "Virsh command line tool of Bantam ",
            env!("CARGO_PKG_VERSION"),
            "\n"
        ))
        .map(|()| true),
        Call::Commands(mut session, commands) => {
            // None is executed if there is a mistake in one of them.
            let commands = commands.iter().map(|words| Parsed::of(words));
            let commands = commands.collect::<Result<Vec<_>, _>>()?;
            let mut is_done = true;
            for command in commands {
                is_done = session.execute(&command)?;
            }
            Ok(is_done)
        }
    });
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        // A reader that closes early, such as `head`, has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            say_error(&error);
            ExitCode::FAILURE
        }
    }
}

fn say_error(error: &anyhow::Error) {
    say_last(format_args!("error: {}", reason(error)));
}

/// Reads the options before the command.
fn read_call(arguments: Vec<OsString>) -> anyhow::Result<Call> {
    let words = arguments.into_iter().map(|argument| {
        let refused = |argument: OsString| anyhow!("'{}' is not UTF-8", argument.display());
        argument.into_string().map_err(refused)
    });
    let words = words.collect::<Result<Vec<_>, _>>()?;
    let mut words = words.into_iter().peekable();
    let mut session = Session::default();
    while let Some(option) = words.next_if(|word| word.starts_with('-')) {
        if option == "--" {
            break;
        }
        let (name, mut given) = match option.split_once('=') {
            Some((name, value)) if name.starts_with("--") => (name, Some(value.to_owned())),
            _ => (option.as_str(), None),
        };
        let mut value = || {
            given
                .take()
                .or_else(|| words.next())
                .with_context(|| format!("option '{name}' requires an argument"))
        };
        match name {
            "-c" | "--connect" => session.uri = Some(value()?),
            "-e" | "--escape" => session.escape = value()?.parse()?,
            "-q" | "--quiet" => session.is_quiet = true,
            "-r" | "--readonly" => session.is_read_only = true,
            "-h" | "--help" => return Ok(Call::Help),
            "-v" => return Ok(Call::Version),
            "-V" => return Ok(Call::LongVersion),
            "--version" => {
                return Ok(match given.as_deref() {
                    Some("long") => Call::LongVersion,
                    _ => Call::Version,
                });
            }
            // They concern messages of virsh, and connections over networks.
            "-d" | "--debug" | "-k" | "--keepalive-interval" | "-K" | "--keepalive-count" => {
                value()?;
            }
            _ => bail!("unsupported option '{option}'. See --help."),
        }
    }
    check_uri(&session.uri())?;
    let words: Vec<_> = words.collect();
    let commands = match &words[..] {
        [] => bail!(
            "there is no command: the interactive mode of virsh is not supported by Bantam; 'help' lists the commands"
        ),
        [script] => args::split_script(script)?,
        _ => vec![words],
    };
    Ok(Call::Commands(session, commands))
}

/// Refuses connections to what is not Bantam, which would be about other machines than those here.
fn check_uri(uri: &str) -> anyhow::Result<()> {
    match uri {
        "qemu:///system" | "qemu:///session" => Ok(()),
        _ => bail!(
            "failed to connect to the hypervisor '{uri}': Bantam has the machines of this host and user only; use \
             qemu:///system or qemu:///session"
        ),
    }
}

impl Session {
    /// Returns the connection: that of the caller, or of the variables that virsh looks at, or that of the user.
    fn uri(&self) -> String {
        let variable = |name: &str| env::var(name).ok().filter(|uri| !uri.is_empty());
        self.uri
            .clone()
            .or_else(|| variable("VIRSH_DEFAULT_CONNECT_URI"))
            .or_else(|| variable("LIBVIRT_DEFAULT_URI"))
            .unwrap_or_else(|| {
                match geteuid().is_root() {
                    true => "qemu:///system",
                    false => "qemu:///session",
                }
                .to_owned()
            })
    }

    /// Executes a command, reports an error in one line, and returns whether there was none.
    ///
    /// # Errors
    /// If standard output cannot be written to.
    fn execute(&mut self, parsed: &Parsed) -> anyhow::Result<bool> {
        let Parsed { command, arguments } = parsed;
        let Some(arguments) = arguments else {
            print(&help::of(command))?;
            return Ok(true);
        };
        let result = match self.is_read_only && command.changes {
            true => Err(anyhow!(
                "operation forbidden: read only access prevents '{}'",
                command.name
            )),
            false => (command.run)(self, arguments),
        };
        if !self.is_quiet {
            self.text.push('\n');
        }
        if let Err(error) = &result {
            say_error(error);
        }
        self.flush()?;
        Ok(result.is_ok())
    }

    /// Writes what has been printed so far to standard output, before a command that goes on for long.
    fn flush(&mut self) -> anyhow::Result<()> {
        print(&std::mem::take(&mut self.text))
    }

    /// Prints what a command was asked for.
    fn print(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// Prints a line that is left out with `--quiet`.
    fn tell(&mut self, line: &str) {
        if !self.is_quiet {
            self.text.push_str(line);
            self.text.push('\n');
        }
    }

    /// Prints a table.
    fn table(&mut self, heading: &[&str], rows: &[Vec<String>]) {
        let heading = (!self.is_quiet).then_some(heading);
        self.text.push_str(&table::table(heading, rows));
    }

    /// Prints facts below one another, with the values from column 16 on.
    fn facts(&mut self, facts: &[(&str, String)]) {
        self.text.push_str(&table::facts(16, facts));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(line: &str) -> Result<Call, String> {
        let words = line.split(' ').map(OsString::from).collect();
        read_call(words).map_err(|error| error.to_string())
    }

    #[test]
    fn options_come_before_the_command() {
        for line in [
            "-c qemu:///session -q list --all",
            "--connect=qemu:///session --quiet list --all",
            "-d 0 --connect qemu:///session -q list --all",
        ] {
            let Ok(Call::Commands(session, commands)) = call(line) else {
                panic!("{line}");
            };
            assert_eq!(session.uri(), "qemu:///session");
            assert!(session.is_quiet && !session.is_read_only);
            assert_eq!(commands, [["list", "--all"]]);
        }
        assert!(matches!(call("-v"), Ok(Call::Version)));
        assert!(matches!(call("--version=long"), Ok(Call::LongVersion)));
        assert_eq!(
            call("--nope list").unwrap_err(),
            "unsupported option '--nope'. See --help."
        );
        assert_eq!(call("-c").unwrap_err(), "option '-c' requires an argument");
    }

    #[test]
    fn the_key_that_leaves_a_console_is_chosen() {
        let Ok(Call::Commands(session, _)) = call("-e ^x --escape=^Y console web") else {
            panic!("it is a command line");
        };
        assert_eq!(session.escape.byte(), 0x19);
        let error = call("-e xy console web").unwrap_err();
        assert_eq!(error, "Invalid string 'xy' for escape sequence");
    }

    #[test]
    fn other_hypervisors_are_refused() {
        for uri in ["test:///default", "qemu+ssh://host/system", ""] {
            let line = format!("-c {uri} list");
            let error = call(&line).unwrap_err();
            assert!(error.contains("failed to connect"), "{error}");
        }
    }
}
