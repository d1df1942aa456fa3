//! Shell completions and manual pages, made from the same definitions as the help.

use std::fs;
use std::io::{self, Write};
use std::iter;
use std::path::Path;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Args;

/// Prints the completions for a shell.
pub fn print_completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Args::command(), "bantam", &mut script);
    io::stdout()
        .write_all(&script)
        .context("cannot write the completions to standard output")
}

/// Writes a manual page for `bantam` and one for each of its subcommands.
pub fn write_man_pages(folder: &Path) -> anyhow::Result<()> {
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    fs::create_dir_all(folder)
        .and_then(|()| {
            iter::once(&command)
                .chain(command.get_subcommands())
                .try_for_each(|command| write_man_page(command, folder))
        })
        .with_context(|| format!("cannot write the manual pages to '{}'", folder.display()))
}

fn write_man_page(command: &Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let man = Man::new(command.clone()).title(name);
    let mut page = Vec::new();
    man.render(&mut page)?;
    // The text after the options is laid out already: its lines must stay as they are.
    let page = String::from_utf8_lossy(&page).replace(".SH EXTRA\n", ".SH NOTES\n.nf\n");
    fs::write(folder.join(man.get_filename()), page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_manual_page_for_each_command() {
        let folder = std::env::temp_dir().join(format!("bantam-man-{}", std::process::id()));
        write_man_pages(&folder).unwrap();
        let run = fs::read_to_string(folder.join("bantam-run.1")).unwrap();
        for page in [
            "bantam.1",
            "bantam-check.1",
            "bantam-completions.1",
            "bantam-man.1",
        ] {
            assert!(folder.join(page).exists(), "{page}");
        }
        fs::remove_dir_all(&folder).unwrap();
        assert!(run.contains("host\\-workarounds"), "{run}");
        assert!(run.contains(".nf\nExamples:"), "{run}");
    }
}
