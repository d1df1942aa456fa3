//! What a network is, as it is kept on the host.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{GroupName, Mac, NetworkError, NetworkName, Subnet, Subnet6};

/// How the machines of a network reach others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Each other, the host, and what the host reaches, under the host's address.
    #[default]
    Nat,
    /// Each other and the host.
    HostOnly,
    /// What is on a bridge of the host that an administrator has made.
    Bridged,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Mode::Nat => "nat",
            Mode::HostOnly => "hostonly",
            Mode::Bridged => "bridged",
        })
    }
}

/// Describes a network that is to be defined. What is left out is chosen.
#[derive(Clone, Debug)]
pub struct NewNetwork {
    /// Its name.
    pub name: NetworkName,
    /// How its machines reach others.
    pub mode: Mode,
    /// Of a bridged network the bridge, which must be given; of others what their bridge is called.
    pub bridge: Option<String>,
    /// Its IPv4 addresses.
    pub subnet: Option<Subnet>,
    /// Its IPv6 addresses.
    pub subnet6: Option<Subnet6>,
    /// Whether it has IPv6 addresses.
    pub ipv6: bool,
    /// The domain of its machines.
    pub domain: Option<String>,
    /// Whether its machines reach the host only and not each other.
    pub isolate_ports: bool,
    /// Whether its machines can send under their own addresses only.
    pub filter: bool,
    /// Whether it is started when the host is, and when a machine needs it.
    pub autostart: bool,
    /// The group whose members may use it without root.
    pub group: Option<GroupName>,
}

impl NewNetwork {
    /// Describes a network with defaults for all but its name and mode.
    pub fn new(name: NetworkName, mode: Mode) -> NewNetwork {
        NewNetwork {
            name,
            mode,
            bridge: None,
            subnet: None,
            subnet6: None,
            ipv6: true,
            domain: None,
            isolate_ports: false,
            filter: true,
            autostart: false,
            group: None,
        }
    }

    /// Checks that the options are those of the mode.
    ///
    /// # Errors
    /// [`NetworkError::Options`] if they exclude each other.
    pub(crate) fn check(&self) -> Result<(), NetworkError> {
        let wrong = |text: &str| Err(NetworkError::Options(text.to_owned()));
        if let Some(bridge) = &self.bridge
            && !is_interface_name(bridge)
        {
            return wrong(&format!(
                "invalid interface name '{bridge}': 1 to 15 letters, digits and the characters '.', '_' and '-'"
            ));
        }
        if let Some(domain) = &self.domain
            && !is_domain(domain)
        {
            return wrong(&format!(
                "invalid domain '{domain}': labels of letters, digits and '-', separated by dots"
            ));
        }
        match self.mode {
            Mode::Bridged if self.bridge.is_none() => {
                wrong("a bridged network needs the name of its bridge (--bridge)")
            }
            Mode::Bridged
                if self.subnet.is_some() || self.subnet6.is_some() || self.domain.is_some() =>
            {
                wrong("a bridged network has the addresses and names of what is on its bridge")
            }
            _ if self.subnet6.is_some() && !self.ipv6 => {
                wrong("a network without IPv6 has no IPv6 subnet")
            }
            _ => Ok(()),
        }
    }
}

/// Whether an interface can be called so, in all places in which the name is used.
pub(crate) fn is_interface_name(text: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=15).contains(&text.len()) && text.bytes().all(is_allowed) && text != "." && text != ".."
}

fn is_domain(text: &str) -> bool {
    let is_label = |label: &str| label.parse::<crate::HostName>().is_ok();
    text.len() <= 253 && text.split('.').all(is_label)
}

/// A network that is defined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Definition {
    /// Its name.
    pub name: NetworkName,
    /// How its machines reach others.
    pub mode: Mode,
    /// The bridge that its machines are on.
    pub bridge: String,
    /// Its addresses, if they are its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addresses: Option<Addresses>,
    /// Whether its machines reach the host only and not each other.
    #[serde(default)]
    pub isolate_ports: bool,
    /// Whether its machines can send under their own addresses only.
    #[serde(default)]
    pub filter: bool,
    /// Whether it is started when the host is, and when a machine needs it.
    #[serde(default)]
    pub autostart: bool,
    /// The group whose members may use it without root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupName>,
}

/// Addresses and names of a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Addresses {
    /// IPv4 addresses.
    pub subnet: Subnet,
    /// Whether these were chosen, so that others can be if they are in use when the network is started.
    #[serde(default)]
    pub is_chosen: bool,
    /// IPv6 addresses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet6: Option<Subnet6>,
    /// The bridge's MAC address, so that machines find the host again when the network was stopped meanwhile.
    pub mac: Mac,
    /// Domain of the machines.
    pub domain: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(mode: Mode) -> NewNetwork {
        NewNetwork::new("lab".parse().unwrap(), mode)
    }

    #[test]
    fn options_are_those_of_the_mode() {
        let with = |change: fn(&mut NewNetwork), mode| {
            let mut network = new(mode);
            change(&mut network);
            network.check().map_err(|error| error.to_string())
        };
        with(|_| (), Mode::Nat).unwrap();
        with(
            |network| network.bridge = Some("br0".to_owned()),
            Mode::Bridged,
        )
        .unwrap();
        let bridged = |change: fn(&mut NewNetwork)| with(change, Mode::Bridged).unwrap_err();
        assert!(bridged(|_| ()).contains("needs the name of its bridge"));
        assert!(
            bridged(|network| {
                network.bridge = Some("br0".to_owned());
                network.domain = Some("a".to_owned());
            })
            .contains("has the addresses and names")
        );
        let nat = |change: fn(&mut NewNetwork)| with(change, Mode::Nat).unwrap_err();
        assert!(nat(|network| network.bridge = Some("a/b".to_owned())).contains("'a/b'"));
        assert!(nat(|network| network.domain = Some("a..b".to_owned())).contains("'a..b'"));
        assert!(
            nat(|network| {
                network.ipv6 = false;
                network.subnet6 = Some("fd00::/64".parse().unwrap());
            })
            .contains("without IPv6")
        );
    }
}
