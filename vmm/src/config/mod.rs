//! What a machine is made of, as a user writes it: on the command line or in a machine file.
//!
//! [`MachineConfig`] is all of it, and a machine file has its fields as keys: one can be read, and with
//! [`MachineConfig::to_toml`] one can be written. [`MachineTable`] holds what one source says, the command
//! line or a machine file, and [`MachineTable::over`] lays one over another. Both sources read the same
//! structs: a machine file through [`toml`], an option such as `--disk disk.img,ro,id=root` through a small
//! serde deserializer for option strings. An embedding program starts from [`MachineConfig::new`] instead.

mod balloon;
mod channel;
mod cpu;
mod device_name;
mod disk;
mod ending;
mod error;
mod forms;
mod huge_pages;
mod input_file;
mod limits;
mod memory_size;
mod metadata;
mod net;
mod option_string;
pub mod path;
mod quantity;
mod rng;
mod serial;
mod table;
mod vcpu_count;
mod vsock;
mod whole_number;
mod wide_number;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::hash::Hash;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bantam_arch::layout;
use bantam_devices::virtio::console::MAX_CHANNELS;
use bantam_devices::virtio::owner::DeviceCommand;
pub use bantam_metadata::{MetadataAddress, MetadataVersion};
use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;
use serde::{Deserialize, Serialize};

pub use balloon::{BalloonConfig, BalloonSize};
pub use channel::{ChannelConfig, ChannelName};
pub use cpu::{CpuModifiers, CpuidModifier, CpuidRegister, MsrModifier};
pub use device_name::DeviceName;
pub use disk::{
    BlockEngineOption, CacheModeOption, DiskBlockSize, DiskConfig, DiskFormatOption, DiskId,
    DiskLockOption, DiskQueueCount,
};
pub use ending::{ExitStatus, OnHalt, ShutdownTimeout};
pub use error::ConfigError;
pub use huge_pages::HugePages;
pub use input_file::read_text_file;
pub use limits::{LimitConfig, LimitsConfig, NetLimitsConfig};
pub use memory_size::MemorySize;
pub use metadata::MetadataConfig;
pub use net::{InterfaceName, MacAddress, Mtu, NetConfig, QueuePairs};
pub use quantity::Quantity;
pub use rng::RngConfig;
pub use serial::SerialConfig;
pub use table::MachineTable;
pub use vcpu_count::VcpuCount;
pub use vsock::{GuestCid, VsockConfig};

use limits::RateKeys;
use wide_number::WideNumber;

/// Everything that decides what a machine is.
///
/// The types of the fields hold only values that are right by themselves;
/// [`MachineConfig::validate`] checks that they are right together. In a machine file every key can be left
/// out, which is the default of [`MachineConfig::new`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default = "MachineConfig::without_kernel",
    deny_unknown_fields,
    rename_all = "kebab-case"
)]
pub struct MachineConfig {
    /// Kernel image.
    #[serde(with = "path")]
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(with = "path::option", skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line in place of the one that fits the machine.
    pub cmdline: Option<String>,
    /// Words added to the end of the kernel command line. In a machine file a list of texts is taken too.
    #[serde(
        deserialize_with = "forms::appended",
        skip_serializing_if = "Option::is_none"
    )]
    pub append: Option<String>,
    /// Number of vCPUs.
    pub cpus: VcpuCount,
    /// Whether the guest sees each two vCPUs as the threads of one core (simultaneous multithreading).
    /// The host's scheduler is not told: where that matters, the program pins the threads of the
    /// machine itself.
    pub smt: bool,
    /// What is changed of the vCPUs that KVM makes.
    pub cpu: CpuModifiers,
    /// Guest memory.
    pub memory: MemorySize,
    /// Which pages of the host it is made of.
    pub huge_pages: HugePages,
    /// Disks, in the order in which the guest finds them.
    #[serde(rename = "disk", deserialize_with = "forms::disks")]
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest finds them.
    #[serde(rename = "net", deserialize_with = "forms::nets")]
    pub nets: Vec<NetConfig>,
    /// Socket device.
    #[serde(
        deserialize_with = "forms::vsock",
        skip_serializing_if = "Option::is_none"
    )]
    pub vsock: Option<VsockConfig>,
    /// What the guest is told over its network devices.
    #[serde(
        deserialize_with = "forms::metadata",
        skip_serializing_if = "Option::is_none"
    )]
    pub metadata: Option<MetadataConfig>,
    /// Other end of the serial port.
    pub serial: SerialConfig,
    /// Bytes of output that the serial port takes; what the guest sends beyond that is dropped.
    pub serial_limit: LimitConfig,
    /// Other end of the virtio console, `/dev/hvc0` in a Linux guest; with [`SerialConfig::None`] there
    /// is no such console.
    pub console: SerialConfig,
    /// Channels between programs of the guest and of the host.
    #[serde(rename = "channel", deserialize_with = "forms::channels")]
    pub channels: Vec<ChannelConfig>,
    /// Entropy device.
    #[serde(with = "rng")]
    pub rng: Option<RngConfig>,
    /// Memory balloon.
    #[serde(
        deserialize_with = "forms::balloon",
        skip_serializing_if = "Option::is_none"
    )]
    pub balloon: Option<BalloonConfig>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocolOption,
    /// What a reboot of the guest does. This and what follows down to [`Self::exit_status`] is for the
    /// program that owns the machine; the library builds one machine, and ends it when it is told to.
    pub on_reboot: OnReboot,
    /// How often the machine is started again at most. Without a limit if there is none.
    pub restart_limit: Option<u32>,
    /// How long a guest that is told to end may take to shut itself down.
    pub shutdown_timeout: ShutdownTimeout,
    /// Of whom the exit status of the program tells.
    pub exit_status: ExitStatus,
    /// What happens when the guest has halted for good.
    pub on_halt: OnHalt,
    /// Whether a host without hardware virtualization adds the words to the kernel command line
    /// that a guest needs there.
    pub host_workarounds: bool,
    /// Whether the log tells how long the guest takes until it writes 123 to
    /// [`layout::BOOT_TIMER`].
    pub boot_timer: bool,
}

impl MachineConfig {
    /// A machine that boots `kernel` and is otherwise all defaults: one vCPU, 256 MiB of memory,
    /// the serial port on standard input and output, an entropy device, and no other.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: None,
            append: None,
            cpus: VcpuCount::default(),
            smt: false,
            cpu: CpuModifiers::default(),
            memory: MemorySize::default(),
            huge_pages: HugePages::default(),
            disks: Vec::new(),
            nets: Vec::new(),
            vsock: None,
            metadata: None,
            serial: SerialConfig::default(),
            serial_limit: LimitConfig::default(),
            console: SerialConfig::None,
            channels: Vec::new(),
            rng: Some(RngConfig::default()),
            balloon: None,
            boot_protocol: BootProtocolOption::default(),
            on_reboot: OnReboot::default(),
            restart_limit: None,
            shutdown_timeout: ShutdownTimeout::default(),
            exit_status: ExitStatus::default(),
            on_halt: OnHalt::default(),
            host_workarounds: true,
            boot_timer: false,
        }
    }

    /// What a machine file says that says nothing; [`MachineConfig::validate`] refuses it.
    fn without_kernel() -> Self {
        Self::new("")
    }

    /// The keys of a machine file and their values, the defaults among them.
    fn to_table(&self) -> toml::Table {
        toml::Table::try_from(self).expect("each field serializes to what TOML has")
    }

    /// The machine file that describes the machine, without what is default.
    ///
    /// A reader takes relative paths as relative to the folder of the file
    /// ([`MachineConfig::rebase_paths`]), and no file of more than 1 MiB ([`read_text_file`]).
    pub fn to_toml(&self) -> String {
        let defaults = Self::without_kernel().to_table();
        let mut table = self.to_table();
        table.retain(|key, value| defaults.get(key) != Some(value));
        table.to_string()
    }

    /// Makes relative paths relative to `folder`.
    pub fn rebase_paths(&mut self, folder: &Path) {
        let channels = self.channels.iter_mut().map(|channel| &mut channel.end);
        let streams = [&mut self.serial, &mut self.console]
            .into_iter()
            .chain(channels)
            .filter_map(|end| match end {
                SerialConfig::File(path) | SerialConfig::Socket(path) => Some(path),
                SerialConfig::Stdio | SerialConfig::Pty | SerialConfig::None => None,
            });
        let kernel = Some(&mut self.kernel).filter(|path| !path.as_os_str().is_empty());
        let vsock = self.vsock.as_mut().map(|vsock| &mut vsock.socket);
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        for path in kernel
            .into_iter()
            .chain(&mut self.initrd)
            .chain(vsock)
            .chain(streams)
            .chain(disks)
        {
            if path.is_relative() {
                *path = folder.join(&path);
            }
        }
    }

    /// What the disks are called, in their order.
    pub fn disk_names(&self) -> impl Iterator<Item = DeviceName> {
        let disks = self.disks.iter().enumerate();
        disks.map(|(place, disk)| disk.device_name(place))
    }

    /// What the network devices are called, in their order.
    pub fn net_names(&self) -> impl Iterator<Item = DeviceName> {
        let nets = self.nets.iter().enumerate();
        nets.map(|(place, net)| net.device_name(place))
    }

    /// Checks that the parts of the machine fit together.
    ///
    /// # Errors
    ///
    /// As [`MachineConfig::validate_values`] and [`MachineConfig::validate_files`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_values()?;
        self.validate_files()
    }

    /// Checks what needs no look at the file system, and so never waits for it.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::NoKernel`]: there is nothing to boot.
    /// - [`ConfigError::UnpairedVcpu`]: each two vCPUs are to share a core, and one is left.
    /// - [`ConfigError::HugePagesMemory`]: memory is not a whole number of the huge pages.
    /// - [`ConfigError::TooManyDevices`]: more devices than a machine has interrupts for
    ///   ([`layout::MAX_VIRTIO_DEVICES`]).
    /// - [`ConfigError::BalloonOfHugePages`]: a balloon in memory of pages of 2 MiB.
    /// - [`ConfigError::BalloonTooLarge`]: the balloon is larger than the memory.
    /// - [`ConfigError::RepeatedDiskId`]: an id is given to two disks.
    /// - [`ConfigError::RepeatedTap`]: a tap interface is given to two network devices.
    /// - [`ConfigError::RepeatedMacAddress`]: two network devices have the same address.
    /// - [`ConfigError::RepeatedDeviceName`], [`ConfigError::FixedDeviceName`]: a disk or network device has
    ///   the name of another device.
    /// - [`ConfigError::BurstWithoutLimit`]: a device has a burst of a limit that it does not have.
    /// - [`ConfigError::VsockPath`]: the path of the socket device's socket is too long.
    /// - [`ConfigError::MetadataWithoutNet`], [`ConfigError::MetadataNet`]: metadata is served over
    ///   no network device, or over one that there is not.
    /// - [`ConfigError::TooManyChannels`]: more than [`MAX_CHANNELS`].
    /// - [`ConfigError::RepeatedChannel`]: two channels have one name.
    /// - [`ConfigError::ChannelEnd`]: a channel leads nowhere.
    /// - [`ConfigError::RepeatedStdio`]: standard input and output are the end of two of serial port,
    ///   console and channels.
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
        let devices = self.disks.len()
            + self.nets.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.console != SerialConfig::None)
            + usize::from(!self.channels.is_empty())
            + usize::from(self.rng.is_some())
            + usize::from(self.balloon.is_some());
        if devices > layout::MAX_VIRTIO_DEVICES {
            return Err(ConfigError::TooManyDevices { count: devices });
        }
        if self.balloon.is_some() && self.huge_pages == HugePages::TwoMib {
            return Err(ConfigError::BalloonOfHugePages);
        }
        if let Some(balloon) = &self.balloon
            && balloon.size.bytes() > self.memory.bytes()
        {
            return Err(ConfigError::BalloonTooLarge {
                size: balloon.size,
                memory: self.memory,
            });
        }
        if let Some(id) = first_repeated(self.disks.iter().filter_map(|disk| disk.id.as_ref())) {
            return Err(ConfigError::RepeatedDiskId { id: id.clone() });
        }
        if let Some(tap) = first_repeated(self.nets.iter().map(|net| &net.tap)) {
            return Err(ConfigError::RepeatedTap { tap: tap.clone() });
        }
        self.validate_mac_addresses()?;
        for disk in &self.disks {
            disk.validate_bursts()?;
        }
        for net in &self.nets {
            net.validate_bursts()?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        if let Some(rng) = &self.rng {
            rng.validate()?;
        }
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

    /// Checks which files the paths lead to. A file system that hangs is waited for.
    ///
    /// # Errors
    ///
    /// - [`ConfigError::RepeatedEnd`]: a file or socket is the end of two of serial port, console and
    ///   channels.
    /// - [`ConfigError::SerialFile`]: the output of one of them goes to a file that is a disk, the
    ///   kernel or the initrd.
    /// - [`ConfigError::RepeatedDisk`]: a file is given to two disks that are not both read-only.
    pub fn validate_files(&self) -> Result<(), ConfigError> {
        self.validate_stream_files()?;
        self.validate_disk_sharing()
    }

    fn validate_names(&self) -> Result<(), ConfigError> {
        let names: Vec<_> = self.disk_names().chain(self.net_names()).collect();
        if let Some(name) = names.iter().find(|name| name.is_fixed()) {
            return Err(ConfigError::FixedDeviceName { name: name.clone() });
        }
        match first_repeated(names.into_iter()) {
            Some(name) => Err(ConfigError::RepeatedDeviceName { name }),
            None => Ok(()),
        }
    }

    /// Takes over what `command` has changed of the device called `name`, so that a machine made by this is
    /// like the one that was changed.
    pub(crate) fn apply(&mut self, name: &DeviceName, command: &DeviceCommand) {
        let mut disks = (0..).zip(&mut self.disks);
        let mut nets = (0..).zip(&mut self.nets);
        if let Some((_, disk)) = disks.find(|(index, disk)| disk.device_name(*index) == *name) {
            disk.apply(command);
        } else if let Some((_, net)) = nets.find(|(index, net)| net.device_name(*index) == *name) {
            net.apply(command);
        } else if let Some(balloon) = &mut self.balloon {
            balloon.apply(command);
        }
    }

    fn validate_mac_addresses(&self) -> Result<(), ConfigError> {
        let mut taps = HashMap::new();
        for net in &self.nets {
            let mac = net.mac_address();
            if let Some(first) = taps.insert(mac, &net.tap) {
                return Err(ConfigError::RepeatedMacAddress {
                    mac,
                    first: first.clone(),
                    second: net.tap.clone(),
                });
            }
        }
        Ok(())
    }

    /// The serial port, the console and the channels: what each is called, and its other end.
    fn streams(&self) -> impl Iterator<Item = (String, &SerialConfig)> {
        let channel = |it: &ChannelConfig| format!("channel '{}'", it.name);
        let channels = self.channels.iter().map(move |it| (channel(it), &it.end));
        [
            ("the serial port".to_string(), &self.serial),
            ("the console".to_string(), &self.console),
        ]
        .into_iter()
        .chain(channels)
    }

    /// Whether the serial port, the console or a channel leads to standard input and output.
    pub fn uses_stdio(&self) -> bool {
        self.streams().any(|(_, end)| *end == SerialConfig::Stdio)
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
        let mut ends = HashSet::new();
        for (stream, end) in self.streams() {
            let (SerialConfig::File(path) | SerialConfig::Socket(path)) = end else {
                continue;
            };
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

/// What two names of one file, be they links or paths, have in common.
#[derive(PartialEq, Eq, Hash)]
enum FileIdentity {
    /// An existing file.
    Inode { device: u64, inode: u64 },
    /// A file that is not there, or out of reach. If it is needed, opening it says so.
    Path(PathBuf),
}

impl FileIdentity {
    fn of(path: &Path) -> Self {
        match fs::metadata(path) {
            Ok(metadata) => Self::Inode {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            Err(_) => Self::Path(path.to_path_buf()),
        }
    }
}

fn first_repeated<T: Eq + Hash>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    items.find_map(|item| seen.replace(item))
}

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocolOption {
    /// The best one that the kernel image offers.
    #[default]
    Auto,
    /// PVH (Xen, `docs/misc/pvh`).
    Pvh,
    /// 64-bit Linux boot protocol (`Documentation/arch/x86/boot.rst`).
    Linux64,
}

impl FromStr for BootProtocolOption {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::BootProtocol { text: text.into() })
    }
}

impl fmt::Display for BootProtocolOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Pvh => "pvh",
            Self::Linux64 => "linux64",
        })
    }
}

/// What a reboot or a panic of the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// Ends the machine.
    #[default]
    Exit,
    /// Starts the machine again.
    Restart,
}

impl FromStr for OnReboot {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::OnReboot { text: text.into() })
    }
}

impl fmt::Display for OnReboot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exit => "exit",
            Self::Restart => "restart",
        })
    }
}

/// The unit variant that serde knows by this name, so that names are written once.
fn variant_by_name<'de, T: Deserialize<'de>>(name: &'de str) -> Option<T> {
    let deserializer = IntoDeserializer::<ValueError>::into_deserializer(name);
    T::deserialize(deserializer).ok()
}

/// Whether a value need not be written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod round_trip;
#[cfg(test)]
mod tests;
