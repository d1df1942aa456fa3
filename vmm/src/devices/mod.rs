//! The devices of a machine. What they need of the host is opened first; then each gets its place.

mod builder;
mod disk;
mod legacy;
mod net;
mod saved;
mod serial_end;
mod streams;
mod table;
mod turn;

use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use bantam_devices::opener::Opener;
use bantam_devices::virtio::balloon::{Balloon, BalloonOptions};
use bantam_devices::virtio::owner::DeviceHandle;
use bantam_devices::virtio::rng::{self, Rng};
use bantam_devices::virtio::vsock::Vsock;
use bantam_network::PlaceKeeper;
use bantam_storage::FileAccess;

pub(crate) use builder::Builder;
use builder::NewDevice;
pub use disk::{check_disk, disk_files};
pub(crate) use legacy::{LegacyDevice, LegacyDevices};
pub use net::{keep_network_places, serve_network_places};
pub(crate) use saved::SavedDevice;
pub(crate) use serial_end::{OpenSerial, SerialGuard};
pub use streams::Stream;
pub(crate) use streams::open_serial;
pub(crate) use table::DeviceTable;

use crate::config::{DeviceName, MachineConfig};
use crate::console::Console;
use crate::error::Error;
use crate::metadata::MachineMetadata;

/// What is needed to open devices.
pub(crate) struct Opening<'a> {
    pub(crate) config: &'a MachineConfig,
    pub(crate) opener: &'a Arc<dyn Opener>,
    pub(crate) place_keeper: Option<&'a Arc<PlaceKeeper>>,
    /// The program's end, until one of the streams has taken it.
    pub(crate) stdio: &'a mut Console,
    pub(crate) metadata: Option<&'a MachineMetadata>,
    /// The partition of the first disk with the root file system, when that disk has been opened.
    pub(crate) root_partition: Option<u32>,
}

/// Gives a device its place in the machine. All its files, sockets and taps are open.
pub(crate) type Build = Box<dyn FnOnce(&mut Builder<'_>) -> Result<(), Error>>;

/// Opens what the virtio devices of one kind need, and returns a function to build each device.
type Open = fn(&mut Opening<'_>) -> Result<Vec<Build>, Error>;

/// The kinds of virtio devices, in the order in which a guest finds them.
const KINDS: [Open; 7] = [
    disk::open,
    net::open,
    open_vsock,
    streams::open_console,
    streams::open_channels,
    open_entropy,
    open_balloon,
];

/// Opens what all virtio devices need, and returns a function to build each device.
pub(crate) fn open_virtio(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let mut devices = Vec::new();
    for open in KINDS {
        devices.extend(open(opening)?);
    }
    Ok(devices)
}

fn open_vsock(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let Some(config) = &opening.config.vsock else {
        return Ok(Vec::new());
    };
    let (path, cid) = (&config.socket, config.cid.get());
    let listener = opening.opener.listen(path);
    let listener = listener.map_err(|source| Error::Listen {
        path: path.clone(),
        purpose: "the socket device".to_owned(),
        source,
    })?;
    let log_name = format!("socket device '{}'", path.display());
    Ok(vec![Box::new(move |builder| {
        let device = NewDevice {
            name: DeviceName::of_kind("vsock"),
            log_name,
            own_thread: None,
            model: Vsock::new(cid, listener),
        };
        builder.attach(device, |vsock, _| DeviceHandle::Vsock(vsock.metrics()))
    })])
}

fn open_entropy(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let Some(config) = &opening.config.rng else {
        return Ok(Vec::new());
    };
    let source = opening
        .opener
        .file(Path::new(rng::SOURCE), FileAccess::Read);
    let source = source.map_err(Error::resource("the entropy device"))?;
    let limits = config.limits.into();
    Ok(vec![Box::new(move |builder| {
        let device = Rng::with_source(source, &limits);
        let device = NewDevice {
            name: DeviceName::of_kind("rng"),
            log_name: "entropy device".to_owned(),
            own_thread: None,
            model: device.map_err(Error::resource("the entropy device"))?,
        };
        builder.attach(device, |rng, _| DeviceHandle::Entropy(rng.metrics()))
    })])
}

fn open_balloon(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let Some(config) = &opening.config.balloon else {
        return Ok(Vec::new());
    };
    let options = BalloonOptions {
        target_mib: config.size.mib(),
        deflate_on_oom: config.deflate_on_oom,
        statistics_interval: NonZeroU32::new(config.statistics),
        free_page_reporting: config.reporting,
        free_page_hinting: config.hinting,
    };
    Ok(vec![Box::new(move |builder| {
        let name = DeviceName::of_kind("balloon");
        let device = Balloon::new(&options, builder.memory);
        let device = device.map_err(|source| Error::Device {
            name: name.clone(),
            source: source.into(),
        })?;
        let device = NewDevice {
            name,
            log_name: "balloon".to_owned(),
            own_thread: None,
            model: device,
        };
        builder.attach(device, |balloon, link| {
            DeviceHandle::Balloon(balloon.handle(link))
        })
    })])
}
