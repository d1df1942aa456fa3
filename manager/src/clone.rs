//! Copies of machines, and templates: machines that are only there to be copied.

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bantam_seed::HostName;
use bantam_storage::Options;
use bantam_storage::tools::{self, CopyOptions, Format, Job, NewContent, Opened, Purpose, open};
use bantam_sysprep::Report;
use bantam_vmm::config::{DiskConfig, DiskFormatOption, MachineConfig};

use crate::definition::{Settings, machine_file, parse_machine_file};
use crate::error::Error;
use crate::files;
use crate::images::{create_overlay, format_of, use_overlay};
use crate::mac::give_mac_addresses;
use crate::machine::{Change, CopyAccess, Machine, file, write_new};
use crate::manager::Manager;
use crate::name::{MAX_LEN, MachineName};
use crate::provision::renew_seed;
use crate::snapshots::{MachineSnapshot, SnapshotPlan};
use crate::sysprep::{ACTION as RESET, IdentityReset, reset_clone};

/// Zeroes of this length and alignment take no room in a copy.
const SPARSE: u64 = 4096;

/// How the disks of a copy come to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloneStorage {
    /// Their images are copied. Where the host's file system can share blocks between files, this takes no time.
    Full,
    /// Their images are overlays of the template's, which takes no time anywhere.
    Linked,
}

/// A copy of a machine.
#[derive(Clone, Debug)]
pub struct ClonedMachine {
    /// The new machine.
    pub machine: Machine,
    /// Sockets and files of the host that lead to the guest, and where they are for the copy.
    pub moved: Vec<(PathBuf, PathBuf)>,
    /// What was done to the identity of the system on its disks, if that was reset.
    pub report: Option<Report>,
}

impl Manager {
    /// Makes a machine that is like `source`, with disks of its own; `job` is told how far the copy of each is. It has another
    /// id, from which its MAC addresses derive, and a disk for cloud-init, if there is one, with another instance id and host
    /// name. The disks of a source that runs are as they would be if its power were cut now. With `reset`, the identity of the
    /// system on them is reset.
    ///
    /// The command can be killed at any time: the copy exists as a whole or not at all. A source that runs may keep a snapshot
    /// then, whose description names the copy.
    ///
    /// # Errors
    /// If `source` has a managed save, or is to be linked and is not a template, there is a machine of that name,
    /// the copy is cancelled, the identity cannot be reset, a command that changes `source` is at work on it, or the host does not
    /// let the copy be kept. Any number of copies of a source that does not run are made at once.
    pub fn clone_machine(
        &self,
        source: &Machine,
        name: &MachineName,
        storage: CloneStorage,
        reset: Option<&IdentityReset>,
        job: Job<'_>,
    ) -> Result<ClonedMachine, Error> {
        const ACTION: &str = "clone";
        let access = source.copy_access(ACTION)?;
        let settings = source.settings()?;
        if storage == CloneStorage::Linked && !settings.template {
            let reason = format!(
                "its disks can change, and overlays of them must not; make it a template first (bantam template {0}), or \
                 copy its disks (bantam clone {0} {name})",
                source.name()
            );
            return Err(source.refused(ACTION, reason));
        }
        if source.has_managed_save() {
            let reason =
                "what its guest was doing is in a managed save; start it and shut it down first";
            return Err(source.refused(ACTION, reason));
        }
        let new = self.begin(name)?;
        let frozen = match &access {
            CopyAccess::Exclusive(change) => {
                let frozen = source.freeze(change, name).inspect_err(|_| {
                    // The first error says more.
                    let _ = files::remove_folder(&new.folder);
                })?;
                frozen.map(|frozen| (change, frozen))
            }
            CopyAccess::Shared { .. } => None,
        };
        let target = Machine::at(self.folders(), name.clone());
        let title = settings.title;
        let made = Settings::new(settings.restart).and_then(|mut settings| {
            settings.title = title;
            let mut config = match &frozen {
                Some((_, frozen)) => {
                    parse_machine_file(&frozen.machine_file, &source.machine_file())?
                }
                None => source.config()?,
            };
            let moved = move_streams(&mut config, target.folder());
            let before: Vec<_> = config.nets.iter().map(|net| net.mac).collect();
            for net in &mut config.nets {
                net.mac = None;
                net.hostname = None;
            }
            give_mac_addresses(&mut config, &settings.id);
            let after = config.nets.iter().map(|net| net.mac);
            let changed = before.into_iter().zip(after);
            let changed =
                changed.filter_map(|(old, new)| Some((old?.to_string(), new?.to_string())));
            let changed: Vec<_> = changed.collect();
            let seed = source.seed_place(&config);
            copy_disks(
                source,
                &mut config,
                &new.folder,
                target.folder(),
                storage,
                job,
            )?;
            if let Some(file) = seed.and_then(|place| config.disks[place].path.file_name()) {
                let path = new.folder.join(file::DISKS).join(file);
                let host_name = HostName::from_name(name.as_str());
                let id = renew_seed(&path, |seed, id| {
                    seed.renew(id, host_name.as_ref(), &changed);
                })?;
                settings.instance_id = Some(id);
            }
            source.copy_document(&new.folder)?;
            Ok((moved, config, settings))
        });
        let thawed = match frozen {
            Some((change, frozen)) => source.delete_snapshot_with(change, &frozen.name),
            None => Ok(()),
        };
        let finished = made.and_then(|(moved, mut config, settings)| {
            thawed?;
            let report = reset.map(|reset| {
                let host_name = HostName::from_name(name.as_str());
                let reset = IdentityReset {
                    host_name: reset.host_name.clone().or(host_name),
                    ..reset.clone()
                };
                reset_clone(&mut config, &new.folder, &reset, job.cancelled)?
                    .map_err(|reason| target.refused(RESET, reason))
            });
            let report = report.transpose()?;
            write_new(&new.folder, &machine_file(&config), &settings)?;
            let _all = self.lock_all()?;
            if let Some(found) = self.find_folded(name)? {
                return Err(Error::Exists { found });
            }
            let machine = self.put_in_place(&new.folder, name)?;
            Ok(ClonedMachine {
                machine,
                moved,
                report,
            })
        });
        if finished.is_err() {
            // The first error says more.
            let _ = files::remove_folder(&new.folder);
        }
        finished
    }

    /// Makes the folder of a machine that is copied or arrives, and keeps other commands from removing it.
    pub(crate) fn begin(&self, name: &MachineName) -> Result<NewFolder, Error> {
        let _all = self.lock_all()?;
        if let Some(found) = self.find_folded(name)? {
            return Err(Error::Exists { found });
        }
        let folder = self.new_folder(name);
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(Error::Exists {
                    found: name.to_string(),
                });
            }
            result => result.map_err(Error::file("create", &folder))?,
        }
        Ok(NewFolder {
            change: Change::of_new(&folder)?,
            folder,
        })
    }

    /// Returns the other machines that need an image in the folder of `machine`, or, if that is a template, one that it
    /// would write to if it were none.
    ///
    /// # Errors
    /// If the folder of the machines cannot be read.
    pub fn linked_to(&self, machine: &Machine) -> Result<Vec<MachineName>, Error> {
        let is_template = machine.settings().is_ok_and(|settings| settings.template);
        let disks = machine.config().map(|config| config.disks);
        let written: HashSet<_> = disks
            .unwrap_or_default()
            .into_iter()
            .filter(|disk| is_template && !disk.readonly)
            .filter_map(|disk| fs::canonicalize(disk.path).ok())
            .collect();
        let home = fs::canonicalize(machine.folder());
        let home = home.map_err(Error::file("find", machine.folder()))?;
        let is_own = |image: &PathBuf| written.contains(image) || image.starts_with(&home);
        let others = self.machines()?.into_iter();
        let linked = others.filter(|other| {
            other.name() != machine.name() && other.needed_images().files.iter().any(is_own)
        });
        Ok(linked.map(|other| other.name().clone()).collect())
    }

    /// Makes a machine a template, which cannot be started, so that linked copies can be made of it; or an ordinary
    /// machine again.
    ///
    /// # Errors
    /// If it runs, has snapshots or a managed save, or is a template with linked copies; another command is at work on it, or
    /// the host refuses it.
    pub fn set_template(&self, machine: &Machine, template: bool) -> Result<(), Error> {
        const ACTION: &str = "make a template of";
        let change = machine.change(ACTION)?;
        machine.mend(&change)?;
        machine.require_shut_off(ACTION)?;
        let mut settings = machine.settings()?;
        if settings.template == template {
            return Ok(());
        }
        match template {
            true if machine.has_managed_save() => {
                let reason = "it has a managed save; start it and shut it down first";
                return Err(machine.refused(ACTION, reason));
            }
            true if !machine.snapshots()?.is_empty() => {
                let reason = "it has snapshots; delete them first, or make a template of a clone";
                return Err(machine.refused(ACTION, reason));
            }
            true => machine.set_autostart(false)?,
            false => self.require_unlinked(machine, "start")?,
        }
        settings.template = template;
        machine.write_settings(&settings)
    }

    /// Returns an error if other machines need the images of `machine`.
    pub(crate) fn require_unlinked(
        &self,
        machine: &Machine,
        action: &'static str,
    ) -> Result<(), Error> {
        let linked = self.linked_to(machine)?;
        if linked.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = linked.iter().take(5).map(MachineName::as_str).collect();
        let more = match linked.len() - names.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let reason = format!(
            "other machines need its disks: {}{more}; undefine them first",
            names.join(", ")
        );
        Err(machine.refused(action, reason))
    }
}

impl Machine {
    /// Has the images of a machine that runs stand still, while it goes on with overlays, for its clone `name`.
    fn freeze(
        &self,
        change: &Change,
        name: &MachineName,
    ) -> Result<Option<MachineSnapshot>, Error> {
        if !self.is_active()? {
            return Ok(None);
        }
        let text = format!("clone-{name}");
        let snapshot: MachineName = text.get(..MAX_LEN).unwrap_or(&text).parse()?;
        let description = Some(format!("for the clone '{name}', while it is made"));
        // One that an earlier command has left, which was killed.
        let left = self.snapshot(&snapshot);
        if left.is_ok_and(|left| left.description == description) {
            self.delete_snapshot_with(change, &snapshot)?;
        }
        let plan = SnapshotPlan {
            name: Some(snapshot),
            description,
            disk_only: true,
        };
        self.take_snapshot_with(change, &plan).map(Some)
    }
}

/// The folder of a machine that is being copied or arrives.
pub(crate) struct NewFolder {
    folder: PathBuf,
    /// Says to other commands that somebody is at work.
    change: Change,
}

impl NewFolder {
    /// Keeps the right to change the machine, without what is known of the folder.
    pub(crate) fn into_change(self) -> Change {
        self.change
    }
}

/// Has what the guest writes lead to sockets and files in `home`. Returns where each was, and where it is.
fn move_streams(config: &mut MachineConfig, home: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut names = HashSet::new();
    let mut moved = Vec::new();
    for path in config.stream_paths_mut() {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        while !names.insert(name.clone()) {
            let mut longer = OsString::from("other-");
            longer.push(&name);
            name = longer;
        }
        let old = mem::replace(path, home.join(name));
        moved.push((old, path.clone()));
    }
    moved
}

/// Gives `config`, which is that of `source`, disks of its own. They are made in `new`, which will be `home`.
fn copy_disks(
    source: &Machine,
    config: &mut MachineConfig,
    new: &Path,
    home: &Path,
    storage: CloneStorage,
    job: Job<'_>,
) -> Result<(), Error> {
    let names: Vec<_> = config.disk_names().collect();
    let folder = new.join(file::DISKS);
    for (disk, name) in config.disks.iter_mut().zip(names) {
        if disk.readonly && !disk.path.starts_with(source.folder()) {
            continue;
        }
        files::create_folders(&folder).map_err(Error::file("create", &folder))?;
        let format = format_of(disk);
        if storage == CloneStorage::Linked && !disk.readonly {
            let file = format!("{name}.qcow2");
            create_overlay(disk, &folder.join(&file))?;
            use_overlay(disk, &home.join(file::DISKS).join(file));
            continue;
        }
        let file = format!("{name}.{format}");
        copy_image(disk, format, &folder.join(&file), job)?;
        disk.path = home.join(file::DISKS).join(file);
        disk.format = Some(match format {
            Format::Qcow2 => DiskFormatOption::Qcow2,
            _ => DiskFormatOption::Raw,
        });
    }
    Ok(())
}

/// Copies the image of `disk` to `path`, with what its backing files have.
fn copy_image(disk: &DiskConfig, format: Format, path: &Path, job: Job<'_>) -> Result<(), Error> {
    let refused = |reason: String| Error::Image {
        path: path.display().to_string(),
        reason,
    };
    let opened = open(&disk.path, Some(format), Purpose::Read);
    let opened = opened.map_err(|error| refused(error.to_string()))?;
    if opened.files.len() == 1
        && share_blocks(&disk.path, path).map_err(|e| refused(e.to_string()))?
    {
        return Ok(());
    }
    let copied = copy_content(&opened, format, path, job);
    copied.map_err(|reason| {
        // The reason says more.
        let _ = files::remove_file(path);
        refused(reason)
    })
}

/// Has a new file share the blocks of another, until one of them is written to. Returns `false`, with no new file, if the
/// file system cannot.
fn share_blocks(from: &Path, to: &Path) -> io::Result<bool> {
    let source = File::open(from)?;
    if !source.metadata()?.is_file() {
        return Ok(false);
    }
    let mut options = OpenOptions::new();
    let target = options.write(true).create_new(true).mode(0o600).open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        target.sync_all()?;
        return Ok(true);
    }
    fs::remove_file(to)?;
    Ok(false)
}

fn copy_content(opened: &Opened, format: Format, path: &Path, job: Job<'_>) -> Result<(), String> {
    let size = opened.image.size();
    let created = tools::create(
        path,
        format,
        size,
        Options::default(),
        NewContent::default(),
    );
    let created = created.map_err(|error| error.to_string())?;
    let options = CopyOptions {
        sparse: Some(SPARSE),
        target_is_zero: created.reads_as_zeroes,
        layers: None,
    };
    tools::copy(&*opened.image, 0..size, &*created.target, 0, options, job)
        .map_err(|error| error.to_string())?;
    created
        .target
        .finish(true)
        .map_err(|error| error.to_string())
}
