//! Named machines: the commands of `bantam` that virsh has too, and the process of a machine.

mod args;
mod autostart;
mod clone;
mod completion;
mod console;
mod create;
mod detach;
mod devices;
mod domain;
mod edit;
mod events;
mod first_boot;
mod images;
mod info;
mod interfaces;
mod lifecycle;
mod list;
mod process;
mod save;
mod snapshot;
mod stats;
mod sysprep;
mod top;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;
use bantam_manager::{Machine, MachineName, Manager};
use serde::Serialize;

pub use args::{NameArgs, NamedCommand, SnapshotCreateArgs, SnapshotListArgs, SnapshotNameArgs};
pub use completion::with_machine_names;
pub use console::attach_silently as attach_console;
pub use create::config_of;
pub use domain::{Edited, Memory, define_domain, domain_xml, edit_domain, start_domain};
pub use interfaces::connection;
pub use save::restore;
pub use snapshot::{
    create_snapshot, delete_snapshot, describe_snapshot, list_snapshots, revert, snapshot_tree,
    snapshot_with_memory,
};

use crate::{is_broken_pipe, status_of};

/// Executes a command to a named machine.
pub fn execute(command: NamedCommand) -> ExitCode {
    if let NamedCommand::MachineProcess(args) = command {
        return process::run(args);
    }
    match execute_command(command) {
        // A reader that closes early, such as `head`, has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        result => status_of(result),
    }
}

fn execute_command(command: NamedCommand) -> anyhow::Result<()> {
    match command {
        NamedCommand::Create(args) => create::create(*args),
        NamedCommand::Define(args) => create::define(*args),
        NamedCommand::Undefine(args) => create::undefine(&args),
        NamedCommand::Rename(args) => create::rename(&args),
        NamedCommand::Clone(args) => clone::clone(&args),
        NamedCommand::Sysprep(args) => sysprep::sysprep(&args),
        NamedCommand::Template(args) => clone::template(&args),
        NamedCommand::Images(args) => images::images(*args),
        NamedCommand::List(args) => list::list(&args),
        NamedCommand::Start(args) => lifecycle::start(&args),
        NamedCommand::Shutdown(args) => lifecycle::shutdown(&args),
        NamedCommand::Reboot(args) => Ok(machine(&args.name)?.reboot()?),
        NamedCommand::Reset(args) => Ok(machine(&args.name)?.reset()?),
        NamedCommand::Destroy(args) => lifecycle::destroy(&args),
        NamedCommand::Suspend(args) => Ok(machine(&args.name)?.suspend()?),
        NamedCommand::Resume(args) => Ok(machine(&args.name)?.resume()?),
        NamedCommand::Save(args) => save::save(&args),
        NamedCommand::Managedsave(args) => save::managed_save(&args),
        NamedCommand::Dominfo(args) => info::info(&args),
        NamedCommand::Domstate(args) => info::state(&args),
        NamedCommand::Domstats(args) => stats::stats(&args),
        NamedCommand::Top(args) => top::top(&args),
        NamedCommand::Domblklist(args) => info::disks(&args),
        NamedCommand::Domiflist(args) => interfaces::list(&args),
        NamedCommand::Domifaddr(args) => interfaces::addresses(&args),
        NamedCommand::Ssh(args) => interfaces::ssh(&args),
        NamedCommand::Dumpcfg(args) => info::dump(&args),
        NamedCommand::Dumpxml(args) => domain::dump(&args),
        NamedCommand::Console(args) => console::console(&args),
        NamedCommand::Edit(args) => edit::edit(&args),
        NamedCommand::Setmem(args) => edit::set_memory(&args),
        NamedCommand::Setvcpus(args) => edit::set_vcpus(&args),
        NamedCommand::Blockresize(args) => edit::resize_disk(&args),
        NamedCommand::AttachDisk(args) => devices::attach_disk(*args),
        NamedCommand::DetachDisk(args) => devices::detach_disk(&args),
        NamedCommand::AttachInterface(args) => devices::attach_interface(*args),
        NamedCommand::DetachInterface(args) => devices::detach_interface(&args),
        NamedCommand::ChangeMedia(args) => devices::change_media(&args),
        NamedCommand::Autostart(args) => autostart::autostart(&args),
        NamedCommand::Events(args) => events::events(&args),
        // It is executed before this.
        NamedCommand::MachineProcess(_) => Ok(()),
    }
}

/// Returns the machine called `name`.
fn machine(name: &MachineName) -> anyhow::Result<Machine> {
    Ok(Manager::of_user()?.machine(name)?)
}

/// Returns the machine that `socket` names, if it is not the path of a file but the name of a machine.
pub fn running_machine(socket: &Path) -> Option<Machine> {
    if socket.exists() {
        return None;
    }
    let name = socket.to_str()?.parse().ok()?;
    machine(&name).ok()
}

/// Prints text to standard output.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let printed = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    printed.context("cannot write to standard output")
}

/// Prints a line of JSON.
fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_json::to_string(value).context("cannot write JSON")?;
    print(&(text + "\n"))
}

/// Lays out rows in columns, each as wide as its widest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<_> = cells
            .map(|(cell, &width)| format!("{cell:width$}"))
            .collect();
        text.push_str(line.join("   ").trim_end());
        text.push('\n');
    }
    text
}

/// Lays out facts as virsh does: each with its name, a colon, and its value at one place.
fn facts(facts: &[(&str, String)]) -> String {
    let lines = facts
        .iter()
        .map(|(name, value)| format!("{:<16}{value}\n", format!("{name}:")));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        let rows = [row(["NAME", "STATE"]), row(["a-machine", "running"])];
        assert_eq!(table(&rows), "NAME        STATE\na-machine   running\n");
        assert_eq!(table(&[]), "");
    }
}
