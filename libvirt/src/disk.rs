//! Disks, and drives with media.

use std::path::{Path, PathBuf};

use bantam_storage::ImageFormat;
use bantam_vmm::config::{
    BlockEngineOption, CacheModeOption, DeviceName, DiskBlockSize, DiskConfig, DiskFormatOption,
    DiskId, DiskQueueCount, LimitConfig, Quantity,
};

use crate::error::Error;
use crate::values::{absolute, number};
use crate::xml::{Element, Node};

/// Begins an alias that a user gives a device (`VIR_DOMAIN_DEVICE_ALIAS`, "ua-" in libvirt's formatdomain page).
const USER_ALIAS: &str = "ua-";
/// Begins the targets of virtio disks.
const VIRTIO_TARGET: &str = "vd";

/// Whether a disk has contents: a drive of a CD or floppy disk may be empty.
pub(crate) fn has_medium(disk: &Element) -> bool {
    let has_source = disk.first("source").is_some_and(|source| {
        source
            .attributes
            .iter()
            .any(|(name, _)| !matches!(name.as_str(), "index" | "startupPolicy"))
    });
    has_source || matches!(disk.get("device"), None | Some("disk" | "lun"))
}

/// Returns an empty drive of a CD, if the element is one with or without a medium, or another empty drive.
pub(crate) fn drive(disk: &Element) -> Option<Element> {
    let mut drive = disk.clone();
    if has_medium(disk) {
        if !is_cd(disk) {
            return None;
        }
        drive.children.retain(|node| {
            !matches!(node, Node::Element(it) if matches!(it.name.as_str(), "source" | "serial"))
        });
    }
    Some(drive)
}

fn is_cd(disk: &Element) -> bool {
    disk.get("device") == Some("cdrom")
}

/// Returns the name that a disk has on the host: its alias, or its target.
pub(crate) fn host_name(disk: &Element) -> Option<&str> {
    user_alias(disk).or_else(|| disk.get_of("target", "dev"))
}

/// Returns the name that a user has given a device.
pub(crate) fn user_alias(device: &Element) -> Option<&str> {
    device.get_of("alias", "name")?.strip_prefix(USER_ALIAS)
}

/// Makes the alias of a device, if libvirt can have it.
pub(crate) fn alias(name: &DeviceName) -> Option<Element> {
    let is_allowed = !name.as_str().contains('.');
    is_allowed.then(|| Element::new("alias").attribute("name", format_args!("{USER_ALIAS}{name}")))
}

/// Reads the disks, in the order of their targets, as libvirt does it; media of CD drives come last. What has to be said of
/// them goes into `notes`.
///
/// # Errors
/// If a disk is one that Bantam does not have.
pub(crate) fn read_all(
    devices: &Element,
    notes: &mut Vec<String>,
) -> Result<Vec<DiskConfig>, Error> {
    let mut elements: Vec<_> = devices.all("disk").filter(|it| has_medium(it)).collect();
    let place = |disk: &&Element| {
        let target = disk.get_of("target", "dev").unwrap_or_default();
        (is_cd(disk), target.len(), target.to_owned())
    };
    elements.sort_by_key(place);
    let mut disks: Vec<DiskConfig> = Vec::new();
    for (place, element) in elements.into_iter().enumerate() {
        let mut disk = read(element, notes)?;
        let name = host_name(element).unwrap_or_default();
        let is_implied =
            user_alias(element).is_some_and(|alias| disk.device_name(place).as_str() == alias);
        if !is_implied {
            disk.name = Some(name.parse()?);
        }
        disks.push(disk);
    }
    Ok(disks)
}

fn read(element: &Element, notes: &mut Vec<String>) -> Result<DiskConfig, Error> {
    let target = element.get_of("target", "dev").unwrap_or_default();
    let label = format!("disk '{target}'");
    if target.is_empty() {
        return Err(Error::value("a <disk>", "has no <target dev='vda'/>"));
    }
    let is_cd = is_cd(element);
    match element.get("device") {
        None | Some("disk") => check_bus(element, &label, target)?,
        Some("cdrom") => notes.push(format!(
            "{label}: the CD is a read-only virtio disk for the guest, after the disks"
        )),
        Some(device) => {
            return Err(Error::unsupported(
                format!("{label} with device='{device}'"),
                "write device='disk' or device='cdrom', or remove it",
            ));
        }
    }
    let mut disk = DiskConfig::new(source(element, &label)?);
    disk.readonly = is_cd || element.first("readonly").is_some();
    read_driver(element, &label, &mut disk, notes)?;
    if let Some(serial) = element.content_of("serial") {
        disk.id = Some(DiskId::try_from(serial)?);
    }
    if let Some(size) = element.get_of("blockio", "logical_block_size") {
        disk.block_size = Some(DiskBlockSize::try_from(number(
            size,
            &format!("the block size of {label}"),
        )?)?);
    }
    if let Some(limits) = element.first("iotune") {
        disk.limits.bytes = limit(limits, "total_bytes_sec", &label)?;
        disk.limits.operations = limit(limits, "total_iops_sec", &label)?;
    }
    match element.first("backingStore") {
        Some(end) if end.attributes.is_empty() && end.children.is_empty() => disk.backing = false,
        Some(_) => notes.push(format!(
            "<backingStore> of {label} is not kept: the image itself says which backing file it has"
        )),
        None => {}
    }
    Ok(disk)
}

fn check_bus(element: &Element, label: &str, target: &str) -> Result<(), Error> {
    let bus = element.get_of("target", "bus");
    match bus {
        Some("virtio") => Ok(()),
        // It follows from the target.
        None if target.starts_with(VIRTIO_TARGET) => Ok(()),
        _ => Err(Error::unsupported(
            format!(
                "{label} on the bus '{}'",
                bus.unwrap_or("that its target implies")
            ),
            "a guest finds virtio disks only: write <target dev='vda' bus='virtio'/> if it has that driver (virt-install \
             --disk ...,bus=virtio)",
        )),
    }
}

fn source(element: &Element, label: &str) -> Result<PathBuf, Error> {
    let attribute = match element.get("type") {
        Some("file") => "file",
        Some("block") => "dev",
        kind => {
            return Err(Error::unsupported(
                format!("{label} of type '{}'", kind.unwrap_or("file")),
                "its image has to be in a file (type='file') or on a block device (type='block')",
            ));
        }
    };
    let path = element.get_of("source", attribute).unwrap_or_default();
    absolute(path, &format!("the source of {label}"))
}

fn read_driver(
    element: &Element,
    label: &str,
    disk: &mut DiskConfig,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let driver = |name| element.get_of("driver", name);
    disk.format = Some(match driver("type") {
        // libvirt does not look into the image.
        None => DiskFormatOption::Raw,
        Some(format) => format.parse().map_err(|_| {
            Error::unsupported(
                format!("{label} with the format '{format}'"),
                "convert it (bantam image convert), and write type='qcow2' or type='raw'",
            )
        })?,
    });
    disk.cache = match driver("cache") {
        None | Some("default" | "writeback") => CacheModeOption::Writeback,
        Some("writethrough") => CacheModeOption::Writethrough,
        Some("none") => CacheModeOption::None,
        Some("unsafe") => CacheModeOption::Unsafe,
        Some(cache) => {
            return Err(Error::unsupported(
                format!("{label} with cache='{cache}'"),
                "write writethrough, which keeps what is acknowledged as well, or none, writeback or unsafe",
            ));
        }
    };
    match driver("io") {
        Some("io_uring") => disk.engine = BlockEngineOption::IoUring,
        Some(io) => notes.push(format!(
            "io='{io}' of {label} is not kept: Bantam chooses by itself"
        )),
        None => {}
    }
    if let Some(queues) = driver("queues") {
        let queues = number(queues, &format!("the number of queues of {label}"))?;
        disk.queues = Some(DiskQueueCount::try_from(queues)?);
    }
    Ok(())
}

fn limit(limits: &Element, name: &str, label: &str) -> Result<LimitConfig, Error> {
    let Some(text) = limits.content_of(name) else {
        return Ok(LimitConfig::default());
    };
    // libvirt's 0 is no limit.
    let per_second = match number(text.trim(), &format!("<{name}> of {label}"))? {
        0 => None,
        number => Some(Quantity::try_from(number)?),
    };
    Ok(LimitConfig::Rate {
        per_second,
        burst: None,
    })
}

/// Writes the disks. Those that were in CD drives of `original` are so again.
pub(crate) fn write_all(disks: &[DiskConfig], original: Option<&Element>) -> Vec<Element> {
    let drives: Vec<_> = original
        .into_iter()
        .flat_map(|devices| devices.all("disk"))
        .filter(|it| is_cd(it))
        .collect();
    let drive_of = |place: usize, disk: &DiskConfig| {
        let name = disk.device_name(place);
        let is_it = |drive: &&&Element| disk.readonly && host_name(drive) == Some(name.as_str());
        drives.iter().find(is_it).copied()
    };
    // A CD comes after the disks, or it would be another disk for the guest when it is read again.
    let after_disks = disks
        .iter()
        .enumerate()
        .rposition(|(place, disk)| drive_of(place, disk).is_none())
        .map_or(0, |last| last + 1);
    let mut next = 0;
    let elements = disks.iter().enumerate().map(|(place, disk)| {
        let drive = drive_of(place, disk).filter(|_| place >= after_disks);
        let name = disk.device_name(place);
        let target = match drive {
            Some(drive) => drive.first("target").cloned(),
            None => {
                let own = target_place(name.as_str()).filter(|own| *own >= next);
                let place = own.unwrap_or(next);
                next = place.saturating_add(1);
                let target = Element::new("target").attribute("dev", target_name(place));
                Some(target.attribute("bus", "virtio"))
            }
        };
        let target = target.unwrap_or_else(|| Element::new("target"));
        let is_named = target.get("dev") == Some(name.as_str()) && disk.name.is_some();
        let mut element = write(disk, drive.is_some(), target);
        if !is_named {
            // Bantam's own options say the name that libvirt cannot have.
            let by_place = || DeviceName::try_from(format!("disk{place}")).ok();
            let alias = alias(&name).or_else(|| by_place().as_ref().and_then(alias));
            element.children.extend(alias.map(Node::Element));
        }
        element
    });
    elements.collect()
}

fn write(disk: &DiskConfig, is_cd: bool, target: Element) -> Element {
    // Files that programs share are there as well.
    let is_device = disk.path.starts_with("/dev") && !disk.path.starts_with("/dev/shm");
    let (kind, attribute) = match is_device {
        true => ("block", "dev"),
        false => ("file", "file"),
    };
    let device = if is_cd { "cdrom" } else { "disk" };
    let mut driver = Element::new("driver")
        .attribute("name", "qemu")
        .attribute("type", format_of(&disk.path, disk.format));
    if disk.cache != CacheModeOption::default() {
        driver = driver.attribute("cache", disk.cache);
    }
    if disk.engine == BlockEngineOption::IoUring {
        driver = driver.attribute("io", "io_uring");
    }
    if let Some(queues) = disk.queues.filter(|_| !is_cd) {
        driver = driver.attribute("queues", queues.get());
    }
    let source = Element::new("source").attribute(attribute, disk.path.to_string_lossy());
    let mut element = Element::new("disk")
        .attribute("type", kind)
        .attribute("device", device)
        .child(driver)
        .child(source);
    if !disk.backing {
        element.push(Element::new("backingStore"));
    }
    element.push(target);
    element
        .children
        .extend(write_limits(disk).map(Node::Element));
    if disk.readonly {
        element.push(Element::new("readonly"));
    }
    if let Some(id) = &disk.id {
        element.push(Element::new("serial").text(id));
    }
    if let Some(size) = disk.block_size {
        element.push(Element::new("blockio").attribute("logical_block_size", size.get()));
    }
    element
}

/// Writes the limits of a disk that libvirt has too.
fn write_limits(disk: &DiskConfig) -> Option<Element> {
    let limits = [
        ("total_bytes_sec", disk.limits.bytes),
        ("total_iops_sec", disk.limits.operations),
    ];
    let mut element = Element::new("iotune");
    for (name, limit) in limits {
        if let Some(rate) = plain_rate(limit) {
            element.push(Element::new(name).text(rate));
        }
    }
    (!element.children.is_empty()).then_some(element)
}

/// Returns a limit that is a rate and nothing else.
pub(crate) fn plain_rate(limit: LimitConfig) -> Option<u64> {
    match limit {
        LimitConfig::Rate {
            per_second: Some(rate),
            burst: None,
        } => Some(rate.get()),
        _ => None,
    }
}

/// Returns the format of an image; if it is not given, what its name says.
fn format_of(path: &Path, given: Option<DiskFormatOption>) -> DiskFormatOption {
    given.unwrap_or_else(|| ImageFormat::of_name(path).into())
}

/// Gives each disk the format that it is written with, which its name may have said so far.
pub(crate) fn say_formats(disks: &mut [DiskConfig]) {
    for disk in disks {
        disk.format = Some(format_of(&disk.path, disk.format));
    }
}

/// Returns the target of the virtio disk at `place`, counted from zero: vda, vdb, ..., vdz, vdaa, ...
fn target_name(place: usize) -> String {
    let mut letters = Vec::new();
    let mut rest = place + 1;
    while rest > 0 {
        rest -= 1;
        letters.push(char::from(b'a' + (rest % 26) as u8));
        rest /= 26;
    }
    letters.reverse();
    VIRTIO_TARGET.chars().chain(letters).collect()
}

/// Returns the place of the virtio disk with this target.
fn target_place(target: &str) -> Option<usize> {
    let letters = target.strip_prefix(VIRTIO_TARGET)?;
    if !(1..=3).contains(&letters.len()) {
        return None;
    }
    let place = letters.bytes().try_fold(0_usize, |place, letter| {
        letter
            .is_ascii_lowercase()
            .then(|| place * 26 + usize::from(letter - b'a') + 1)
    });
    place.map(|place| place - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_count_like_letters() {
        for (place, name) in [
            (0, "vda"),
            (25, "vdz"),
            (26, "vdaa"),
            (701, "vdzz"),
            (702, "vdaaa"),
        ] {
            assert_eq!(target_name(place), name);
            assert_eq!(target_place(name), Some(place));
        }
        for name in ["vd", "vdA", "vd1", "sda", "vdaaaa", "vdé"] {
            assert_eq!(target_place(name), None, "{name}");
        }
    }
}
