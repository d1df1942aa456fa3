//! Bantam under the name `jailer`: the options of Firecracker's jailer.

use std::convert::Infallible;
use std::ffi::OsString;
use std::path::PathBuf;

use bantam_jailer::{DEFAULT_BASE, FileValue, Groups, Jailer, ResourceLimit, Version};
use clap::Parser;

use crate::args::instance_id;

/// The options under the name jailer.
#[derive(Debug, Parser)]
#[command(name = "jailer", max_term_width = 100, disable_version_flag = true)]
#[command(
    about = "Bantam in place of Firecracker's jailer: starts a monitor as another user, with a root folder of its own"
)]
pub struct JailerArgs {
    /// Name of the jail: up to 64 letters, digits and dashes
    #[arg(long, value_name = "NAME", value_parser = instance_id, required_unless_present = "version")]
    id: Option<String>,

    /// The monitor: a file with firecracker in its name, such as a link to bantam
    ///
    /// It is copied into the jail, so it must need no libraries.
    #[arg(long, value_name = "FILE", required_unless_present = "version")]
    exec_file: Option<PathBuf>,

    /// Number of the user that the monitor runs as
    #[arg(long, value_name = "NUMBER", required_unless_present = "version")]
    uid: Option<u32>,

    /// Number of the group that the monitor runs as
    #[arg(long, value_name = "NUMBER", required_unless_present = "version")]
    gid: Option<u32>,

    /// Folder for jails: the root of the monitor is FOLDER/FILE/NAME/root
    #[arg(long, value_name = "FOLDER", default_value = DEFAULT_BASE)]
    chroot_base_dir: PathBuf,

    /// File of the network namespace that the monitor is in
    #[arg(long, value_name = "FILE")]
    netns: Option<PathBuf>,

    /// Start the monitor in a session of its own without a terminal, and end
    #[arg(long)]
    daemonize: bool,

    /// Start the monitor as the first process of a PID namespace, and end
    #[arg(long)]
    new_pid_ns: bool,

    /// What the control group of the jail is told, such as cpu.shares=512; can be given more than once
    #[arg(long = "cgroup", value_name = "FILE=VALUE")]
    cgroups: Vec<FileValue>,

    /// Version of control groups: 1 or 2
    #[arg(long, value_name = "1|2", default_value = "1", hide_possible_values = true, value_parser = ["1", "2"])]
    cgroup_version: String,

    /// Control group that has the jail's group [default: one with the name of the monitor's file]
    ///
    /// With version 2 and without --cgroup, the monitor is put into this group itself, which must exist.
    #[arg(long, value_name = "PATH")]
    parent_cgroup: Option<PathBuf>,

    /// Limit of a resource: fsize=BYTES for files that are written, no-file=NUMBER for descriptors (2048)
    #[arg(long = "resource-limit", value_name = "RESOURCE=VALUE")]
    resource_limits: Vec<ResourceLimit>,

    /// Print the version of Firecracker whose jailer this is like, and that of Bantam
    #[arg(long, short = 'V')]
    pub version: bool,

    /// Options of the monitor, after --
    #[arg(last = true, value_name = "OPTION")]
    arguments: Vec<OsString>,
}

/// Becomes the monitor.
///
/// # Errors
/// Those of [`Jailer::enter`].
pub fn enter(args: JailerArgs) -> anyhow::Result<Infallible> {
    let missing = || anyhow::anyhow!("--id, --exec-file, --uid and --gid are required");
    let jailer = Jailer {
        id: args.id.ok_or_else(missing)?,
        exec_file: args.exec_file.ok_or_else(missing)?,
        uid: args.uid.ok_or_else(missing)?,
        gid: args.gid.ok_or_else(missing)?,
        base: args.chroot_base_dir,
        network_namespace: args.netns,
        daemonize: args.daemonize,
        new_pid_namespace: args.new_pid_ns,
        groups: Groups {
            version: match &*args.cgroup_version {
                "2" => Version::Two,
                _ => Version::One,
            },
            parent: args.parent_cgroup,
            values: args.cgroups,
        },
        limits: args.resource_limits.into_iter().collect(),
        arguments: args.arguments,
    };
    Ok(jailer.enter()?)
}
