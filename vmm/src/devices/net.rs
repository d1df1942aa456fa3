//! The network devices of a machine.

mod host;
mod namespace;
mod user;

use std::path::Path;
use std::sync::Arc;

use bantam_devices::opener::Opener;
use bantam_devices::tap::{QueueCount, Tap};
use bantam_devices::virtio::net::{FrameStream, Net, NetBackend};
use bantam_devices::virtio::owner::DeviceHandle;

use super::{Build, NewDevice, Opening};
use crate::config::{Mtu, NetConfig, NetEnd, QueuePairs};
use crate::error::Error;
pub use host::{keep_network_places, serve_network_places};
use user::UserBackend;

/// Opens what all network devices are connected to.
pub(super) fn open(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let config = opening.config;
    let vcpu_count = config.cpus.get();
    let nets = config.nets.iter().enumerate();
    nets.map(|(index, net)| {
        let mac = net.mac_address(index).bytes();
        let mut user = None;
        let backend: Arc<dyn NetBackend> = match net.end() {
            NetEnd::Tap(tap) => {
                let open = || open_tap(&**opening.opener, net, tap.as_str(), vcpu_count);
                Arc::new(match &net.netns {
                    Some(namespace) => namespace::inside(namespace, open)?,
                    None => open()?,
                })
            }
            NetEnd::Host(network) => Arc::new(host::open(opening, index, network, mac)?),
            NetEnd::Descriptor(fd) => Arc::new(opening.opener.adopt_tap(fd)?),
            NetEnd::Passt(path) => Arc::new(open_passt(opening, path, net.label(index))?),
            NetEnd::User => {
                let backend = Arc::new(UserBackend::open(net, mac, net.label(index))?);
                user = Some(backend.clone());
                backend
            }
        };
        let name = net.device_name(index);
        let service = opening
            .metadata
            .and_then(|metadata| metadata.service(&name));
        let mtu = match net.end() {
            NetEnd::Tap(_) | NetEnd::Host(_) | NetEnd::Descriptor(_) => net.mtu.map(Mtu::get),
            NetEnd::User | NetEnd::Passt(_) => Some(user::mtu(net)),
        };
        let limits = net.limits.into();
        let log_name = match &net.tap {
            Some(tap) => format!("network interface '{tap}'"),
            None => format!("network interface '{name}'"),
        };
        let own_thread = net.iothread.then(|| format!("bantam-net{index}"));
        let build: Build = Box::new(move |builder| {
            let device = Net::new(backend, mac, mtu, &limits, service)
                .map_err(Error::resource("the timers of a network interface"))?;
            if let Some(user) = user {
                // Apart from the device's own log: a guest must not hide its other faults by refusals.
                let log = builder.log(&format!("rules of {log_name}"));
                user.report_refusals(log, device.handle().metrics().clone());
                builder.forward(user.ports().to_vec());
            }
            let device = NewDevice {
                name,
                log_name,
                own_thread,
                model: device,
            };
            builder.attach(device, |net, _| DeviceHandle::Net(net.handle()))
        });
        Ok(build)
    })
    .collect()
}

fn open_passt(opening: &Opening<'_>, path: &Path, label: String) -> Result<FrameStream, Error> {
    let (opener, socket) = (opening.opener.clone(), path.to_owned());
    FrameStream::connect(label, move || opener.connect(&socket)).map_err(|source| {
        Error::NetSocket {
            path: path.to_owned(),
            source,
        }
    })
}

/// Returns how many queues a tap is to have.
fn wanted_queues(config: &NetConfig, vcpu_count: u8) -> QueueCount {
    match config.queues {
        Some(queues) => QueueCount::Exactly(queues.get().into()),
        None => QueueCount::AtMost(vcpu_count.min(QueuePairs::MAX).into()),
    }
}

fn open_tap(
    opener: &dyn Opener,
    config: &NetConfig,
    name: &str,
    vcpu_count: u8,
) -> Result<Tap, Error> {
    let queues = wanted_queues(config, vcpu_count);
    let mtu = config.mtu.map(Mtu::get);
    let tap = opener.tap(name, mtu, queues)?;
    if config.queues.is_none() && tap.queues().len() < queues.get() {
        tracing::info!(
            "tap '{name}' was made with a single queue, so {vcpu_count} vCPUs share one; made \
             with 'multi_queue', it has one for each"
        );
    }
    Ok(tap)
}
