//! Headers of Ethernet, ARP, IP, TCP, UDP and ICMP: how they are read and written.
//!
//! What a guest sends is hostile. Every function that reads takes a slice and returns `None` for bytes that
//! are not what they should be.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

pub(crate) const BROADCAST: Mac = [0xff; 6];

pub(crate) const ETHERNET_SIZE: usize = 14;
pub(crate) const IPV4_SIZE: usize = 20;
pub(crate) const IPV6_SIZE: usize = 40;
pub(crate) const TCP_SIZE: usize = 20;
pub(crate) const UDP_SIZE: usize = 8;
pub(crate) const ICMP_SIZE: usize = 8;

/// The most bytes of headers at the start of a frame: Ethernet, IPv4 and TCP, both with all options.
pub(crate) const MAX_HEADERS_SIZE: usize = ETHERNET_SIZE + 60 + 60;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
pub(crate) const PROTOCOL_ICMPV6: u8 = 58;

/// Hops that packets to the guest may still make, as a host would set it.
const HOP_LIMIT: u8 = 64;
/// The flag that forbids fragmentation (RFC 791, section 3.1).
const DONT_FRAGMENT: [u8; 2] = [0x40, 0];
/// The bits of the field for fragments that say that a packet is one: another follows, or its offset.
const FRAGMENT_BITS: u16 = 0x3fff;

/// Reads the field at `offset`.
pub(crate) fn field<const SIZE: usize>(bytes: &[u8], offset: usize) -> Option<[u8; SIZE]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Reads a number of 16 bits.
pub(crate) fn number16(bytes: &[u8], offset: usize) -> Option<u16> {
    field(bytes, offset).map(u16::from_be_bytes)
}

/// Reads a number of 32 bits.
pub(crate) fn number32(bytes: &[u8], offset: usize) -> Option<u32> {
    field(bytes, offset).map(u32::from_be_bytes)
}

/// The header of an Ethernet frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ethernet {
    pub(crate) destination: Mac,
    pub(crate) source: Mac,
    pub(crate) ethertype: u16,
}

impl Ethernet {
    pub(crate) fn read(frame: &[u8]) -> Option<Ethernet> {
        Some(Ethernet {
            destination: field(frame, 0)?,
            source: field(frame, 6)?,
            ethertype: number16(frame, 12)?,
        })
    }

    pub(crate) fn write(&self, frame: &mut Vec<u8>) {
        frame.extend(self.destination);
        frame.extend(self.source);
        frame.extend(self.ethertype.to_be_bytes());
    }
}

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

/// The header of an IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    pub(crate) protocol: u8,
    pub(crate) header_size: usize,
    pub(crate) payload_size: usize,
    pub(crate) hop_limit: u8,
}

impl Ip {
    /// Reads the header of an unfragmented packet, of which `packet` has the start; `size` is the size of what
    /// the frame carries. A packet with extension headers of IPv6 has one of them as its protocol.
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
        if number16(packet, 6)? & FRAGMENT_BITS != 0 {
            return None;
        }
        Some(Ip {
            source: Ipv4Addr::from(field::<4>(packet, 12)?).into(),
            destination: Ipv4Addr::from(field::<4>(packet, 16)?).into(),
            protocol: *packet.get(9)?,
            header_size,
            payload_size: total - header_size,
            hop_limit: *packet.get(8)?,
        })
    }

    fn read_v6(packet: &[u8], size: usize) -> Option<Ip> {
        let payload_size = usize::from(number16(packet, 4)?);
        if IPV6_SIZE + payload_size > size {
            return None;
        }
        Some(Ip {
            source: Ipv6Addr::from(field::<16>(packet, 8)?).into(),
            destination: Ipv6Addr::from(field::<16>(packet, 24)?).into(),
            protocol: *packet.get(6)?,
            header_size: IPV6_SIZE,
            payload_size,
            hop_limit: *packet.get(7)?,
        })
    }
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

/// Overwrites a number of 16 bits.
pub(crate) fn put16(bytes: &mut [u8], offset: usize, number: u16) {
    if let Some(place) = bytes.get_mut(offset..offset + 2) {
        place.copy_from_slice(&number.to_be_bytes());
    }
}

/// Adds up numbers of 16 bits. At most 128 KiB can be added up without overflow.
pub(crate) fn sum(bytes: &[u8]) -> u32 {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let whole: u32 = pairs
        .iter()
        .map(|&pair| u32::from(u16::from_be_bytes(pair)))
        .sum();
    whole + rest.first().map_or(0, |&last| u32::from(last) << 8)
}

/// Reduces a sum to its sum in one's complement.
pub(crate) fn fold(total: u32) -> u16 {
    let once = (total >> 16) + (total & 0xffff);
    ((once >> 16) + (once & 0xffff)) as u16
}

/// Flags of a TCP segment.
pub(crate) mod tcp_flag {
    pub(crate) const FIN: u8 = 1;
    pub(crate) const SYN: u8 = 2;
    pub(crate) const RST: u8 = 4;
    pub(crate) const PSH: u8 = 8;
    pub(crate) const ACK: u8 = 16;
}

/// The header of a TCP segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Tcp {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) mss: Option<u16>,
    pub(crate) window_scale: Option<u8>,
    pub(crate) header_size: usize,
}

impl Tcp {
    pub(crate) const CHECKSUM_OFFSET: usize = 16;

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Reads the header at the start of `segment`, which has to be there as a whole.
    pub(crate) fn read(segment: &[u8]) -> Option<Tcp> {
        let header_size = usize::from(segment.get(12)? >> 4) * 4;
        let mut options = segment.get(TCP_SIZE..header_size)?;
        let mut header = Tcp {
            source: number16(segment, 0)?,
            destination: number16(segment, 2)?,
            sequence: number32(segment, 4)?,
            acknowledgment: number32(segment, 8)?,
            flags: segment[13],
            window: number16(segment, 14)?,
            mss: None,
            window_scale: None,
            header_size,
        };
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                (0, _) => break,
                (1, _) => rest,
                (_, [size, ..]) => {
                    // The size counts both bytes; options that are cut off end the list.
                    let Some(value) = options.get(2..usize::from(*size)) else {
                        break;
                    };
                    match (kind, value) {
                        (2, &[high, low]) => header.mss = Some(u16::from_be_bytes([high, low])),
                        // Larger shifts count as 14 (RFC 7323, section 2.3).
                        (3, &[shift]) => header.window_scale = Some(shift.min(14)),
                        _ => {}
                    }
                    &options[usize::from(*size)..]
                }
                _ => break,
            };
        }
        Some(header)
    }

    /// Returns the size of the header that [`Tcp::write`] writes.
    pub(crate) fn written_size(&self) -> usize {
        TCP_SIZE
            + if self.mss.is_some() { 4 } else { 0 }
            + if self.window_scale.is_some() { 4 } else { 0 }
    }

    /// Appends the header, without a checksum.
    pub(crate) fn write(&self, frame: &mut Vec<u8>) {
        frame.extend(self.source.to_be_bytes());
        frame.extend(self.destination.to_be_bytes());
        frame.extend(self.sequence.to_be_bytes());
        frame.extend(self.acknowledgment.to_be_bytes());
        frame.extend([(self.written_size() as u8 / 4) << 4, self.flags]);
        frame.extend(self.window.to_be_bytes());
        frame.extend([0; 4]);
        if let Some(mss) = self.mss {
            frame.extend([2, 4]);
            frame.extend(mss.to_be_bytes());
        }
        if let Some(shift) = self.window_scale {
            frame.extend([1, 3, 3, shift]);
        }
    }
}

/// The header of a UDP datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Udp {
    pub(crate) source: u16,
    pub(crate) destination: u16,
    pub(crate) payload_size: usize,
}

impl Udp {
    pub(crate) const CHECKSUM_OFFSET: usize = 6;

    /// Reads the header of a datagram that has `size` bytes in its packet.
    pub(crate) fn read(datagram: &[u8], size: usize) -> Option<Udp> {
        let own_size = usize::from(number16(datagram, 4)?);
        if own_size > size {
            return None;
        }
        Some(Udp {
            source: number16(datagram, 0)?,
            destination: number16(datagram, 2)?,
            payload_size: own_size.checked_sub(UDP_SIZE)?,
        })
    }

    /// Appends the header, without a checksum.
    pub(crate) fn write(&self, frame: &mut Vec<u8>) {
        frame.extend(self.source.to_be_bytes());
        frame.extend(self.destination.to_be_bytes());
        frame.extend(((UDP_SIZE + self.payload_size) as u16).to_be_bytes());
        frame.extend([0; 2]);
    }

    /// Makes a whole frame with the datagram `payload`.
    pub(crate) fn frame(route: &Route, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
        let size = UDP_SIZE + payload.len();
        let mut frame = Vec::with_capacity(route.headers_size() + size);
        route.write(&mut frame, PROTOCOL_UDP, size, None);
        let start = frame.len();
        Udp {
            source,
            destination,
            payload_size: payload.len(),
        }
        .write(&mut frame);
        frame.extend(payload);
        let total = route.pseudo_sum(PROTOCOL_UDP, size) + sum(&frame[start..]);
        put16(
            &mut frame,
            start + Self::CHECKSUM_OFFSET,
            udp_checksum(total),
        );
        frame
    }
}

/// Returns the checksum of UDP for a sum. Zero means that there is none, so it is written in its other form.
pub(crate) fn udp_checksum(total: u32) -> u16 {
    match !fold(total) {
        0 => 0xffff,
        checksum => checksum,
    }
}

/// Makes a whole frame with an ICMP message, of version 4 or 6 as the addresses are. The checksum in
/// `message` does not matter.
pub(crate) fn icmp_frame(route: &Route, message: &[u8], hop_limit: Option<u8>) -> Vec<u8> {
    let (protocol, pseudo) = match route.destination {
        IpAddr::V4(_) => (PROTOCOL_ICMP, 0),
        IpAddr::V6(_) => (
            PROTOCOL_ICMPV6,
            route.pseudo_sum(PROTOCOL_ICMPV6, message.len()),
        ),
    };
    let mut frame = Vec::with_capacity(route.headers_size() + message.len());
    route.write(&mut frame, protocol, message.len(), hop_limit);
    let start = frame.len();
    frame.extend(message);
    put16(&mut frame, start + 2, 0);
    let checksum = !fold(pseudo + sum(&frame[start..]));
    put16(&mut frame, start + 2, checksum);
    frame
}
