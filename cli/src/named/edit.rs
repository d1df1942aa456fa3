//! `bantam edit`, and changes of single settings.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use bantam_manager::{Machine, parse_machine_file};

use super::args::{BlockresizeArgs, NameArgs, SetmemArgs, SetvcpusArgs};
use super::machine;
use crate::message::say;

pub fn edit(args: &NameArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let before = machine.machine_file_text()?;
    let draft = machine
        .folder()
        .join(format!("edit-{}.toml", std::process::id()));
    fs::write(&draft, &before).with_context(|| format!("cannot write '{}'", draft.display()))?;
    let edited = edit_draft(&machine, &draft, &before);
    let removed = fs::remove_file(&draft);
    let is_changed = edited?;
    removed.with_context(|| format!("cannot remove '{}'", draft.display()))?;
    match is_changed {
        true => say_next_start(&machine),
        false => {
            say(format_args!("machine '{}' is not changed", args.name));
            Ok(())
        }
    }
}

/// Has the user edit the draft until it is a machine file, and puts it in place. Returns whether anything was changed.
fn edit_draft(machine: &Machine, draft: &Path, before: &str) -> anyhow::Result<bool> {
    loop {
        run_editor(draft)?;
        let text = fs::read_to_string(draft)
            .with_context(|| format!("cannot read '{}'", draft.display()))?;
        if text == before {
            return Ok(false);
        }
        match parse_machine_file(&text, draft) {
            Ok(_) => {
                machine.replace_machine_file(before, &text)?;
                return Ok(true);
            }
            Err(error) if io::stdin().is_terminal() && asks_to_go_on(&error.to_string())? => {}
            Err(error) => {
                return Err(error).context("the machine file is not changed");
            }
        }
    }
}

fn run_editor(draft: &Path) -> anyhow::Result<()> {
    let given = ["VISUAL", "EDITOR"].into_iter().find_map(env::var_os);
    let editor = given.unwrap_or_else(|| OsString::from("vi"));
    // The variable may have arguments, and is a command of a shell by convention.
    let mut command = Command::new("sh");
    let mut script = editor.clone();
    script.push(" \"$1\"");
    command.arg("-c").arg(script).arg("sh").arg(draft);
    let status = command.status();
    let status = status.context("cannot start a shell for the editor")?;
    if !status.success() {
        bail!(
            "the machine file is not changed: the editor '{}' has failed ({status}); set EDITOR to another",
            editor.display()
        );
    }
    Ok(())
}

fn asks_to_go_on(reason: &str) -> anyhow::Result<bool> {
    say(format_args!("error: {reason}"));
    let mut stderr = io::stderr();
    let mut answer = String::new();
    write!(stderr, "Edit it again? [Y/n] ")
        .and_then(|()| stderr.flush())
        .and_then(|()| io::stdin().lock().read_line(&mut answer))
        .context("cannot ask what to do")?;
    Ok(!answer.trim().eq_ignore_ascii_case("n"))
}

/// Tells the user of a machine that runs when a change counts.
pub fn say_next_start(machine: &Machine) -> anyhow::Result<()> {
    if machine.is_active()? {
        let name = machine.name();
        say(format_args!(
            "machine '{name}' is running: it changes when it is ended and started again"
        ));
    }
    Ok(())
}

pub fn set_memory(args: &SetmemArgs) -> anyhow::Result<()> {
    Ok(machine(&args.name)?.set_memory(args.size)?)
}

pub fn set_vcpus(args: &SetvcpusArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    machine.set_vcpus(args.count)?;
    say_next_start(&machine)
}

pub fn resize_disk(args: &BlockresizeArgs) -> anyhow::Result<()> {
    machine(&args.name)?.grow_disk(&args.disk, args.size)?;
    Ok(())
}
