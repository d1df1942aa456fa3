//! Packets that the guest sends in parts.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::wire::{Fragment, IPV4_SIZE, Ip};

/// Most packets that are incomplete at a time.
const MAX_PACKETS: usize = 16;
/// Most bytes of a packet's payload.
const MAX_SIZE: usize = u16::MAX as usize - IPV4_SIZE;
/// Most gaps in a packet. Parts that arrive in order, or in reverse, leave one at most.
const MAX_RANGES: usize = 16;
/// How long parts wait for others. Those of a guest follow each other at once.
const WAIT_TIME: Duration = Duration::from_secs(5);

/// What the parts of a packet have in common (RFC 791, section 3.2; RFC 8200, section 4.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    identification: u32,
}

struct Packet {
    key: Key,
    began: Instant,
    payload: Vec<u8>,
    /// The parts that have arrived: start and end, in order, without parts that touch each other.
    ranges: Vec<(usize, usize)>,
    /// The size of the payload, once the last part has arrived.
    size: Option<usize>,
    /// Parts have contradicted each other, so further ones are thrown away.
    is_spoilt: bool,
}

/// Parts that wait for others, of a bounded number of packets.
#[derive(Default)]
pub(crate) struct Reassembly {
    packets: Vec<Packet>,
}

impl Reassembly {
    /// Takes a part of a packet, and returns the whole payload if it completes that.
    pub(crate) fn take(
        &mut self,
        ip: &Ip,
        fragment: Fragment,
        bytes: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let key = Key {
            source: ip.source,
            destination: ip.destination,
            protocol: ip.protocol,
            identification: fragment.identification,
        };
        self.packets
            .retain(|packet| now.duration_since(packet.began) < WAIT_TIME);
        let index = match self.packets.iter().position(|packet| packet.key == key) {
            Some(index) => index,
            None => {
                if self.packets.len() >= MAX_PACKETS {
                    // The oldest is the first.
                    self.packets.remove(0);
                }
                self.packets.push(Packet {
                    key,
                    began: now,
                    payload: Vec::new(),
                    ranges: Vec::new(),
                    size: None,
                    is_spoilt: false,
                });
                self.packets.len() - 1
            }
        };
        let packet = &mut self.packets[index];
        if !packet.is_spoilt && !packet.add(fragment, bytes) {
            packet.is_spoilt = true;
            packet.payload = Vec::new();
            packet.ranges = Vec::new();
        }
        let is_whole = packet.size.is_some_and(|size| packet.ranges == [(0, size)]);
        is_whole.then(|| self.packets.remove(index).payload)
    }

    /// Forgets all parts.
    pub(crate) fn clear(&mut self) {
        self.packets.clear();
    }
}

impl Packet {
    /// Adds a part; `false` if it does not fit. Parts that overlap are never sent on purpose (RFC 5722).
    fn add(&mut self, fragment: Fragment, bytes: &[u8]) -> bool {
        let start = fragment.offset;
        let end = start + bytes.len();
        let is_aligned = fragment.is_last || bytes.len().is_multiple_of(8);
        if bytes.is_empty() || end > MAX_SIZE || !is_aligned {
            return false;
        }
        let furthest = self.ranges.last().map_or(0, |&(_, end)| end);
        match (self.size, fragment.is_last) {
            (Some(size), false) if end > size => return false,
            (Some(_), true) => return false,
            (None, true) if furthest > end => return false,
            (None, true) => self.size = Some(end),
            _ => {}
        }
        let place = self.ranges.partition_point(|&(other, _)| other < start);
        let before = place.checked_sub(1).map(|before| self.ranges[before]);
        let after = self.ranges.get(place).copied();
        if before.is_some_and(|(_, other_end)| other_end > start)
            || after.is_some_and(|(other, _)| other < end)
        {
            return false;
        }
        self.ranges.insert(place, (start, end));
        if after.is_some_and(|(other, _)| other == end) {
            self.ranges[place].1 = self.ranges.remove(place + 1).1;
        }
        if before.is_some_and(|(_, other_end)| other_end == start) {
            self.ranges[place - 1].1 = self.ranges.remove(place).1;
        }
        if self.ranges.len() > MAX_RANGES {
            return false;
        }
        self.payload.resize(self.payload.len().max(end), 0);
        self.payload[start..end].copy_from_slice(bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(identification: u32, offset: usize, is_last: bool) -> (Ip, Fragment) {
        let fragment = Fragment {
            identification,
            offset,
            is_last,
        };
        let address = IpAddr::from([10, 0, 2, 15]);
        let ip = Ip {
            source: address,
            destination: address,
            protocol: 17,
            protocol_offset: 9,
            header_size: 20,
            payload_size: 0,
            hop_limit: 64,
            has_source_route: false,
            fragment: Some(fragment),
        };
        (ip, fragment)
    }

    #[test]
    fn parts_that_overlap_or_contradict_each_other_spoil_the_packet() {
        let now = Instant::now();
        for parts in [
            [(0, 16, false), (8, 16, false), (24, 8, true)],
            [(8, 8, true), (0, 16, false), (0, 8, false)],
            [(16, 8, false), (0, 8, true), (8, 8, false)],
            [(0, 7, false), (8, 8, false), (16, 8, true)],
            [(0, 8, false), (65_528, 8, true), (8, 8, false)],
            [(0, 8, false), (0, 8, false), (8, 8, true)],
        ] {
            let mut reassembly = Reassembly::default();
            for (offset, size, is_last) in parts {
                let (ip, fragment) = ip(1, offset, is_last);
                let whole = reassembly.take(&ip, fragment, &vec![1; size], now);
                assert_eq!(whole, None, "{parts:?}");
            }
        }
    }

    #[test]
    fn what_is_never_completed_makes_room() {
        let now = Instant::now();
        let mut reassembly = Reassembly::default();
        for number in 0..1000 {
            let (ip, fragment) = ip(number, 8 * number as usize, false);
            reassembly.take(&ip, fragment, &[1; 8], now);
            assert!(reassembly.packets.len() <= MAX_PACKETS);
        }
        let (ip, fragment) = ip(5000, 0, false);
        reassembly.take(&ip, fragment, &[1; 8], now + WAIT_TIME);
        assert_eq!(reassembly.packets.len(), 1);
    }

    proptest! {
        #[test]
        fn parts_in_any_order_make_the_packet(
            sizes in prop::collection::vec(1usize..8, 2..16),
            seed in any::<u64>(),
        ) {
            let total: usize = sizes.iter().map(|units| units * 8).sum::<usize>() - 3;
            let payload: Vec<u8> = (0..total).map(|index| index as u8).collect();
            let mut offset = 0;
            let mut parts: Vec<_> = sizes
                .iter()
                .map(|units| {
                    let start = offset;
                    offset = (offset + units * 8).min(total);
                    (start, offset)
                })
                .collect();
            let mut state = seed;
            for index in (1..parts.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                parts.swap(index, (state >> 33) as usize % (index + 1));
            }
            let mut reassembly = Reassembly::default();
            let last = parts.len() - 1;
            for (number, (start, end)) in parts.into_iter().enumerate() {
                let (ip, fragment) = ip(9, start, end == total);
                let whole = reassembly.take(&ip, fragment, &payload[start..end], Instant::now());
                prop_assert_eq!(whole, (number == last).then(|| payload.clone()));
            }
        }

        #[test]
        fn any_parts_are_taken_or_not(
            parts in prop::collection::vec(
                (0u32..3, 0usize..8192, 0usize..300, any::<bool>()), 0..200
            ),
        ) {
            let mut reassembly = Reassembly::default();
            for (identification, unit, size, is_last) in parts {
                let (ip, fragment) = ip(identification, 8 * unit, is_last);
                reassembly.take(&ip, fragment, &vec![1; size], Instant::now());
                for packet in &reassembly.packets {
                    prop_assert!(packet.ranges.len() <= MAX_RANGES);
                    prop_assert!(packet.payload.len() <= MAX_SIZE);
                }
            }
        }
    }
}
