//! `bantam snapshot`: takes, examines and merges snapshots.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use bantam_vmm::{FrozenDisk, SnapshotDescription, SnapshotFiles, merge_snapshots};
use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::local_time::local_time;

/// The options of `bantam snapshot`.
#[derive(Debug, clap::Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    command: SnapshotCommand,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Shows what is in a snapshot
    Info {
        /// Directory of the snapshot
        directory: PathBuf,
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
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
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
        SnapshotCommand::Info { directory, output } => info(&directory, output),
        SnapshotCommand::Merge { base, directories } => merge(&base, &directories),
    }
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
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot write to standard output")
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
        lines.push(format!("network device {name}: tap {}", net.tap));
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
        anyhow::bail!("name the directory of the new snapshot");
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
