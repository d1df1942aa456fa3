//! `virsh help`.

use anyhow::anyhow;

use super::Session;
use super::args::{Arguments, Kind, Opt};
use super::commands::{COMMANDS, Command, find};

const OPTIONS: &str = "
virsh [options]... [<command_string>]
virsh [options]... <command> [args...]

  options:
    -c | --connect=URI      qemu:///system or qemu:///session
    -e | --escape <char>    key that leaves a console (default ^])
    -h | --help             this help
    -q | --quiet            quiet mode
    -r | --readonly         change nothing
    -v                      short version
    -V                      long version
         --version[=TYPE]   version, TYPE is short or long (default short)
  commands:

";

/// Describes the options and all commands.
pub fn of_all() -> String {
    let commands = COMMANDS
        .iter()
        .map(|it| format!("    {:<30} {}\n", it.name, it.summary));
    let commands = commands.collect::<String>();
    format!("{OPTIONS}{commands}\n  (specify help <command> for details about the command)\n")
}

/// Describes a command.
pub fn of(command: &Command) -> String {
    let name = command.name;
    let mut synopsis = name.to_owned();
    let mut options = String::new();
    for option in command.options {
        let (place, line) = describe(option);
        synopsis.push_str(&format!(" {place}"));
        options.push_str(&format!("    {line}\n"));
    }
    let options = match options.is_empty() {
        true => options,
        false => format!("\n  OPTIONS\n{options}"),
    };
    format!(
        "  NAME\n    {name} - {}\n\n  SYNOPSIS\n    {synopsis}\n{options}\n",
        command.summary
    )
}

/// Returns how an option stands in the synopsis, and in the list of options.
fn describe(option: &Opt) -> (String, String) {
    let name = option.name;
    match option.kind {
        Kind::Flag => (format!("[--{name}]"), format!("--{name}")),
        Kind::Needed => (format!("<{name}>"), format!("[--{name}] <string>")),
        Kind::Value => (format!("[<{name}>]"), format!("[--{name}] <string>")),
        Kind::Named => (format!("[--{name} <string>]"), format!("--{name} <string>")),
        Kind::Rest => (format!("[<{name}>]..."), format!("[--{name}] <string>")),
    }
}

pub fn run(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let text =
        match arguments.value("command") {
            None => of_all(),
            Some(name) => of(find(name)
                .ok_or_else(|| anyhow!("command or command group '{name}' doesn't exist"))?),
        };
    session.print(&text);
    Ok(())
}
