//! Shell completions and manual pages, made from the same definitions as the help.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyhow::Context;
use clap::{Args as _, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Args;
use crate::control::ControlArgs;
use crate::image::ImageArgs;
use crate::named;

/// Prints the completions for a shell.
pub fn print_completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    // The command `help` completes only the subcommands that are there from the beginning.
    let mut command = Args::command()
        .mut_subcommand("image", |command| {
            ImageArgs::augment_args(command.defer(|command| command))
        })
        .mut_subcommand("control", |command| {
            ControlArgs::augment_args(command.defer(|command| command))
        });
    clap_complete::generate(shell, &mut command, "bantam", &mut script);
    let script = named::with_machine_names(shell, String::from_utf8_lossy(&script).into_owned());
    io::stdout()
        .write_all(script.as_bytes())
        .context("cannot write the completions to standard output")
}

/// Writes a manual page for `bantam` and one for each of its subcommands.
pub fn write_man_pages(folder: &Path) -> anyhow::Result<()> {
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    fs::create_dir_all(folder)
        .and_then(|()| write_man_pages_of(&command, folder))
        .with_context(|| format!("cannot write the manual pages to '{}'", folder.display()))
}

fn write_man_pages_of(command: &Command, folder: &Path) -> io::Result<()> {
    write_man_page(command, folder)?;
    command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
        .try_for_each(|command| write_man_pages_of(command, folder))
}

fn write_man_page(command: &Command, folder: &Path) -> io::Result<()> {
    let name = command.get_display_name().unwrap_or(command.get_name());
    let man = Man::new(command.clone()).title(name);
    let mut page = Vec::new();
    man.render(&mut page)?;
    // The text after the options is formatted already: its lines must stay as they are.
    let page = String::from_utf8_lossy(&page).replace(".SH EXTRA\n", ".SH NOTES\n.nf\n");
    fs::write(folder.join(man.get_filename()), with_lists(&page))
}

/// Turns lines of the help that start with a dash into lists, which a manual page would otherwise
/// join into one paragraph.
fn with_lists(page: &str) -> String {
    const DASH: &str = "\\- ";
    let mut lines: Vec<&str> = Vec::new();
    let mut in_list = false;
    for line in page.lines() {
        if let Some(item) = line.strip_prefix(DASH) {
            if !in_list {
                // The list adds its own space after the text before.
                lines.pop_if(|line| line.is_empty());
                lines.push(".RS");
                in_list = true;
            }
            lines.extend([".IP \\(bu 2", item]);
        } else if in_list && let Some(rest) = line.strip_prefix("  ") {
            lines.push(rest);
        } else {
            if in_list {
                lines.push(".RE");
                in_list = false;
                // More text of the same paragraph.
                if ![".TP", ".SH"]
                    .iter()
                    .any(|request| line.starts_with(request))
                {
                    lines.push(".IP");
                }
            }
            lines.push(line);
        }
    }
    if in_list {
        lines.push(".RE");
    }
    lines.join("\n") + "\n"
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
            "bantam-control.1",
            "bantam-control-pause.1",
            "bantam-image.1",
            "bantam-image-convert.1",
            "bantam-man.1",
            "bantam-start.1",
        ] {
            assert!(folder.join(page).exists(), "{page}");
        }
        assert!(!folder.join("bantam-machine-process.1").exists());
        fs::remove_dir_all(&folder).unwrap();
        assert!(run.contains("host\\-workarounds"), "{run}");
        assert!(run.contains(".nf\nExamples:"), "{run}");
        assert!(
            run.contains(".RS\n.IP \\(bu 2\nstdio: standard input"),
            "{run}"
        );
        assert!(run.contains("none: nowhere.\n.RE\n"), "{run}");
    }

    #[test]
    fn a_list_ends_before_what_follows_it() {
        let page = ".TP\nThe choices:\n\n\\- one: first\n  and more\n\\- two\n.TP\n\\-x\n\\- y\nz";
        assert_eq!(
            with_lists(page),
            ".TP\nThe choices:\n.RS\n.IP \\(bu 2\none: first\nand more\n.IP \\(bu 2\ntwo\n.RE\n\
             .TP\n\\-x\n.RS\n.IP \\(bu 2\ny\n.RE\n.IP\nz\n"
        );
    }
}
