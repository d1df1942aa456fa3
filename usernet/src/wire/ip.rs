//! Headers of IP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    ETHERNET_SIZE, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, IPV4_SIZE, IPV6_SIZE, Mac, field,
    fold, number16, number32, put16, sum,
};

/// Hops that packets to the guest may still make, as a host would set it.
const HOP_LIMIT: u8 = 64;
/// The flag that forbids fragmentation (RFC 791, section 3.1).
const DONT_FRAGMENT: [u8; 2] = [0x40, 0];
/// The flag that says that another fragment follows.
pub(super) const MORE_FRAGMENTS: u16 = 0x2000;
/// The bits of an offset, in units of [`FRAGMENT_UNIT`] bytes.
const OFFSET_BITS: u16 = 0x1fff;
pub(super) const FRAGMENT_UNIT: usize = 8;

/// Options of IPv4 by which the sender gives the way: loose and strict (RFC 791, section 3.1).
const SOURCE_ROUTES: [u8; 2] = [131, 137];

/// Extension headers of IPv6 (RFC 8200, section 4).
pub(super) mod extension {
    pub(in crate::wire) const HOP_BY_HOP: u8 = 0;
    pub(in crate::wire) const ROUTING: u8 = 43;
    pub(in crate::wire) const FRAGMENT: u8 = 44;
    pub(in crate::wire) const DESTINATION: u8 = 60;
}

/// Most extension headers of a packet.
const MAX_EXTENSIONS: usize = 8;

/// The header of an IP packet, with options and extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    /// Where the header says what the protocol is.
    pub(crate) protocol_offset: usize,
    /// Bytes of all headers in front of that of `protocol`.
    pub(crate) header_size: usize,
    pub(crate) payload_size: usize,
    pub(crate) hop_limit: u8,
    /// Whether the sender gives the way.
    pub(crate) has_source_route: bool,
    /// Which part of a packet it is, if it is not a whole one.
    pub(crate) fragment: Option<Fragment>,
}

/// A part of a packet that was too large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// What the parts of a packet have in common.
    pub(crate) identification: u32,
    /// Where in the payload of the whole packet this part belongs, in bytes.
    pub(crate) offset: usize,
    pub(crate) is_last: bool,
}

impl Ip {
    /// Reads the header of a packet; `packet` has its start, and `size` is the size of what the frame carries.
    pub(crate) fn read(packet: &[u8], size: usize) -> Option<Ip> {
        match packet.first()? >> 4 {
            4 => Self::read_v4(packet, size),
            6 => Self::read_v6(packet, size),
            _ => None,
        }
    }

    fn read_v4(packet: &[u8], size: usize) -> Option<Ip> {
        let header_size = usize::from(packet[0] & 0xf) * 4;
        let total = usize::from(number16(packet, 2)?);
        if header_size < IPV4_SIZE || total < header_size || total > size {
            return None;
        }
        let options = packet.get(IPV4_SIZE..header_size)?;
        let fragment = number16(packet, 6)?;
        let is_fragment = fragment & (MORE_FRAGMENTS | OFFSET_BITS) != 0;
        Some(Ip {
            source: Ipv4Addr::from(field::<4>(packet, 12)?).into(),
            destination: Ipv4Addr::from(field::<4>(packet, 16)?).into(),
            protocol: *packet.get(9)?,
            protocol_offset: 9,
            header_size,
            payload_size: total - header_size,
            hop_limit: *packet.get(8)?,
            has_source_route: has_source_route(options),
            fragment: match is_fragment {
                true => Some(Fragment {
                    identification: number16(packet, 4)?.into(),
                    offset: usize::from(fragment & OFFSET_BITS) * FRAGMENT_UNIT,
                    is_last: fragment & MORE_FRAGMENTS == 0,
                }),
                false => None,
            },
        })
    }

    fn read_v6(packet: &[u8], size: usize) -> Option<Ip> {
        let payload_size = usize::from(number16(packet, 4)?);
        if IPV6_SIZE + payload_size > size {
            return None;
        }
        let mut ip = Ip {
            source: Ipv6Addr::from(field::<16>(packet, 8)?).into(),
            destination: Ipv6Addr::from(field::<16>(packet, 24)?).into(),
            protocol: *packet.get(6)?,
            protocol_offset: 6,
            header_size: IPV6_SIZE,
            payload_size,
            hop_limit: *packet.get(7)?,
            has_source_route: false,
            fragment: None,
        };
        for _ in 0..MAX_EXTENSIONS {
            let [next, length] = match ip.protocol {
                extension::HOP_BY_HOP
                | extension::ROUTING
                | extension::DESTINATION
                | extension::FRAGMENT => field(packet, ip.header_size)?,
                _ => return Some(ip),
            };
            let mut extension_size = 8 + usize::from(length) * 8;
            match ip.protocol {
                extension::ROUTING => {
                    let segments_left = *packet.get(ip.header_size + 3)?;
                    ip.has_source_route |= segments_left > 0;
                }
                extension::FRAGMENT => {
                    extension_size = 8;
                    let [high, low] = field(packet, ip.header_size + 2)?;
                    let place = u16::from_be_bytes([high, low]);
                    let fragment = Fragment {
                        identification: number32(packet, ip.header_size + 4)?,
                        offset: usize::from(place >> 3) * FRAGMENT_UNIT,
                        is_last: place & 1 == 0,
                    };
                    // A packet in one piece is none that waits for others (RFC 6946).
                    if !fragment.is_last || fragment.offset > 0 {
                        ip.fragment = Some(fragment);
                    }
                }
                _ => {}
            }
            ip.protocol = next;
            ip.protocol_offset = ip.header_size;
            ip.header_size += extension_size;
            ip.payload_size = ip.payload_size.checked_sub(extension_size)?;
            // What follows is in the part before, except in the first.
            if ip.fragment.is_some() {
                return Some(ip);
            }
        }
        None
    }
}

fn has_source_route(mut options: &[u8]) -> bool {
    while let [kind, rest @ ..] = options {
        options = match (kind, rest) {
            (0, _) => return false,
            (1, _) => rest,
            (kind, _) if SOURCE_ROUTES.contains(kind) => return true,
            // The size counts both bytes.
            (_, [size, ..]) if *size >= 2 => options.get(usize::from(*size)..).unwrap_or_default(),
            _ => return false,
        };
    }
    false
}

/// The two ends of a packet to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) source_mac: Mac,
    pub(crate) destination_mac: Mac,
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
}

impl Route {
    /// Bytes of the headers of Ethernet and IP.
    pub(crate) fn headers_size(&self) -> usize {
        ETHERNET_SIZE
            + match self.destination {
                IpAddr::V4(_) => IPV4_SIZE,
                IpAddr::V6(_) => IPV6_SIZE,
            }
    }

    /// Replaces `frame` by the headers of a packet whose payload has `payload_size` bytes, which must not be
    /// more than a packet can have.
    pub(crate) fn write(
        &self,
        frame: &mut Vec<u8>,
        protocol: u8,
        payload_size: usize,
        hop_limit: Option<u8>,
    ) {
        frame.clear();
        let hop_limit = hop_limit.unwrap_or(HOP_LIMIT);
        let mut ethernet = Ethernet {
            destination: self.destination_mac,
            source: self.source_mac,
            ethertype: ETHERTYPE_IPV4,
        };
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                ethernet.write(frame);
                frame.extend([0x45, 0]);
                frame.extend(((IPV4_SIZE + payload_size) as u16).to_be_bytes());
                frame.extend([0, 0]);
                frame.extend(DONT_FRAGMENT);
                frame.extend([hop_limit, protocol, 0, 0]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                let checksum = !fold(sum(&frame[ETHERNET_SIZE..]));
                put16(frame, ETHERNET_SIZE + 10, checksum);
            }
            (source, destination) => {
                ethernet.ethertype = ETHERTYPE_IPV6;
                ethernet.write(frame);
                frame.extend([0x60, 0, 0, 0]);
                frame.extend((payload_size as u16).to_be_bytes());
                frame.extend([protocol, hop_limit]);
                frame.extend(octets_v6(source));
                frame.extend(octets_v6(destination));
            }
        }
    }

    /// Returns the sum of the pseudo-header that the checksums of TCP, UDP and ICMPv6 begin with.
    pub(crate) fn pseudo_sum(&self, protocol: u8, size: usize) -> u32 {
        let mut total = u32::from(protocol) + (size as u32 >> 16) + (size as u32 & 0xffff);
        for address in [self.source, self.destination] {
            total += match address {
                IpAddr::V4(address) => sum(&address.octets()),
                IpAddr::V6(address) => sum(&address.octets()),
            };
        }
        total
    }
}

fn octets_v6(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}
