//! What the guest is told about the network, and how it finds its neighbors there.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::UserNetwork;
use crate::addresses::LINK_LOCAL_GATEWAY;
use crate::frame::GuestFrame;
use crate::ndp::{self, Message, RouterAdvertisement};
use crate::wire::{ArpRequest, BROADCAST, Mac, Route, Udp, icmp_frame};
use crate::{dhcp, dhcpv6};

/// How often the guest is told of the network without asking. What it is told is valid for longer.
pub(super) const ADVERTISEMENT_TICK: Duration = Duration::from_secs(3600);
/// The smallest MTU of IPv6.
const MIN_MTU_V6: u16 = 1280;

impl UserNetwork {
    pub(super) fn take_arp(&mut self, bytes: &[u8]) {
        let Some(request) = ArpRequest::read(bytes) else {
            return;
        };
        if self.addresses.is_own(request.target.into()) && request.sender_mac[0] & 1 == 0 {
            self.reply(request.reply(self.link.mac));
        }
    }

    pub(super) fn take_dhcp(&mut self, frame: &mut dyn GuestFrame, offset: usize, size: usize) {
        let mut message = vec![0; size.min(dhcp::MAX_MESSAGE_SIZE)];
        frame.read_at(offset, &mut message);
        let subnet = self.addresses.subnet;
        let lease = dhcp::Lease {
            address: subnet.guest(),
            mask: subnet.mask(),
            broadcast: subnet.broadcast(),
            gateway: subnet.gateway(),
            dns: self.addresses.is_open().then(|| subnet.dns()),
            mtu: self.link.mtu,
            domain: match &self.domain {
                Some(domain) => Some(domain),
                None => self.resolver.domain(),
            },
            hostname: self.hostname.as_deref(),
        };
        let Some(answer) = dhcp::answer(&message, &lease) else {
            return;
        };
        let route = Route {
            source_mac: self.link.mac,
            destination_mac: answer.mac.unwrap_or(BROADCAST),
            source: subnet.gateway().into(),
            destination: answer.destination.into(),
        };
        let ports = (dhcp::SERVER_PORT, dhcp::CLIENT_PORT);
        self.reply(Udp::frame(&route, ports.0, ports.1, &answer.message));
    }

    /// Takes a message to the DHCPv6 server; `route` is that of an answer, apart from its source.
    pub(super) fn take_dhcpv6(
        &mut self,
        route: &Route,
        frame: &mut dyn GuestFrame,
        offset: usize,
        size: usize,
    ) {
        let mut message = vec![0; size.min(dhcpv6::MAX_MESSAGE_SIZE)];
        frame.read_at(offset, &mut message);
        let subnet = self.addresses.subnet;
        let lease = dhcpv6::Lease {
            mac: self.link.mac,
            address: subnet.guest_v6(),
            dns: self.addresses.is_open().then(|| subnet.dns_v6()),
            domain: match &self.domain {
                Some(domain) => Some(domain),
                None => self.resolver.domain(),
            },
        };
        if let Some(answer) = dhcpv6::answer(&message, &lease) {
            let route = Route {
                source: LINK_LOCAL_GATEWAY.into(),
                ..*route
            };
            let ports = (dhcpv6::SERVER_PORT, dhcpv6::CLIENT_PORT);
            self.reply(Udp::frame(&route, ports.0, ports.1, &answer));
        }
    }

    /// Takes a message with which the guest looks for neighbors or routers. `route` is that of an answer, apart
    /// from its source.
    pub(super) fn take_ndp(&mut self, message: Message, route: &Route) {
        let route = match route.destination.is_unspecified() {
            true => self.route_to_all(),
            false => *route,
        };
        match message {
            Message::RouterSolicitation => self.advertise(&route),
            Message::NeighborSolicitation(target) if self.addresses.is_own(target.into()) => {
                let is_solicited = !route.destination.is_multicast();
                let message = ndp::neighbor_advertisement(target, self.link.mac, is_solicited);
                let route = Route {
                    source: target.into(),
                    ..route
                };
                self.reply(icmp_frame(&route, &message, Some(ndp::HOP_LIMIT)));
            }
            Message::NeighborSolicitation(_) | Message::NeighborAdvertisement => {}
        }
    }

    /// Takes note that the guest speaks IPv6. One that has gone on from a snapshot, and does not ask, is told of
    /// the network.
    pub(super) fn hear_v6(&mut self, source: IpAddr) {
        if let IpAddr::V6(source) = source
            && !source.is_unicast_link_local()
            && self.addresses.is_of_guest(source.into())
        {
            self.guest_v6 = Some(source);
        }
        if self.advertised.is_none() {
            self.advertise_to_all(Instant::now());
            self.keep_time(false);
        }
    }

    /// Tells the guest of the network if it has not been told for a long time.
    pub(super) fn advertise_again(&mut self, now: Instant) {
        let is_due = |last: Instant| now.duration_since(last) >= ADVERTISEMENT_TICK;
        if self.advertised.is_some_and(is_due) {
            self.advertise_to_all(now);
        }
    }

    fn advertise_to_all(&mut self, now: Instant) {
        self.advertised = Some(now);
        self.advertise(&self.route_to_all());
    }

    fn advertise(&mut self, route: &Route) {
        if self.link.mtu < MIN_MTU_V6 {
            return;
        }
        self.advertised.get_or_insert_with(Instant::now);
        let subnet = self.addresses.subnet;
        let message = RouterAdvertisement {
            mac: self.link.mac,
            prefix: subnet.prefix_v6(),
            mtu: self.link.mtu,
            dns: self.addresses.is_open().then(|| subnet.dns_v6()),
            domain: match &self.domain {
                Some(domain) => Some(domain),
                None => self.resolver.domain(),
            },
        }
        .message();
        let route = Route {
            source: LINK_LOCAL_GATEWAY.into(),
            ..*route
        };
        self.reply(icmp_frame(&route, &message, Some(ndp::HOP_LIMIT)));
    }

    fn route_to_all(&self) -> Route {
        Route {
            source_mac: self.link.mac,
            destination_mac: group_mac(ndp::ALL_NODES),
            source: LINK_LOCAL_GATEWAY.into(),
            destination: ndp::ALL_NODES.into(),
        }
    }
}

/// Returns the Ethernet address of a group (RFC 2464, section 7).
fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}
