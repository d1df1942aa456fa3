//! Reset of the identity of a system, in a helper machine, on the disks of a machine that does not run.
//!
//! The helper machine works on overlays, which are committed to the disks when it has done everything. A record of what it has
//! done is written in between ([`Record`]): without one nothing counts, and with one the commits are finished, by another command if
//! this one is killed.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bantam_seed::HostName;
use bantam_storage::tools::Format;
use bantam_sysprep::{
    OperationSet, Replacement, Report, Task, TaskDisk, exchange, replace_identifiers,
};
use bantam_vmm::config::{DiskConfig, DiskFormatOption, MachineConfig, SerialConfig};
use bantam_vmm::{Controller, ExitReason};
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::files;
use crate::images::{create_overlay, use_overlay};
use crate::lock::{self, Purpose};
use crate::machine::{Machine, file};
use crate::manager::Manager;
use crate::merge::commit;
use crate::store::checked_format;

/// What is done, in messages.
pub(crate) const ACTION: &str = "reset the identity of";
/// The memory of the helper machine.
const MEMORY: &str = "192M";
/// What its kernel is told: it says nothing, and a panic ends it. Asking KVM for the host's clock takes minutes without hardware
/// virtualization, and nothing here needs that clock.
const KERNEL_WORDS: &str = "quiet loglevel=1 panic=-1 initcall_blacklist=ptp_kvm_init";
/// How long a helper machine may take. It takes a second with hardware virtualization, and 20 without.
const LIMIT: Duration = Duration::from_secs(600);
/// How often is looked whether the user has cancelled it.
const INTERVAL: Duration = Duration::from_millis(100);
/// The file with what was done, beside the overlays.
const RECORD: &str = "record.json";
/// The exchange disk.
const EXCHANGE: &str = "exchange";

/// What the helper machine starts from.
#[derive(Clone, Debug)]
pub struct Helper {
    /// A kernel with the file systems of the guests.
    pub kernel: PathBuf,
    /// An initrd with the program of `sysprep/helper`.
    pub initrd: PathBuf,
}

/// How an identity is reset.
#[derive(Clone, Debug)]
pub struct IdentityReset {
    /// What is reset.
    pub operations: OperationSet,
    /// The new host name; without it, that of a machine is made of its name.
    pub host_name: Option<HostName>,
    /// The helper machine.
    pub helper: Helper,
}

/// Overlays with a new identity that are to be committed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Record {
    overlays: Vec<PathBuf>,
    identifiers: Vec<Replacement>,
}

/// A disk of a machine, and what it is called.
struct NamedDisk {
    name: String,
    place: usize,
    config: DiskConfig,
}

impl Manager {
    /// Resets the identity of the system on the disks of a machine that does not run, and says what was done. If this fails or is
    /// cancelled, nothing has changed. If it is killed, nothing has, or the next command to the machine finishes it. With `dry_run`,
    /// nothing changes.
    ///
    /// # Errors
    /// If the machine runs, has a managed save or other machines are linked to it; no system is found, or it cannot be changed;
    /// `cancelled` is set; another command is at work on the machine, or the host refuses it.
    pub fn reset_identity(
        &self,
        machine: &Machine,
        reset: &IdentityReset,
        dry_run: bool,
        cancelled: &AtomicBool,
    ) -> Result<Report, Error> {
        let change = machine.change(ACTION)?;
        machine.mend(&change)?;
        machine.require_shut_off(ACTION)?;
        self.require_unlinked(machine, ACTION)?;
        if machine.has_managed_save() {
            let reason = "its guest goes on from a managed save, and knows its disks as they are; start it and shut it down first";
            return Err(machine.refused(ACTION, reason));
        }
        let mut reset = reset.clone();
        if reset.host_name.is_none() {
            reset.host_name = HostName::from_name(machine.name().as_str());
        }
        let folder = machine.file(file::SYSPREP);
        let report = prepare(
            &folder,
            written_disks(&machine.config()?),
            &reset,
            dry_run,
            cancelled,
        )?
        .map_err(|reason| machine.refused(ACTION, reason))?;
        machine.mend_identity()?;
        Ok(report)
    }
}

/// The same for the system on a disk image that no machine uses now. What a killed command has left is in a folder beside the
/// image whose name begins with a dot, and the next call for the image finishes it or removes it.
///
/// # Errors
/// If `image` is a block device or in use, and as for [`Manager::reset_identity`].
pub fn reset_identity_of_image(
    image: &Path,
    format: Option<DiskFormatOption>,
    reset: &IdentityReset,
    dry_run: bool,
    cancelled: &AtomicBool,
) -> Result<Report, Error> {
    let real = fs::canonicalize(image).map_err(Error::file("find", image))?;
    let refused = |reason: String| Error::Store {
        action: ACTION,
        name: image.display().to_string(),
        reason,
    };
    let is_file = fs::metadata(&real)
        .map_err(Error::file("open", image))?
        .is_file();
    if !is_file {
        return Err(refused(
            "it is not a file; give a block device to a machine, and name that".to_owned(),
        ));
    }
    let mut disk = DiskConfig::new(&real);
    disk.format = Some(match checked_format(ACTION, &real, format)? {
        Format::Qcow2 => DiskFormatOption::Qcow2,
        _ => DiskFormatOption::Raw,
    });
    let name = real
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let home = real.with_file_name(format!(".{name}.sysprep"));
    files::create_folders(&home).map_err(Error::file("create", &home))?;
    let path = home.join(file::LOCK);
    let lock = lock::create(&path).map_err(Error::file("open", &path))?;
    if !lock::try_lock(&lock, Purpose::Change).map_err(Error::file("lock", &path))? {
        return Err(refused(
            "another command is at work on it; try again when that is done".to_owned(),
        ));
    }
    let folder = home.join(file::SYSPREP);
    let finish_in = || {
        finish(&folder)?;
        files::remove_folder(&folder).map_err(Error::file("remove", &folder))
    };
    finish_in()?;
    let disk = NamedDisk {
        name,
        place: 0,
        config: disk,
    };
    let report = prepare(&folder, vec![disk], reset, dry_run, cancelled)?.map_err(refused);
    finish_in()?;
    files::remove_folder(&home).map_err(Error::file("remove", &home))?;
    report
}

/// Returns the disks of a machine that can be written to.
fn written_disks(config: &MachineConfig) -> Vec<NamedDisk> {
    let disks = config.disk_names().zip(&config.disks);
    let disks = (0..).zip(disks).filter(|(_, (_, disk))| !disk.readonly);
    disks
        .map(|(place, (name, disk))| NamedDisk {
            name: name.to_string(),
            place,
            config: disk.clone(),
        })
        .collect()
}

/// Resets the identity on overlays of `disks` in `folder`, and writes the record. Without one, the folder is removed.
fn prepare(
    folder: &Path,
    mut disks: Vec<NamedDisk>,
    reset: &IdentityReset,
    dry_run: bool,
    cancelled: &AtomicBool,
) -> Result<Result<Report, String>, Error> {
    let prepared = files::create_folders(folder)
        .map_err(Error::file("create", folder))
        .and_then(|()| {
            for disk in &mut disks {
                let overlay = folder.join(format!("{}.qcow2", disk.place));
                create_overlay(&disk.config, &overlay)?;
                use_overlay(&mut disk.config, &overlay);
            }
            let report = run(&disks, reset, folder, cancelled)?;
            if let (Ok(report), false) = (&report, dry_run) {
                let record = Record {
                    overlays: disks.into_iter().map(|disk| disk.config.path).collect(),
                    identifiers: report.identifiers.clone(),
                };
                let path = folder.join(RECORD);
                let text = serde_json::to_vec(&record).map_err(std::io::Error::from);
                text.and_then(|text| files::replace(&path, text))
                    .map_err(Error::file("write", &path))?;
            }
            Ok(report)
        });
    if dry_run || !matches!(prepared, Ok(Ok(_))) {
        files::remove_folder(folder).map_err(Error::file("remove", folder))?;
    }
    prepared
}

/// Commits the overlays of the record in `folder`, if there is one, and returns it.
fn finish(folder: &Path) -> Result<Option<Record>, Error> {
    let path = folder.join(RECORD);
    let text = files::read(&path).map_err(Error::file("read", &path))?;
    let record: Option<Record> = match text {
        Some(text) => {
            let record = serde_json::from_str(&text).map_err(std::io::Error::from);
            Some(record.map_err(Error::file("read", &path))?)
        }
        None => None,
    };
    for overlay in record.iter().flat_map(|record| &record.overlays) {
        commit(&DiskConfig::new(overlay))?;
    }
    Ok(record)
}

impl Machine {
    /// Finishes the reset of the identity whose command was killed, if it had done everything, and else takes it back.
    pub(crate) fn mend_identity(&self) -> Result<(), Error> {
        let folder = self.file(file::SYSPREP);
        if !folder.exists() {
            return Ok(());
        }
        if let Some(record) = finish(&folder)? {
            self.update_config(|config| follow(config, &record.identifiers))?;
        }
        files::remove_folder(&folder).map_err(Error::file("remove", &folder))
    }
}

/// Resets the identity on the disks of a clone that nobody knows yet. `config` is that of the clone, and its images are below
/// `folder`, in the folder of disks, under the names that they have in `config`.
pub(crate) fn reset_clone(
    config: &mut MachineConfig,
    folder: &Path,
    reset: &IdentityReset,
    cancelled: &AtomicBool,
) -> Result<Result<Report, String>, Error> {
    let mut disks = written_disks(config);
    for disk in &mut disks {
        let name = disk.config.path.file_name().unwrap_or_default();
        disk.config.path = folder.join(file::DISKS).join(name);
    }
    let report = run(&disks, reset, folder, cancelled)?;
    if let Ok(report) = &report {
        follow(config, &report.identifiers);
    }
    Ok(report)
}

/// Has the kernel command line name the new identifiers.
fn follow(config: &mut MachineConfig, identifiers: &[Replacement]) {
    if let Some(append) = &mut config.append
        && let Some(replaced) = replace_identifiers(append.as_bytes(), identifiers)
        && let Ok(replaced) = String::from_utf8(replaced)
    {
        *append = replaced;
    }
}

/// Runs the helper machine with `disks`, and an exchange disk that is in `folder` meanwhile. The inner error is the reason why
/// nothing can be done.
fn run(
    disks: &[NamedDisk],
    reset: &IdentityReset,
    folder: &Path,
    cancelled: &AtomicBool,
) -> Result<Result<Report, String>, Error> {
    if disks.is_empty() {
        return Ok(Err("it has no disk that it can write to".to_owned()));
    }
    let task = Task {
        operations: reset.operations.clone(),
        host_name: reset.host_name.as_ref().map(ToString::to_string),
        disks: disks
            .iter()
            .map(|disk| TaskDisk {
                name: disk.name.clone(),
                place: disk.place,
            })
            .collect(),
    };
    let path = folder.join(EXCHANGE);
    let mut random = [0; exchange::RANDOM_SIZE];
    getrandom::fill(&mut random).map_err(|error| Error::io("read random bytes")(error.into()))?;
    let exchange = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path);
    let exchange = exchange.map_err(Error::file("create", &path))?;
    exchange::write_task(&exchange, &task, &random).map_err(Error::file("write", &path))?;

    let mut config = MachineConfig::new(&reset.helper.kernel);
    config.initrd = Some(reset.helper.initrd.clone());
    config.append = Some(KERNEL_WORDS.to_owned());
    config.memory = MEMORY.parse()?;
    config.serial = SerialConfig::None;
    config.disks = vec![disk(&path, DiskFormatOption::Raw, exchange::SERIAL)];
    for (named, told) in disks.iter().zip(&task.disks) {
        let format = match crate::images::format_of(&named.config) {
            Format::Qcow2 => DiskFormatOption::Qcow2,
            _ => DiskFormatOption::Raw,
        };
        let mut attached = disk(&named.config.path, format, &told.serial());
        attached.block_size = named.config.block_size;
        attached.backing = true;
        config.disks.push(attached);
    }
    let ended = run_machine(config, cancelled)?;
    let outcome = match ended {
        Ok(()) => exchange::read_outcome(&exchange)
            .map_err(|error| format!("the helper machine has failed: {error}")),
        Err(reason) => Err(reason),
    };
    files::remove_file(&path).map_err(Error::file("remove", &path))?;
    Ok(outcome.and_then(|outcome| outcome))
}

fn disk(path: &Path, format: DiskFormatOption, serial: &str) -> DiskConfig {
    let mut disk = DiskConfig::new(path);
    disk.format = Some(format);
    disk.id = serial.to_owned().try_into().ok();
    disk
}

/// Runs a machine until it has ended. The inner error says why it has not done what it was to do.
fn run_machine(config: MachineConfig, cancelled: &AtomicBool) -> Result<Result<(), String>, Error> {
    let machine = Controller::new()?;
    machine.configure(config)?;
    machine.start()?;
    let begin = Instant::now();
    let failed = |error: std::sync::Arc<bantam_vmm::Error>| {
        format!("the helper machine has failed: {error}")
    };
    loop {
        match machine.wait_within(INTERVAL) {
            Ok(Some(ExitReason::PowerOff | ExitReason::Reboot)) => return Ok(Ok(())),
            Ok(Some(reason)) => return Ok(Err(format!("the helper machine has failed: {reason}"))),
            Err(error) => return Ok(Err(failed(error))),
            Ok(None) => {}
        }
        let reason = if cancelled.load(Ordering::Relaxed) {
            "it was cancelled".to_owned()
        } else if begin.elapsed() >= LIMIT {
            format!(
                "the helper machine has not ended within {} seconds",
                LIMIT.as_secs()
            )
        } else {
            continue;
        };
        machine.stop();
        // Its disks are not used any more when this returns.
        return Ok(match machine.wait() {
            Ok(_) => Err(reason),
            Err(error) => Err(failed(error)),
        });
    }
}

#[cfg(test)]
mod tests {
    use bantam_storage::tools::{Purpose, open};
    use bantam_sysprep::IdentifierKind;

    use super::*;
    use crate::definition::RestartPolicy;
    use crate::folders::Folders;

    const OLD: &str = "0b2f3d6e-11a2-4c3b-8a77-0123456789ab";
    const NEW: &str = "ffffffff-ffff-4fff-8fff-ffffffffffff";

    /// A machine whose command was killed when the helper machine had done everything, or before.
    fn killed(folder: &Path, has_record: bool) -> (Machine, PathBuf) {
        let manager = Manager::new(Folders {
            machines: folder.join("machines"),
            runtime: folder.join("run"),
            units: None,
        });
        let image = folder.join("disk.img");
        fs::write(&image, [0; 64 << 10]).unwrap();
        let mut config = MachineConfig::new("/vmlinux");
        config.append = Some(format!("root=PARTUUID={OLD}"));
        config.disks = vec![DiskConfig::new(&image)];
        let name = "web".parse().unwrap();
        let machine = manager
            .create(&name, &config, RestartPolicy::Never)
            .unwrap();
        let pending = machine.file(file::SYSPREP);
        files::create_folders(&pending).unwrap();
        let overlay = pending.join("0.qcow2");
        create_overlay(&config.disks[0], &overlay).unwrap();
        let opened = open(&overlay, Some(Format::Qcow2), Purpose::Write).unwrap();
        opened.image.write_at(&[7; 512], 1024).unwrap();
        opened.image.flush().unwrap();
        drop(opened);
        if has_record {
            let record = Record {
                overlays: vec![overlay],
                identifiers: vec![Replacement {
                    kind: IdentifierKind::Partition,
                    old: OLD.to_owned(),
                    new: NEW.to_owned(),
                }],
            };
            fs::write(pending.join(RECORD), serde_json::to_vec(&record).unwrap()).unwrap();
        }
        (machine, image)
    }

    #[test]
    fn what_a_killed_command_has_left_is_finished_or_removed() {
        for has_record in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let (machine, image) = killed(folder.path(), has_record);
            let change = machine.change("start").unwrap();
            machine.mend(&change).unwrap();
            assert!(!machine.file(file::SYSPREP).exists());
            let bytes = fs::read(&image).unwrap();
            assert_eq!(bytes[1024..1536] == [7; 512], has_record);
            assert!(bytes[1536..].iter().all(|&byte| byte == 0));
            let id = if has_record { NEW } else { OLD };
            let append = machine.config().unwrap().append.unwrap();
            assert_eq!(append, format!("root=PARTUUID={id}"));
        }
    }
}
