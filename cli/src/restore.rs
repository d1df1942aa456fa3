//! `bantam restore`: a machine that goes on from a snapshot.

use std::fs::{self, File};
use std::os::fd::{OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bantam_storage::ImageFormat;
use bantam_storage::tools::{self, Format, NewContent};
use bantam_vmm::config::{
    ChannelName, DeviceName, DiskConfig, DiskFormatOption, GuestCid, MachineConfig, NetConfig,
    NetEnd, SerialConfig,
};
use nix::unistd::close;

use bantam_vmm::{MemoryLoad, Snapshot, SnapshotFiles};

use crate::api::read_metadata;
use crate::args::RestoreArgs;
use crate::image::{open_backing, options, set_backing};

/// Something of the host that a device is to use, in place of what it used before.
#[derive(Clone, Debug)]
pub struct Replacement<T> {
    /// The device.
    pub device: DeviceName,
    /// What it is to use.
    pub value: T,
}

impl<T> Replacement<T> {
    /// Reads `NAME=VALUE`.
    pub fn parse(
        text: &str,
        value: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Self, String> {
        let (name, rest) = text
            .split_once('=')
            .ok_or("it must be the name of a device, '=', and what it is to use")?;
        let device = name.parse().map_err(|error| format!("{error}"))?;
        let value = value(rest)?;
        Ok(Replacement { device, value })
    }
}

/// Where the memory of a machine comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemorySource {
    /// From the memory file.
    File(MemoryLoad),
    /// From the program that listens on this socket.
    Server(PathBuf),
}

/// Opens the snapshot, and returns it with the configuration of the machine that goes on from it.
pub fn prepare(args: &RestoreArgs) -> anyhow::Result<(Snapshot, MachineConfig)> {
    let mut snapshot = open(args)?;
    if args.force {
        snapshot.take_changed_disks();
    }
    let mut config = snapshot.config().clone();
    replace_ends(&mut config, args)?;
    config.seccomp = args.seccomp.unwrap_or(config.seccomp);
    // The rest are frozen with the snapshot, and become backing files.
    snapshot.check_disks(&config)?;
    if let Some(folder) = &args.overlays {
        add_overlays(&mut config, args, folder)?;
    }
    Ok((snapshot, config))
}

fn open(args: &RestoreArgs) -> anyhow::Result<Snapshot> {
    if !args.descriptors.is_empty() {
        let descriptors = inherited(&args.descriptors)?;
        return Ok(Snapshot::from_descriptors(descriptors)?);
    }
    let mut snapshot = match &args.memory_load {
        MemorySource::File(load) => {
            let mut snapshot = Snapshot::open(&args.directory)?;
            snapshot.set_memory_load(*load);
            snapshot
        }
        MemorySource::Server(socket) => {
            let files = SnapshotFiles::in_directory(&args.directory);
            Snapshot::open_served(&files.state, socket)?
        }
    };
    if args.record_working_set {
        if matches!(args.memory_load, MemorySource::Server(_)) {
            bail!(
                "cannot record the working set of memory that another program serves (--memory-load uffd): that program \
                 sees which pages are touched"
            );
        }
        snapshot.record_working_set()?;
    }
    Ok(snapshot)
}

/// Gives devices the ends on the host that the command line names, and the guest other metadata.
fn replace_ends(config: &mut MachineConfig, args: &RestoreArgs) -> anyhow::Result<()> {
    for Replacement { device, value } in &args.disks {
        let names: Vec<_> = config.disk_names().collect();
        let disk = named(&mut config.disks, &names, device, "disk")?;
        disk.path = value.path.clone();
        disk.format = value.format;
    }
    for Replacement { device, value } in &args.nets {
        let names: Vec<_> = config.net_names().collect();
        let net = named(&mut config.nets, &names, device, "network device")?;
        match net.end() {
            NetEnd::Tap(_) | NetEnd::Descriptor(_) => net.fd = None,
            NetEnd::User | NetEnd::Host(_) => {
                bail!("network device '{device}' is on a network, and takes no tap")
            }
            NetEnd::Passt(_) => {
                bail!("network device '{device}' is on a network of passt, and takes no tap")
            }
        }
        net.tap = value.tap.clone();
        net.mac = value.mac.or(net.mac);
    }
    if args.vsock.is_some() || args.cid.is_some() {
        let vsock = config.vsock.as_mut();
        let vsock = vsock.context("the machine of the snapshot has no socket device")?;
        if let Some(socket) = &args.vsock {
            vsock.socket.clone_from(socket);
        }
        vsock.cid = args.cid.unwrap_or(vsock.cid);
    }
    if let Some(serial) = &args.serial {
        config.serial = serial.clone();
    }
    if let Some(console) = &args.console {
        if config.console == SerialConfig::None {
            bail!("the machine of the snapshot has no virtio console");
        }
        if *console == SerialConfig::None {
            bail!("the virtio console cannot be removed: lead it to a file or a socket");
        }
        config.console = console.clone();
    }
    for (name, end) in &args.channels {
        let mut channels = config.channels.iter_mut();
        let channel = channels.find(|channel| channel.name == *name);
        let channel = channel
            .with_context(|| format!("the machine of the snapshot has no channel '{name}'"))?;
        channel.end = end.clone();
    }
    if let Some(path) = &args.metadata {
        let metadata = config.metadata.as_mut();
        let metadata = metadata.context("the machine of the snapshot serves no metadata")?;
        metadata.contents = Some(read_metadata(path)?);
    }
    Ok(())
}

/// Returns the device called `name`.
fn named<'a, T>(
    devices: &'a mut [T],
    names: &[DeviceName],
    name: &DeviceName,
    kind: &str,
) -> anyhow::Result<&'a mut T> {
    let place = names.iter().position(|it| it == name);
    let device = place.and_then(|place| devices.get_mut(place));
    device.with_context(|| {
        let names: Vec<_> = names.iter().map(DeviceName::as_str).collect();
        match names.is_empty() {
            true => format!("the machine of the snapshot has no {kind}"),
            false => format!(
                "the machine of the snapshot has no {kind} '{name}', but {}",
                names.join(", ")
            ),
        }
    })
}

/// Gives each disk that can be written to, and was not given another image, an overlay in `folder`.
fn add_overlays(
    config: &mut MachineConfig,
    args: &RestoreArgs,
    folder: &Path,
) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create '{}'", folder.display()))?;
    let names: Vec<_> = config.disk_names().collect();
    for (disk, name) in config.disks.iter_mut().zip(names) {
        let is_replaced = args.disks.iter().any(|it| it.device == name);
        if disk.readonly || is_replaced {
            continue;
        }
        let overlay = folder.join(format!("{name}.qcow2"));
        create_overlay(disk, &overlay)?;
        disk.path = overlay;
        disk.format = Some(DiskFormatOption::Qcow2);
        disk.backing = true;
    }
    Ok(())
}

/// Makes an empty image at `overlay` whose backing file is the image of `disk`.
fn create_overlay(disk: &DiskConfig, overlay: &Path) -> anyhow::Result<()> {
    let name = overlay.display();
    if overlay.exists() {
        bail!("cannot create '{name}': there is a file already; remove it, or name another folder");
    }
    let format = match (disk.format, ImageFormat::of_name(&disk.path)) {
        (Some(DiskFormatOption::Qcow2), _) | (None, ImageFormat::Qcow2) => Format::Qcow2,
        (Some(DiskFormatOption::Raw), _) | (None, ImageFormat::Raw) => Format::Raw,
    };
    let backing = fs::canonicalize(&disk.path)
        .with_context(|| format!("cannot find disk '{}'", disk.path.display()))?;
    let backing = backing.to_str();
    let backing = backing.context("a backing file must have a name in UTF-8")?;
    let mut image_options = options(&[])?;
    set_backing(&mut image_options, Some(backing), Some(format));
    let opened = open_backing(overlay, &image_options)?;
    let opened = opened.context("an overlay needs a backing file")?;
    let size = opened.image.size();
    let content = NewContent {
        compress: false,
        backing: Some(opened.image),
    };
    let created = tools::create(overlay, Format::Qcow2, size, image_options, content)?;
    let finished = created.target.finish(true);
    if finished.is_err() {
        created.remove();
    }
    finished.with_context(|| format!("cannot create '{name}'"))
}

/// Reads a disk's replacement: `NAME=PATH[,format=FORMAT]`.
pub fn disk(text: &str) -> Result<Replacement<DiskConfig>, String> {
    Replacement::parse(text, |text| {
        text.parse().map_err(|error| format!("{error}"))
    })
}

/// Reads where a channel leads: `NAME=END`.
pub fn channel(text: &str) -> Result<(ChannelName, SerialConfig), String> {
    let (name, end) = text
        .split_once('=')
        .ok_or("it must be the name of a channel, '=', and where it leads")?;
    let name = ChannelName::try_from(name.to_owned()).map_err(|error| error.to_string())?;
    match end.parse() {
        Ok(SerialConfig::None) => Err("a channel cannot lead nowhere".to_owned()),
        end => Ok((name, end.map_err(|error| error.to_string())?)),
    }
}

/// Reads where memory comes from.
pub fn memory_source(text: &str) -> Result<MemorySource, String> {
    let load = match text {
        "lazy" => MemoryLoad::Lazy,
        "prefetch" => MemoryLoad::Prefetch,
        "copy" => MemoryLoad::Copy,
        "copy-all" => MemoryLoad::CopyAll,
        _ => {
            let socket = text.strip_prefix("uffd=").filter(|path| !path.is_empty());
            return socket
                .map(|path| MemorySource::Server(PathBuf::from(path)))
                .ok_or_else(|| {
                    "expected lazy, prefetch, copy, copy-all or uffd=SOCKET".to_owned()
                });
        }
    };
    Ok(MemorySource::File(load))
}

/// Reads a network device's replacement: `NAME=TAP[,mac=MAC]`.
pub fn net(text: &str) -> Result<Replacement<NetConfig>, String> {
    Replacement::parse(text, |text| {
        let net: NetConfig = format!("tap={text}")
            .parse()
            .map_err(|error| format!("{error}"))?;
        let expected = NetConfig {
            tap: net.tap.clone(),
            user: false,
            mac: net.mac,
            ..NetConfig::user()
        };
        match net == expected {
            true => Ok(net),
            false => Err("only the tap and its 'mac' can be others".to_owned()),
        }
    })
}

/// Reads a context identifier of a guest.
pub fn cid(text: &str) -> Result<GuestCid, String> {
    let number: i64 = text.parse().map_err(|_| "it is not a whole number")?;
    GuestCid::try_from(number).map_err(|error| error.to_string())
}

/// Takes over descriptors that the program was started with.
fn inherited(numbers: &[RawFd]) -> anyhow::Result<Vec<OwnedFd>> {
    let take = |&number: &RawFd| {
        // This program reads from its own place in the file, and none of its own programs inherits it.
        let path = format!("/proc/self/fd/{number}");
        let file = File::open(&path).with_context(|| format!("cannot open '{path}'"))?;
        close(number).context("cannot close an inherited descriptor")?;
        Ok(file.into())
    };
    numbers.iter().map(take).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_device_gets_another_tap_and_mac_address_only() {
        let replaced = net("lan=tap7,mac=02:00:00:00:00:07").unwrap();
        assert_eq!(replaced.device.as_str(), "lan");
        assert_eq!(replaced.value.tap.unwrap().as_str(), "tap7");
        let mac = replaced.value.mac.unwrap();
        assert_eq!(mac.to_string(), "02:00:00:00:00:07");
        assert_eq!(net("lan=tap7").unwrap().value.mac, None);
        for (text, reason) in [
            ("tap7", "it must be the name of a device"),
            ("lan=tap7,mtu=9000", "only the tap and its 'mac'"),
            ("lan=tap7,mac=7", "invalid MAC address"),
        ] {
            let error = net(text).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn a_guest_cannot_have_every_cid() {
        assert_eq!(cid("3").unwrap().get(), 3);
        for text in ["2", "4294967295", "x", ""] {
            cid(text).unwrap_err();
        }
    }
}
