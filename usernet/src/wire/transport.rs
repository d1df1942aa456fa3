//! Headers of TCP and UDP, and ICMP messages.

use std::net::IpAddr;

use super::{
    PROTOCOL_ICMP, PROTOCOL_ICMPV6, PROTOCOL_UDP, Route, TCP_SIZE, UDP_SIZE, fold, number16,
    number32, put16, sum,
};

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
