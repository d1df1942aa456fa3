//! Checks that the parts of a machine fit together.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::hash::Hash;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bantam_arch::layout;
use bantam_devices::virtio::console::MAX_CHANNELS;

use super::limits::RateKeys;
use super::{ChannelConfig, ConfigError, DeviceName, MachineConfig, SerialConfig};

impl MachineConfig {
    /// Checks that the parts of the machine fit together.
    ///
    /// # Errors
    ///
    /// Those of [`MachineConfig::validate_values`] and [`MachineConfig::validate_files`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_values()?;
        self.validate_files()
    }

    /// Checks everything that does not need the file system, so that it never waits for one.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::NoKernel`]: there is nothing to boot.
    /// - [`ConfigError::UnpairedVcpu`]: vCPUs are to share cores in pairs, but their number is odd.
    /// - [`ConfigError::HugePagesMemory`]: memory is not a whole number of the huge pages.
    /// - [`ConfigError::CgroupRange`], [`ConfigError::CgroupPeriod`]: a limit is not one that a control group can have.
    /// - [`ConfigError::TooManyDevices`]: more devices than a machine has interrupts for
    ///   ([`layout::MAX_VIRTIO_DEVICES`]).
    /// - The error of a single device that is wrong in itself or does not fit into the machine's memory.
    /// - [`ConfigError::RepeatedDiskId`]: an id is given to two disks.
    /// - [`ConfigError::RepeatedTap`]: a tap interface is given to two network devices.
    /// - [`ConfigError::RepeatedMacAddress`]: two network devices have the same address.
    /// - [`ConfigError::RepeatedDeviceName`], [`ConfigError::PlaceDeviceName`],
    ///   [`ConfigError::FixedDeviceName`]: a disk or network device has the name of another device.
    /// - [`ConfigError::BurstWithoutLimit`]: a device has a burst without its limit.
    /// - [`ConfigError::MetadataWithoutNet`], [`ConfigError::MetadataNet`]: metadata is to be served over no
    ///   network device, or over one that does not exist.
    /// - [`ConfigError::TooManyChannels`]: more than [`MAX_CHANNELS`].
    /// - [`ConfigError::RepeatedChannel`]: two channels have the same name.
    /// - [`ConfigError::ChannelEnd`]: a channel leads nowhere.
    /// - [`ConfigError::RepeatedStdio`]: more than one of serial port, console and channels leads to standard
    ///   input and output.
    pub fn validate_values(&self) -> Result<(), ConfigError> {
        if self.kernel.as_os_str().is_empty() {
            return Err(ConfigError::NoKernel);
        }
        let vcpu_count = self.cpus.get();
        if self.smt && vcpu_count > 1 && !vcpu_count.is_multiple_of(2) {
            return Err(ConfigError::UnpairedVcpu { count: vcpu_count });
        }
        if !self
            .memory
            .bytes()
            .is_multiple_of(self.huge_pages.page_size())
        {
            return Err(ConfigError::HugePagesMemory {
                memory: self.memory,
                pages: self.huge_pages,
            });
        }
        let count = self.device_count();
        if count > layout::MAX_VIRTIO_DEVICES {
            return Err(ConfigError::TooManyDevices { count });
        }
        if let Some(cgroup) = &self.cgroup {
            cgroup.validate()?;
        }
        self.validate_devices()?;
        if let Some(id) = first_repeated(self.disks.iter().filter_map(|disk| disk.id.as_ref())) {
            return Err(ConfigError::RepeatedDiskId { id: id.clone() });
        }
        if let Some(tap) = first_repeated(self.nets.iter().filter_map(|net| net.tap.as_ref())) {
            return Err(ConfigError::RepeatedTap { tap: tap.clone() });
        }
        self.validate_mac_addresses()?;
        let keys = RateKeys {
            per_second: "per-second",
            burst: "burst",
        };
        let serial = || "the limit of the serial port".to_string();
        self.serial_limit.check_burst(keys, serial)?;
        self.validate_names()?;
        self.validate_metadata()?;
        self.validate_streams()
    }

    /// Checks the files that the paths lead to. It waits for a file system that hangs.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::RepeatedEnd`]: more than one of serial port, console, channels and socket device leads
    ///   to the same file or socket.
    /// - [`ConfigError::SerialFile`]: the output of one of them goes to a file that is a disk, the
    ///   kernel or the initrd.
    /// - [`ConfigError::RepeatedDisk`]: a file is given to two disks that are not both read-only.
    /// - [`ConfigError::WritableBootFile`]: a disk that is not read-only is the kernel or the initrd.
    pub fn validate_files(&self) -> Result<(), ConfigError> {
        self.validate_stream_files()?;
        self.validate_disk_sharing()?;
        self.validate_boot_files()
    }

    fn validate_names(&self) -> Result<(), ConfigError> {
        let names: Vec<_> = self.disk_names().chain(self.net_names()).collect();
        if let Some(name) = names.iter().find(|name| name.is_fixed()) {
            return Err(ConfigError::FixedDeviceName { name: name.clone() });
        }
        let Some(name) = first_repeated(names.into_iter()) else {
            return Ok(());
        };
        let disks = self.disks.iter().map(|disk| disk.name.as_ref());
        let nets = self.nets.iter().map(|net| net.name.as_ref());
        let is_given = |given: Option<&DeviceName>| given == Some(&name);
        let times_given = disks.chain(nets).filter(|&given| is_given(given)).count();
        match name.is_by_place() && times_given < 2 {
            true => Err(ConfigError::PlaceDeviceName { name }),
            false => Err(ConfigError::RepeatedDeviceName { name }),
        }
    }

    fn validate_mac_addresses(&self) -> Result<(), ConfigError> {
        let mut labels = HashMap::new();
        for (place, net) in self.nets.iter().enumerate() {
            let (mac, second) = (net.mac_address(place), net.label(place));
            if let Some(first) = labels.insert(mac, second.clone()) {
                return Err(ConfigError::RepeatedMacAddress { mac, first, second });
            }
        }
        Ok(())
    }

    fn validate_metadata(&self) -> Result<(), ConfigError> {
        let Some(metadata) = &self.metadata else {
            return Ok(());
        };
        if metadata.nets.is_empty() {
            return Err(ConfigError::MetadataWithoutNet);
        }
        let names: Vec<_> = self.net_names().collect();
        match metadata.nets.iter().find(|name| !names.contains(name)) {
            Some(name) => Err(ConfigError::MetadataNet { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn validate_streams(&self) -> Result<(), ConfigError> {
        let count = self.channels.len();
        if count > MAX_CHANNELS {
            return Err(ConfigError::TooManyChannels { count });
        }
        if let Some(name) = first_repeated(self.channels.iter().map(|channel| &channel.name)) {
            return Err(ConfigError::RepeatedChannel { name: name.clone() });
        }
        let leads_nowhere = |channel: &&ChannelConfig| channel.end == SerialConfig::None;
        if let Some(channel) = self.channels.iter().find(leads_nowhere) {
            return Err(ConfigError::ChannelEnd {
                name: channel.name.clone(),
            });
        }
        let mut at_stdio = self
            .streams()
            .filter(|(_, end)| **end == SerialConfig::Stdio);
        if let (Some((first, _)), Some((second, _))) = (at_stdio.next(), at_stdio.next()) {
            return Err(ConfigError::RepeatedStdio { first, second });
        }
        Ok(())
    }

    fn validate_stream_files(&self) -> Result<(), ConfigError> {
        let inputs: Vec<_> = [Some(&self.kernel), self.initrd.as_ref()]
            .into_iter()
            .flatten()
            .chain(self.disks.iter().map(|disk| &disk.path))
            .map(|path| FileIdentity::of(path))
            .collect();
        let streams = self.streams().filter_map(|(stream, end)| match end {
            SerialConfig::File(path) | SerialConfig::Socket(path) => Some((stream, path)),
            _ => None,
        });
        let vsock = self.vsock.iter();
        let vsock = vsock.map(|vsock| ("the socket device".to_string(), &vsock.socket));
        let mut ends = HashSet::new();
        for (stream, path) in streams.chain(vsock) {
            let identity = FileIdentity::of(path);
            if inputs.contains(&identity) {
                let path = path.clone();
                return Err(ConfigError::SerialFile { stream, path });
            }
            if !ends.insert(identity) {
                let path = path.clone();
                return Err(ConfigError::RepeatedEnd { stream, path });
            }
        }
        Ok(())
    }

    fn validate_boot_files(&self) -> Result<(), ConfigError> {
        let writable = self.disks.iter().filter(|disk| !disk.readonly);
        let writable: HashSet<_> = writable.map(|disk| FileIdentity::of(&disk.path)).collect();
        let boot_files = [
            ("kernel", Some(&self.kernel)),
            ("initrd", self.initrd.as_ref()),
        ];
        for (what, path) in boot_files {
            if let Some(path) = path
                && writable.contains(&FileIdentity::of(path))
            {
                let path = path.clone();
                return Err(ConfigError::WritableBootFile { what, path });
            }
        }
        Ok(())
    }

    fn validate_disk_sharing(&self) -> Result<(), ConfigError> {
        let mut readonly_by_file = HashMap::new();
        for disk in &self.disks {
            let other = readonly_by_file.insert(FileIdentity::of(&disk.path), disk.readonly);
            if let Some(other_readonly) = other
                && !(disk.readonly && other_readonly)
            {
                return Err(ConfigError::RepeatedDisk {
                    path: disk.path.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Whether two paths lead to the same file, or to the same place for one that does not exist yet. It waits
/// for a file system that hangs.
pub fn is_same_file(one: &Path, other: &Path) -> bool {
    FileIdentity::of(one) == FileIdentity::of(other)
}

/// Identifies a file, whatever its paths and links.
#[derive(PartialEq, Eq, Hash)]
enum FileIdentity {
    /// An existing file.
    Inode { device: u64, inode: u64 },
    /// A name in an existing folder.
    New {
        device: u64,
        folder: u64,
        name: OsString,
    },
    /// A file that cannot be reached. If it is needed, opening it reports that.
    Path(PathBuf),
}

impl FileIdentity {
    fn of(path: &Path) -> Self {
        if let Ok(metadata) = fs::metadata(path) {
            return Self::Inode {
                device: metadata.dev(),
                inode: metadata.ino(),
            };
        }
        let folder = match path.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            folder => folder.unwrap_or(path),
        };
        match (fs::metadata(folder), path.file_name()) {
            (Ok(metadata), Some(name)) => Self::New {
                device: metadata.dev(),
                folder: metadata.ino(),
                name: name.to_owned(),
            },
            _ => Self::Path(path.to_path_buf()),
        }
    }
}

fn first_repeated<T: Eq + Hash>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    items.find_map(|item| seen.replace(item))
}
