//! The configuration of a machine, as a user writes it on the command line or in a machine file.
//!
//! [`MachineConfig`] holds all of it. A machine file has its fields as keys; [`MachineTable`] reads it, and
//! [`MachineConfig::to_toml`] writes it. A [`MachineTable`] holds what one source says, the command line or a
//! machine file, and [`MachineTable::over`] lays one over another. Both sources are read into the same
//! structs: a machine file by [`toml`], and an option such as `--disk disk.img,ro,id=root` by a small serde
//! deserializer for option strings. An embedding program starts from [`MachineConfig::new`] instead.

mod balloon;
mod cgroup;
mod channel;
mod confinement;
mod cpu;
mod device_name;
mod disk;
mod ending;
mod error;
mod forms;
mod gdb;
mod host_network;
mod huge_pages;
mod input_file;
mod limited_device;
mod limits;
mod memory_size;
mod metadata;
mod net;
mod option_string;
pub mod path;
mod quantity;
mod serial;
mod short_keys;
mod smbios;
mod table;
mod validation;
mod vcpu_count;
mod vsock;
mod whole_number;
mod wide_number;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bantam_devices::virtio::owner::{DeviceCommand, PresentImage};
pub use bantam_metadata::{MetadataAddress, MetadataVersion};
pub use bantam_network::NetworkName;
pub use bantam_usernet::{DnsName, Forward, Subnet};
use serde::de::IntoDeserializer;
use serde::de::value::Error as ValueError;
use serde::{Deserialize, Serialize};

pub use balloon::{BalloonConfig, BalloonSize};
pub use cgroup::CgroupConfig;
pub use channel::{ChannelConfig, ChannelName};
pub use confinement::Seccomp;
pub use cpu::{CpuModifiers, CpuidModifier, CpuidRegister, MsrModifier};
pub use device_name::DeviceName;
pub use disk::{
    BlockEngineOption, CacheModeOption, DiskBlockSize, DiskConfig, DiskFormatOption, DiskId,
    DiskLockOption, DiskQueueCount,
};
pub use ending::{ExitStatus, OnHalt, ShutdownTimeout};
pub use error::ConfigError;
pub use gdb::GdbConfig;
pub use host_network::{HostNetwork, Namespace};
pub use huge_pages::HugePages;
pub use input_file::read_text_file;
pub use limited_device::LimitedDevice;
pub use limits::{LimitConfig, LimitsConfig, NetLimitsConfig};
pub use memory_size::MemorySize;
pub use metadata::MetadataConfig;
pub use net::{InterfaceName, MacAddress, Mtu, NetConfig, NetEnd, QueuePairs};
pub use quantity::Quantity;
pub use serial::SerialConfig;
pub use smbios::{SmbiosConfig, SmbiosText, Uuid};
pub use table::MachineTable;
pub use validation::is_same_file;
pub use vcpu_count::VcpuCount;
pub use vsock::{GuestCid, VsockConfig};

use wide_number::WideNumber;

/// Describes a machine completely.
///
/// The types of the fields hold only values that are valid by themselves; [`MachineConfig::validate`] checks
/// that they are valid together. A key that a machine file leaves out has the value that
/// [`MachineConfig::new`] gives the field.
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
    /// Kernel command line, in place of the default one for the machine.
    pub cmdline: Option<String>,
    /// Words added to the end of the kernel command line. A machine file may also have a list of texts.
    #[serde(
        deserialize_with = "forms::appended",
        skip_serializing_if = "Option::is_none"
    )]
    pub append: Option<String>,
    /// Number of vCPUs.
    pub cpus: VcpuCount,
    /// Whether the guest sees each pair of vCPUs as the threads of one core (simultaneous multithreading).
    /// The host's scheduler is not told about this: if it matters, the program has to pin the threads of the
    /// machine itself.
    pub smt: bool,
    /// Changes to the vCPUs that KVM creates.
    pub cpu: CpuModifiers,
    /// Guest memory.
    pub memory: MemorySize,
    /// The pages of the host that guest memory consists of.
    pub huge_pages: HugePages,
    /// Disks, in the order in which the guest finds them.
    #[serde(rename = "disk", deserialize_with = "forms::tables")]
    pub disks: Vec<DiskConfig>,
    /// Network devices, in the order in which the guest finds them.
    #[serde(rename = "net", deserialize_with = "forms::tables")]
    pub nets: Vec<NetConfig>,
    /// Socket device.
    #[serde(
        deserialize_with = "forms::table",
        skip_serializing_if = "Option::is_none"
    )]
    pub vsock: Option<VsockConfig>,
    /// Metadata that the guest is told over its network devices.
    #[serde(
        deserialize_with = "forms::table",
        skip_serializing_if = "Option::is_none"
    )]
    pub metadata: Option<MetadataConfig>,
    /// SMBIOS tables, which say who the machine is.
    #[serde(
        deserialize_with = "forms::table",
        skip_serializing_if = "Option::is_none"
    )]
    pub smbios: Option<SmbiosConfig>,
    /// Other end of the serial port.
    pub serial: SerialConfig,
    /// Limit of the serial port's output in bytes; output beyond it is dropped.
    pub serial_limit: LimitConfig,
    /// Other end of the virtio console, `/dev/hvc0` in a Linux guest; with [`SerialConfig::None`] there
    /// is no such console.
    pub console: SerialConfig,
    /// Channels between programs of the guest and of the host.
    #[serde(rename = "channel", deserialize_with = "forms::tables")]
    pub channels: Vec<ChannelConfig>,
    /// Entropy device.
    #[serde(with = "limited_device")]
    pub rng: Option<LimitedDevice>,
    /// Memory balloon.
    #[serde(
        deserialize_with = "forms::table",
        skip_serializing_if = "Option::is_none"
    )]
    pub balloon: Option<BalloonConfig>,
    /// How the kernel is entered.
    pub boot_protocol: BootProtocolOption,
    /// What a reboot of the guest does. This field and those down to [`Self::exit_status`] are for the
    /// program that owns the machine; the library builds one machine, and ends it when it is told to.
    pub on_reboot: OnReboot,
    /// How many times the machine is restarted at most; `None` is no limit.
    pub restart_limit: Option<u32>,
    /// How long a guest that is asked to shut itself down may take.
    pub shutdown_timeout: ShutdownTimeout,
    /// What the exit status of the program is about.
    pub exit_status: ExitStatus,
    /// What happens when the guest has halted for good.
    pub on_halt: OnHalt,
    /// Whether, on a host without hardware virtualization, the parameters that a guest needs there are added
    /// to the kernel command line.
    pub host_workarounds: bool,
    /// Whether the log says how long the guest takes from its start until it writes 123 to
    /// [`layout::BOOT_TIMER`].
    pub boot_timer: bool,
    /// Whether the pages that the guest and its devices write are logged, for differential snapshots.
    pub track_dirty_pages: bool,
    /// What happens when a thread makes a system call that it never makes. This field and the next three are for the
    /// program that owns the machine, too.
    pub seccomp: Seccomp,
    /// Whether the process can open those files only that its machine uses.
    pub landlock: bool,
    /// Whether the host may write a core dump of the process.
    pub coredump: bool,
    /// What the process may use of the host.
    #[serde(
        deserialize_with = "forms::table",
        skip_serializing_if = "Option::is_none"
    )]
    pub cgroup: Option<CgroupConfig>,
    /// Where gdb can connect to debug the guest, which waits for it before its first instruction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gdb: Option<GdbConfig>,
}

impl MachineConfig {
    /// Describes a machine that boots `kernel`, with defaults for all else: one vCPU, 256 MiB of memory, the
    /// serial port on standard input and output, and an entropy device as the only other device.
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
            smbios: None,
            serial: SerialConfig::default(),
            serial_limit: LimitConfig::default(),
            console: SerialConfig::None,
            channels: Vec::new(),
            rng: Some(LimitedDevice::default()),
            balloon: None,
            boot_protocol: BootProtocolOption::default(),
            on_reboot: OnReboot::default(),
            restart_limit: None,
            shutdown_timeout: ShutdownTimeout::default(),
            exit_status: ExitStatus::default(),
            on_halt: OnHalt::default(),
            host_workarounds: true,
            boot_timer: false,
            track_dirty_pages: false,
            seccomp: Seccomp::default(),
            landlock: true,
            coredump: false,
            cgroup: None,
            gdb: None,
        }
    }

    /// Returns all defaults, as an empty machine file has them. [`MachineConfig::validate`] refuses them.
    fn without_kernel() -> Self {
        Self::new("")
    }

    /// Returns the keys of a machine file with their values, including defaults.
    fn to_table(&self) -> toml::Table {
        toml::Table::try_from(self).expect("each field serializes to what TOML has")
    }

    /// Writes a machine file that describes the machine, leaving out defaults.
    ///
    /// Reading it back takes relative paths as relative to the folder of the file
    /// ([`MachineConfig::rebase_paths`]), and refuses a file of more than 1 MiB ([`read_text_file`]).
    pub fn to_toml(&self) -> String {
        let defaults = Self::without_kernel().to_table();
        let mut table = self.to_table();
        table.retain(|key, value| defaults.get(key) != Some(value));
        table.to_string()
    }

    /// Reads what [`MachineConfig::to_toml`] has written, without looking at the files that it names.
    ///
    /// # Errors
    /// [`ConfigError::Options`] if a key or a value is not one of a machine file, and those of
    /// [`MachineConfig::validate_values`].
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Options {
            message: table::describe(error.message()),
        })?;
        config.validate_values()?;
        Ok(config)
    }

    /// Makes relative paths relative to `folder`.
    pub fn rebase_paths(&mut self, folder: &Path) {
        let rebase = |path: &mut PathBuf| {
            if path.is_relative() {
                *path = folder.join(&path);
            }
        };
        self.stream_paths_mut().for_each(rebase);
        let kernel = Some(&mut self.kernel).filter(|path| !path.as_os_str().is_empty());
        let disks = self.disks.iter_mut().map(|disk| &mut disk.path);
        kernel
            .into_iter()
            .chain(&mut self.initrd)
            .chain(disks)
            .for_each(rebase);
    }

    /// Returns the paths of sockets and files of the host that what the guest writes leads to, apart from disks. Two
    /// machines cannot have the same ones.
    pub fn stream_paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let channels = self.channels.iter_mut().map(|channel| &mut channel.end);
        let streams = [&mut self.serial, &mut self.console]
            .into_iter()
            .chain(channels)
            .filter_map(|end| match end {
                SerialConfig::File(path) | SerialConfig::Socket(path) => Some(path),
                SerialConfig::Stdio | SerialConfig::Pty | SerialConfig::None => None,
            });
        let vsock = self.vsock.as_mut().map(|vsock| &mut vsock.socket);
        let gdb = match &mut self.gdb {
            Some(GdbConfig::Unix(path)) => Some(path),
            Some(GdbConfig::Tcp(_)) | None => None,
        };
        vsock.into_iter().chain(gdb).chain(streams)
    }

    /// Returns the names of the disks, in their order.
    pub fn disk_names(&self) -> impl Iterator<Item = DeviceName> {
        let disks = self.disks.iter().enumerate();
        disks.map(|(place, disk)| disk.device_name(place))
    }

    /// Returns the names of the network devices, in their order.
    pub fn net_names(&self) -> impl Iterator<Item = DeviceName> {
        let nets = self.nets.iter().enumerate();
        nets.map(|(place, net)| net.device_name(place))
    }

    /// Gives devices on networks of the host the MAC addresses that they will have, if the configuration leaves them
    /// open, so that they have the same ones when the machine goes on in another process.
    pub(crate) fn fix_mac_addresses(&mut self) {
        for (place, net) in self.nets.iter_mut().enumerate() {
            net.fix_mac_address(place);
        }
    }

    /// Returns the number of virtio devices of the machine.
    fn device_count(&self) -> usize {
        self.disks.len()
            + self.nets.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.console != SerialConfig::None)
            + usize::from(!self.channels.is_empty())
            + usize::from(self.rng.is_some())
            + usize::from(self.balloon.is_some())
    }

    /// Checks each device by itself, and the balloon against the machine's memory.
    fn validate_devices(&self) -> Result<(), ConfigError> {
        if let Some(balloon) = &self.balloon {
            balloon.validate(self.memory, self.huge_pages)?;
        }
        for disk in &self.disks {
            disk.validate_bursts()?;
        }
        for (place, net) in self.nets.iter().enumerate() {
            net.validate(place)?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.validate()?;
        }
        match &self.rng {
            Some(rng) => rng.validate("the entropy device"),
            None => Ok(()),
        }
    }

    /// Applies the change that `command` has made to the device called `name`, so that a machine built from
    /// this configuration is like the one that was changed.
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

    /// Gives the disk called `name` another image.
    pub(crate) fn apply_image(&mut self, name: &DeviceName, image: &PresentImage) {
        if let Some(disk) = self.disk_mut(name) {
            disk.apply_image(image);
        }
    }

    /// Allows the image of the disk called `name` to have backing files.
    pub(crate) fn allow_backing(&mut self, name: &DeviceName) {
        if let Some(disk) = self.disk_mut(name) {
            disk.backing = true;
        }
    }

    fn disk_mut(&mut self, name: &DeviceName) -> Option<&mut DiskConfig> {
        let mut disks = (0..).zip(&mut self.disks);
        let found = disks.find(|(index, disk)| disk.device_name(*index) == *name);
        found.map(|(_, disk)| disk)
    }

    /// Returns the serial port, the console and the channels: the name of each for messages, and its other
    /// end.
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

    /// Whether the default kernel command line names the first disk, or a partition of it, as the root file system.
    pub(crate) fn boots_from_first_disk(&self) -> bool {
        self.cmdline.is_none() && self.initrd.is_none() && !self.disks.is_empty()
    }

    /// Whether the serial port, the console or a channel leads to standard input and output.
    pub fn uses_stdio(&self) -> bool {
        self.streams().any(|(_, end)| *end == SerialConfig::Stdio)
    }
}

/// Names of the devices that a machine has at most once. No disk or network device can have such a name, so
/// that a machine can be given any of these devices later.
const FIXED_DEVICE_NAMES: [&str; 7] = [
    "serial", "console", "channels", "keyboard", "vsock", "rng", "balloon",
];

/// How the kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocolOption {
    /// The best protocol that the kernel image offers.
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

/// Finds the unit variant that serde knows by this name, so that names are written only once.
fn variant_by_name<'de, T: Deserialize<'de>>(name: &'de str) -> Option<T> {
    let deserializer = IntoDeserializer::<ValueError>::into_deserializer(name);
    T::deserialize(deserializer).ok()
}

/// Whether a value is the default, so that it need not be written.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests;
