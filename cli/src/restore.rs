//! `bantam restore`: a machine that goes on from a snapshot.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use bantam_storage::ImageFormat;
use bantam_storage::tools::{self, Format, NewContent};
use bantam_vmm::Snapshot;
use bantam_vmm::config::{
    DeviceName, DiskConfig, DiskFormatOption, InterfaceName, MachineConfig, SerialConfig,
};

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

/// Opens the snapshot, and returns it with the configuration of the machine that goes on from it.
pub fn prepare(args: &RestoreArgs) -> anyhow::Result<(Snapshot, MachineConfig)> {
    let mut snapshot = Snapshot::open(&args.directory)?;
    if args.force {
        snapshot.take_changed_disks();
    }
    let mut config = snapshot.config().clone();
    replace_ends(&mut config, args)?;
    // The rest are frozen with the snapshot, and become backing files.
    snapshot.check_disks(&config)?;
    if let Some(folder) = &args.overlays {
        add_overlays(&mut config, args, folder)?;
    }
    Ok((snapshot, config))
}

/// Gives devices the ends on the host that the command line names.
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
        if net.user {
            bail!("network device '{device}' is on a user network, and takes no tap");
        }
        net.tap = Some(value.clone());
    }
    if let Some(socket) = &args.vsock {
        let vsock = config.vsock.as_mut();
        let vsock = vsock.context("the machine of the snapshot has no socket device")?;
        vsock.socket = socket.clone();
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

/// Reads a network device's replacement: `NAME=TAP`.
pub fn net(text: &str) -> Result<Replacement<InterfaceName>, String> {
    Replacement::parse(text, |text| {
        InterfaceName::try_from(text.to_owned()).map_err(|error| format!("{error}"))
    })
}
