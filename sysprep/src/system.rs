//! The disks in the helper machine, and the system on them.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::content::{Content, Identity};
use crate::fstab;
use crate::partitions::{PartitionInfo, Table};
use crate::root::Root;
use crate::task::{TaskDisk, tame};

/// Where the system is mounted.
const SYSTEM: &str = "/system";
/// Where a file system is mounted to look at it, and one that is not part of the system.
const ASIDE: &str = "/aside";
/// Subvolumes that distributions have their root in.
const SUBVOLUMES: [&str; 3] = ["@", "root", "@rootfs"];
/// Places whose absence would hide files that name identifiers.
const NEEDED_PLACES: [&str; 4] = ["/boot", "/efi", "/etc", "/usr"];

/// A disk of the machine.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) name: String,
    pub(crate) place: usize,
    pub(crate) node: PathBuf,
    pub(crate) table: Option<Table>,
    pub(crate) numbers: Vec<u32>,
}

/// A partition, or a disk without partitions.
#[derive(Debug)]
pub(crate) struct Volume {
    pub(crate) name: String,
    place: usize,
    number: Option<u32>,
    pub(crate) node: PathBuf,
    pub(crate) content: Content,
    pub(crate) identity: Identity,
    label: Option<String>,
    info: PartitionInfo,
}

/// All that is on the disks.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    pub(crate) disks: Vec<Disk>,
    pub(crate) volumes: Vec<Volume>,
}

/// A system that is mounted.
#[derive(Debug)]
pub(crate) struct System {
    /// Its name and place.
    pub(crate) name: String,
    pub(crate) root: Root,
    /// The places in it where something is mounted.
    mounted: Vec<PathBuf>,
    /// The volumes that are mounted, by their places in [`Disks::volumes`].
    pub(crate) volumes: Vec<usize>,
    /// What of fstab could not be mounted, and why.
    pub(crate) missing: Vec<(String, String)>,
}

fn context(what: impl Into<String>) -> impl FnOnce(io::Error) -> String {
    let what = what.into();
    move |error| format!("{what}: {error}")
}

/// Returns the attribute of a device, without blanks at its ends.
fn attribute(device: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(device.join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// Returns the block device with a serial number, by its folder in sysfs.
pub(crate) fn device_with_serial(serial: &str) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir("/sys/block")? {
        let path = entry?.path();
        if attribute(&path, "serial").as_deref() == Some(serial) {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Returns the device file of a device in sysfs.
pub(crate) fn node(device: &Path) -> PathBuf {
    Path::new("/dev").join(device.file_name().unwrap_or_default())
}

impl Disks {
    /// Looks at the disks of a task.
    pub(crate) fn scan(disks: &[TaskDisk]) -> Result<Disks, String> {
        let mut found = Disks::default();
        for disk in disks {
            let reading = || context(format!("cannot read {}", disk.name));
            let device = device_with_serial(&disk.serial()).map_err(reading())?;
            let device = device.ok_or_else(|| format!("{} is not there", disk.name))?;
            found.add(disk, &device).map_err(reading())?;
        }
        Ok(found)
    }

    fn add(&mut self, disk: &TaskDisk, device: &Path) -> io::Result<()> {
        let mut partitions = Vec::new();
        for entry in fs::read_dir(device)? {
            let path = entry?.path();
            let number = attribute(&path, "partition").and_then(|number| number.parse().ok());
            partitions.extend(number.map(|number: u32| (number, path)));
        }
        partitions.sort();
        let whole = node(device);
        let table = match partitions.is_empty() {
            true => None,
            false => Table::read(&File::open(&whole)?)?,
        };
        let name = &disk.name;
        if partitions.is_empty() {
            self.volumes
                .push(Volume::new(name.clone(), disk.place, None, whole.clone())?);
        }
        for (number, path) in &partitions {
            let name = format!("{name} partition {number}");
            let mut volume = Volume::new(name, disk.place, Some(*number), node(path))?;
            if let Some(table) = &table {
                volume.info = table.partition(*number);
            }
            self.volumes.push(volume);
        }
        self.disks.push(Disk {
            name: name.clone(),
            place: disk.place,
            node: whole,
            table,
            numbers: partitions.into_iter().map(|(number, _)| number).collect(),
        });
        Ok(())
    }

    /// Finds the volume that fstab names.
    fn find(&self, what: &str) -> Option<usize> {
        let (tag, value) = what.split_once('=').unwrap_or_else(|| {
            let path = Path::new(what);
            let tag = match path.parent().and_then(Path::to_str) {
                Some("/dev/disk/by-uuid") => "UUID",
                Some("/dev/disk/by-partuuid") => "PARTUUID",
                Some("/dev/disk/by-label") => "LABEL",
                Some("/dev/disk/by-partlabel") => "PARTLABEL",
                Some("/dev") => "",
                _ => return ("none", ""),
            };
            (
                tag,
                path.file_name()
                    .and_then(|it| it.to_str())
                    .unwrap_or_default(),
            )
        });
        let is_it = |volume: &Volume| {
            let has = |id: Option<&str>| id.is_some_and(|id| id.eq_ignore_ascii_case(value));
            match tag {
                "UUID" => match &volume.identity {
                    Identity::Changeable { id } => has(Some(id)),
                    Identity::Fixed { id, .. } => has(id.as_deref()),
                    Identity::None => false,
                },
                "PARTUUID" => has(volume.info.id.as_deref()),
                "LABEL" => volume.label.as_deref() == Some(value),
                "PARTLABEL" => volume.info.label.as_deref() == Some(value),
                "" => device_place(value) == Some((volume.place, volume.number)),
                _ => false,
            }
        };
        let mut found = (0..).zip(&self.volumes).filter(|(_, volume)| is_it(volume));
        let first = found.next()?;
        // Two that have the same name cannot be told apart.
        found.next().is_none().then_some(first.0)
    }
}

/// Returns the place of a disk, and the number of a partition of it, that a guest calls `vdb2` or `sdb2`.
fn device_place(name: &str) -> Option<(usize, Option<u32>)> {
    let rest = ["vd", "sd"]
        .iter()
        .find_map(|begin| name.strip_prefix(begin))?;
    let mut characters = rest.chars();
    let letter = characters.next().filter(char::is_ascii_lowercase)?;
    let place = letter as usize - 'a' as usize;
    match characters.as_str() {
        "" => Some((place, None)),
        number => Some((place, Some(number.parse().ok()?))),
    }
}

impl Volume {
    fn new(name: String, place: usize, number: Option<u32>, node: PathBuf) -> io::Result<Volume> {
        let device = File::open(&node)?;
        let content = Content::detect(&device)?;
        Ok(Volume {
            identity: content.identity(&device)?,
            label: content.label(&device)?,
            info: PartitionInfo::default(),
            name,
            place,
            number,
            node,
            content,
        })
    }

    /// Mounts it. `None` is for what is not a file system.
    fn mount(&self, target: &Path, is_read_only: bool, subvolume: Option<&str>) -> io::Result<()> {
        let kind = self.content.mount_type();
        let kind =
            kind.ok_or_else(|| io::Error::other(format!("it is {}", self.content.name())))?;
        let mut flags =
            MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOATIME;
        if is_read_only {
            flags |= MountFlags::RDONLY;
        }
        let options = match (self.content, subvolume) {
            // A copy of the same file system may be mounted beside it.
            (Content::Xfs, _) => "nouuid".to_owned(),
            (_, Some(subvolume)) => format!("subvol={subvolume}"),
            (_, None) => String::new(),
        };
        let options = CString::new(options)?;
        Ok(mount(&self.node, target, kind, flags, options.as_c_str())?)
    }
}

/// Calls a function with a volume that is mounted aside.
pub(crate) fn with_mounted_aside<T>(
    volume: &Volume,
    is_read_only: bool,
    subvolume: Option<&str>,
    look: impl FnOnce(&Root) -> T,
) -> io::Result<T> {
    let folder = Path::new(ASIDE);
    fs::create_dir_all(folder)?;
    volume.mount(folder, is_read_only, subvolume)?;
    // What it has open is closed before it is unmounted.
    let looked = Root::open(folder).map(|root| look(&root));
    unmount(folder, UnmountFlags::empty())?;
    looked
}

/// Where a system may be.
struct Candidate {
    volume: usize,
    subvolume: Option<&'static str>,
    name: String,
}

impl System {
    /// Finds the system on the disks, and mounts it with the file systems of its fstab.
    pub(crate) fn mount(disks: &Disks) -> Result<System, String> {
        let (mut candidates, seen) = candidates(disks);
        let found = match candidates.len() {
            1 => candidates.remove(0),
            0 => {
                return Err(format!(
                    "no Linux system was found on the disks: {}",
                    seen.join(", ")
                ));
            }
            _ => {
                let names: Vec<_> = candidates.into_iter().map(|it| it.name).collect();
                return Err(format!(
                    "there are several systems on the disks, and only one can be reset: {}",
                    names.join("; ")
                ));
            }
        };
        let volume = &disks.volumes[found.volume];
        let folder = Path::new(SYSTEM);
        let mounting = || context(format!("cannot mount {}", volume.name));
        fs::create_dir_all(folder).map_err(mounting())?;
        volume
            .mount(folder, false, found.subvolume)
            .map_err(mounting())?;
        let mut system = System {
            name: found.name,
            root: Root::open(folder).map_err(mounting())?,
            mounted: vec![folder.to_path_buf()],
            volumes: vec![found.volume],
            missing: Vec::new(),
        };
        system.mount_fstab(disks);
        Ok(system)
    }

    /// Mounts what fstab says, below the root.
    fn mount_fstab(&mut self, disks: &Disks) {
        let text = match self.root.read("/etc/fstab") {
            Ok(text) => text.unwrap_or_default(),
            Err(error) => {
                return self
                    .missing
                    .push(("/etc/fstab".to_owned(), error.to_string()));
            }
        };
        let mut entries = fstab::parse(&text);
        entries.retain(|entry| entry.place.len() > 1 && entry.place.starts_with('/'));
        // Those that others are below come first.
        entries.sort_by_key(|entry| Path::new(&entry.place).components().count());
        for entry in entries {
            let is_needed = NEEDED_PLACES
                .iter()
                .any(|place| Path::new(&entry.place).starts_with(place));
            if entry.has("bind") || (entry.has("noauto") && !is_needed) {
                continue;
            }
            let Some(volume) = disks.find(&entry.what) else {
                if is_needed || entry.what.contains('/') || entry.what.contains('=') {
                    let reason = format!("{} is not on the disks", entry.what);
                    self.missing.push((entry.place, reason));
                }
                continue;
            };
            let subvolume = entry
                .options
                .iter()
                .find_map(|it| it.strip_prefix("subvol="));
            match self.mount_at(&disks.volumes[volume], &entry.place, subvolume) {
                Ok(()) => self.volumes.push(volume),
                Err(error) => self.missing.push((entry.place, error.to_string())),
            }
        }
    }

    fn mount_at(
        &mut self,
        volume: &Volume,
        place: &str,
        subvolume: Option<&str>,
    ) -> io::Result<()> {
        let target = self.root.mount_point(Path::new(place))?;
        let target = target.ok_or_else(|| io::Error::other("there is no folder of this name"))?;
        // The folder that was found below the root, whatever its path leads to.
        let path = PathBuf::from(format!("/proc/self/fd/{}", target.as_raw_fd()));
        let real = fs::read_link(&path)?;
        volume.mount(&path, false, subvolume)?;
        self.mounted.push(real);
        Ok(())
    }

    /// Returns what is missing that may have files which name identifiers.
    pub(crate) fn missing_needed(&self) -> impl Iterator<Item = &(String, String)> {
        self.missing.iter().filter(|(place, _)| {
            let place = Path::new(place);
            NEEDED_PLACES.iter().any(|needed| place.starts_with(needed))
        })
    }

    /// Unmounts everything.
    pub(crate) fn unmount(self) -> Result<(), String> {
        drop(self.root);
        for place in self.mounted.iter().rev() {
            unmount(place, UnmountFlags::empty())
                .map_err(|error| format!("cannot unmount '{}': {error}", place.display()))?;
        }
        Ok(())
    }
}

/// Looks for systems. Returns also what each volume is.
fn candidates(disks: &Disks) -> (Vec<Candidate>, Vec<String>) {
    let mut candidates = Vec::new();
    let mut seen = Vec::new();
    for (place, volume) in (0..).zip(&disks.volumes) {
        let mut what = volume.content.name().to_owned();
        let subvolumes = match volume.content {
            Content::Btrfs => &SUBVOLUMES[..],
            _ => &[],
        };
        let all = [None]
            .into_iter()
            .chain(subvolumes.iter().copied().map(Some));
        for subvolume in all.filter(|_| volume.content.mount_type().is_some()) {
            match with_mounted_aside(volume, true, subvolume, system_name) {
                Ok(None) => {}
                Ok(Some(name)) => {
                    candidates.push(Candidate {
                        volume: place,
                        subvolume,
                        name: format!("{name} on {}", volume.name),
                    });
                    break;
                }
                Err(error) if subvolume.is_none() => what = format!("{what} ({error})"),
                // There is no such subvolume.
                Err(_) => {}
            }
        }
        seen.push(format!("{} is {what}", volume.name));
    }
    (candidates, seen)
}

/// Returns the name of the system in a root; `None` if there is none.
fn system_name(root: &Root) -> Option<String> {
    if !root.has("/etc/os-release") && !root.has("/etc/fstab") {
        return None;
    }
    let texts =
        ["/etc/os-release", "/usr/lib/os-release"].map(|path| root.read(path).ok().flatten());
    let text = texts.into_iter().flatten().next().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name = name.map(|name| tame(name.trim_matches(['"', '\''])));
    Some(name.unwrap_or_else(|| "a Linux system".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_a_guest_are_disks_by_their_places() {
        assert_eq!(device_place("vda"), Some((0, None)));
        assert_eq!(device_place("sdc12"), Some((2, Some(12))));
        for name in ["", "vd", "vdA1", "nvme0n1", "vda1x", "mapper"] {
            assert_eq!(device_place(name), None, "{name}");
        }
    }
}
