//! Packets to the guest in parts.

use super::{
    ETHERNET_SIZE, IPV4_SIZE, IPV6_SIZE, fold,
    ip::{FRAGMENT_UNIT, MORE_FRAGMENTS, extension},
    put16, sum,
};

/// Bytes of the header by which a part of a packet of IPv6 is known (RFC 8200, section 4.5).
const FRAGMENT_HEADER_SIZE: usize = 8;
/// Where headers have their fields.
mod v4 {
    pub(super) const TOTAL_SIZE: usize = super::ETHERNET_SIZE + 2;
    pub(super) const IDENTIFICATION: usize = super::ETHERNET_SIZE + 4;
    pub(super) const PLACE: usize = super::ETHERNET_SIZE + 6;
    pub(super) const CHECKSUM: usize = super::ETHERNET_SIZE + 10;
}
mod v6 {
    pub(super) const PAYLOAD_SIZE: usize = super::ETHERNET_SIZE + 4;
    pub(super) const NEXT_HEADER: usize = super::ETHERNET_SIZE + 6;
}

/// Splits the packet in `frame`, as [`super::Route::write`] has begun it, into frames whose packets have at most `mtu` bytes
/// (RFC 791, section 3.2; RFC 8200, section 4.5). There are none if not even a unit of payload fits into one.
pub(crate) fn split(frame: &[u8], mtu: usize, identification: u32) -> Vec<Vec<u8>> {
    let is_v4 = frame
        .get(ETHERNET_SIZE)
        .is_some_and(|first| first >> 4 == 4);
    let (header_size, extension_size) = match is_v4 {
        true => (IPV4_SIZE, 0),
        false => (IPV6_SIZE, FRAGMENT_HEADER_SIZE),
    };
    let room = mtu.saturating_sub(header_size + extension_size) / FRAGMENT_UNIT * FRAGMENT_UNIT;
    let Some((headers, payload)) = frame.split_at_checked(ETHERNET_SIZE + header_size) else {
        return Vec::new();
    };
    if room == 0 {
        return Vec::new();
    }
    let count = payload.len().div_ceil(room);
    let parts = payload.chunks(room).enumerate().map(|(index, part)| {
        let is_last = index + 1 == count;
        // In units, as IPv4 has it; IPv6 has it in the upper 13 bits, which are the bytes.
        let offset = index * room;
        let mut frame = Vec::with_capacity(headers.len() + extension_size + part.len());
        frame.extend(headers);
        if is_v4 {
            let more = if is_last { 0 } else { MORE_FRAGMENTS };
            put16(&mut frame, v4::TOTAL_SIZE, (IPV4_SIZE + part.len()) as u16);
            put16(&mut frame, v4::IDENTIFICATION, identification as u16);
            put16(
                &mut frame,
                v4::PLACE,
                (offset / FRAGMENT_UNIT) as u16 | more,
            );
            put16(&mut frame, v4::CHECKSUM, 0);
            let checksum = !fold(sum(&frame[ETHERNET_SIZE..]));
            put16(&mut frame, v4::CHECKSUM, checksum);
        } else {
            let protocol = frame[v6::NEXT_HEADER];
            frame[v6::NEXT_HEADER] = extension::FRAGMENT;
            let size = FRAGMENT_HEADER_SIZE + part.len();
            put16(&mut frame, v6::PAYLOAD_SIZE, size as u16);
            frame.extend([protocol, 0]);
            frame.extend((offset as u16 | u16::from(!is_last)).to_be_bytes());
            frame.extend(identification.to_be_bytes());
        }
        frame.extend(part);
        frame
    });
    parts.collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::reassembly::Reassembly;
    use crate::wire::{Ip, Route};

    proptest! {
        #[test]
        fn parts_fit_and_are_the_packet(
            is_v4: bool,
            payload in proptest::collection::vec(any::<u8>(), 1..20_000),
            mtu in 68usize..9000,
            identification: u32,
        ) {
            let mtu = if is_v4 { mtu } else { mtu.max(1280) };
            let address = |last| -> IpAddr {
                match is_v4 {
                    true => [10, 0, 2, last].into(),
                    false => [0xfd62, 0, 0, 0, 0, 0, 0, last.into()].into(),
                }
            };
            let route = Route {
                source_mac: [2; 6],
                destination_mac: [4; 6],
                source: address(2),
                destination: address(15),
            };
            let mut frame = Vec::new();
            route.write(&mut frame, 17, payload.len(), None);
            frame.extend(&payload);
            let parts = split(&frame, mtu, identification);
            let mut reassembly = Reassembly::default();
            let mut whole = None;
            for part in &parts {
                prop_assert!(part.len() <= ETHERNET_SIZE + mtu);
                let packet = &part[ETHERNET_SIZE..];
                let ip = Ip::read(packet, packet.len()).unwrap();
                prop_assert_eq!((ip.source, ip.destination, ip.protocol), (route.source, route.destination, 17));
                if is_v4 {
                    prop_assert_eq!(fold(sum(&packet[..IPV4_SIZE])), 0xffff);
                }
                prop_assert!(whole.is_none());
                let bytes = &packet[ip.header_size..];
                whole = match ip.fragment {
                    Some(fragment) => reassembly.take(&ip, fragment, bytes, Instant::now()),
                    // It has fitted.
                    None => Some(bytes.to_vec()),
                };
            }
            prop_assert_eq!(whole, Some(payload));
        }
    }
}
