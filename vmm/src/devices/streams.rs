//! The serial port, the console and the channels, and where each leads.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bantam_devices::virtio::console::Console as ConsoleDevice;
use bantam_devices::virtio::owner::DeviceHandle;

use super::serial_end::{self, OpenSerial};
use super::{Build, NewDevice, Opening};
use crate::config::{ChannelName, DeviceName, SerialConfig};
use crate::error::Error;

/// A stream of bytes between the guest and the host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// The serial port.
    Serial,
    /// The virtio console.
    Console,
    /// The channel of this name.
    Channel(ChannelName),
}

/// The paths of the streams that lead to a pseudoterminal, file or socket.
pub(crate) type StreamPaths = BTreeMap<Stream, PathBuf>;

/// Opens the other end of the serial port.
pub(crate) fn open_serial(opening: &mut Opening<'_>) -> Result<OpenSerial, Error> {
    let end = &opening.config.serial;
    open_end(opening, "the serial port", end)
}

/// Opens the console, if there is one.
pub(super) fn open_console(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let end = &opening.config.console;
    if *end == SerialConfig::None {
        return Ok(Vec::new());
    }
    let open = open_end(opening, "the console", end)?;
    Ok(vec![Box::new(move |builder| {
        let device = ConsoleDevice::new();
        builder.connect(Stream::Console, &device, 0, open);
        let device = NewDevice {
            name: DeviceName::console(),
            log_name: "console".to_owned(),
            own_thread: None,
            model: device,
        };
        builder.attach(device, |device, link| {
            DeviceHandle::Console(device.handle(link))
        })
    })])
}

/// Opens the device of all channels, if there are any.
pub(super) fn open_channels(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let channels = &opening.config.channels;
    if channels.is_empty() {
        return Ok(Vec::new());
    }
    let mut open = Vec::new();
    for channel in channels {
        let purpose = format!("channel '{}'", channel.name);
        let end = open_end(opening, &purpose, &channel.end)?;
        open.push((channel.name.clone(), end));
    }
    Ok(vec![Box::new(move |builder| {
        let names = open.iter().map(|(name, _)| name.as_str().to_owned());
        let device = ConsoleDevice::with_channels(names.collect());
        for (port, (name, open)) in (1..).zip(open) {
            builder.connect(Stream::Channel(name), &device, port, open);
        }
        let device = NewDevice {
            name: DeviceName::of_kind("channels"),
            log_name: "channels".to_owned(),
            own_thread: None,
            model: device,
        };
        builder.attach(device, |device, link| {
            DeviceHandle::Console(device.handle(link))
        })
    })])
}

/// Opens the other end of `stream`, which describes it for messages. The stream that is configured as
/// `stdio` gets the program's end.
fn open_end(
    opening: &mut Opening<'_>,
    stream: &str,
    end: &SerialConfig,
) -> Result<OpenSerial, Error> {
    let stdio = match end {
        SerialConfig::Stdio => std::mem::take(opening.stdio),
        _ => Default::default(),
    };
    serial_end::open(&**opening.opener, stream, end, stdio)
}
