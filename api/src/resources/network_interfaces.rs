//! `/network-interfaces/{iface_id}`: network cards.

use bantam_vmm::DeviceCommand;
use serde::Deserialize;

use crate::bodies::network_interfaces::NetworkInterface;
use crate::bodies::rate_limiter::RateLimiter;
use crate::configuration::Configuration;
use crate::fault::Fault;
use crate::instance::Instance;
use crate::method::Method;
use crate::metrics_groups::Group;
use crate::request::Request;
use crate::resources::resource::Resource;

pub(super) const RESOURCE: Resource = Resource {
    path: "network-interfaces",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, [id]) => {
            let interface: NetworkInterface = call.json()?;
            call.check_id(id, &interface.iface_id)?;
            Ok(Request::put(
                "network",
                interface,
                Configuration::put_network_interface,
            ))
        }
        (Method::Patch, [id]) => {
            let update: NetworkInterfaceUpdate = call.json()?;
            call.check_id(id, &update.iface_id)?;
            Ok(Request::patch("network", |instance| update.apply(instance)))
        }
        _ => Err(call.unknown()),
    },
    groups: &[Group::new(
        "net",
        "activate_fails cfg_fails mac_address_updates no_rx_avail_buffer no_tx_avail_buffer \
         event_fails rx_queue_event_count rx_event_rate_limiter_count rx_rate_limiter_throttled \
         rx_tap_event_count rx_bytes_count rx_packets_count rx_fails rx_count tap_read_fails \
         tap_write_fails tap_write_agg tx_bytes_count tx_malformed_frames tx_fails tx_count \
         tx_packets_count tx_queue_event_count tx_rate_limiter_event_count \
         tx_rate_limiter_throttled tx_spoofed_mac_count tx_remaining_reqs_count",
    )
    .and_each()],
};

/// Body of `PATCH /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkInterfaceUpdate {
    /// Which interface.
    iface_id: String,
    /// The limits of what the guest receives that change.
    #[serde(default)]
    rx_rate_limiter: Option<RateLimiter>,
    /// The limits of what the guest sends that change.
    #[serde(default)]
    tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterfaceUpdate {
    fn apply(self, instance: &mut Instance) -> Result<(), Fault> {
        instance.view().require_started()?;
        let configuration = instance.view().configuration();
        let interfaces = &configuration.network_interfaces;
        let is_it = |interface: &&NetworkInterface| interface.iface_id == self.iface_id;
        let Some(interface) = interfaces.iter().find(is_it) else {
            return Err(Fault::NoSuchDevice {
                kind: "network interface",
                id: self.iface_id,
            });
        };
        let mut interface = interface.clone();
        let applied = |update: Option<RateLimiter>, before: Option<RateLimiter>| match update {
            Some(update) => Some(update.applied_to(before)),
            None => before,
        };
        interface.rx_rate_limiter = applied(self.rx_rate_limiter, interface.rx_rate_limiter);
        interface.tx_rate_limiter = applied(self.tx_rate_limiter, interface.tx_rate_limiter);
        let name = configuration.names().interface(&interface.iface_id)?;
        let command = DeviceCommand::SetNetLimits(interface.limits());
        instance.controller().device(&name, command)?;
        instance.record(|configuration| configuration.set_network_interface(interface));
        Ok(())
    }
}
