//! The configuration that clients have put together so far, and the machine that is made of it.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bantam_vmm::NetLimits;
use bantam_vmm::config::{
    BalloonConfig, BalloonSize, BlockEngineOption, CacheModeOption, DeviceName, DiskConfig,
    DiskFormatOption, DiskId, DiskLockOption, GuestCid, HugePages as GuestPages, InterfaceName,
    MachineConfig, MetadataAddress, MetadataConfig as MachineMetadata, Mtu, NetConfig,
    SerialConfig, VsockConfig,
};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::resources::RESOURCES;
use crate::resources::balloon::Balloon;
use crate::resources::boot_source::BootSource;
use crate::resources::cpu_config::CpuConfig;
use crate::resources::drives::{CacheType, Drive, IoEngine};
use crate::resources::entropy::Entropy;
use crate::resources::logger::Logger;
use crate::resources::machine_config::{HugePages, MachineConfiguration, memory_size, vcpu_count};
use crate::resources::metrics::Metrics;
use crate::resources::mmds::MetadataConfig;
use crate::resources::network_interfaces::NetworkInterface;
use crate::resources::rate_limiter::{RateLimiter, TokenBucket};
use crate::resources::serial::Serial;
use crate::resources::vsock::Vsock;

/// The kernel command line if the client gives none, as in Firecracker.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// Longest serial number of a disk.
const LONGEST_SERIAL: usize = 20;

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

impl Configuration {
    /// Checks each part as if a client had put it, in the order of the table of resources.
    ///
    /// # Errors
    /// When a part cannot be used.
    pub fn check(mut self) -> Result<Configuration, Fault> {
        let not_supported = |what: &str| Fault::NotSupported {
            what: what.to_string(),
        };
        if !self.pmem.is_empty() {
            return Err(not_supported("Persistent memory devices"));
        }
        if self.memory_hotplug.is_some() {
            return Err(not_supported("Memory hotplug"));
        }
        let mut checked = Configuration::default();
        for resource in RESOURCES {
            (resource.check)(&mut self, &mut checked)?;
        }
        Ok(checked)
    }

    /// The drives in the order in which the guest finds them: the root device is the first.
    pub(crate) fn drives_in_order(&self) -> impl Iterator<Item = &Drive> {
        let root = self.drives.iter().filter(|drive| drive.is_root_device);
        root.chain(self.drives.iter().filter(|drive| !drive.is_root_device))
    }

    /// The machine that all of it makes.
    pub(crate) fn machine(&self) -> Result<MachineConfig, Fault> {
        let boot_source = self.boot_source.as_ref().ok_or(Fault::NoBootSource)?;
        let mut config = MachineConfig::new(&boot_source.kernel_image_path);
        config.initrd = boot_source.initrd_path.clone();
        let boot_args = boot_source.boot_args.as_deref();
        config.cmdline = Some(boot_args.unwrap_or(DEFAULT_BOOT_ARGS).to_string());
        config.append = self.root_device_words();
        config.cpus = vcpu_count(&self.machine_config)?;
        config.smt = self.machine_config.smt;
        let cpu_config = self.cpu_config.as_ref();
        config.cpu = cpu_config.map(CpuConfig::modifiers).unwrap_or_default();
        config.memory = memory_size(&self.machine_config)?;
        config.huge_pages = match self.machine_config.huge_pages {
            HugePages::None => GuestPages::None,
            HugePages::Transparent => GuestPages::Transparent,
            HugePages::TwoMib => GuestPages::TwoMib,
        };
        config.disks = self
            .drives_in_order()
            .map(disk_config)
            .collect::<Result<_, _>>()?;
        config.nets = self
            .network_interfaces
            .iter()
            .map(net_config)
            .collect::<Result<_, _>>()?;
        config.rng = self.entropy.is_some();
        let entropy_limiter = self
            .entropy
            .as_ref()
            .and_then(|it| it.rate_limiter.as_ref());
        config.rng_limits = RateLimiter::limits(entropy_limiter);
        config.vsock = self.vsock.as_ref().map(vsock_config);
        config.balloon = self.balloon.as_ref().map(balloon_config);
        config.metadata = match &self.mmds_config {
            Some(metadata) => Some(self.metadata_config(metadata)?),
            None => None,
        };
        config.serial = match &self.serial {
            Some(Serial {
                serial_out_path: Some(path),
                ..
            }) => SerialConfig::File(path.clone()),
            _ => SerialConfig::Stdio,
        };
        let serial_limit = self.serial.as_ref().and_then(|serial| serial.rate_limiter);
        config.serial_limit = serial_limit.as_ref().and_then(TokenBucket::rate_limit);
        config.validate()?;
        Ok(config)
    }

    pub(crate) fn metadata_config(
        &self,
        metadata: &MetadataConfig,
    ) -> Result<MachineMetadata, Fault> {
        let place = |id: &String| {
            let mut interfaces = self.network_interfaces.iter();
            let place = interfaces.position(|interface| interface.iface_id == *id);
            place.ok_or_else(|| Fault::NoSuchDevice {
                kind: "network interface",
                id: id.clone(),
            })
        };
        let nets: Vec<usize> = metadata
            .network_interfaces
            .iter()
            .map(place)
            .collect::<Result<_, _>>()?;
        if nets.is_empty() {
            return Err(Fault::Value {
                what: "network_interfaces",
                reason: "there must be one at least".to_string(),
            });
        }
        let address = match metadata.ipv4_address {
            Some(address) => MetadataAddress::try_from(address).map_err(|error| Fault::Value {
                what: "ipv4_address",
                reason: error.to_string(),
            })?,
            None => MetadataAddress::default(),
        };
        Ok(MachineMetadata {
            version: metadata.version.into(),
            address,
            imds_compat: metadata.imds_compat,
            ..MachineMetadata::new(nets)
        })
    }

    /// What the kernel is told of the drive with its root file system.
    fn root_device_words(&self) -> Option<String> {
        let root = self.drives.iter().find(|drive| drive.is_root_device)?;
        let place = match &root.partuuid {
            Some(partition) => format!("PARTUUID={partition}"),
            None => "/dev/vda".to_string(),
        };
        let access = if root.is_read_only { "ro" } else { "rw" };
        Some(format!("root={place} {access}"))
    }
}

/// Tells a client at once of a file that will be missing at the start.
pub(crate) fn check_readable(what: &'static str, path: &Path) -> Result<(), Fault> {
    // It does not wait for the writer of a pipe.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path);
    opened
        .map(drop)
        .map_err(|error| file_fault(what, path, &error))
}

pub(crate) fn file_fault(what: &'static str, path: &Path, error: &std::io::Error) -> Fault {
    Fault::File {
        what,
        path: path.display().to_string(),
        reason: error.to_string(),
    }
}

/// The name of a device whose id clients give in the field `field`.
pub(crate) fn device_name(field: &'static str, id: &str) -> Result<DeviceName, Fault> {
    DeviceName::try_from(id.to_owned()).map_err(Fault::value(field))
}

pub(crate) fn disk_config(drive: &Drive) -> Result<DiskConfig, Fault> {
    let path = drive.path_on_host.clone().unwrap_or_default();
    // One that was cut off could be that of another drive.
    let has_serial = drive.drive_id.len() <= LONGEST_SERIAL;
    let serial = has_serial.then(|| DiskId::try_from(drive.drive_id.clone()));
    Ok(DiskConfig {
        readonly: drive.is_read_only,
        id: serial.transpose().map_err(Fault::value("drive_id"))?,
        cache: match drive.cache_type {
            CacheType::Unsafe => CacheModeOption::Unsafe,
            CacheType::Writeback => CacheModeOption::Writeback,
        },
        engine: match drive.io_engine {
            None => BlockEngineOption::Auto,
            Some(IoEngine::Sync) => BlockEngineOption::Sync,
            Some(IoEngine::Async) => BlockEngineOption::IoUring,
        },
        limits: Some(RateLimiter::limits(drive.rate_limiter.as_ref())),
        // As Firecracker does it, which has neither formats nor locks.
        format: Some(DiskFormatOption::Raw),
        lock: DiskLockOption::WherePossible,
        any_size: true,
        ..DiskConfig::new(path)
    })
}

pub(crate) fn net_config(interface: &NetworkInterface) -> Result<NetConfig, Fault> {
    let tap = InterfaceName::try_from(interface.host_dev_name.clone())
        .map_err(Fault::value("host_dev_name"))?;
    let mac = interface.guest_mac.as_deref().map(str::parse).transpose();
    let mtu = interface.mtu.map(|mtu| Mtu::try_from(i64::from(mtu)));
    Ok(NetConfig {
        mac: mac.map_err(Fault::value("guest_mac"))?,
        mtu: mtu.transpose().map_err(Fault::value("mtu"))?,
        limits: Some(net_limits(interface)),
        ..NetConfig::new(tap)
    })
}

pub(crate) fn net_limits(interface: &NetworkInterface) -> NetLimits {
    NetLimits {
        receive: RateLimiter::limits(interface.rx_rate_limiter.as_ref()),
        transmit: RateLimiter::limits(interface.tx_rate_limiter.as_ref()),
    }
}

fn balloon_config(balloon: &Balloon) -> BalloonConfig {
    BalloonConfig {
        size: BalloonSize::from_mib(balloon.amount_mib),
        deflate_on_oom: balloon.deflate_on_oom,
        reporting: balloon.free_page_reporting,
        hinting: balloon.free_page_hinting,
        statistics: balloon.stats_polling_interval_s.into(),
    }
}

fn vsock_config(vsock: &Vsock) -> VsockConfig {
    VsockConfig {
        // Firecracker takes any.
        cid: GuestCid::unchecked(vsock.guest_cid),
        socket: vsock.uds_path.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bantam_vmm::RateLimit;

    use super::*;

    #[test]
    fn what_a_client_says_of_processors_memory_and_serial_port_reaches_the_machine() {
        let text = r#"{
            "boot-source": {"kernel_image_path": "/dev/null"},
            "machine-config":
                {"vcpu_count": 4, "mem_size_mib": 64, "smt": true, "huge_pages": "2M"},
            "serial": {"rate_limiter": {"size": 1000, "refill_time": 500}}
        }"#;
        let configuration: Configuration = serde_json::from_str(text).unwrap();
        let machine = configuration.check().unwrap().machine().unwrap();
        assert_eq!((machine.cpus.get(), machine.smt), (4, true));
        assert_eq!(machine.memory.bytes(), 64 << 20);
        assert_eq!(machine.huge_pages, GuestPages::TwoMib);
        let limit = RateLimit {
            size: 1000,
            refill_time: Duration::from_millis(500),
            one_time_burst: 0,
        };
        assert_eq!(machine.serial_limit, Some(limit));
    }
}
