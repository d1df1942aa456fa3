//! `bantam snapshot create`, `list`, `tree`, `revert` and `delete`, for named machines.

use std::path::PathBuf;

use bantam_manager::{MachineName, MachineSnapshot, SnapshotPlan};
use serde_json::json;

use super::args::{NameArgs, Output, SnapshotCreateArgs, SnapshotListArgs, SnapshotNameArgs};
use super::{facts, machine, print, print_json, table};
use crate::local_time::local_time;
use crate::message::say;

pub fn create_snapshot(args: &SnapshotCreateArgs) -> anyhow::Result<()> {
    let taken = machine(&args.name)?.take_named_snapshot(&SnapshotPlan {
        name: args.snapshot.clone(),
        description: args.description.clone(),
        disk_only: args.disk_only,
    })?;
    say(format_args!(
        "snapshot '{}' of machine '{}': {}",
        taken.name,
        args.name,
        content(&taken)
    ));
    Ok(())
}

fn content(snapshot: &MachineSnapshot) -> &'static str {
    match snapshot.has_memory {
        true => "disks and memory",
        false => "disks",
    }
}

pub fn list_snapshots(args: &SnapshotListArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let snapshots = machine.snapshots()?;
    if args.only_names {
        let names = snapshots.iter().map(|it| format!("{}\n", it.name));
        return print(&names.collect::<String>());
    }
    let current = machine.settings()?.current_snapshot;
    let is_current = |it: &MachineSnapshot| current.as_deref() == Some(it.name.as_str());
    if args.output == Output::Json {
        let snapshots = snapshots.iter().map(|it| {
            json!({
                "name": it.name,
                "created": it.created,
                "parent": it.parent,
                "memory": it.has_memory,
                "description": it.description,
                "current": is_current(it),
            })
        });
        return print_json(&snapshots.collect::<Vec<_>>());
    }
    let heading = ["Name", "Creation Time", "Content", "Description"].map(str::to_owned);
    let mut rows = vec![heading.to_vec()];
    rows.extend(snapshots.iter().map(|it| {
        vec![
            it.name.to_string(),
            local_time(it.created),
            content(it).to_owned(),
            it.description.clone().unwrap_or_default(),
        ]
    }));
    print(&table(&rows))
}

pub fn snapshot_tree(args: &NameArgs) -> anyhow::Result<()> {
    let machine = machine(&args.name)?;
    let snapshots = machine.snapshots()?;
    let current = machine.settings()?.current_snapshot;
    print(&tree(&snapshots, current.as_deref()))
}

/// Draws the snapshots, each below its parent.
fn tree(snapshots: &[MachineSnapshot], current: Option<&str>) -> String {
    let is_known = |name: &str| snapshots.iter().any(|it| it.name.as_str() == name);
    let children = |parent: Option<&str>| {
        let found = snapshots.iter().filter(move |it| {
            let own = it.parent.as_deref().filter(|name| is_known(name));
            own == parent
        });
        found.collect::<Vec<_>>()
    };
    let mut text = String::new();
    // The next one is at the end.
    let mut waiting: Vec<_> = children(None).into_iter().rev().map(|it| (0, it)).collect();
    let mut left = snapshots.len();
    // A record that was changed by hand may have a loop.
    while let Some((depth, snapshot)) = waiting.pop()
        && left > 0
    {
        left -= 1;
        let name = snapshot.name.as_str();
        let mark = if current == Some(name) {
            " (current)"
        } else {
            ""
        };
        text.push_str(&format!("{}{name}{mark}\n", "  ".repeat(depth)));
        let below = children(Some(name)).into_iter().rev();
        waiting.extend(below.map(|it| (depth + 1, it)));
    }
    text
}

pub fn revert(args: &SnapshotNameArgs) -> anyhow::Result<()> {
    let snapshot = machine(&args.name)?.revert(&args.snapshot)?;
    let state = match snapshot.has_memory {
        true => "goes on",
        false => "is shut off",
    };
    say(format_args!(
        "machine '{}' {state}, as it was at snapshot '{}'",
        args.name, snapshot.name
    ));
    Ok(())
}

pub fn delete_snapshot(args: &SnapshotNameArgs) -> anyhow::Result<()> {
    Ok(machine(&args.name)?.delete_snapshot(&args.snapshot)?)
}

/// Returns the directory with the memory of a machine's snapshot, or `None` if it has none.
pub fn snapshot_with_memory(
    name: &MachineName,
    snapshot: &MachineName,
) -> anyhow::Result<Option<PathBuf>> {
    let machine = machine(name)?;
    let has_memory = machine.snapshot(snapshot)?.has_memory;
    Ok(has_memory.then(|| machine.snapshot_folder(snapshot)))
}

/// Prints what is known of a snapshot that has no memory.
pub fn describe_snapshot(
    name: &MachineName,
    snapshot: &MachineName,
    as_json: bool,
) -> anyhow::Result<()> {
    let record = machine(name)?.snapshot(snapshot)?;
    if as_json {
        return print_json(&record);
    }
    let mut lines = vec![
        ("Name", record.name.to_string()),
        ("Machine", name.to_string()),
        ("Taken", local_time(record.created)),
        ("Content", content(&record).to_owned()),
    ];
    if let Some(parent) = record.parent {
        lines.push(("Parent", parent));
    }
    for disk in &record.disks {
        lines.push(("Disk", format!("{} ({})", disk.name, disk.image.display())));
    }
    print(&facts(&lines))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(name: &str, created: u64, parent: Option<&str>) -> MachineSnapshot {
        MachineSnapshot {
            name: name.parse().unwrap(),
            created,
            parent: parent.map(str::to_owned),
            has_memory: false,
            description: None,
            disks: Vec::new(),
            machine_file: String::new(),
        }
    }

    #[test]
    fn each_snapshot_is_below_its_parent() {
        let snapshots = [
            snapshot("a", 1, None),
            snapshot("b", 2, Some("a")),
            snapshot("c", 3, Some("b")),
            snapshot("d", 4, Some("a")),
            snapshot("e", 5, Some("gone")),
        ];
        assert_eq!(
            tree(&snapshots, Some("d")),
            "a\n  b\n    c\n  d (current)\ne\n"
        );
    }

    #[test]
    fn a_loop_of_parents_is_not_followed_for_ever() {
        let snapshots = [snapshot("a", 1, Some("b")), snapshot("b", 2, Some("a"))];
        assert_eq!(tree(&snapshots, None), "");
    }
}
