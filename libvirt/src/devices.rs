//! The devices of a domain: which of them are devices of a machine, and which element is which device.

use crate::disk;
use crate::streams;
use crate::xml::Element;

/// Whether an element becomes a device of the machine. Others of its name are kept.
pub(crate) fn is_understood(device: &Element) -> bool {
    match device.name.as_str() {
        "disk" => disk::has_medium(device),
        "channel" => streams::is_virtio_channel(device),
        _ => true,
    }
}

/// Names a device that is kept, for people.
pub(crate) fn describe_kept(device: &Element) -> String {
    match device.name.as_str() {
        "disk" => format!(
            "the empty drive '{}'",
            device.get_of("target", "dev").unwrap_or_default()
        ),
        name => format!(
            "<devices/{name}> of type '{}'",
            device.get("type").unwrap_or_default()
        ),
    }
}

/// Whether two elements of one name are the same device: one that was made of a machine, and one of an earlier domain.
pub(crate) fn is_same(made: &Element, original: &Element) -> bool {
    if !is_understood(original) {
        return false;
    }
    match made.name.as_str() {
        "disk" => disk::host_name(made) == disk::host_name(original),
        "interface" => {
            let mac = |it: &Element| it.get_of("mac", "address").map(str::to_ascii_lowercase);
            mac(made) == mac(original)
        }
        "channel" => made.get_of("target", "name") == original.get_of("target", "name"),
        "console" => streams::is_virtio_console(made) == streams::is_virtio_console(original),
        _ => true,
    }
}

/// Returns what is left of a device that the machine does not have: all, if it never had it, and the drive of a medium.
pub(crate) fn left(original: &Element) -> Option<Element> {
    match original.name.as_str() {
        "disk" => disk::drive(original),
        _ => (!is_understood(original)).then(|| original.clone()),
    }
}
