//! What a user says about the network.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::OptionError;
use crate::rule::Rule;

/// What a network is like. [`UserNetworkOptions::default`] is what most guests need.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserNetworkOptions {
    /// The network's addresses.
    pub subnet: Subnet,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// Whether the guest reaches nothing, and is only reached by `forwards`.
    pub restrict: bool,
    /// What the guest may reach; if there are none, all that `deny` does not forbid.
    pub allow: Vec<Rule>,
    /// What the guest may not reach, even if `allow` has it.
    pub deny: Vec<Rule>,
    /// Whether the gateway's address leads to the host's loopback address.
    pub host_loopback: bool,
    /// Name servers in place of those of the host.
    pub dns: Vec<IpAddr>,
    /// The domain that the guest is told, in place of the one that the host searches.
    pub domain: Option<DnsName>,
    /// The name that the guest is told for itself.
    pub hostname: Option<DnsName>,
}

/// The IPv4 addresses of a network: [`Subnet::MIN_HOSTS`] or more, as `10.0.2.0/24`. Its IPv6 addresses follow
/// from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    address: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The fewest addresses that a network can have, including the first and the last.
    pub const MIN_HOSTS: u32 = 8;

    /// Largest length of the prefix.
    const MAX_PREFIX: u8 = 29;

    /// Returns the address of the gateway, which is the second after the network's own.
    pub fn gateway(self) -> Ipv4Addr {
        self.host(2)
    }

    /// Returns the address of the name server.
    pub fn dns(self) -> Ipv4Addr {
        self.host(3)
    }

    /// Returns the address of the guest.
    pub fn guest(self) -> Ipv4Addr {
        match self.prefix {
            // It is the fifteenth address by tradition, if there is one.
            ..=27 => self.host(15),
            _ => self.host(4),
        }
    }

    /// Returns the gateway's address of IPv6.
    pub fn gateway_v6(self) -> Ipv6Addr {
        self.host_v6(2)
    }

    /// Returns the name server's address of IPv6.
    pub fn dns_v6(self) -> Ipv6Addr {
        self.host_v6(3)
    }

    /// Returns the address of IPv6 that the guest gets if it asks for one by DHCP.
    pub fn guest_v6(self) -> Ipv6Addr {
        self.host_v6(0x15)
    }

    /// Returns the first 64 bits of the network's IPv6 addresses, followed by zeroes.
    pub(crate) fn prefix_v6(self) -> Ipv6Addr {
        self.host_v6(0)
    }

    pub(crate) fn contains_v6(self, address: Ipv6Addr) -> bool {
        address.to_bits() >> 64 == self.prefix_v6().to_bits() >> 64
    }

    fn host_v6(self, number: u16) -> Ipv6Addr {
        // Unique local addresses, which differ for networks with different subnets. They are not random, as
        // RFC 4193 wants them for networks that could meet: these end in the monitor.
        let [high, low] = [16, 0].map(|shift| (self.address.to_bits() >> shift) as u16);
        Ipv6Addr::new(0xfd62, 0x616e, high, low, 0, 0, 0, number)
    }

    pub(crate) fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.mask_bits())
    }

    pub(crate) fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | !self.mask_bits())
    }

    pub(crate) fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask_bits() == self.address.to_bits()
    }

    fn mask_bits(self) -> u32 {
        u32::MAX << (32 - u32::from(self.prefix))
    }

    fn host(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.address.to_bits() | number)
    }
}

impl Default for Subnet {
    fn default() -> Self {
        Subnet {
            address: Ipv4Addr::new(10, 0, 2, 0),
            prefix: 24,
        }
    }
}

impl FromStr for Subnet {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let invalid = || OptionError::Subnet { text: text.into() };
        let (address, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let address: Ipv4Addr = address.parse().map_err(|_| invalid())?;
        let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
        if !(8..=Self::MAX_PREFIX).contains(&prefix) {
            return Err(invalid());
        }
        let subnet = Subnet { address, prefix };
        let is_unusable = address.is_loopback()
            || address.is_link_local()
            || address.is_multicast()
            || address.octets()[0] == 0
            || address.octets()[0] >= 240;
        if is_unusable || !subnet.contains(address) || address.to_bits() & !subnet.mask_bits() != 0
        {
            return Err(invalid());
        }
        Ok(subnet)
    }
}

impl TryFrom<String> for Subnet {
    type Error = OptionError;

    fn try_from(text: String) -> Result<Self, OptionError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        })
    }
}

/// Ports of the host that lead to ports of the guest: `[tcp:|udp:][ADDRESS:]PORT[-LAST]:GUESTPORT[-LAST]`.
///
/// The address is one of the host's. Without one, only programs on the host reach the ports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Forward {
    protocol: Protocol,
    address: IpAddr,
    host_ports: RangeInclusive<u16>,
    guest_port: u16,
}

impl Forward {
    /// Most ports of all forwards of a network: each takes a descriptor.
    pub const MAX_PORTS: usize = 1024;

    /// Returns the protocol.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Returns the number of ports.
    pub fn port_count(&self) -> usize {
        self.host_ports.len()
    }

    /// Returns each port of the host with the port of the guest that it leads to.
    pub fn ports(&self) -> impl Iterator<Item = (SocketAddr, u16)> + use<> {
        let (address, first) = (self.address, self.guest_port);
        let ports = self.host_ports.clone().enumerate();
        ports.map(move |(index, port)| (SocketAddr::new(address, port), first + index as u16))
    }
}

impl FromStr for Forward {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let invalid = || OptionError::Forward { text: text.into() };
        let (protocol, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Protocol::Tcp, rest),
            Some(("udp", rest)) => (Protocol::Udp, rest),
            _ => (Protocol::Tcp, text),
        };
        let (rest, guest) = rest.rsplit_once(':').ok_or_else(invalid)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let bare = address
                    .strip_prefix('[')
                    .map(|inner| inner.strip_suffix(']').ok_or_else(invalid))
                    .transpose()?;
                (
                    bare.unwrap_or(address).parse().map_err(|_| invalid())?,
                    host,
                )
            }
            None => (Ipv4Addr::LOCALHOST.into(), rest),
        };
        let host_ports = ports(host).ok_or_else(invalid)?;
        let guest_ports = ports(guest).ok_or_else(invalid)?;
        // The host chooses port 0 itself, so a range cannot begin with it.
        let is_range = host_ports.len() > 1;
        if *guest_ports.start() == 0
            || host_ports.len() != guest_ports.len()
            || is_range && *host_ports.start() == 0
        {
            return Err(invalid());
        }
        Ok(Forward {
            protocol,
            address,
            host_ports,
            guest_port: *guest_ports.start(),
        })
    }
}

/// Reads `PORT` or `FIRST-LAST`.
pub(crate) fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let port = |text: &str| {
        let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    let (first, last) = match text.split_once('-') {
        Some((first, last)) => (port(first)?, port(last)?),
        None => (port(text)?, port(text)?),
    };
    (first <= last).then_some(first..=last)
}

impl TryFrom<String> for Forward {
    type Error = OptionError;

    fn try_from(text: String) -> Result<Self, OptionError> {
        text.parse()
    }
}

impl From<Forward> for String {
    fn from(forward: Forward) -> String {
        forward.to_string()
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.protocol)?;
        match self.address {
            IpAddr::V4(address) => write!(f, "{address}:")?,
            IpAddr::V6(address) => write!(f, "[{address}]:")?,
        }
        let (first, last) = (self.host_ports.start(), self.host_ports.end());
        match first == last {
            true => write!(f, "{first}:{}", self.guest_port),
            false => {
                let guest_last = self.guest_port + (last - first);
                write!(f, "{first}-{last}:{}-{guest_last}", self.guest_port)
            }
        }
    }
}

/// A domain or the name of a host: up to 253 letters, digits, dots and hyphens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DnsName(String);

impl DnsName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DnsName {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let is_label = |label: &str| {
            let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
            (1..=63).contains(&label.len())
                && label.bytes().all(allowed)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        match text.len() <= 253 && text.split('.').all(is_label) {
            true => Ok(DnsName(text.into())),
            false => Err(OptionError::DnsName { text: text.into() }),
        }
    }
}

impl TryFrom<String> for DnsName {
    type Error = OptionError;

    fn try_from(text: String) -> Result<Self, OptionError> {
        text.parse()
    }
}

impl From<DnsName> for String {
    fn from(name: DnsName) -> String {
        name.0
    }
}

impl fmt::Display for DnsName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn forward(text: &str) -> Forward {
        text.parse().unwrap()
    }

    #[test]
    fn forwards_have_defaults_and_ranges() {
        for (text, full) in [
            ("8080:80", "tcp:127.0.0.1:8080:80"),
            ("udp:5353:53", "udp:127.0.0.1:5353:53"),
            ("tcp:0.0.0.0:0:22", "tcp:0.0.0.0:0:22"),
            ("[::1]:2222:22", "tcp:[::1]:2222:22"),
            (
                "udp:10.0.0.1:5000-5009:6000-6009",
                "udp:10.0.0.1:5000-5009:6000-6009",
            ),
        ] {
            assert_eq!(forward(text).to_string(), full);
        }
        let pairs: Vec<_> = forward("80-81:65534-65535").ports().collect();
        let host = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        assert_eq!(pairs, [(host(80), 65534), (host(81), 65535)]);
    }

    #[test]
    fn forwards_that_lead_nowhere_are_refused() {
        for text in [
            "",
            "80",
            "80:",
            ":80",
            "80:0",
            "0-1:5-6",
            "1-2:5",
            "2-1:2-1",
            "65536:1",
            "+1:1",
            "sctp:1:1",
            "localhost:1:1",
            "[::1:1:1",
            "1-3:65534-65536",
            "tcp:udp:1:1",
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains("PORT:GUESTPORT"), "{error}");
        }
    }

    #[test]
    fn a_subnet_has_places_for_all() {
        let subnet: Subnet = "192.168.7.8/29".parse().unwrap();
        let places = [subnet.gateway(), subnet.dns(), subnet.guest()];
        assert_eq!(places.map(|place| place.octets()[3]), [10, 11, 12]);
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(192, 168, 7, 15));
        let subnet = Subnet::default();
        assert_eq!(subnet.guest(), Ipv4Addr::new(10, 0, 2, 15));
        assert_eq!(subnet.mask(), Ipv4Addr::new(255, 255, 255, 0));
        assert!(!subnet.contains(Ipv4Addr::new(10, 0, 3, 15)));
        for text in [
            "10.0.2.0",
            "10.0.2.1/24",
            "10.0.2.0/30",
            "0.0.0.0/8",
            "127.0.0.0/8",
            "169.254.0.0/16",
            "224.0.0.0/8",
            "10.0.0.0/7",
            "fd00::/64",
        ] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_those_of_dns() {
        let name = |text: &str| text.parse::<DnsName>();
        assert!(name("guest-1.example.org").is_ok());
        for text in ["", ".", "a..b", "-a", "a-", "a b", "ä", &"a".repeat(64)] {
            assert!(name(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text in "[tcpud:0-9.\\[\\]-]{0,30}|.*") {
            if let Ok(forward) = text.parse::<Forward>() {
                prop_assert_eq!(forward.to_string().parse::<Forward>().unwrap(), forward);
            }
            if let Ok(subnet) = text.parse::<Subnet>() {
                prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
            }
            let _ = text.parse::<DnsName>();
        }
    }
}
