//! `bantam image snapshot`.

use std::fmt::Write;
use std::sync::Arc;

use anyhow::Context;
use bantam_storage::Image;
use bantam_storage::qcow2::Snapshot;
use bantam_storage::tools::{Opened, Purpose, open};

use super::args::SnapshotArgs;
use super::output::print;
use super::purpose;
use super::size::human;
use super::target::options;
use crate::local_time::local_time;

/// Lists or changes the snapshots of an image.
pub fn snapshot(args: &SnapshotArgs) -> anyhow::Result<()> {
    let changes = args.create.is_some() || args.apply.is_some() || args.delete.is_some();
    let purpose = match changes {
        true => Purpose::Write,
        false => purpose(args.force_share),
    };
    let opened = open(&args.file, None, purpose)?;
    let name = args.file.display();
    let Some(image) = opened.qcow2 else {
        // Other formats have no snapshots to list.
        anyhow::ensure!(
            !changes,
            "'{name}' has no snapshots: it is {}",
            opened.format
        );
        return Ok(());
    };
    if let Some(snapshot) = &args.create {
        image
            .create_snapshot(snapshot)
            .with_context(|| format!("cannot create the snapshot '{snapshot}' in '{name}'"))?;
    } else if let Some(snapshot) = &args.apply {
        image
            .apply_snapshot(snapshot)
            .with_context(|| format!("cannot apply the snapshot '{snapshot}' of '{name}'"))?;
    } else if let Some(snapshot) = &args.delete {
        image
            .delete_snapshot(snapshot)
            .with_context(|| format!("cannot delete the snapshot '{snapshot}' of '{name}'"))?;
    } else {
        let snapshots = image.snapshots()?;
        if !snapshots.is_empty() {
            let listed = snapshots.iter().map(|snapshot| Listed {
                id: &snapshot.id,
                name: &snapshot.name,
                machine_state: snapshot.machine_state,
                seconds: snapshot.seconds,
                guest_clock: snapshot.guest_clock,
                instructions: snapshot.instructions(),
            });
            print(&list(listed))?;
        }
        return Ok(());
    }
    image
        .flush()
        .with_context(|| format!("cannot write '{name}'"))
}

/// Returns the disk of an open image as it was at a snapshot. It is given as for qemu-img: by its name or identifier, or as
/// `snapshot.id=ID,snapshot.name=NAME`.
pub fn at_snapshot(opened: Opened, wanted: &str) -> anyhow::Result<Opened> {
    let name = opened.files.first().map(|path| path.display().to_string());
    let name = name.unwrap_or_default();
    let Some(image) = &opened.qcow2 else {
        anyhow::bail!("'{name}' has no snapshots: it is {}", opened.format);
    };
    let (mut by_id, mut by_name) = (None, None);
    if wanted.starts_with("snapshot.") {
        let mut options = options(&[wanted.to_owned()])?;
        (by_id, by_name) = (options.take("snapshot.id"), options.take("snapshot.name"));
        options.finish("of a snapshot")?;
    }
    let id = match (&by_id, &by_name) {
        (None, None) => wanted.to_owned(),
        _ => {
            let is_wanted = |snapshot: &Snapshot| {
                by_id.as_ref().is_none_or(|id| *id == snapshot.id)
                    && by_name.as_ref().is_none_or(|name| *name == snapshot.name)
            };
            let found = image.snapshots()?.into_iter().find(is_wanted);
            let found = found.with_context(|| format!("'{name}' has no snapshot '{wanted}'"))?;
            found.id
        }
    };
    let snapshot = image
        .open_snapshot(&id)
        .with_context(|| format!("cannot open a snapshot of '{name}'"))?;
    let snapshot = Arc::new(snapshot);
    Ok(Opened {
        image: Arc::clone(&snapshot) as Arc<dyn Image>,
        qcow2: Some(snapshot),
        ..opened
    })
}

/// A snapshot in a list.
pub struct Listed<'a> {
    /// Its identifier.
    pub id: &'a str,
    /// Its name.
    pub name: &'a str,
    /// The size of the machine's state in bytes.
    pub machine_state: u64,
    /// When it was made, in seconds since 1970.
    pub seconds: u32,
    /// For how long the guest had run, in nanoseconds.
    pub guest_clock: u64,
    /// How many instructions the guest had executed, if they were counted.
    pub instructions: Option<u64>,
}

/// Lists snapshots as qemu-img does.
pub fn list<'a>(snapshots: impl Iterator<Item = Listed<'a>>) -> String {
    let mut text = format!(
        "Snapshot list:\n{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n",
        "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"
    );
    for snapshot in snapshots {
        let milliseconds = snapshot.guest_clock / 1_000_000;
        let (seconds, milliseconds) = (milliseconds / 1000, milliseconds % 1000);
        let clock = format!(
            "{:02}:{:02}:{:02}.{milliseconds:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60
        );
        let _ = writeln!(
            text,
            "{:<9} {:<16} {:>8}{:>20}{clock:>13}{:>11}",
            snapshot.id,
            snapshot.name,
            human(snapshot.machine_state),
            local_time(snapshot.seconds.into()),
            snapshot
                .instructions
                .map_or(String::new(), |count| count.to_string())
        );
    }
    text
}
