//! Which addresses there are in the network, and which of the host's they lead to.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::options::{Subnet, UserNetworkOptions};
use crate::wire::Mac;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// Where something of the guest goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// To this address.
    Remote(SocketAddr),
    /// To a name server of the host.
    NameServer,
    /// There is nobody, or the guest may not reach it.
    Refused,
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

    /// Whether the network itself has `address`.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        address == self.subnet.gateway() || !self.restrict && address == self.subnet.dns()
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
            IpAddr::V6(_) => false,
        }
    }

    /// Returns where a packet to `destination` goes.
    pub(crate) fn target(&self, destination: SocketAddr) -> Target {
        let IpAddr::V4(address) = destination.ip() else {
            return Target::Refused;
        };
        if self.restrict {
            return Target::Refused;
        }
        if address == self.subnet.dns() && destination.port() == DNS_PORT {
            return Target::NameServer;
        }
        if address == self.subnet.gateway() && self.host_loopback {
            let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
            return Target::Remote(SocketAddr::new(loopback, destination.port()));
        }
        match self.subnet.contains(address) || !is_public_v4(address) {
            true => Target::Refused,
            false => Target::Remote(destination),
        }
    }

    /// Returns the address under which the guest sees `peer`, which has connected to a forwarded port.
    pub(crate) fn seen_by_guest(&self, peer: IpAddr) -> IpAddr {
        let peer = peer.to_canonical();
        match peer {
            IpAddr::V4(address) if is_public_v4(address) && !self.subnet.contains(address) => peer,
            // Programs of the host, and others whom the guest could not answer.
            _ => self.subnet.gateway().into(),
        }
    }
}

/// Whether an address means the same for everybody, and is neither this host's alone nor that of its link.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let first = address.octets()[0];
    // 0.0.0.0 means this host too.
    first != 0 && !address.is_loopback() && !address.is_link_local() && first < 224
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
            "[::ffff:127.0.0.1]:80",
        ] {
            assert_eq!(target(&addresses, text), Target::Refused, "{text}");
        }
        for text in ["192.0.2.1:80", "10.0.3.1:53", "192.168.1.1:443"] {
            let address = text.parse().unwrap();
            assert_eq!(target(&addresses, text), Target::Remote(address));
        }
        assert_eq!(target(&addresses, "10.0.2.3:53"), Target::NameServer);
    }

    #[test]
    fn the_gateway_leads_to_the_host_if_that_is_asked_for() {
        let address = "127.0.0.1:8080".parse().unwrap();
        let open = addresses(true, false);
        assert_eq!(target(&open, "10.0.2.2:8080"), Target::Remote(address));
        // Only its own address does.
        assert_eq!(target(&open, "127.0.0.1:8080"), Target::Refused);
        let closed = addresses(true, true);
        for text in ["10.0.2.2:8080", "10.0.2.3:53", "192.0.2.1:80"] {
            assert_eq!(target(&closed, text), Target::Refused, "{text}");
        }
    }

    #[test]
    fn peers_that_the_guest_could_not_answer_are_the_gateway() {
        let addresses = addresses(false, false);
        let seen = |text: &str| addresses.seen_by_guest(text.parse().unwrap()).to_string();
        assert_eq!(seen("192.0.2.7"), "192.0.2.7");
        assert_eq!(seen("::ffff:192.0.2.7"), "192.0.2.7");
        for text in [
            "127.0.0.1",
            "10.0.2.15",
            "::1",
            "2001:db8::1",
            "169.254.1.1",
        ] {
            assert_eq!(seen(text), "10.0.2.2", "{text}");
        }
    }
}
