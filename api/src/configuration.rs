//! What clients have said of the machine so far, and the machine that it makes.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use bantam_vmm::config::{
    BalloonConfig, BalloonSize, BlockEngineOption, CacheModeOption, DeviceName, DiskConfig,
    DiskFormatOption, DiskId, DiskLockOption, GuestCid, HugePages as GuestPages, InterfaceName,
    MachineConfig, MemorySize, MetadataAddress, MetadataConfig as MachineMetadata, Mtu, NetConfig,
    RngConfig, SerialConfig, VcpuCount, VsockConfig,
};
use bantam_vmm::{NetLimits, check_disk};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::request::check_name;
use crate::resources::{
    Balloon, BootSource, CacheType, CpuConfig, CpuTemplate, Drive, Entropy, HugePages, IoEngine,
    Logger, MachineConfiguration, MetadataConfig, Metrics, NetworkInterface, RateLimiter, Serial,
    TokenBucket, Vsock,
};

/// The kernel command line where the client gives none, as Firecracker has it.
const DEFAULT_BOOT_ARGS: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux \
                                 i8042.dumbkbd swiotlb=noforce";

/// Longest kernel command line in bytes, as in Firecracker: 2048 with the NUL at its end.
const LONGEST_BOOT_ARGS: usize = 2047;

/// Longest serial number of a disk.
const LONGEST_SERIAL: usize = 20;

/// What a configuration file says, and answer of `GET /vm/config`: all that clients have said so far.
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
    /// Persistent memory devices, of which there can be none.
    #[serde(default, skip_serializing)]
    pub pmem: Vec<serde_json::Value>,
    /// Memory hotplug, which there is not.
    #[serde(default, skip_serializing)]
    pub memory_hotplug: Option<serde_json::Value>,
}

impl Configuration {
    /// Checks each part as if a client had put it, in the order in which one would.
    ///
    /// # Errors
    /// As the methods that put parts.
    pub fn check(self) -> Result<Configuration, Fault> {
        let not_supported = |what: &str| Fault::NotSupported {
            what: what.to_string(),
        };
        if !self.pmem.is_empty() {
            return Err(not_supported("Persistent memory devices"));
        }
        if self.memory_hotplug.is_some() {
            return Err(not_supported("Memory hotplug"));
        }
        let mut checked = Configuration {
            logger: self.logger,
            metrics: self.metrics,
            ..Configuration::default()
        };
        checked.put_machine_config(self.machine_config)?;
        if let Some(boot_source) = self.boot_source {
            checked.put_boot_source(boot_source)?;
        }
        for drive in self.drives {
            checked.put_drive(drive)?;
        }
        for interface in self.network_interfaces {
            checked.put_network_interface(interface)?;
        }
        if let Some(balloon) = self.balloon {
            checked.put_balloon(balloon)?;
        }
        if let Some(vsock) = self.vsock {
            checked.put_vsock(vsock)?;
        }
        if let Some(metadata) = self.mmds_config {
            checked.put_metadata_config(metadata)?;
        }
        checked.entropy = self.entropy;
        checked.serial = self.serial;
        if let Some(config) = self.cpu_config {
            checked.put_cpu_config(config)?;
        }
        Ok(checked)
    }

    pub(crate) fn put_machine_config(&mut self, wanted: MachineConfiguration) -> Result<(), Fault> {
        vcpu_count(&wanted)?;
        memory_size(&wanted)?;
        if let Some(balloon) = &self.balloon {
            check_balloon(balloon, &wanted)?;
        }
        if !matches!(wanted.cpu_template, None | Some(CpuTemplate::None)) {
            return Err(Fault::NotSupported {
                what: "CPU templates other than 'None'".to_string(),
            });
        }
        if wanted.track_dirty_pages {
            tracing::info!("track_dirty_pages has no effect: there are no snapshots yet");
        }
        self.machine_config = wanted;
        Ok(())
    }

    pub(crate) fn put_boot_source(&mut self, boot_source: BootSource) -> Result<(), Fault> {
        check_readable("kernel image", &boot_source.kernel_image_path)?;
        if let Some(path) = &boot_source.initrd_path {
            check_readable("initrd", path)?;
        }
        let length = boot_source.boot_args.as_ref().map_or(0, String::len);
        if length > LONGEST_BOOT_ARGS {
            return Err(Fault::Value {
                what: "boot_args",
                reason: format!("they have {length} bytes; {LONGEST_BOOT_ARGS} is the most"),
            });
        }
        self.boot_source = Some(boot_source);
        Ok(())
    }

    pub(crate) fn put_drive(&mut self, drive: Drive) -> Result<(), Fault> {
        check_name(&drive.drive_id)?;
        if drive.socket.is_some() {
            return Err(Fault::NotSupported {
                what: "vhost-user drives".to_string(),
            });
        }
        let Some(path) = &drive.path_on_host else {
            return Err(Fault::Value {
                what: "drive",
                reason: "path_on_host is missing".to_string(),
            });
        };
        check_readable("drive image", path)?;
        check_disk(&disk_config(&drive)?)?;
        let is_other_root =
            |other: &&Drive| other.is_root_device && other.drive_id != drive.drive_id;
        if drive.is_root_device
            && let Some(root) = self.drives.iter().find(is_other_root)
        {
            return Err(Fault::SecondRootDevice {
                id: root.drive_id.clone(),
            });
        }
        put_by(&mut self.drives, drive, |drive| &drive.drive_id);
        Ok(())
    }

    pub(crate) fn put_network_interface(
        &mut self,
        interface: NetworkInterface,
    ) -> Result<(), Fault> {
        check_name(&interface.iface_id)?;
        let mac = net_config(&interface)?.mac_address();
        let has_same_mac = |other: &NetworkInterface| {
            net_config(other).is_ok_and(|other| other.mac_address() == mac)
        };
        let is_same = |other: &NetworkInterface| {
            other.iface_id != interface.iface_id
                && (other.host_dev_name == interface.host_dev_name || has_same_mac(other))
        };
        if let Some(other) = self.network_interfaces.iter().find(|other| is_same(other)) {
            return Err(Fault::Value {
                what: "network interface",
                reason: format!("'{}' has the same tap or MAC address", other.iface_id),
            });
        }
        put_by(&mut self.network_interfaces, interface, |interface| {
            &interface.iface_id
        });
        Ok(())
    }

    pub(crate) fn put_balloon(&mut self, balloon: Balloon) -> Result<(), Fault> {
        check_balloon(&balloon, &self.machine_config)?;
        self.balloon = Some(balloon);
        Ok(())
    }

    pub(crate) fn put_vsock(&mut self, vsock: Vsock) -> Result<(), Fault> {
        self.vsock = Some(vsock);
        Ok(())
    }

    pub(crate) fn put_metadata_config(&mut self, metadata: MetadataConfig) -> Result<(), Fault> {
        self.metadata_config(&metadata)?;
        self.mmds_config = Some(metadata);
        Ok(())
    }

    pub(crate) fn put_cpu_config(&mut self, config: CpuConfig) -> Result<(), Fault> {
        for (what, list) in [
            ("reg_modifiers", &config.reg_modifiers),
            ("vcpu_features", &config.vcpu_features),
        ] {
            if !list.is_empty() {
                return Err(Fault::Value {
                    what,
                    reason: "x86-64 has none; leave the list empty".to_string(),
                });
            }
        }
        let invalid = |reason| Fault::Value {
            what: "cpuid_modifiers",
            reason,
        };
        if config
            .cpuid_modifiers
            .iter()
            .any(|leaf| leaf.modifiers.is_empty())
        {
            return Err(invalid("a leaf changes no register".to_string()));
        }
        let checked = config.modifiers().check_host();
        checked.map_err(|error| invalid(error.to_string()))?;
        self.cpu_config = Some(config);
        Ok(())
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
            .map(|drive| {
                Ok(DiskConfig {
                    name: Some(self.drive_name(&drive.drive_id)?),
                    ..disk_config(drive)?
                })
            })
            .collect::<Result<_, Fault>>()?;
        config.nets = self
            .network_interfaces
            .iter()
            .map(|interface| {
                Ok(NetConfig {
                    name: Some(self.interface_name(&interface.iface_id)?),
                    ..net_config(interface)?
                })
            })
            .collect::<Result<_, Fault>>()?;
        config.rng = self.entropy.as_ref().map(|entropy| RngConfig {
            limits: RateLimiter::limits(entropy.rate_limiter.as_ref()).into(),
        });
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
        let serial_limit = serial_limit.as_ref().and_then(TokenBucket::rate_limit);
        config.serial_limit = serial_limit.into();
        config.validate()?;
        Ok(config)
    }

    /// What the machine calls a drive: its id, or `drive.N` by its place if no device, or one of another
    /// kind, can have that name. No id has a dot.
    pub(crate) fn drive_name(&self, id: &str) -> Result<DeviceName, Fault> {
        let place = self.drives_in_order().position(|it| it.drive_id == id);
        let place = place.ok_or_else(|| Fault::NoSuchDevice {
            kind: "drive",
            id: id.to_string(),
        })?;
        let name = own_name(id).map_or_else(|| format!("drive.{place}").parse(), Ok);
        name.map_err(Fault::value("drive_id"))
    }

    /// What the machine calls a network interface: its id, or `interface.N` by its place if no device, or
    /// another one, can have that name. Clients may give a drive and an interface the same id.
    pub(crate) fn interface_name(&self, id: &str) -> Result<DeviceName, Fault> {
        let mut interfaces = self.network_interfaces.iter();
        let place = interfaces.position(|it| it.iface_id == id);
        let place = place.ok_or_else(|| Fault::NoSuchDevice {
            kind: "network interface",
            id: id.to_string(),
        })?;
        let is_taken = self.drives.iter().any(|drive| drive.drive_id == id);
        let name = own_name(id).filter(|_| !is_taken);
        let name = name.map_or_else(|| format!("interface.{place}").parse(), Ok);
        name.map_err(Fault::value("iface_id"))
    }

    fn metadata_config(&self, metadata: &MetadataConfig) -> Result<MachineMetadata, Fault> {
        let nets: Vec<DeviceName> = metadata
            .network_interfaces
            .iter()
            .map(|id| self.interface_name(id))
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

/// The name that a drive or network interface has by its id, if it can have that.
fn own_name(id: &str) -> Option<DeviceName> {
    let name: DeviceName = id.parse().ok()?;
    (!name.is_fixed()).then_some(name)
}

/// Puts `item` in the place of the one with its name, or behind the last.
fn put_by<T>(items: &mut Vec<T>, item: T, name: impl Fn(&T) -> &String) {
    match items.iter_mut().find(|other| name(other) == name(&item)) {
        Some(place) => *place = item,
        None => items.push(item),
    }
}

/// Tells a client at once of a file that will be missing at the start.
fn check_readable(what: &'static str, path: &Path) -> Result<(), Fault> {
    // Without waiting for what it may be instead: a pipe that nobody writes to.
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

fn vcpu_count(wanted: &MachineConfiguration) -> Result<VcpuCount, Fault> {
    let count = i64::from(wanted.vcpu_count);
    if wanted.smt && count > 1 && count % 2 != 0 {
        return Err(Fault::Value {
            what: "vcpu_count",
            reason: "it must be 1 or even where smt is true".to_string(),
        });
    }
    VcpuCount::try_from(count).map_err(Fault::value("vcpu_count"))
}

fn memory_size(wanted: &MachineConfiguration) -> Result<MemorySize, Fault> {
    let mib = wanted.mem_size_mib;
    if wanted.huge_pages == HugePages::TwoMib && !mib.is_multiple_of(2) {
        return Err(Fault::Value {
            what: "mem_size_mib",
            reason: "it must be even where huge_pages is 2M".to_string(),
        });
    }
    let bytes = mib.saturating_mul(1 << 20);
    MemorySize::from_bytes(bytes).map_err(Fault::value("mem_size_mib"))
}

/// Tells a client at once of a balloon that the machine cannot have.
fn check_balloon(balloon: &Balloon, machine: &MachineConfiguration) -> Result<(), Fault> {
    let refused = |reason| {
        Err(Fault::Value {
            what: "balloon",
            reason,
        })
    };
    let (amount, memory) = (balloon.amount_mib, machine.mem_size_mib);
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

fn disk_config(drive: &Drive) -> Result<DiskConfig, Fault> {
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
        limits: RateLimiter::limits(drive.rate_limiter.as_ref()).into(),
        // As Firecracker does it, which has neither formats nor locks.
        format: Some(DiskFormatOption::Raw),
        lock: DiskLockOption::WherePossible,
        any_size: true,
        ..DiskConfig::new(path)
    })
}

fn net_config(interface: &NetworkInterface) -> Result<NetConfig, Fault> {
    let tap = InterfaceName::try_from(interface.host_dev_name.clone())
        .map_err(Fault::value("host_dev_name"))?;
    let mac = interface.guest_mac.as_deref().map(str::parse).transpose();
    let mtu = interface.mtu.map(|mtu| Mtu::try_from(i64::from(mtu)));
    Ok(NetConfig {
        mac: mac.map_err(Fault::value("guest_mac"))?,
        mtu: mtu.transpose().map_err(Fault::value("mtu"))?,
        limits: net_limits(interface).into(),
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
    use bantam_vmm::config::MachineTable;
    use bantam_vmm::host::{Virtualization, virtualization};

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
        assert_eq!(machine.serial_limit.rate_limit(), Some(limit));
    }

    #[test]
    fn features_of_processors_are_changed_where_the_host_can() {
        let put =
            |text| Configuration::default().put_cpu_config(serde_json::from_str(text).unwrap());
        let changes = r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0,
            "modifiers": [{"register": "ecx", "bitmap": "0b0"}]}]}"#;
        match virtualization() {
            Virtualization::Vmx | Virtualization::Svm => put(changes).unwrap(),
            Virtualization::Pvm | Virtualization::None => {
                let message = put(changes).unwrap_err().to_string();
                let expected =
                    "Invalid cpuid_modifiers: cannot change CPUID: this host has no hardware";
                assert!(message.starts_with(expected), "{message}");
            }
        }
        put(r#"{"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b0"}]}"#).unwrap();
        put(r#"{"reg_modifiers": [], "vcpu_features": []}"#).unwrap();
        for refused in [
            r#"{"reg_modifiers": [{"addr": "0x603000000013c020", "bitmap": "0b0"}]}"#,
            r#"{"vcpu_features": [{"index": 0, "bitmap": "0b0"}]}"#,
            r#"{"cpuid_modifiers": [{"leaf": "1", "subleaf": "0", "flags": 0, "modifiers": []}]}"#,
        ] {
            assert!(put(refused).is_err(), "{refused}");
        }
    }

    #[test]
    fn devices_are_called_by_their_ids_as_far_as_these_differ() {
        let long = "x".repeat(65);
        let drive = |id: &str| {
            format!(
                r#"{{"drive_id": "{id}", "path_on_host": "/dev/null", "is_root_device": false}}"#
            )
        };
        let interface =
            |id: &str, tap: &str| format!(r#"{{"iface_id": "{id}", "host_dev_name": "{tap}"}}"#);
        let text = format!(
            r#"{{
                "boot-source": {{"kernel_image_path": "/dev/zero"}},
                "drives": [{}, {}, {}],
                "network-interfaces": [{}, {}],
                "mmds-config": {{"network_interfaces": ["1"]}}
            }}"#,
            drive("1"),
            drive("rng"),
            drive(&long),
            interface("1", "tap0"),
            interface("net0", "tap1"),
        );
        let mut configuration: Configuration = serde_json::from_str(&text).unwrap();
        for drive in &mut configuration.drives {
            drive.is_read_only = true;
        }
        let machine = configuration.machine().unwrap();
        let names: Vec<_> = machine.disk_names().chain(machine.net_names()).collect();
        let names: Vec<_> = names.iter().map(DeviceName::as_str).collect();
        assert_eq!(names, ["1", "drive.1", "drive.2", "interface.0", "net0"]);
        assert_eq!(machine.metadata.unwrap().nets[0].as_str(), "interface.0");
    }

    #[test]
    fn what_clients_say_can_be_written_as_a_machine_file() {
        let text = r#"{
            "boot-source": {"kernel_image_path": "/dev/zero"},
            "drives": [{
                "drive_id": "root", "path_on_host": "/dev/null", "is_root_device": true,
                "rate_limiter": {"bandwidth": {"size": 5, "refill_time": 60000}}
            }],
            "network-interfaces": [{
                "iface_id": "eth0", "host_dev_name": "tap0",
                "tx_rate_limiter": {"ops":
                    {"size": 18446744073709551615, "one_time_burst": 7, "refill_time": 1}}
            }],
            "vsock": {"guest_cid": 1, "uds_path": "/v.sock"},
            "entropy": {"rate_limiter": {"bandwidth": {"size": 9, "refill_time": 1500}}},
            "mmds-config": {"network_interfaces": ["eth0"], "version": "V2"},
            "cpu-config": {"msr_modifiers": [{"addr": "0x10a", "bitmap": "0b1xx0"}]}
        }"#;
        let configuration: Configuration = serde_json::from_str(text).unwrap();
        let mut machine = configuration.machine().unwrap();
        let metadata = machine.metadata.as_mut().unwrap();
        metadata.contents = Some(serde_json::json!({"a": [null, 1.5, u64::MAX, "b"]}));
        let file = MachineTable::from_toml(&machine.to_toml(), Path::new("/vm.toml"));
        assert_eq!(file.unwrap().into_config().unwrap(), machine);
    }

    #[test]
    fn an_address_in_other_letters_is_the_same() {
        let mut configuration = Configuration::default();
        let mut put = |id: &str, tap: &str, mac: &str| {
            let text = format!(
                r#"{{"iface_id": "{id}", "host_dev_name": "{tap}", "guest_mac": "{mac}"}}"#
            );
            let result = configuration.put_network_interface(serde_json::from_str(&text).unwrap());
            result.map_err(|fault| fault.to_string())
        };
        put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
        let error = put("b", "tap1", "06:00:C0:00:02:0A").unwrap_err();
        assert!(error.contains("'a' has the same"), "{error}");
        put("b", "tap1", "06:00:C0:00:02:0B").unwrap();
        put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
    }

    #[test]
    fn processors_and_memory_that_do_not_fit_are_refused() {
        let refused = [
            r#"{"vcpu_count": 3, "mem_size_mib": 64, "smt": true}"#,
            r#"{"vcpu_count": 1, "mem_size_mib": 65, "huge_pages": "2M"}"#,
        ];
        for text in refused {
            let mut configuration = Configuration::default();
            let wanted = serde_json::from_str(text).unwrap();
            assert!(configuration.put_machine_config(wanted).is_err(), "{text}");
        }
    }
}
