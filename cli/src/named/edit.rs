//! `bantam edit`, and changes of single settings.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};
use bantam_manager::{Machine, parse_machine_file};
use bantam_vmm::config::read_text_file;

use super::args::{BlockresizeArgs, NameArgs, SetmemArgs, SetvcpusArgs};
use super::machine;
use crate::message::say;
use crate::reason;

pub fn edit(args: &NameArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let before = machine.machine_file_text()?;
    let path = machine.machine_file();
    let check = |text: &str| Ok(parse_machine_file(text, &path).map(|_| ())?);
    match edit_text(&machine, "toml", &before, check)? {
        Some(text) => {
            machine.replace_machine_file(&before, &text)?;
            say_next_start(&machine)
        }
        None => {
            say(format_args!("machine '{}' is not changed", args.name));
            Ok(())
        }
    }
}

/// Has the user edit the text that is `before`, in a file with this extension, until `check` accepts it. Returns `None` if it
/// is not changed.
pub fn edit_text(
    machine: &Machine,
    extension: &str,
    before: &str,
    check: impl Fn(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Option<String>> {
    let draft = format!("edit-{}.{extension}", std::process::id());
    let draft = machine.folder().join(draft);
    fs::write(&draft, before).with_context(|| format!("cannot write '{}'", draft.display()))?;
    let edited = edit_draft(&draft, before, check);
    let removed = fs::remove_file(&draft);
    let text = edited?;
    removed.with_context(|| format!("cannot remove '{}'", draft.display()))?;
    Ok(text)
}

/// Has the user edit the draft until it is accepted. Returns `None` if it is not changed.
fn edit_draft(
    draft: &Path,
    before: &str,
    check: impl Fn(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Option<String>> {
    loop {
        run_editor(draft)?;
        let text =
            read_text_file(draft).with_context(|| format!("cannot read '{}'", draft.display()))?;
        if text == before {
            return Ok(None);
        }
        match check(&text) {
            Ok(()) => return Ok(Some(text)),
            Err(error) if io::stdin().is_terminal() && asks_to_go_on(&reason(&error))? => {}
            Err(error) => return Err(error).context("the machine is not changed"),
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
            "the machine is not changed: the editor '{}' has failed ({status}); set EDITOR to another",
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
