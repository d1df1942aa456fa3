//! Discovery of neighbors and routers in IPv6 (RFC 4861), with what the guest is told of the network.

use std::net::Ipv6Addr;

use crate::dns::write_name;
use crate::wire::{Mac, field};

/// The group of all nodes of the link.
pub(crate) const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// The hop limit of all these messages: nobody outside of the link can send them.
pub(crate) const HOP_LIMIT: u8 = 255;
/// How long the guest uses the gateway and the name server without being told of them again, in seconds; it is
/// the longest time that all understand (section 6.2.1).
const LIFETIME: u16 = 9000;

mod kind {
    pub(super) const ROUTER_SOLICITATION: u8 = 133;
    pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(super) const NEIGHBOR_SOLICITATION: u8 = 135;
    pub(super) const NEIGHBOR_ADVERTISEMENT: u8 = 136;
}

mod option {
    pub(super) const SOURCE_ADDRESS: u8 = 1;
    pub(super) const TARGET_ADDRESS: u8 = 2;
    pub(super) const PREFIX: u8 = 3;
    pub(super) const MTU: u8 = 5;
    // RFC 8106.
    pub(super) const NAME_SERVER: u8 = 25;
    pub(super) const DOMAIN: u8 = 31;
}

/// That other information is to be had by DHCP (RFC 4861, section 4.2).
const OTHER_BY_DHCP: u8 = 0x40;
/// That addresses are on the link, and can be made from the prefix (section 4.6.2).
const PREFIX_FLAGS: u8 = 0xc0;

/// The flags of an advertisement: that a router sends it, that it was asked for, and that it replaces what was
/// known before (section 4.4).
const IS_ROUTER: u8 = 0x80;
const IS_SOLICITED: u8 = 0x40;
const OVERRIDES: u8 = 0x20;

/// A message of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// It looks for a router.
    RouterSolicitation,
    /// It looks for the neighbor with this address.
    NeighborSolicitation(Ipv6Addr),
    /// It says which address it has.
    NeighborAdvertisement,
}

impl Message {
    /// Reads a message of ICMPv6.
    pub(crate) fn read(message: &[u8]) -> Option<Message> {
        let [kind, code, ..] = message else {
            return None;
        };
        match (*kind, *code) {
            (kind::ROUTER_SOLICITATION, 0) => Some(Message::RouterSolicitation),
            (kind::NEIGHBOR_SOLICITATION, 0) => {
                let target = field::<16>(message, 8)?.into();
                Some(Message::NeighborSolicitation(target))
            }
            (kind::NEIGHBOR_ADVERTISEMENT, 0) => Some(Message::NeighborAdvertisement),
            _ => None,
        }
    }
}

/// Says that `target` has the Ethernet address `mac`, to whoever asked for it, or to all.
pub(crate) fn neighbor_advertisement(target: Ipv6Addr, mac: Mac, is_solicited: bool) -> Vec<u8> {
    let solicited = if is_solicited { IS_SOLICITED } else { 0 };
    let flags = IS_ROUTER | OVERRIDES | solicited;
    let mut message = vec![kind::NEIGHBOR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    message.extend(target.octets());
    message.extend([option::TARGET_ADDRESS, 1]);
    message.extend(mac);
    message
}

/// What the guest is told of the network.
#[derive(Debug, Clone)]
pub(crate) struct RouterAdvertisement<'a> {
    pub(crate) mac: Mac,
    /// The first 64 bits of addresses.
    pub(crate) prefix: Ipv6Addr,
    pub(crate) mtu: u16,
    /// `None` if the guest reaches nothing.
    pub(crate) dns: Option<Ipv6Addr>,
    pub(crate) domain: Option<&'a str>,
}

impl RouterAdvertisement<'_> {
    /// Returns the message.
    pub(crate) fn message(&self) -> Vec<u8> {
        // The default number of hops.
        let mut message = vec![kind::ROUTER_ADVERTISEMENT, 0, 0, 0, 64, OTHER_BY_DHCP];
        let lifetime = if self.dns.is_some() { LIFETIME } else { 0 };
        message.extend(lifetime.to_be_bytes());
        // How long neighbors are taken to be there, and how often they are asked for: as the guest likes.
        message.extend([0; 8]);
        message.extend([option::SOURCE_ADDRESS, 1]);
        message.extend(self.mac);
        message.extend([option::MTU, 1, 0, 0, 0, 0]);
        message.extend(self.mtu.to_be_bytes());
        message.extend([option::PREFIX, 4, 64, PREFIX_FLAGS]);
        // The times for which addresses are valid, and preferred: without end.
        message.extend([0xff; 8]);
        message.extend([0; 4]);
        message.extend(self.prefix.octets());
        if let Some(dns) = self.dns {
            message.extend([option::NAME_SERVER, 3, 0, 0]);
            message.extend(u32::from(LIFETIME).to_be_bytes());
            message.extend(dns.octets());
        }
        let mut name = Vec::new();
        write_name(&mut name, self.domain.unwrap_or_default());
        if !name.is_empty() {
            // Sizes are in units of 8 bytes.
            name.resize(name.len().next_multiple_of(8), 0);
            message.extend([option::DOMAIN, 1 + (name.len() / 8) as u8, 0, 0]);
            message.extend(u32::from(LIFETIME).to_be_bytes());
            message.extend(name);
        }
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_whole_units() {
        for domain in [
            None,
            Some("example.org"),
            Some("a.b"),
            Some("a..b"),
            Some(""),
        ] {
            let message = RouterAdvertisement {
                mac: [2, 0, 0, 0, 0, 1],
                prefix: "fd00::".parse().unwrap(),
                mtu: 65520,
                dns: Some("fd00::3".parse().unwrap()),
                domain,
            }
            .message();
            let (mut options, mut kinds) = (&message[16..], Vec::new());
            while let [kind, units, ..] = options {
                kinds.push(*kind);
                options = &options[8 * usize::from(*units)..];
            }
            let mut expected = vec![1, 5, 3, 25];
            if domain.is_some_and(|domain| domain.split('.').all(|label| !label.is_empty())) {
                expected.push(31);
            }
            assert_eq!(kinds, expected, "{domain:?}");
        }
    }

    #[test]
    fn any_bytes_are_read_or_not() {
        bolero::check!().for_each(|bytes: &[u8]| {
            let _ = Message::read(bytes);
        });
    }
}
