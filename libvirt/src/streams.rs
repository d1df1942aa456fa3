//! The serial port, the virtio console and channels.

use std::path::PathBuf;

use bantam_vmm::config::{ChannelConfig, ChannelName, MachineConfig, SerialConfig};

use crate::error::Error;
use crate::values::absolute;
use crate::xml::Element;

/// Whether a channel is one between programs by a named virtio port, and not a part of a graphics protocol.
pub(crate) fn is_virtio_channel(channel: &Element) -> bool {
    let kind = channel.get("type").unwrap_or_default();
    channel.get_of("target", "type") == Some("virtio")
        && !matches!(kind, "spicevmc" | "spiceport" | "qemu-vdagent" | "dbus")
}

/// Whether a console is a virtio console, and not another name for the serial port.
pub(crate) fn is_virtio_console(console: &Element) -> bool {
    console.get_of("target", "type") == Some("virtio")
}

/// Returns the socket of a channel for which the domain leaves the place open. It is in the folder of the machine.
pub(crate) fn channel_socket(name: &ChannelName) -> PathBuf {
    format!("channel-{name}.sock").into()
}

/// Reads the serial port, the consoles and the channels of a domain.
///
/// # Errors
/// If one leads to something that Bantam does not have, or there is more than one serial port or virtio console.
pub(crate) fn read_all(devices: &Element, config: &mut MachineConfig) -> Result<(), Error> {
    let is_alias = |it: &&Element| matches!(it.get_of("target", "type"), None | Some("serial"));
    let serials: Vec<_> = devices.all("serial").collect();
    let serial = match serials[..] {
        // A console is the serial port if there is none.
        [] => devices.all("console").find(is_alias),
        [serial] => Some(serial),
        _ => {
            return Err(Error::unsupported(
                "a second <serial>",
                "remove it, or make it a <channel> or a virtio <console>",
            ));
        }
    };
    config.serial = SerialConfig::None;
    if let Some(serial) = serial {
        let kind = serial.get_of("target", "type");
        if let Some(kind) = kind.filter(|it| !matches!(*it, "isa-serial" | "serial")) {
            return Err(Error::unsupported(
                format!("a serial port of type '{kind}'"),
                "write <target type='isa-serial'/>",
            ));
        }
        config.serial = read_end(serial, "the serial port", None)?;
    }
    let mut consoles = devices.all("console").filter(|it| !is_alias(it));
    if let Some(console) = consoles.next() {
        let kind = console.get_of("target", "type").unwrap_or_default();
        if kind != "virtio" || consoles.next().is_some() {
            return Err(Error::unsupported(
                format!("a console of type '{kind}'"),
                "there is the serial port and one console with <target type='virtio'/>",
            ));
        }
        config.console = match read_end(console, "the console", None)? {
            // The console of the machine is the serial port.
            SerialConfig::Stdio if config.serial == SerialConfig::Stdio => SerialConfig::Pty,
            end => end,
        };
    }
    for channel in devices.all("channel") {
        match channel.get_of("target", "type") {
            _ if is_virtio_channel(channel) => config.channels.push(read_channel(channel)?),
            Some("guestfwd") => {
                return Err(Error::unsupported(
                    "a channel of type 'guestfwd'",
                    "remove it; a guest reaches programs of the host by a network or vsock",
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

fn read_channel(channel: &Element) -> Result<ChannelConfig, Error> {
    let name = channel.get_of("target", "name").unwrap_or_default();
    let name: ChannelName = name.parse()?;
    let label = format!("channel '{name}'");
    let end = match read_end(channel, &label, Some(channel_socket(&name)))? {
        SerialConfig::Stdio if channel.get("type") == Some("pty") => SerialConfig::Pty,
        end => end,
    };
    Ok(ChannelConfig { name, end })
}

/// Reads where a stream leads. `socket` is for one whose place is left open.
fn read_end(
    element: &Element,
    label: &str,
    socket: Option<PathBuf>,
) -> Result<SerialConfig, Error> {
    let path = || {
        let path = element.get_of("source", "path").unwrap_or_default();
        absolute(path, &format!("the source of {label}"))
    };
    match element.get("type") {
        None | Some("pty" | "stdio") => Ok(SerialConfig::Stdio),
        Some("null") => Ok(SerialConfig::None),
        Some("file") => path().map(SerialConfig::File),
        Some("unix") if element.get_of("source", "mode") == Some("connect") => {
            Err(Error::unsupported(
                format!("{label} that connects to a socket"),
                "write <source mode='bind'/>, and have the other program connect",
            ))
        }
        Some("unix") => match socket.filter(|_| element.get_of("source", "path").is_none()) {
            Some(socket) => Ok(SerialConfig::Socket(socket)),
            None => path().map(SerialConfig::Socket),
        },
        Some(kind) => Err(Error::unsupported(
            format!("{label} of type '{kind}'"),
            "write pty (the console of the machine), file, unix or null",
        )),
    }
}

/// Writes the serial port, the consoles and the channels.
pub(crate) fn write_all(config: &MachineConfig) -> Vec<Element> {
    let mut elements = Vec::new();
    if config.serial != SerialConfig::None {
        for (name, target) in [("serial", "isa-serial"), ("console", "serial")] {
            let target = Element::new("target").attribute("type", target);
            elements.push(write_end(name, &config.serial).child(target.attribute("port", 0)));
        }
    }
    if config.console != SerialConfig::None {
        let target = Element::new("target").attribute("type", "virtio");
        let port = usize::from(config.serial != SerialConfig::None);
        let console = write_end("console", &config.console);
        elements.push(console.child(target.attribute("port", port)));
    }
    for channel in &config.channels {
        let target = Element::new("target")
            .attribute("type", "virtio")
            .attribute("name", &channel.name);
        let has_open_place = channel.end == SerialConfig::Socket(channel_socket(&channel.name));
        let element = match &channel.end {
            SerialConfig::Stdio => Element::new("channel").attribute("type", "stdio"),
            _ if has_open_place => Element::new("channel").attribute("type", "unix"),
            end => write_end("channel", end),
        };
        elements.push(element.child(target));
    }
    elements
}

fn write_end(name: &str, end: &SerialConfig) -> Element {
    let element = Element::new(name);
    let source = |path: &PathBuf| Element::new("source").attribute("path", path.to_string_lossy());
    match end {
        SerialConfig::Stdio | SerialConfig::Pty => element.attribute("type", "pty"),
        SerialConfig::None => element.attribute("type", "null"),
        SerialConfig::File(path) => element.attribute("type", "file").child(source(path)),
        SerialConfig::Socket(path) => {
            let mut source = source(path);
            source.attributes.insert(0, ("mode".into(), "bind".into()));
            element.attribute("type", "unix").child(source)
        }
    }
}
