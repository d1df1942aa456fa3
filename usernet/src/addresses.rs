//! Which addresses there are in the network, and which of the host's they lead to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::options::{Subnet, UserNetworkOptions};
use crate::wire::Mac;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// The gateway's address on the link, which routers must have (RFC 4861, section 6.1.2).
pub(crate) const LINK_LOCAL_GATEWAY: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// Unique local addresses under which clouds give credentials to whoever asks, as under 169.254.169.254.
const METADATA_V6: [Ipv6Addr; 2] = [
    Ipv6Addr::new(0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd20, 0x00ce, 0, 0, 0, 0, 0, 0x254),
];

/// Where something of the guest goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// To this address.
    Remote(SocketAddr),
    /// To a name server of the host.
    NameServer,
    /// There is nobody.
    Nobody,
    /// The guest may not reach it.
    Forbidden,
}

/// The addresses of a network, and what the guest may reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) subnet: Subnet,
    restrict: bool,
    host_loopback: bool,
}

impl Addresses {
    pub(crate) fn new(options: &UserNetworkOptions) -> Addresses {
        Addresses {
            subnet: options.subnet,
            restrict: options.restrict,
            host_loopback: options.host_loopback,
        }
    }

    /// Returns the Ethernet address of everything in the network apart from the guest.
    pub(crate) fn mac(&self) -> Mac {
        let [a, b, c, d] = self.subnet.gateway().octets();
        // The first two bytes say that the address is locally administered.
        [0x52, 0x55, a, b, c, d]
    }

    /// Whether the guest reaches more than its gateway.
    pub(crate) fn is_open(&self) -> bool {
        !self.restrict
    }

    /// Whether the network itself has `address`.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                address == self.subnet.gateway() || self.is_open() && address == self.subnet.dns()
            }
            IpAddr::V6(address) => {
                address == self.subnet.gateway_v6()
                    || address == LINK_LOCAL_GATEWAY
                    || self.is_open() && address == self.subnet.dns_v6()
            }
        }
    }

    /// Whether the guest may use `address` for itself.
    pub(crate) fn is_of_guest(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                self.subnet.contains(address)
                    && address != self.subnet.gateway()
                    && address != self.subnet.dns()
                    && address != self.subnet.broadcast()
            }
            IpAddr::V6(address) if address.is_unicast_link_local() => address != LINK_LOCAL_GATEWAY,
            IpAddr::V6(address) => {
                self.subnet.contains_v6(address)
                    && address != self.subnet.gateway_v6()
                    && address != self.subnet.dns_v6()
            }
        }
    }

    /// Returns where a packet to `destination` goes.
    pub(crate) fn target(&self, destination: SocketAddr) -> Target {
        let (gateway, dns, loopback): (IpAddr, IpAddr, IpAddr) = match destination {
            SocketAddr::V4(_) => (
                self.subnet.gateway().into(),
                self.subnet.dns().into(),
                Ipv4Addr::LOCALHOST.into(),
            ),
            SocketAddr::V6(_) => (
                self.subnet.gateway_v6().into(),
                self.subnet.dns_v6().into(),
                Ipv6Addr::LOCALHOST.into(),
            ),
        };
        let address = destination.ip();
        if self.restrict {
            return Target::Forbidden;
        }
        if address == dns && destination.port() == DNS_PORT {
            return Target::NameServer;
        }
        if address == gateway {
            return match self.host_loopback {
                true => Target::Remote(SocketAddr::new(loopback, destination.port())),
                false => Target::Forbidden,
            };
        }
        if self.contains(address) {
            return Target::Nobody;
        }
        match is_public(address) {
            true => Target::Remote(destination),
            false => Target::Forbidden,
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.subnet.contains(address),
            IpAddr::V6(address) => self.subnet.contains_v6(address),
        }
    }

    /// Returns the address under which a guest that is reached by the same version of IP as `guest` sees
    /// `peer`, which has connected to a forwarded port.
    pub(crate) fn seen_by_guest(&self, peer: IpAddr, guest: IpAddr) -> IpAddr {
        let is_same_kind = peer.is_ipv4() == guest.is_ipv4();
        if is_same_kind && is_public(peer) && !self.contains(peer) {
            return peer;
        }
        // Programs of the host, and others whom the guest could not answer.
        match guest {
            IpAddr::V4(_) => self.subnet.gateway().into(),
            IpAddr::V6(_) => self.subnet.gateway_v6().into(),
        }
    }
}

/// Whether an address means the same for everybody, and is neither this host's alone nor that of its link.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            let first = address.octets()[0];
            // 0.0.0.0 means this host too.
            first != 0 && !address.is_loopback() && !address.is_link_local() && first < 224
        }
        IpAddr::V6(address) => {
            // Addresses that begin with 96 zeroes, ::1 and :: among them, or that stand for those of IPv4.
            let has_v4 = address.to_bits() >> 32 == 0 || address.to_ipv4_mapped().is_some();
            !has_v4
                && !address.is_unicast_link_local()
                && !address.is_multicast()
                && !METADATA_V6.contains(&address)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(host_loopback: bool, restrict: bool) -> Addresses {
        Addresses::new(&UserNetworkOptions {
            host_loopback,
            restrict,
            ..UserNetworkOptions::default()
        })
    }

    fn target(addresses: &Addresses, text: &str) -> Target {
        addresses.target(text.parse().unwrap())
    }

    #[test]
    fn only_the_outside_is_reached() {
        let addresses = addresses(false, false);
        for text in [
            "127.0.0.1:80",
            "127.9.9.9:53",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "224.0.0.251:5353",
            "255.255.255.255:9",
            "10.0.2.2:22",
            "10.0.2.3:80",
            "10.0.2.77:80",
            "10.0.2.255:80",
            "[::1]:80",
            "[::]:80",
            "[::127.0.0.1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::ffff:192.0.2.1]:80",
            "[fe80::1]:80",
            "[febf::1]:80",
            "[ff02::fb]:5353",
            "[fd00:ec2::254]:80",
            "[fd62:616e:a00:200::2]:22",
            "[fd62:616e:a00:200::3]:80",
            "[fd62:616e:a00:200::77]:80",
        ] {
            let target = target(&addresses, text);
            assert!(
                matches!(target, Target::Forbidden | Target::Nobody),
                "{text}"
            );
        }
        for text in [
            "192.0.2.1:80",
            "10.0.3.1:53",
            "192.168.1.1:443",
            "[2001:db8::1]:80",
            "[fd00::1]:80",
        ] {
            let address = text.parse().unwrap();
            assert_eq!(target(&addresses, text), Target::Remote(address));
        }
        for text in ["10.0.2.3:53", "[fd62:616e:a00:200::3]:53"] {
            assert_eq!(target(&addresses, text), Target::NameServer);
        }
    }

    #[test]
    fn the_gateway_leads_to_the_host_if_that_is_asked_for() {
        let address = "127.0.0.1:8080".parse().unwrap();
        let open = addresses(true, false);
        assert_eq!(target(&open, "10.0.2.2:8080"), Target::Remote(address));
        let address = "[::1]:8080".parse().unwrap();
        let gateway = "[fd62:616e:a00:200::2]:8080";
        assert_eq!(target(&open, gateway), Target::Remote(address));
        // Only its own addresses do.
        assert_eq!(target(&open, "127.0.0.1:8080"), Target::Forbidden);
        assert_eq!(target(&open, "[::1]:8080"), Target::Forbidden);
        let closed = addresses(true, true);
        for text in ["10.0.2.2:8080", "10.0.2.3:53", "192.0.2.1:80"] {
            assert_eq!(target(&closed, text), Target::Forbidden, "{text}");
        }
    }

    #[test]
    fn peers_that_the_guest_could_not_answer_are_the_gateway() {
        let addresses = addresses(false, false);
        let seen = |peer: &str, guest: &str| {
            let [peer, guest] = [peer, guest].map(|text| text.parse().unwrap());
            addresses.seen_by_guest(peer, guest).to_string()
        };
        let guest = "10.0.2.15";
        assert_eq!(seen("192.0.2.7", guest), "192.0.2.7");
        for text in ["127.0.0.1", guest, "::1", "2001:db8::1", "169.254.1.1"] {
            assert_eq!(seen(text, guest), "10.0.2.2", "{text}");
        }
        let guest = "fd62:616e:a00:200::15";
        assert_eq!(seen("2001:db8::1", guest), "2001:db8::1");
        for text in ["::1", "fe80::7", guest, "192.0.2.7"] {
            assert_eq!(seen(text, guest), "fd62:616e:a00:200::2", "{text}");
        }
    }

    #[test]
    fn the_guest_has_addresses_of_the_network() {
        let addresses = addresses(false, false);
        let is_of_guest = |text: &str| addresses.is_of_guest(text.parse().unwrap());
        for text in [
            "10.0.2.15",
            "10.0.2.99",
            "fd62:616e:a00:200:1::9",
            "fe80::99",
        ] {
            assert!(is_of_guest(text), "{text}");
        }
        for text in [
            "10.0.2.2",
            "10.0.2.255",
            "192.0.2.1",
            "fe80::2",
            "fd62:616e:a00:200::3",
            "fd62:616e:a00:201::9",
            "::",
            "::ffff:10.0.2.15",
        ] {
            assert!(!is_of_guest(text), "{text}");
        }
    }
}
