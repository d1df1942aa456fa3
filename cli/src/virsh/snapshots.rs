//! Commands for snapshots of machines.

use anyhow::{Context, anyhow, bail};
use bantam_manager::{Machine, MachineName, MachineSnapshot, SnapshotPlan};

use super::Session;
use super::args::Arguments;
use super::domains::domain;
use crate::local_time::local_time_with_zone;

/// Returns the name of the snapshot that a command is about: `--snapshotname`, or with `--current` the current one.
fn snapshot(machine: &Machine, arguments: &Arguments) -> anyhow::Result<MachineName> {
    let name = match (arguments.value("snapshotname"), arguments.has("current")) {
        (Some(_), true) => {
            bail!("Options --snapshotname and --current are mutually exclusive")
        }
        (None, false) => bail!("--snapshotname or --current is required"),
        (Some(name), false) => name.to_owned(),
        (None, true) => current_of(machine)?,
    };
    let found = machine.snapshots()?.into_iter().map(|it| it.name);
    let found = found.into_iter().find(|it| it.as_str() == name);
    found.ok_or_else(|| {
        anyhow!("Domain snapshot not found: no domain snapshot with matching name '{name}'")
    })
}

fn current_of(machine: &Machine) -> anyhow::Result<String> {
    let current = machine.settings()?.current_snapshot;
    current.with_context(|| format!("domain '{}' has no current snapshot", machine.name()))
}

/// Returns the state of the machine in a snapshot.
fn state(snapshot: &MachineSnapshot) -> &'static str {
    match snapshot.has_memory {
        true => "running",
        false => "disk-snapshot",
    }
}

pub fn create(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let plan = SnapshotPlan {
        name: arguments.value("name").map(str::parse).transpose()?,
        description: arguments.value("description").map(str::to_owned),
        disk_only: arguments.has("disk-only"),
    };
    let taken = machine.take_named_snapshot(&plan)?;
    session.tell(&format!("Domain snapshot {} created", taken.name));
    Ok(())
}

pub fn list(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let mut snapshots = domain(arguments)?.snapshots()?;
    snapshots.sort_by(|one, other| one.name.cmp(&other.name));
    if arguments.has("name") {
        for it in &snapshots {
            session.print(&format!("{}\n", it.name));
        }
        return Ok(());
    }
    let has_parent = arguments.has("parent");
    let rows = snapshots.into_iter().map(|it| {
        let state = state(&it).to_owned();
        let mut row = vec![it.name.to_string(), local_time_with_zone(it.created), state];
        if has_parent {
            row.push(it.parent.unwrap_or_default());
        }
        row
    });
    let heading = match has_parent {
        true => &["Name", "Creation Time", "State", "Parent"][..],
        false => &["Name", "Creation Time", "State"],
    };
    session.table(heading, &rows.collect::<Vec<_>>());
    Ok(())
}

pub fn current(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    if !arguments.has("name") {
        bail!("Bantam has no XML of a snapshot; use --name, or 'snapshot-info'");
    }
    let name = current_of(&domain(arguments)?)?;
    session.print(&(name + "\n"));
    Ok(())
}

pub fn info(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = snapshot(&machine, arguments)?;
    let snapshot = machine.snapshot(&name)?;
    let all = machine.snapshots()?;
    let (children, descendants) = below(&all, name.as_str());
    let current = machine.settings()?.current_snapshot;
    let is_current = current.as_deref() == Some(name.as_str());
    session.facts(&[
        ("Name", name.to_string()),
        ("Domain", machine.name().to_string()),
        ("Current", if is_current { "yes" } else { "no" }.to_owned()),
        ("State", state(&snapshot).to_owned()),
        // The machine goes on with overlays.
        ("Location", "external".to_owned()),
        ("Parent", snapshot.parent.unwrap_or_else(|| "-".to_owned())),
        ("Children", children.to_string()),
        ("Descendants", descendants.to_string()),
        ("Metadata", "yes".to_owned()),
    ]);
    Ok(())
}

/// Returns how many snapshots were taken next after the one called `name`, and how many after it at all.
fn below(snapshots: &[MachineSnapshot], name: &str) -> (usize, usize) {
    let children_of = |name: &str| {
        let children = snapshots.iter().map(|it| (it, it.parent.as_deref()));
        let children = children.filter(|(_, parent)| *parent == Some(name));
        children.map(|(it, _)| it.name.as_str()).collect::<Vec<_>>()
    };
    let children = children_of(name);
    let mut found = children.clone();
    let mut next = 0;
    while let Some(child) = found.get(next) {
        // A record that was changed by hand may have a loop.
        for it in children_of(child) {
            if it != name && !found.contains(&it) {
                found.push(it);
            }
        }
        next += 1;
    }
    (children.len(), found.len())
}

pub fn revert(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = snapshot(&machine, arguments)?;
    machine.revert(&name)?;
    session.tell(&format!("Domain snapshot {name} reverted"));
    Ok(())
}

pub fn delete(session: &mut Session, arguments: &Arguments) -> anyhow::Result<()> {
    let machine = domain(arguments)?;
    let name = snapshot(&machine, arguments)?;
    let deleted = machine.delete_snapshot(&name);
    deleted.with_context(|| format!("Failed to delete snapshot {name}"))?;
    session.tell(&format!("Domain snapshot {name} deleted"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_come_after_a_snapshot_are_counted_once() {
        let snapshot = |name: &str, parent: &str| MachineSnapshot {
            name: name.parse().unwrap(),
            created: 0,
            parent: Some(parent.to_owned()),
            has_memory: false,
            description: None,
            disks: Vec::new(),
            machine_file: String::new(),
        };
        let snapshots = [
            snapshot("b", "a"),
            snapshot("c", "b"),
            snapshot("d", "a"),
            // A loop.
            snapshot("a", "c"),
        ];
        assert_eq!(below(&snapshots, "a"), (2, 3));
        assert_eq!(below(&snapshots, "d"), (0, 0));
    }
}
