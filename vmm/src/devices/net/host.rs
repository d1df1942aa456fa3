//! A place on a network of the host as what a network device is connected to.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use bantam_devices::opener::Opener;
use bantam_devices::tap::{FrameFilter, Offloads, QueueCount, Tap};
use bantam_devices::virtio::net::{NetBackend, NetQueue};
use bantam_network::{
    Attachment, KeptPlace, Mac, Networks, Place, Port, UserPlace, can_administer_network,
};
use bantam_storage::{FileAccess, HostOpener};

use super::Opening;
use crate::config::{HostNetwork, MachineConfig, Mtu, NetConfig, NetEnd};
use crate::error::Error;

/// A tap with its place on a network.
pub(super) struct HostBackend {
    label: String,
    /// It is gone before its place is given up.
    tap: Tap,
    _place: Held,
}

/// A place on a network, until this is dropped.
enum Held {
    /// One that this process has taken by itself.
    Own { _port: Port },
    /// One that a process of root has given to it.
    Given { _place: UserPlace },
    /// One that the process beside it has taken.
    Kept { _place: KeptPlace },
}

/// Gives the guest of the network device `index`, which has the address `mac`, a place on a network, and opens the tap that
/// leads there.
///
/// # Errors
/// If there is no place for it, or no tap can be made.
pub(super) fn open(
    opening: &Opening<'_>,
    index: usize,
    network: HostNetwork,
    mac: [u8; 6],
) -> Result<HostBackend, Error> {
    let config = &opening.config.nets[index];
    let vcpu_count = opening.config.cpus.get();
    let label = network.to_string();
    let backend = |tap: Tap, place| HostBackend {
        label: format!("tap '{}' on {label}", tap.name()),
        tap,
        _place: place,
    };
    let attachment = Attachment {
        mac: Mac(mac),
        ..attachment(config, network)
    };
    if let Some(keeper) = opening.place_keeper {
        let (place, queues) = keeper.take(index, attachment.mac)?;
        let tap = Tap::of_queues(queues)?;
        return Ok(backend(tap, Held::Kept { _place: place }));
    }
    if let Place::Network(name) = &attachment.place
        && !can_administer_network()
    {
        let queues = super::wanted_queues(config, vcpu_count);
        let (place, queues) = Networks::of_host().ask_for_place(name, &attachment, queues.get())?;
        let tap = Tap::of_queues(queues)?;
        return Ok(backend(tap, Held::Given { _place: place }));
    }
    let port = Networks::of_host().attach(&attachment)?;
    let tap = open_tap(&**opening.opener, config, &port, vcpu_count)?;
    port.connect()?;
    Ok(backend(tap, Held::Own { _port: port }))
}

/// Returns what a network device needs of a network, without its address.
fn attachment(config: &NetConfig, network: HostNetwork) -> Attachment {
    Attachment {
        place: match network {
            HostNetwork::Network(name) => Place::Network(name),
            HostNetwork::Bridge(name) => Place::Bridge(name),
            HostNetwork::Beside(name) => Place::Beside(name),
        },
        mac: Mac([0; 6]),
        hostname: config.host_name(),
        filter: config.filter,
    }
}

/// Opens the tap of a place.
fn open_tap(
    opener: &dyn Opener,
    config: &NetConfig,
    port: &Port,
    vcpu_count: u8,
) -> Result<Tap, Error> {
    let Some(device) = port.device() else {
        return super::open_tap(opener, config, port.interface(), vcpu_count);
    };
    let queues = super::wanted_queues(config, vcpu_count).get();
    let open = |_| opener.file(device, FileAccess::ReadWrite);
    let files = (0..queues).map(open).collect::<io::Result<Vec<_>>>();
    let files = files.map_err(|source| Error::OpenTapDevice {
        path: device.to_owned(),
        source,
    })?;
    Ok(Tap::beside(
        files,
        port.interface(),
        config.mtu.map(Mtu::get),
    )?)
}

/// Takes the places of a machine on networks of the host, for the process that has the other end of `socket`
/// ([`ControllerOptions::place_keeper`](crate::ControllerOptions::place_keeper)), and gives them up, until that end is closed.
///
/// # Errors
/// If that process, which has the number `machine`, cannot be waited for.
pub fn keep_network_places(
    config: &MachineConfig,
    machine: u32,
    socket: &OwnedFd,
) -> io::Result<()> {
    let wanted: Vec<_> = config
        .nets
        .iter()
        .map(|net| match net.end() {
            NetEnd::Host(network) => Some(attachment(net, network)),
            _ => None,
        })
        .collect();
    let vcpu_count = config.cpus.get();
    let mut make_tap = |place: usize, port: &Port| {
        let tap = open_tap(&HostOpener, &config.nets[place], port, vcpu_count);
        tap.map(Tap::into_queues).map_err(|error| error.to_string())
    };
    Networks::of_host().keep_places(socket, machine, &wanted, &mut make_tap)
}

/// Gives users places on the network whose folder is `folder`, for clients of `listener`: what the process that `bantam
/// network start` starts does.
///
/// # Errors
/// If there is no such network, or its clients cannot be waited for.
pub fn serve_network_places(folder: &Path, listener: OwnedFd) -> Result<Infallible, Error> {
    let mut open_tap = |name: &str, queues: u8| {
        // Its user must not lower the MTU of the bridge, so it has none of its own.
        let tap = Tap::open(name, None, QueueCount::Exactly(queues.into()));
        tap.map(Tap::into_queues).map_err(|error| error.to_string())
    };
    let served = Networks::of_host().serve_places(folder, listener, &mut open_tap);
    Ok(served?)
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
