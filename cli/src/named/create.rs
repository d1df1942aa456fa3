//! `bantam create`, `define`, `undefine` and `rename`.

use std::env;
use std::ffi::OsStr;
use std::path::Path;

use anyhow::Context;
use bantam_manager::{
    Machine, MachineName, Manager, Removal, StartOptions, defaults, parse_machine_file,
};
use bantam_vmm::config::{MachineTable, read_text_file};

use super::args::{CreateArgs, DefineArgs, RenameArgs, UndefineArgs};
use super::machine;
use crate::message::say;

pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut table = MachineTable::from_options(&args.machine)?;
    if let Some(file) = &args.config {
        table = table.over(MachineTable::from_file(file)?);
    }
    let mut config = table.over(defaults()?).into_config()?;
    config.rebase_paths(&env::current_dir().context("cannot find the current folder")?);
    let manager = Manager::of_user()?;
    let provision = args.first_boot.into_provision(&manager)?;
    let machine = manager.provision(&args.name, &config, args.restart, &provision)?;
    if args.start {
        start_new(&machine)?;
    }
    Ok(())
}

pub fn start_new(machine: &Machine) -> anyhow::Result<()> {
    machine.start(&StartOptions::default()).with_context(|| {
        format!(
            "machine '{}' is defined, but does not start",
            machine.name()
        )
    })?;
    Ok(())
}

pub fn define(args: &DefineArgs) -> anyhow::Result<()> {
    let file = &args.file;
    let text = read_text_file(file).with_context(|| format!("cannot read '{}'", file.display()))?;
    let path = std::path::absolute(file)
        .with_context(|| format!("cannot find the folder of '{}'", file.display()))?;
    let config = parse_machine_file(&text, &path)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(file)?,
    };
    let machine = Manager::of_user()?.define(&name, &config, args.restart)?;
    if machine.is_active()? {
        say(format_args!(
            "machine '{name}' is running: it changes when it is started again"
        ));
    }
    Ok(())
}

fn name_of(file: &Path) -> anyhow::Result<MachineName> {
    let stem = file.file_stem().and_then(OsStr::to_str);
    let name = stem.unwrap_or_default().parse();
    name.with_context(|| {
        format!(
            "the name of '{}' is not one for a machine; give another (--name)",
            file.display()
        )
    })
}

pub fn undefine(args: &UndefineArgs) -> anyhow::Result<()> {
    let manager = Manager::of_user()?;
    let machine = manager.machine(&args.name)?;
    let removal = Removal {
        storage: args.remove_all_storage,
        snapshots: args.snapshots,
        managed_save: args.managed_save,
    };
    for (image, reason) in manager.undefine(&machine, removal)? {
        say(format_args!("'{}' is kept: {reason}", image.display()));
    }
    Ok(())
}

pub fn rename(args: &RenameArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    Manager::of_user()?.rename(&machine, &args.new_name)?;
    Ok(())
}
