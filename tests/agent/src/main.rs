// SPDX-License-Identifier: Apache-2.0

//! The first process of Bantam's test guests.
//!
//! The kernel command line says what it does:
//!
//! - `bantam.mode=shell` (or nothing): an interactive shell on the console;
//! - `bantam.mode=report`: a description of the machine;
//! - `bantam.mode=test bantam.test=COMMAND,...`: the commands listed in `command.rs`, each answered by a
//!   line `bantam: COMMAND ok [DETAILS]` or `bantam: COMMAND failed REASON`.
//!
//! Afterwards it switches the machine off. Any other process executes the commands in its
//! arguments, to try them out in the shell.

mod command;
mod console;
mod disk;
mod error;
mod metadata;
mod net;
mod pattern;
mod power;
mod random;
mod report;
mod shell;
mod sys;
mod system;
mod test;
mod vsock;
mod workload;

use std::env;
use std::path::Path;
use std::process;

use console::say;
use error::{Context, Error, Result};
use power::Ending;

fn main() {
    if process::id() != 1 {
        let commands: Vec<String> = env::args().skip(1).collect();
        test::run(commands.iter().map(String::as_str));
        return;
    }
    // Benchmarks measure the time to this line: nothing may come before it.
    say(format_args!("bantam: init"));
    let ending = init().unwrap_or_else(|error| {
        say(format_args!("bantam: failed {error}"));
        Ending::PowerOff
    });
    ending.happen()
}

fn init() -> Result<Ending> {
    for (kind, folder) in [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
    ] {
        let path = folder.to_string_lossy();
        if !Path::new(&*path).is_dir() {
            std::fs::create_dir(&*path).context(format_args!("create {path}"))?;
        }
        sys::mount(kind, folder).context(format_args!("mount {path}"))?;
    }
    let command_line = system::attribute("/proc/cmdline")?;
    match option(&command_line, "bantam.mode").unwrap_or("shell") {
        "shell" => shell::run(),
        "report" => report::print().map(|()| Ending::PowerOff),
        "test" => {
            let commands = option(&command_line, "bantam.test").unwrap_or_default();
            Ok(test::run(
                commands.split(',').filter(|word| !word.is_empty()),
            ))
        }
        mode => Err(Error::new(format!(
            "bantam.mode={mode} is not shell, report or test"
        ))),
    }
}

/// Returns the value of an option on the kernel command line. The last one counts.
fn option<'a>(command_line: &'a str, name: &str) -> Option<&'a str> {
    command_line
        .split_ascii_whitespace()
        .filter_map(|word| word.split_once('='))
        .filter_map(|(key, value)| (key == name).then_some(value))
        .next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let line = "console=ttyS0 bantam.mode=shell quiet bantam.mode=test bantam.test=a:b=c,d";
        assert_eq!(option(line, "bantam.mode"), Some("test"));
        assert_eq!(option(line, "bantam.test"), Some("a:b=c,d"));
        assert_eq!(option(line, "bantam"), None);
        assert_eq!(option(line, "quiet"), None);
    }
}
