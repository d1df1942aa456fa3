//! The helper machine's side: the first process, which does a task and switches the machine off.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::boot_files::{self, Edit};
use crate::content::{Content, Identity, NewIdentity};
use crate::exchange::{self, SERIAL};
use crate::files;
use crate::identifiers::{IdentifierKind, Pool, Replacement};
use crate::operation::Operation;
use crate::partitions::NewTable;
use crate::root::Root;
use crate::system::{Disks, System, device_with_serial, node, with_mounted_aside};
use crate::task::{Outcome, Report, Task};

/// Does the task on the exchange disk, writes the outcome there, and switches the machine off. It is the first process of a
/// machine. Returns only if the machine cannot be switched off.
pub fn serve() {
    if let Err(error) = serve_task() {
        // The host sees that there is no report; the console is for people.
        eprintln!("bantam: {error}");
    }
    rustix::fs::sync();
    // Without ACPI, a machine is ended by a restart.
    let how = match Path::new("/sys/firmware/acpi").exists() {
        true => RebootCommand::PowerOff,
        false => RebootCommand::Restart,
    };
    if let Err(error) = reboot(how) {
        eprintln!("bantam: cannot end the machine: {error}");
    }
}

fn serve_task() -> io::Result<()> {
    for (kind, folder) in [("devtmpfs", "/dev"), ("sysfs", "/sys"), ("proc", "/proc")] {
        fs::create_dir_all(folder)?;
        match mount(kind, folder, kind, MountFlags::empty(), None::<&CStr>) {
            // The kernel has done it.
            Err(rustix::io::Errno::BUSY) => {}
            result => result?,
        }
    }
    let device = device_with_serial(SERIAL)?;
    let device = device.ok_or_else(|| io::Error::other("there is no exchange disk"))?;
    let disk = File::options().read(true).write(true).open(node(&device))?;
    let (task, random) = exchange::read_task(&disk)?;
    let outcome = perform(&task, Pool::new(random));
    rustix::fs::sync();
    exchange::write_outcome(&disk, &outcome)
}

/// Does a task.
fn perform(task: &Task, pool: Pool) -> Outcome {
    let disks = Disks::scan(&task.disks)?;
    let system = System::mount(&disks)?;
    let mut report = Report {
        system: system.name.clone(),
        ..Report::default()
    };
    files::reset(&system.root, task, &mut report);
    let plan = Plan::new(task, &disks, pool, &mut report)?;
    let plan = plan.follow(&disks, &system, task, &mut report)?;
    system.unmount()?;
    rustix::fs::sync();
    plan.apply(disks, report)
}

/// Identifiers that are going to change.
struct Plan {
    /// Volumes, by their places in [`Disks::volumes`].
    volumes: Vec<(usize, NewIdentity)>,
    /// Partition tables, by the places of their disks.
    tables: Vec<(usize, NewTable)>,
    replacements: Vec<(Operation, Replacement, String)>,
}

impl Plan {
    /// Makes new identifiers, and reports those that stay.
    fn new(
        task: &Task,
        disks: &Disks,
        mut pool: Pool,
        report: &mut Report,
    ) -> Result<Plan, String> {
        let empty = || "there are too many file systems and partitions".to_owned();
        let mut plan = Plan {
            volumes: Vec::new(),
            tables: Vec::new(),
            replacements: Vec::new(),
        };
        let volumes = (0..).zip(&disks.volumes);
        for (place, volume) in volumes.filter(|_| task.operations.contains(Operation::FsUuids)) {
            let old = match &volume.identity {
                Identity::Changeable { id } => id.clone(),
                Identity::Fixed { reason, .. } => {
                    report.left(Operation::FsUuids, &volume.name, reason);
                    continue;
                }
                Identity::None => continue,
            };
            let (identity, new) = volume.content.new_identity(&mut pool).ok_or_else(empty)?;
            let kind = IdentifierKind::FileSystem;
            let what = format!("{} ({})", volume.name, volume.content.name());
            plan.volumes.push((place, identity));
            plan.replacements
                .push((Operation::FsUuids, Replacement { kind, old, new }, what));
        }
        let tables = disks.disks.iter();
        for disk in tables.filter(|_| task.operations.contains(Operation::PartitionUuids)) {
            let Some(table) = &disk.table else {
                if !disk.numbers.is_empty() {
                    let reason = "its partition table has no identifiers, is damaged, or is of a type that is not known";
                    report.left(Operation::PartitionUuids, &disk.name, reason);
                }
                continue;
            };
            if table.lacks_backup() {
                let reason = "the copy of its partition table at its end is missing or damaged, and stays as it is";
                report.left(Operation::PartitionUuids, &disk.name, reason);
            }
            let made = table.new_identifiers(&disk.numbers, &mut pool);
            let (new, replacements) = made.ok_or_else(empty)?;
            plan.tables.push((disk.place, new));
            plan.replacements.extend(
                replacements
                    .into_iter()
                    .map(|it| (Operation::PartitionUuids, it, disk.name.clone())),
            );
        }
        Ok(plan)
    }

    /// Has the files follow that name identifiers. If one cannot, no identifier changes, and the report says so.
    fn follow(
        mut self,
        disks: &Disks,
        system: &System,
        task: &Task,
        report: &mut Report,
    ) -> Result<Plan, String> {
        for (place, reason) in &system.missing {
            report.left(None, place, format!("not mounted: {reason}"));
        }
        let replacements: Vec<_> = self
            .replacements
            .iter()
            .map(|(_, it, _)| it.clone())
            .collect();
        let mut obstacles: Vec<(String, String)> = match replacements.is_empty() {
            true => Vec::new(),
            false => system.missing_needed().cloned().collect(),
        };
        let mut edits = Vec::new();
        match boot_files::plan_system(&system.root, &replacements) {
            _ if replacements.is_empty() => {}
            Ok(planned) => edits.push((None, planned)),
            Err(found) => obstacles.extend(named(found, "")),
        }
        for (place, volume) in (0..).zip(&disks.volumes) {
            if volume.content != Content::Vfat || system.volumes.contains(&place) {
                continue;
            }
            let looked = with_mounted_aside(volume, false, None, |root| {
                if task.operations.contains(Operation::RandomSeed) {
                    files::remove_boot_seed(root, report);
                }
                boot_files::plan_boot(root, &replacements)
            });
            match looked {
                Ok(Ok(planned)) if planned.is_empty() => {}
                Ok(Ok(planned)) => edits.push((Some(place), planned)),
                Ok(Err(found)) => obstacles.extend(named(found, &volume.name)),
                Err(error) => {
                    obstacles.push((volume.name.clone(), format!("not mounted: {error}")));
                }
            }
        }
        if !obstacles.is_empty() && !replacements.is_empty() {
            for (path, reason) in obstacles {
                let reason =
                    format!("it may name UUIDs and cannot follow, so all UUIDs stay: {reason}");
                report.left(Operation::FsUuids, path, reason);
            }
            self.volumes.clear();
            self.tables.clear();
            self.replacements.clear();
            return Ok(self);
        }
        for (volume, planned) in edits {
            let operation = match self.volumes.is_empty() {
                true => Operation::PartitionUuids,
                false => Operation::FsUuids,
            };
            let apply = |root: &Root, report: &mut Report, place: &str| {
                for edit in &planned {
                    apply_edit(edit, root, report, operation, place)?;
                }
                Ok::<(), String>(())
            };
            match volume {
                None => apply(&system.root, report, "")?,
                Some(volume) => {
                    let volume = &disks.volumes[volume];
                    let applied = with_mounted_aside(volume, false, None, |root| {
                        apply(root, report, &volume.name)
                    });
                    applied.map_err(|error| format!("cannot mount {}: {error}", volume.name))??;
                }
            }
        }
        Ok(self)
    }

    /// Changes the identifiers of what is not mounted any more.
    fn apply(self, disks: Disks, mut report: Report) -> Outcome {
        let open = |node: &Path| File::options().read(true).write(true).open(node);
        for (place, identity) in self.volumes {
            let volume = &disks.volumes[place];
            open(&volume.node)
                .and_then(|device| volume.content.change(&device, identity))
                .map_err(|error| format!("cannot change the UUID of {}: {error}", volume.name))?;
        }
        for disk in disks.disks {
            let new = self.tables.iter().find(|(place, _)| *place == disk.place);
            if let (Some(table), Some((_, new))) = (disk.table, new) {
                open(&disk.node)
                    .and_then(|device| table.change(&device, new))
                    .map_err(|error| {
                        format!(
                            "cannot change the partition table of {}: {error}",
                            disk.name
                        )
                    })?;
            }
        }
        for (operation, replacement, what) in self.replacements {
            let detail = format!("{} is now {}", replacement.old, replacement.new);
            report.changed(operation, what, detail);
            report.identifiers.push(replacement);
        }
        Ok(report)
    }
}

fn named(obstacles: Vec<boot_files::Obstacle>, volume: &str) -> Vec<(String, String)> {
    let name = |path: &Path| match volume {
        "" => path.display().to_string(),
        volume => format!("{volume}: {}", path.display()),
    };
    obstacles
        .into_iter()
        .map(|(path, reason)| (name(&path), reason))
        .collect()
}

fn apply_edit(
    edit: &Edit,
    root: &Root,
    report: &mut Report,
    operation: Operation,
    volume: &str,
) -> Result<(), String> {
    let path = match volume {
        "" => edit.path.display().to_string(),
        volume => format!("{volume}: {}", edit.path.display()),
    };
    edit.apply(root)
        .map_err(|error| format!("cannot write '{path}': {error}"))?;
    report.changed(operation, path, "names the new UUIDs");
    Ok(())
}
