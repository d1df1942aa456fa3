//! The configuration that clients put together, and the machine that is made of it.
//!
//! The bodies for devices that a machine has at most one of are here, those for all other parts in
//! [`bodies`](crate::bodies).

use std::path::{Path, PathBuf};

use bantam_vmm::config::{
    BalloonConfig, BalloonSize, DeviceName, DiskConfig, GuestCid, LimitedDevice, MachineConfig,
    MetadataConfig as MachineMetadata, NetConfig, SerialConfig, VsockConfig, is_same_file,
};
use serde::{Deserialize, Serialize};

use crate::bodies::boot_source::BootSource;
use crate::bodies::cpu_config::CpuConfig;
use crate::bodies::drives::{Drive, in_order, root_device_words};
use crate::bodies::logger::Logger;
use crate::bodies::machine_config::{HugePages, MachineConfiguration};
use crate::bodies::metrics::Metrics;
use crate::bodies::mmds::MetadataConfig;
use crate::bodies::network_interfaces::NetworkInterface;
use crate::bodies::rate_limiter::{RateLimiter, TokenBucket};
use crate::device_ids::check_id;
use crate::device_names::DeviceNames;
use crate::fault::Fault;

/// Content of a configuration file, and answer of `GET /vm/config`: all that clients have put so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Configuration {
    /// See `PUT /boot-source`.
    #[serde(default)]
    pub boot_source: Option<BootSource>,
    /// See `PUT /machine-config`.
    #[serde(default)]
    pub machine_config: MachineConfiguration,
    /// See `PUT /drives`, in the order in which they came.
    #[serde(default)]
    pub drives: Vec<Drive>,
    /// See `PUT /network-interfaces`.
    #[serde(default)]
    pub network_interfaces: Vec<NetworkInterface>,
    /// See `PUT /balloon`.
    #[serde(default)]
    pub balloon: Option<Balloon>,
    /// See `PUT /vsock`.
    #[serde(default)]
    pub vsock: Option<Vsock>,
    /// See `PUT /entropy`.
    #[serde(default)]
    pub entropy: Option<Entropy>,
    /// See `PUT /serial`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// See `PUT /logger`.
    #[serde(default)]
    pub logger: Option<Logger>,
    /// See `PUT /metrics`.
    #[serde(default)]
    pub metrics: Option<Metrics>,
    /// See `PUT /mmds/config`.
    #[serde(default)]
    pub mmds_config: Option<MetadataConfig>,
    /// See `PUT /cpu-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfig>,
    /// Persistent memory devices, which are not supported.
    #[serde(default, skip_serializing)]
    pub pmem: Vec<serde_json::Value>,
    /// Memory hotplug, which is not supported.
    #[serde(default, skip_serializing)]
    pub memory_hotplug: Option<serde_json::Value>,
}

/// Body of `PUT /balloon`, and answer of `GET`: memory that the guest gives back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Size wanted in MiB.
    pub amount_mib: u32,
    /// Whether the guest may take memory back when it has no other.
    pub deflate_on_oom: bool,
    /// Seconds between two reports of the guest's memory; none if zero.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the guest can be asked for hints of free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports pages that it does not use.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// Body of `PUT /vsock`: sockets between the guest and programs of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: u32,
    /// The socket on which programs of the host reach the guest.
    pub uds_path: PathBuf,
    /// A name, which has no effect any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

/// Body of `PUT /entropy`: random numbers of the host for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits of the random bytes that the guest takes.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Body of `PUT /serial`: the serial port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// File or named pipe to which the guest's output goes, in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// Limit of the bytes of output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

/// Puts a part into a configuration, in the place of one that is there already.
///
/// An error says why the part cannot be used. The configuration is of no use then either.
pub(crate) type Put<T> = fn(&mut Configuration, T) -> Result<(), Fault>;

impl Configuration {
    /// Checks each part as if a client had put it.
    ///
    /// # Errors
    /// When a part cannot be used.
    pub fn check(self) -> Result<Configuration, Fault> {
        // All fields are named, so that the compiler reports one that is not handled.
        let Configuration {
            boot_source,
            machine_config,
            drives,
            network_interfaces,
            balloon,
            vsock,
            entropy,
            serial,
            logger,
            metrics,
            mmds_config,
            cpu_config,
            pmem,
            memory_hotplug,
        } = self;
        let not_supported = |what: &str| Fault::NotSupported {
            what: what.to_string(),
        };
        if !pmem.is_empty() {
            return Err(not_supported("Persistent memory devices"));
        }
        if memory_hotplug.is_some() {
            return Err(not_supported("Memory hotplug"));
        }
        let mut checked = Configuration {
            vsock,
            entropy,
            serial,
            logger,
            metrics,
            ..Configuration::default()
        };
        checked.put_machine_config(machine_config)?;
        checked.put_all(boot_source, Configuration::put_boot_source)?;
        checked.put_all(drives, Configuration::put_drive)?;
        checked.put_all(network_interfaces, Configuration::put_network_interface)?;
        checked.put_all(balloon, Configuration::put_balloon)?;
        checked.put_all(mmds_config, Configuration::put_mmds_config)?;
        checked.put_all(cpu_config, Configuration::put_cpu_config)?;
        Ok(checked)
    }

    /// Puts all of `parts`, one after the other.
    fn put_all<T>(&mut self, parts: impl IntoIterator<Item = T>, put: Put<T>) -> Result<(), Fault> {
        parts.into_iter().try_for_each(|part| put(self, part))
    }

    pub(crate) fn put_machine_config(&mut self, wanted: MachineConfiguration) -> Result<(), Fault> {
        wanted.vcpu_count()?;
        wanted.memory_size()?;
        if let Some(balloon) = &self.balloon {
            balloon.check(&wanted)?;
        }
        wanted.check_supported()?;
        self.machine_config = wanted;
        Ok(())
    }

    pub(crate) fn put_boot_source(&mut self, boot_source: BootSource) -> Result<(), Fault> {
        boot_source.check()?;
        self.boot_source = Some(boot_source);
        Ok(())
    }

    pub(crate) fn put_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        drive.check()?;
        let is_other_root =
            |other: &&Drive| other.is_root_device && other.drive_id != drive.drive_id;
        if drive.is_root_device
            && let Some(root) = self.drives.iter().find(is_other_root)
        {
            return Err(Fault::SecondRootDevice {
                id: root.drive_id.clone(),
            });
        }
        self.set_drive(drive);
        Ok(())
    }

    /// Sets a drive that was checked, or that the machine has.
    pub(crate) fn set_drive(&mut self, drive: Drive) {
        put_by(&mut self.drives, drive, |drive| &drive.drive_id);
    }

    pub(crate) fn put_network_interface(
        &mut self,
        interface: NetworkInterface,
    ) -> Result<(), Fault> {
        check_id(&interface.iface_id)?;
        let mac = interface.config()?.mac_address(0);
        let has_same_mac = |other: &NetworkInterface| {
            other
                .config()
                .is_ok_and(|other| other.mac_address(0) == mac)
        };
        let is_same = |other: &&NetworkInterface| {
            other.iface_id != interface.iface_id
                && (other.host_dev_name == interface.host_dev_name || has_same_mac(other))
        };
        if let Some(other) = self.network_interfaces.iter().find(is_same) {
            return Err(Fault::Value {
                what: "network interface",
                reason: format!("'{}' has the same tap or MAC address", other.iface_id),
            });
        }
        self.set_network_interface(interface);
        Ok(())
    }

    /// Sets a network interface that was checked, or that the machine has.
    pub(crate) fn set_network_interface(&mut self, interface: NetworkInterface) {
        put_by(&mut self.network_interfaces, interface, |it| &it.iface_id);
    }

    pub(crate) fn put_balloon(&mut self, balloon: Balloon) -> Result<(), Fault> {
        balloon.check(&self.machine_config)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    pub(crate) fn put_mmds_config(&mut self, metadata: MetadataConfig) -> Result<(), Fault> {
        self.metadata(&metadata)?;
        self.mmds_config = Some(metadata);
        Ok(())
    }

    pub(crate) fn put_cpu_config(&mut self, cpu: CpuConfig) -> Result<(), Fault> {
        cpu.check()?;
        self.cpu_config = Some(cpu);
        Ok(())
    }

    /// What the machine calls the devices that clients name.
    pub(crate) fn names(&self) -> DeviceNames<'_> {
        DeviceNames {
            drives: &self.drives,
            interfaces: &self.network_interfaces,
        }
    }

    /// The machine that is made of all parts.
    pub(crate) fn machine(&self) -> Result<MachineConfig, Fault> {
        let boot_source = self.boot_source.as_ref().ok_or(Fault::NoBootSource)?;
        let wanted = &self.machine_config;
        let serial = self.serial.clone().unwrap_or_default();
        let serial_limit = serial.rate_limiter.as_ref();
        let metadata = self.mmds_config.as_ref();
        let cpu = self.cpu_config.as_ref();
        let machine = MachineConfig {
            cpus: wanted.vcpu_count()?,
            smt: wanted.smt,
            memory: wanted.memory_size()?,
            huge_pages: wanted.huge_pages.into(),
            track_dirty_pages: wanted.track_dirty_pages,
            initrd: boot_source.initrd_path.clone(),
            cmdline: Some(boot_source.cmdline()),
            append: root_device_words(&self.drives),
            disks: self.disks()?,
            nets: self.nets()?,
            balloon: self.balloon.as_ref().map(Balloon::config),
            vsock: self.vsock.as_ref().map(Vsock::config),
            metadata: metadata.map(|it| self.metadata(it)).transpose()?,
            rng: self.entropy.map(|entropy| LimitedDevice {
                limits: RateLimiter::limits(entropy.rate_limiter.as_ref()).into(),
            }),
            serial_limit: serial_limit.and_then(TokenBucket::rate_limit).into(),
            serial: match serial.serial_out_path {
                Some(path) => SerialConfig::File(path),
                None => SerialConfig::Stdio,
            },
            cpu: cpu.map(CpuConfig::modifiers).unwrap_or_default(),
            ..MachineConfig::new(&boot_source.kernel_image_path)
        };
        machine.validate()?;
        Ok(machine)
    }

    /// Checks that the program can write `what` to the file at `path`: it is not one that the machine uses. This
    /// waits for a file system that hangs.
    ///
    /// # Errors
    /// If it is a disk, the kernel or the initrd.
    pub(crate) fn check_output(&self, what: &'static str, path: &Path) -> Result<(), Fault> {
        let boot_source = self.boot_source.iter();
        let boot_files =
            boot_source.flat_map(|it| [Some(&it.kernel_image_path), it.initrd_path.as_ref()]);
        let images = self
            .drives
            .iter()
            .filter_map(|drive| drive.path_on_host.as_ref());
        let mut used = boot_files.flatten().chain(images);
        match used.any(|used| is_same_file(used, path)) {
            true => Err(Fault::MachineFile {
                what,
                path: path.display().to_string(),
            }),
            false => Ok(()),
        }
    }

    fn disks(&self) -> Result<Vec<DiskConfig>, Fault> {
        let disk = |drive: &Drive| {
            Ok(DiskConfig {
                name: Some(self.names().drive(&drive.drive_id)?),
                ..drive.config()?
            })
        };
        in_order(&self.drives).map(disk).collect()
    }

    fn nets(&self) -> Result<Vec<NetConfig>, Fault> {
        let net = |interface: &NetworkInterface| {
            Ok(NetConfig {
                name: Some(self.names().interface(&interface.iface_id)?),
                ..interface.config()?
            })
        };
        self.network_interfaces.iter().map(net).collect()
    }

    fn metadata(&self, metadata: &MetadataConfig) -> Result<MachineMetadata, Fault> {
        let ids = metadata.network_interfaces.iter();
        let nets: Result<Vec<DeviceName>, Fault> =
            ids.map(|id| self.names().interface(id)).collect();
        metadata.config(nets?)
    }
}

impl Balloon {
    fn config(&self) -> BalloonConfig {
        BalloonConfig {
            size: BalloonSize::from_mib(self.amount_mib),
            deflate_on_oom: self.deflate_on_oom,
            reporting: self.free_page_reporting,
            hinting: self.free_page_hinting,
            statistics: self.stats_polling_interval_s.into(),
        }
    }

    /// Checks that the machine can have this balloon, so that a client hears of it at once.
    fn check(&self, machine: &MachineConfiguration) -> Result<(), Fault> {
        let refused = |reason| {
            Err(Fault::Value {
                what: "balloon",
                reason,
            })
        };
        let (amount, memory) = (self.amount_mib, machine.mem_size_mib);
        if u64::from(amount) > memory {
            return refused(format!(
                "{amount} MiB are more than the memory of {memory} MiB"
            ));
        }
        if machine.huge_pages == HugePages::TwoMib {
            return refused("it cannot give back huge pages of 2M".to_string());
        }
        Ok(())
    }
}

impl Vsock {
    fn config(&self) -> VsockConfig {
        VsockConfig {
            // Firecracker takes any.
            cid: GuestCid::unchecked(self.guest_cid),
            socket: self.uds_path.clone(),
        }
    }
}

/// Puts `item` in the place of the one with its name, or behind the last.
fn put_by<T>(items: &mut Vec<T>, item: T, name: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| name(other) == name(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

#[cfg(test)]
mod tests;
