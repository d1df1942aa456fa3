//! `bantam snapshot`: takes, examines and merges snapshots.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use bantam_control::ControlClient;
use bantam_manager::MachineName;
use bantam_vmm::config::NetEnd;
use bantam_vmm::{
    Answer, Command, DiskSnapshot, FrozenDisk, SnapshotBase, SnapshotDescription, SnapshotDisks,
    SnapshotFiles, SnapshotOptions, SnapshotTaken, merge_snapshots,
};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::control::connect;
use crate::local_time::local_time;
use crate::named;

/// How long a machine may take to write a snapshot.
const WRITE_TIME: Duration = Duration::from_secs(24 * 60 * 60);

// The options of `bantam snapshot`.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: Option<SnapshotCommand>,

    #[command(flatten)]
    take: TakeArgs,
}

// The options for taking a snapshot.
#[derive(Debug, clap::Args)]
struct TakeArgs {
    /// The control socket that the machine was started with (--control), or the name of a machine
    #[arg(required = true)]
    socket: Option<PathBuf>,

    /// Directory for the snapshot, in the place of an earlier one
    #[arg(required = true)]
    directory: Option<PathBuf>,

    /// Write only what has changed since this snapshot
    #[arg(long, value_name = "BASE")]
    diff: Option<PathBuf>,

    /// End the machine, as if its power were cut
    ///
    /// Its disks then need no overlays.
    #[arg(long)]
    stop: bool,

    /// Path of the overlay that a disk goes on with; can be given more than once
    ///
    /// By default it is beside the image of the disk. If one is given, each disk that the guest can write to needs one.
    #[arg(long = "overlay", value_name = "NAME=PATH", value_parser = overlay, conflicts_with = "stop")]
    overlays: Vec<DiskSnapshot>,

    /// Form of the output
    #[arg(long, value_enum, default_value_t)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Takes a snapshot of a named machine, and keeps it with the machine
    ///
    /// It has all disks at one instant, and the memory of a machine that runs.
    Create(named::SnapshotCreateArgs),
    /// Lists the snapshots of a named machine
    List(named::SnapshotListArgs),
    /// Shows the snapshots of a named machine, each below the one that it was taken after
    Tree(named::NameArgs),
    /// Brings a named machine back to where it was at a snapshot
    ///
    /// The machine goes on from there at once if the snapshot has memory, and is shut off otherwise. What its disks have
    /// been given since is lost.
    Revert(named::SnapshotNameArgs),
    /// Deletes a snapshot of a named machine
    Delete(named::SnapshotNameArgs),
    /// Shows what is in a snapshot
    Info {
        /// Directory of the snapshot, or a machine
        #[arg(value_name = "DIRECTORY|MACHINE")]
        directory: PathBuf,
        /// Snapshot of the machine
        snapshot: Option<MachineName>,
        /// Form of the output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Makes a full snapshot of one and of the differential ones that follow it
    Merge {
        /// Directory of a full snapshot
        base: PathBuf,
        /// Directories of differential snapshots, each based on the one before, and then of the new one
        #[arg(required = true, num_args = 2.., value_name = "DIFF... OUT")]
        directories: Vec<PathBuf>,
    },
}

/// How something is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Executes `bantam snapshot`.
pub fn run(args: SnapshotArgs) -> anyhow::Result<()> {
    match args.command {
        Some(SnapshotCommand::Create(args)) => named::create_snapshot(&args),
        Some(SnapshotCommand::List(args)) => named::list_snapshots(&args),
        Some(SnapshotCommand::Tree(args)) => named::snapshot_tree(&args),
        Some(SnapshotCommand::Revert(args)) => named::revert(&args),
        Some(SnapshotCommand::Delete(args)) => named::delete_snapshot(&args),
        Some(SnapshotCommand::Info {
            directory,
            snapshot: Some(snapshot),
            output,
        }) => {
            let machine = directory.to_str().unwrap_or_default().parse()?;
            match named::snapshot_with_memory(&machine, &snapshot)? {
                Some(directory) => info(&directory, output),
                None => named::describe_snapshot(&machine, &snapshot, output == Output::Json),
            }
        }
        Some(SnapshotCommand::Info {
            directory, output, ..
        }) => info(&directory, output),
        Some(SnapshotCommand::Merge { base, directories }) => merge(&base, &directories),
        None => take(args.take),
    }
}

/// Has a machine take a snapshot of itself.
fn take(args: TakeArgs) -> anyhow::Result<()> {
    let (Some(socket), Some(directory)) = (args.socket, args.directory) else {
        bail!("name the control socket of the machine and the directory of the snapshot");
    };
    let base = args.diff.as_deref().map(|base| {
        files(base).with_context(|| format!("cannot find snapshot '{}'", base.display()))
    });
    let mut client = connect(&socket)?;
    let options = SnapshotOptions {
        files: new_files(&directory)?,
        base: base.transpose()?.map(SnapshotBase::Files),
        disks: match args.overlays.is_empty() {
            true => SnapshotDisks::Overlays,
            false => SnapshotDisks::OverlaysAt(args.overlays),
        },
        stop: args.stop,
        note: None,
    };
    let taken = execute(&mut client, options)?;
    let text = match args.output {
        Output::Text => format!(
            "snapshot {}: {} pages; the guest stood still for {:.1} ms\n",
            taken.id,
            taken.pages,
            taken.paused_for.as_secs_f64() * 1000.0
        ),
        Output::Json => format!(
            "{}\n",
            json!({
                "id": taken.id.to_string(),
                "pages": taken.pages,
                "paused-for-us": taken.paused_for.as_micros(),
            })
        ),
    };
    print(&text)
}

fn execute(client: &mut ControlClient, options: SnapshotOptions) -> anyhow::Result<SnapshotTaken> {
    client.set_answer_time(WRITE_TIME);
    match client.execute(Command::Snapshot(Box::new(options)))? {
        Answer::SnapshotTaken(taken) => Ok(taken),
        _ => bail!("the machine gives another answer than that of a snapshot"),
    }
}

/// Returns the files of a snapshot by paths that the machine knows, which may be in another folder.
fn files(directory: &Path) -> io::Result<SnapshotFiles> {
    let directory = fs::canonicalize(directory)?;
    Ok(SnapshotFiles::in_directory(&directory))
}

/// Returns the files of a new snapshot, and makes its directory.
fn new_files(directory: &Path) -> anyhow::Result<SnapshotFiles> {
    fs::create_dir_all(directory)
        .and_then(|()| files(directory))
        .with_context(|| format!("cannot create '{}'", directory.display()))
}

/// Reads a disk's overlay: `NAME=PATH`.
fn overlay(text: &str) -> Result<DiskSnapshot, String> {
    let (name, path) = text
        .split_once('=')
        .ok_or("it must be the name of a disk, '=', and a path")?;
    Ok(DiskSnapshot {
        disk: name.parse().map_err(|error| format!("{error}"))?,
        path: std::path::absolute(path).map_err(|error| error.to_string())?,
    })
}

fn print(text: &str) -> anyhow::Result<()> {
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")
}

fn info(directory: &Path, output: Output) -> anyhow::Result<()> {
    let files = SnapshotFiles::in_directory(directory);
    let snapshot = SnapshotDescription::read(&files)?;
    // A missing memory file is told when the snapshot is used.
    let used = fs::metadata(&files.memory).map_or(0, |file| file.blocks() * 512);
    let text = match output {
        Output::Text => text(&snapshot, used),
        Output::Json => format!("{:#}\n", json(&snapshot, used)),
    };
    print(&text)
}

fn text(snapshot: &SnapshotDescription, used: u64) -> String {
    let facts = &snapshot.facts;
    let config = &snapshot.config;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let mut lines = vec![
        format!("id: {}", facts.id),
        format!("taken: {}", local_time(facts.taken_at)),
        format!(
            "taken on: {}, Linux {}",
            snapshot.host.name, snapshot.host.kernel
        ),
        format!("taken by: bantam {}", facts.program_version),
    ];
    lines.push(match (facts.base, snapshot.changed_pages) {
        (Some(base), Some(pages)) => format!("kind: {pages} pages that changed since {base}"),
        _ => "kind: full".to_owned(),
    });
    lines.push(format!("kernel: {}", config.kernel.display()));
    lines.push(format!("vCPUs: {}", config.cpus.get()));
    let size = mib(facts.memory_size());
    lines.push(format!("memory: {size} MiB, {} MiB on disk", mib(used)));
    for (name, disk) in config.disk_names().zip(&config.disks) {
        let frozen = snapshot.disks.iter().find(|it| it.name == name);
        let state = match frozen.map(FrozenDisk::is_unchanged) {
            None => "not protected",
            Some(Ok(true)) => "unchanged",
            Some(Ok(false)) => "CHANGED since",
            Some(Err(_)) => "MISSING",
        };
        lines.push(format!("disk {name}: {} ({state})", disk.path.display()));
    }
    for (name, net) in config.net_names().zip(&config.nets) {
        let end = match net.end() {
            NetEnd::Tap(tap) => format!("tap {tap}"),
            NetEnd::Host(network) => network.to_string(),
            NetEnd::User => "user network".to_owned(),
            NetEnd::Passt(path) => format!("network at {}", path.display()),
            NetEnd::Descriptor(fd) => format!("tap of descriptor {fd}"),
        };
        lines.push(format!("network device {name}: {end}"));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn json(snapshot: &SnapshotDescription, used: u64) -> Value {
    let facts = &snapshot.facts;
    let disks = snapshot.config.disk_names().zip(&snapshot.config.disks);
    let disks = disks.map(|(name, disk)| {
        let frozen = snapshot.disks.iter().find(|it| it.name == name);
        json!({
            "name": name,
            "path": disk.path.to_string_lossy(),
            "readonly": disk.readonly,
            "protected": frozen.is_some(),
            "unchanged": frozen.map(|frozen| frozen.is_unchanged().unwrap_or(false)),
        })
    });
    json!({
        "id": facts.id.to_string(),
        "base": facts.base.map(|base| base.to_string()),
        "taken-at": facts.taken_at,
        "program-version": facts.program_version,
        "host": {"name": snapshot.host.name, "kernel": snapshot.host.kernel},
        "changed-pages": snapshot.changed_pages,
        "vcpus": snapshot.config.cpus.get(),
        "memory-bytes": facts.memory_size(),
        "memory-bytes-on-disk": used,
        "disks": disks.collect::<Vec<_>>(),
        "machine-file": snapshot.config.to_toml(),
    })
}

fn merge(base: &Path, directories: &[PathBuf]) -> anyhow::Result<()> {
    let Some((target, differential)) = directories.split_last() else {
        bail!("name the directory of the new snapshot");
    };
    let differential: Vec<_> = differential
        .iter()
        .map(|directory| SnapshotFiles::in_directory(directory))
        .collect();
    fs::create_dir_all(target).with_context(|| format!("cannot create '{}'", target.display()))?;
    let base = SnapshotFiles::in_directory(base);
    merge_snapshots(&base, &differential, &SnapshotFiles::in_directory(target))?;
    Ok(())
}
