//! ARP (RFC 826).

use std::net::Ipv4Addr;

use super::{ETHERTYPE_ARP, Ethernet, Mac, field};

/// A request for the Ethernet address of an IPv4 address (RFC 826).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ArpRequest {
    pub(crate) sender_mac: Mac,
    pub(crate) sender: Ipv4Addr,
    pub(crate) target: Ipv4Addr,
}

impl ArpRequest {
    /// Ethernet, IPv4, the sizes of their addresses, and the operation "request".
    const START: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    const REPLY_START: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 2];

    /// Reads what follows the Ethernet header.
    pub(crate) fn read(bytes: &[u8]) -> Option<ArpRequest> {
        if field(bytes, 0)? != Self::START {
            return None;
        }
        Some(ArpRequest {
            sender_mac: field(bytes, 8)?,
            sender: field::<4>(bytes, 14)?.into(),
            target: field::<4>(bytes, 24)?.into(),
        })
    }

    /// Makes the frame that answers the request with `mac`.
    pub(crate) fn reply(&self, mac: Mac) -> Vec<u8> {
        let mut frame = Vec::new();
        Ethernet {
            destination: self.sender_mac,
            source: mac,
            ethertype: ETHERTYPE_ARP,
        }
        .write(&mut frame);
        frame.extend(Self::REPLY_START);
        frame.extend(mac);
        frame.extend(self.target.octets());
        frame.extend(self.sender_mac);
        frame.extend(self.sender.octets());
        frame
    }
}
