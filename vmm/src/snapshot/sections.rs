//! The sections of a machine in a state file.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bantam_state::{RestoreError, SavedState, Section};
use serde::{Deserialize, Serialize};

use crate::config::{DeviceName, MachineConfig};
use crate::devices::SavedDevice;
use crate::error::Error;
use crate::kvm::{VCPU_KIND, VM_KIND};

/// The configuration of the machine.
#[derive(Debug, Serialize, Deserialize)]
struct Configuration {
    /// A machine file.
    machine_file: String,
}

impl SavedState for Configuration {
    const KIND: &'static str = "configuration";
    const VERSION: u16 = 1;
}

/// What the monitor knows of the guest.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct GuestFacts {
    /// Whether the guest marks a restart after a panic.
    pub(crate) tells_panics: bool,
}

impl SavedState for GuestFacts {
    const KIND: &'static str = "guest";
    const VERSION: u16 = 1;
}

/// The host that a snapshot was taken on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// Release of its kernel.
    pub kernel: String,
    /// Architecture of its processor.
    pub architecture: String,
    /// Its name in the network.
    pub name: String,
}

impl SavedState for HostFacts {
    const KIND: &'static str = "host";
    const VERSION: u16 = 1;
}

impl HostFacts {
    fn of_this_host() -> HostFacts {
        let text = |it: &std::ffi::OsStr| it.to_string_lossy().into_owned();
        match nix::sys::utsname::uname() {
            Ok(names) => HostFacts {
                kernel: text(names.release()),
                architecture: text(names.machine()),
                name: text(names.nodename()),
            },
            Err(_) => HostFacts {
                kernel: String::new(),
                architecture: String::new(),
                name: String::new(),
            },
        }
    }
}

/// A disk's image that stays as it was at a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenDisk {
    /// The disk.
    pub name: DeviceName,
    /// Its image.
    pub path: PathBuf,
    /// Size of the image's file in bytes.
    pub size: u64,
    /// When the file was changed last, in seconds since 1970 and nanoseconds.
    pub modified: (i64, i64),
}

impl SavedState for FrozenDisk {
    const KIND: &'static str = "frozen disk";
    const VERSION: u16 = 1;
}

impl FrozenDisk {
    /// Describes the image at `path` as it is now.
    pub(crate) fn now(name: DeviceName, path: &Path) -> io::Result<FrozenDisk> {
        let metadata = fs::metadata(path)?;
        Ok(FrozenDisk {
            name,
            path: path.to_path_buf(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        })
    }

    /// Returns whether the image is as it was.
    ///
    /// # Errors
    /// If it is not there.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        let now = FrozenDisk::now(self.name.clone(), &self.path)?;
        Ok(now == *self)
    }
}

/// What the owner of the machine wants to find again.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    text: String,
}

impl SavedState for Note {
    const KIND: &'static str = "note";
    const VERSION: u16 = 1;
}

/// The state that a machine goes on from, besides its memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MachineState<'a> {
    pub(crate) guest: GuestFacts,
    /// When it was saved, since 1970, if the guest's clock is to go on as if the machine had run since.
    pub(crate) clock_catches_up_from: Option<Duration>,
    /// Whether the machine that it was saved of runs on this host, so that KVM takes all that its vCPUs have.
    pub(crate) is_of_fork: bool,
    /// One of the virtual machine, and then one of each vCPU.
    pub(crate) processors: &'a [Section],
    pub(crate) devices: &'a [SavedDevice],
}

/// All sections of a machine.
#[derive(Debug)]
pub(crate) struct Sections {
    machine_file: String,
    pub(crate) host: HostFacts,
    pub(crate) note: Option<String>,
    guest: GuestFacts,
    pub(crate) disks: Vec<FrozenDisk>,
    processors: Vec<Section>,
    devices: Vec<SavedDevice>,
}

impl Sections {
    /// Puts together the state of a machine of this host.
    pub(crate) fn new(
        config: &MachineConfig,
        note: Option<String>,
        guest: GuestFacts,
        disks: Vec<FrozenDisk>,
        processors: Vec<Section>,
        devices: Vec<SavedDevice>,
    ) -> Sections {
        Sections {
            machine_file: config.to_toml(),
            host: HostFacts::of_this_host(),
            note,
            guest,
            disks,
            processors,
            devices,
        }
    }

    /// Returns the sections of a state file.
    ///
    /// # Errors
    /// If a part has more state than a section takes.
    pub(crate) fn write(&self) -> Result<Vec<Section>, Error> {
        let mut sections = vec![
            Section::of(&Configuration {
                machine_file: self.machine_file.clone(),
            })?,
            Section::of(&self.host)?,
            Section::of(&self.guest)?,
        ];
        if let Some(text) = &self.note {
            sections.push(Section::of(&Note { text: text.clone() })?);
        }
        for disk in &self.disks {
            sections.push(Section::of(disk)?);
        }
        sections.extend(self.processors.iter().cloned());
        for device in &self.devices {
            sections.push(Section::of(device)?);
        }
        Ok(sections)
    }

    /// Reads the sections of a state file.
    ///
    /// # Errors
    /// If one is damaged, not known to this program, or missing.
    pub(crate) fn read(sections: &[Section]) -> Result<Sections, RestoreError> {
        let (mut configuration, mut host, mut guest, mut note) = (None, None, None, None);
        let (mut disks, mut processors, mut devices) = (Vec::new(), Vec::new(), Vec::new());
        for section in sections {
            match section.kind() {
                Configuration::KIND => configuration = Some(section.decode::<Configuration>()?),
                HostFacts::KIND => host = Some(section.decode()?),
                GuestFacts::KIND => guest = Some(section.decode()?),
                Note::KIND => note = Some(section.decode::<Note>()?.text),
                FrozenDisk::KIND => disks.push(section.decode()?),
                VM_KIND | VCPU_KIND => processors.push(section.clone()),
                SavedDevice::KIND => devices.push(section.decode()?),
                kind => {
                    return Err(RestoreError::Invalid {
                        kind: kind.to_owned(),
                        reason: "this program does not know it: restore it with the program that \
                                 saved it"
                            .to_owned(),
                    });
                }
            }
        }
        Ok(Sections {
            machine_file: required(configuration)?.machine_file,
            host: required(host)?,
            note,
            guest: required(guest)?,
            disks,
            processors,
            devices,
        })
    }

    /// Returns the configuration of the machine.
    ///
    /// # Errors
    /// If this program does not take it.
    pub(crate) fn config(&self) -> Result<MachineConfig, Error> {
        let invalid = |reason: String| RestoreError::Invalid {
            kind: Configuration::KIND.to_owned(),
            reason,
        };
        let config = MachineConfig::from_toml(&self.machine_file);
        config.map_err(|error| invalid(error.to_string()).into())
    }

    pub(crate) fn machine_state(
        &self,
        clock_catches_up_from: Option<Duration>,
        is_of_fork: bool,
    ) -> MachineState<'_> {
        MachineState {
            guest: self.guest,
            clock_catches_up_from,
            is_of_fork,
            processors: &self.processors,
            devices: &self.devices,
        }
    }
}

fn required<T: SavedState>(section: Option<T>) -> Result<T, RestoreError> {
    section.ok_or_else(|| RestoreError::Invalid {
        kind: T::KIND.to_owned(),
        reason: "it is missing".to_owned(),
    })
}
