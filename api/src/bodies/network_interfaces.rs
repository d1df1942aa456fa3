//! Network cards.

use bantam_vmm::NetLimits;
use bantam_vmm::config::{InterfaceName, Mtu, NetConfig};
use serde::{Deserialize, Serialize};

use crate::bodies::rate_limiter::RateLimiter;
use crate::fault::Fault;

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

impl NetworkInterface {
    /// The machine's configuration of it, without a name.
    pub(crate) fn config(&self) -> Result<NetConfig, Fault> {
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

    pub(crate) fn limits(&self) -> NetLimits {
        NetLimits {
            receive: RateLimiter::limits(self.rx_rate_limiter.as_ref()),
            transmit: RateLimiter::limits(self.tx_rate_limiter.as_ref()),
        }
    }
}
