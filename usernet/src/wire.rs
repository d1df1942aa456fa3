//! Headers of Ethernet, ARP, IP, TCP, UDP and ICMP: how they are read and written.
//!
//! What a guest sends is hostile. Every function that reads takes a slice and returns `None` for bytes that
//! are not what they should be.

mod arp;
mod ip;
mod split;
mod transport;

pub(crate) use arp::ArpRequest;
pub(crate) use ip::{Fragment, Ip, Route};
pub(crate) use split::split;
pub(crate) use transport::{Tcp, Udp, icmp_frame, tcp_flag, udp_checksum};

/// An Ethernet address.
pub(crate) type Mac = [u8; 6];

pub(crate) const BROADCAST: Mac = [0xff; 6];

pub(crate) const ETHERNET_SIZE: usize = 14;
pub(crate) const IPV4_SIZE: usize = 20;
pub(crate) const IPV6_SIZE: usize = 40;
pub(crate) const TCP_SIZE: usize = 20;
pub(crate) const UDP_SIZE: usize = 8;
pub(crate) const ICMP_SIZE: usize = 8;

/// The most bytes of headers at the start of a frame: Ethernet, IP and TCP with all options. Frames with more
/// extension headers of IPv6 than fit are not understood.
pub(crate) const MAX_HEADERS_SIZE: usize = 256;

pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
pub(crate) const ETHERTYPE_ARP: u16 = 0x0806;
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

pub(crate) const PROTOCOL_ICMP: u8 = 1;
pub(crate) const PROTOCOL_TCP: u8 = 6;
pub(crate) const PROTOCOL_UDP: u8 = 17;
pub(crate) const PROTOCOL_ICMPV6: u8 = 58;

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
