//! `bantam sysprep`, and what `bantam clone` resets.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bantam_manager::{
    Helper, IdentityReset, Machine, MachineName, Manager, reset_identity_of_image,
};
use bantam_seed::HostName;
use bantam_sysprep::{Operation, OperationSet, Report};
use bantam_vmm::config::DiskFormatOption;
use clap::Args;
use serde_json::json;

use super::args::Output;
use super::{print, print_json, table};
use crate::default_kernel;
use crate::image::cancel_on_signal;

/// Names the initrd of the helper machine in place of the one that was installed.
const VARIABLE: &str = "BANTAM_SYSPREP_INITRD";
/// The initrd, below a folder for data such as `/usr/share`.
const FILE: &str = "bantam/sysprep.cpio";

// A documentation comment would be the help of `bantam sysprep`.
//
// The options of `bantam sysprep`.
#[derive(Debug, Args)]
pub struct SysprepArgs {
    /// The machine, or a disk image: a path with a slash, or a name that no machine has
    #[arg(value_name = "MACHINE|DISK", required_unless_present = "list")]
    target: Option<PathBuf>,

    /// List what can be reset, and what is by default
    #[arg(long, conflicts_with_all = ["target", "operations", "hostname", "format", "dry_run"])]
    list: bool,

    #[command(flatten)]
    chosen: OperationArgs,

    /// The new host name; by default that of the machine
    #[arg(long, value_name = "NAME")]
    hostname: Option<HostName>,

    /// Format of a disk image, raw or qcow2; by default qcow2 if its name ends in .qcow2, else raw
    #[arg(long, value_name = "FORMAT")]
    format: Option<DiskFormatOption>,

    /// Change nothing, and say what would be changed
    #[arg(long)]
    dry_run: bool,

    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

// What is reset.
#[derive(Debug, Args)]
pub struct OperationArgs {
    /// What is reset: names of bantam sysprep --list, defaults or all, separated by commas; -NAME leaves one out
    #[arg(
        long,
        value_name = "LIST",
        alias = "enable",
        allow_hyphen_values = true
    )]
    pub operations: Option<OperationSet>,
}

impl OperationArgs {
    /// Returns how an identity is reset.
    ///
    /// # Errors
    /// If what the helper machine starts from is not installed.
    pub fn to_reset(&self, host_name: Option<HostName>) -> anyhow::Result<IdentityReset> {
        Ok(IdentityReset {
            operations: self.operations.clone().unwrap_or_default(),
            host_name,
            helper: helper()?,
        })
    }
}

pub fn sysprep(args: &SysprepArgs) -> anyhow::Result<()> {
    let Some(target) = &args.target else {
        return list(args.output);
    };
    let cancelled = cancel_on_signal()?;
    let manager = Manager::of_user()?;
    let machine = machine_of(&manager, target);
    if machine.is_none() && !target.exists() {
        bail!(
            "there is neither a machine nor a disk image '{}'; `bantam list --all` shows the machines",
            target.display()
        );
    }
    let reset = args.chosen.to_reset(args.hostname.clone())?;
    let report = match machine {
        Some(_) if args.format.is_some() => bail!(
            "--format is for a disk image, and '{}' is a machine",
            target.display()
        ),
        Some(machine) => manager.reset_identity(&machine, &reset, args.dry_run, cancelled)?,
        None => reset_identity_of_image(target, args.format, &reset, args.dry_run, cancelled)?,
    };
    match args.output {
        Output::Json => print_json(&report),
        Output::Text if args.dry_run => print(&format!(
            "Nothing is changed. This would be:\n{}",
            text_of(&report)
        )),
        Output::Text => print(&text_of(&report)),
    }
}

/// Returns the machine that is meant, if one is: a name without a slash is that of a machine if there is one.
fn machine_of(manager: &Manager, target: &Path) -> Option<Machine> {
    let name: MachineName = target.to_str()?.parse().ok()?;
    manager.machine(&name).ok()
}

fn list(output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        let operations = Operation::ALL.map(|it| {
            json!({"name": it.name(), "default": it.is_default(), "description": it.description()})
        });
        return print_json(&operations);
    }
    let mut rows = vec![["OPERATION", "DEFAULT", "DOES"].map(str::to_owned).to_vec()];
    rows.extend(Operation::ALL.map(|it| {
        let is_default = if it.is_default() { "yes" } else { "no" };
        [it.name(), is_default, it.description()]
            .map(str::to_owned)
            .to_vec()
    }));
    print(&table(&rows))
}

/// Lays a report out for people.
pub fn text_of(report: &Report) -> String {
    let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
    let mut text = format!("System: {}\n", report.system);
    let changes = report.changes.iter();
    let changes: Vec<_> = [row(["CHANGED", "OBJECT", "HOW"])]
        .into_iter()
        .chain(changes.map(|it| row([it.operation.name(), &it.object, &it.detail])))
        .collect();
    text.push_str(&table(&changes));
    if !report.left.is_empty() {
        let left = report.left.iter().map(|it| {
            row([
                it.operation.map_or("all", Operation::name),
                &it.object,
                &it.reason,
            ])
        });
        let left: Vec<_> = [row(["LEFT ALONE", "OBJECT", "WHY"])]
            .into_iter()
            .chain(left)
            .collect();
        text.push_str(&table(&left));
    }
    text
}

/// Finds what the helper machine starts from.
fn helper() -> anyhow::Result<Helper> {
    let kernel = default_kernel::find().context(
        "no kernel is installed for the helper machine: install Bantam's (make install), or have BANTAM_KERNEL name one",
    )?;
    let initrd = match env::var_os(VARIABLE) {
        Some(initrd) if !initrd.is_empty() => Some(PathBuf::from(initrd)),
        _ => default_kernel::find_data(FILE),
    };
    let initrd = initrd.with_context(|| {
        format!("the initrd of the helper machine is not installed: install Bantam (make install), or have {VARIABLE} name one")
    })?;
    Ok(Helper { kernel, initrd })
}
