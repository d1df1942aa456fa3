//! `bantam create`, `define`, `undefine` and `rename`.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bantam_libvirt::{Boot, is_xml};
use bantam_manager::{Machine, MachineName, Manager, Removal, StartOptions, defaults};
use bantam_vmm::config::{MachineConfig, MachineTable, read_text_file};

use super::args::{CreateArgs, DefineArgs, RenameArgs, UndefineArgs};
use super::domain::define_domain;
use super::machine;
use crate::default_kernel;
use crate::message::say;

pub fn create(args: CreateArgs) -> anyhow::Result<()> {
    let mut table = MachineTable::from_options(&args.machine)?;
    if let Some(file) = &args.config {
        table = table.over(MachineTable::from_file(file)?);
    }
    let table = default_kernel::complete(table, args.first_boot.has_image())?;
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

pub fn define(args: DefineArgs) -> anyhow::Result<()> {
    let file = &args.file;
    let text = read_text_file(file).with_context(|| format!("cannot read '{}'", file.display()))?;
    let machine = match is_xml(&text) {
        true => {
            let boot = args.kernel.map(|kernel| {
                Ok::<_, anyhow::Error>(Boot::Given {
                    kernel: absolute(&kernel)?,
                    initrd: args.initrd.as_deref().map(absolute).transpose()?,
                    append: args.append,
                })
            });
            let name = args.name.as_ref();
            define_domain(&text, name, args.restart, boot.transpose()?)
                .with_context(|| format!("cannot define a machine by '{}'", file.display()))?
        }
        false if args.kernel.is_some() => {
            bail!(
                "--kernel is for libvirt's XML: write it into '{}'",
                file.display()
            )
        }
        false => {
            let config = config_of(&text, file)?;
            let name = match args.name {
                Some(name) => name,
                None => name_of(file)?,
            };
            Manager::of_user()?.define(&name, &config, args.restart)?
        }
    };
    if machine.is_active()? {
        say(format_args!(
            "machine '{}' is running: it changes when it is started again",
            machine.name()
        ));
    }
    Ok(())
}

/// Reads the text of a machine file, and completes it by the kernel that is installed.
pub fn config_of(text: &str, file: &Path) -> anyhow::Result<MachineConfig> {
    let table = MachineTable::from_toml(text, &absolute(file)?)?;
    let table = default_kernel::complete(table, false)?;
    Ok(table.over(defaults()?).into_unopened_config()?)
}

fn absolute(file: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(file)
        .with_context(|| format!("cannot find the folder of '{}'", file.display()))
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
