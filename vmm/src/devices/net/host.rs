//! A place on a network of the host as what a network device is connected to.

use std::io;

use bantam_devices::tap::{FrameFilter, Offloads, Tap};
use bantam_devices::virtio::net::{NetBackend, NetQueue};
use bantam_network::{Attachment, Mac, Networks, Place, Port};
use bantam_storage::FileAccess;

use super::Opening;
use crate::config::{HostNetwork, Mtu, NetConfig};
use crate::error::Error;

/// A tap with its place on a network.
pub(super) struct HostBackend {
    label: String,
    /// It is gone before its place is given up.
    tap: Tap,
    _port: Port,
}

/// Gives a guest with the address `mac` a place on a network, and opens the tap that leads there.
///
/// # Errors
/// If there is no place for it, or no tap can be made.
pub(super) fn open(
    opening: &Opening<'_>,
    config: &NetConfig,
    network: HostNetwork,
    mac: [u8; 6],
    vcpu_count: u8,
) -> Result<HostBackend, Error> {
    let label = network.to_string();
    let port = Networks::of_host().attach(&Attachment {
        place: match network {
            HostNetwork::Network(name) => Place::Network(name),
            HostNetwork::Bridge(name) => Place::Bridge(name),
            HostNetwork::Beside(name) => Place::Beside(name),
        },
        mac: Mac(mac),
        hostname: config.host_name(),
        filter: config.filter,
    })?;
    let tap = match port.device() {
        Some(device) => {
            let file = opening.opener.file(device, FileAccess::ReadWrite);
            let file = file.map_err(|source| Error::OpenTapDevice {
                path: device.to_owned(),
                source,
            })?;
            Tap::beside(file, port.interface(), config.mtu.map(Mtu::get))?
        }
        None => super::open_tap(opening, config, port.interface(), vcpu_count)?,
    };
    port.connect()?;
    Ok(HostBackend {
        label: format!("tap '{}' on {label}", tap.name()),
        tap,
        _port: port,
    })
}

impl NetBackend for HostBackend {
    fn label(&self) -> String {
        self.label.clone()
    }

    fn queue_count(&self) -> usize {
        self.tap.queue_count()
    }

    fn queue(&self, index: usize) -> Option<&dyn NetQueue> {
        self.tap.queue(index)
    }

    fn offloads(&self) -> Offloads {
        self.tap.offloads()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.tap.set_offloads(offloads)
    }

    fn set_filter(&self, filter: &FrameFilter) -> io::Result<()> {
        self.tap.set_filter(filter)
    }

    fn use_queues(&self, count: usize) -> io::Result<()> {
        self.tap.use_queues(count)
    }

    fn forget_driver(&self) -> io::Result<()> {
        NetBackend::forget_driver(&self.tap)
    }

    fn remedy(&self, error: &io::Error) -> Option<String> {
        self.tap.remedy(error)
    }
}
