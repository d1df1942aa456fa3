//! `/network-interfaces/{iface_id}`: network cards.

use bantam_vmm::config::{InterfaceName, Mtu, NetConfig};
use bantam_vmm::{DeviceCommand, NetLimits};
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::rate_limiter::RateLimiter;
use super::{Part, Resource, put_all, put_by};
use crate::fault::Fault;
use crate::instance::Instance;
use crate::metrics_groups::Group;
use crate::request::{Method, Request, check_name};

pub(crate) const RESOURCE: Resource = Resource {
    path: "network-interfaces",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, [id]) => {
            let interface: NetworkInterface = call.json()?;
            call.check_id(id, &interface.iface_id)?;
            Ok(Request::put("network", interface))
        }
        (Method::Patch, [id]) => {
            let update: NetworkInterfaceUpdate = call.json()?;
            call.check_id(id, &update.iface_id)?;
            Ok(Request::patch("network", |instance| update.apply(instance)))
        }
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.network_interfaces.drain(..), checked),
    configure: |configuration, machine| {
        for interface in &configuration.network_interfaces {
            machine.nets.push(NetConfig {
                name: Some(configuration.interface_name(&interface.iface_id)?),
                ..interface.config()?
            });
        }
        Ok(())
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

/// Body of `PUT /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// The interface's name.
    pub iface_id: String,
    /// The tap interface of the host.
    pub host_dev_name: String,
    /// The guest's MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// Largest packet that the guest is told to send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Limits of what the guest sends.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

/// Body of `PATCH /network-interfaces/{iface_id}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// Which interface.
    pub iface_id: String,
    /// The limits of what the guest receives that change.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// The limits of what the guest sends that change.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterface {
    fn config(&self) -> Result<NetConfig, Fault> {
        let tap = InterfaceName::try_from(self.host_dev_name.clone())
            .map_err(Fault::value("host_dev_name"))?;
        let mac = self.guest_mac.as_deref().map(str::parse).transpose();
        let mtu = self.mtu.map(|mtu| Mtu::try_from(i64::from(mtu)));
        Ok(NetConfig {
            mac: mac.map_err(Fault::value("guest_mac"))?,
            mtu: mtu.transpose().map_err(Fault::value("mtu"))?,
            limits: self.limits().into(),
            ..NetConfig::new(tap)
        })
    }

    fn limits(&self) -> NetLimits {
        NetLimits {
            receive: RateLimiter::limits(self.rx_rate_limiter.as_ref()),
            transmit: RateLimiter::limits(self.tx_rate_limiter.as_ref()),
        }
    }
}

impl Part for NetworkInterface {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        check_name(&self.iface_id)?;
        let mac = self.config()?.mac_address();
        let has_same_mac =
            |other: &NetworkInterface| other.config().is_ok_and(|other| other.mac_address() == mac);
        let is_same = |other: &&NetworkInterface| {
            other.iface_id != self.iface_id
                && (other.host_dev_name == self.host_dev_name || has_same_mac(other))
        };
        if let Some(other) = configuration.network_interfaces.iter().find(is_same) {
            return Err(Fault::Value {
                what: "network interface",
                reason: format!("'{}' has the same tap or MAC address", other.iface_id),
            });
        }
        put_by(&mut configuration.network_interfaces, self, |interface| {
            &interface.iface_id
        });
        Ok(())
    }
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
        let name = configuration.interface_name(&interface.iface_id)?;
        let command = DeviceCommand::SetNetLimits(interface.limits());
        instance.controller().device(&name, command)?;
        instance.record(|configuration| {
            put_by(
                &mut configuration.network_interfaces,
                interface,
                |interface| &interface.iface_id,
            );
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_in_other_letters_is_the_same() {
        let mut configuration = Configuration::default();
        let mut put = |id: &str, tap: &str, mac: &str| {
            let text = format!(
                r#"{{"iface_id": "{id}", "host_dev_name": "{tap}", "guest_mac": "{mac}"}}"#
            );
            let interface: NetworkInterface = serde_json::from_str(&text).unwrap();
            let result = interface.put(&mut configuration);
            result.map_err(|fault| fault.to_string())
        };
        put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
        let error = put("b", "tap1", "06:00:C0:00:02:0A").unwrap_err();
        assert!(error.contains("'a' has the same"), "{error}");
        put("b", "tap1", "06:00:C0:00:02:0B").unwrap();
        put("a", "tap0", "06:00:c0:00:02:0a").unwrap();
    }
}
