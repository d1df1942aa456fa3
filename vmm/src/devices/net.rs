//! The network devices of a machine.

use bantam_devices::tap::{QueueCount, Tap};
use bantam_devices::virtio::net::Net;
use bantam_devices::virtio::owner::DeviceHandle;

use super::{Build, NewDevice, Opening};
use crate::config::{Mtu, NetConfig, QueuePairs};
use crate::error::Error;

/// Opens the taps of all network devices.
pub(super) fn open(opening: &mut Opening<'_>) -> Result<Vec<Build>, Error> {
    let config = opening.config;
    let vcpu_count = config.cpus.get();
    let nets = config.nets.iter().enumerate();
    nets.map(|(index, net)| {
        let tap = open_tap(opening, net, vcpu_count)?;
        let name = net.device_name(index);
        let service = opening
            .metadata
            .and_then(|metadata| metadata.service(&name));
        let (mac, mtu) = (net.mac_address().bytes(), net.mtu.map(Mtu::get));
        let limits = net.limits.into();
        let log_name = format!("network interface '{}'", net.tap);
        let own_thread = net.iothread.then(|| format!("bantam-net{index}"));
        let build: Build = Box::new(move |builder| {
            let device = Net::new(tap, mac, mtu, &limits, service)
                .map_err(Error::resource("the timers of a network interface"))?;
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

fn open_tap(opening: &Opening<'_>, config: &NetConfig, vcpu_count: u8) -> Result<Tap, Error> {
    let useful = vcpu_count.min(QueuePairs::MAX);
    let queues = match config.queues {
        Some(queues) => QueueCount::Exactly(queues.get().into()),
        None => QueueCount::AtMost(useful.into()),
    };
    let mtu = config.mtu.map(Mtu::get);
    let tap = opening.opener.tap(config.tap.as_str(), mtu, queues)?;
    if config.queues.is_none() && tap.queues().len() < useful.into() {
        tracing::info!(
            "tap '{}' was made with a single queue, so {vcpu_count} vCPUs share one; made \
             with 'multi_queue', it has one for each",
            config.tap
        );
    }
    Ok(tap)
}
