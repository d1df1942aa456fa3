//! Checksums of packets from DHCP servers.
//!
//! If the driver has the feature `GUEST_CSUM`, the host leaves the checksums of its own packets to the
//! driver, and the guest's network stack knows from a packet's header that it need not verify it. But DHCP
//! clients such as dhclient and udhcpc read whole frames from a packet socket, as they have no address yet,
//! and many verify the checksum themselves and drop the packet. Clients of DHCPv6 have a link-local address
//! and read from UDP sockets, so they are not affected.

use bantam_memory::GuestBuffers;
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE};

use crate::tap::PACKET_HEADER_SIZE;

/// Size of the part of a packet's header that describes the checksum (section 5.1.6): flags, kind of
/// segmentation, two fields that only segmentation needs, the start of the bytes that are summed, and the
/// offset of the checksum from there.
const HEADER_SIZE: usize = 10;
/// Offset of the last two of these fields.
const START_AND_OFFSET: usize = 6;

/// Offset of the checksum in a UDP header.
const UDP_CHECKSUM_OFFSET: u16 = 6;
/// The port from which DHCP servers answer (RFC 2131, section 4.1).
const DHCP_SERVER_PORT: u16 = 67;

/// Completes the UDP checksum of `packet`, `size` bytes with its header, if it comes from a DHCP server. If
/// the guest changes the bytes meanwhile, it spoils only its own packet.
pub(super) fn complete_dhcp_checksum(packet: &mut GuestBuffers, size: usize) {
    let mut header = [0; HEADER_SIZE];
    packet.read_at(0, &mut header);
    let [flags, segmentation, _, _, _, _, start @ .., _, _] = header;
    let offset = u16::from_le_bytes([header[8], header[9]]);
    // Nearly all checksums that the host leaves unfinished are those of TCP.
    if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 || offset != UDP_CHECKSUM_OFFSET {
        return;
    }
    let datagram = PACKET_HEADER_SIZE + usize::from(u16::from_le_bytes(start));
    let checksum = datagram + usize::from(offset);
    let mut source_port = [0; 2];
    packet.read_at(datagram, &mut source_port);
    if u16::from_be_bytes(source_port) != DHCP_SERVER_PORT
        || u32::from(segmentation) != VIRTIO_NET_HDR_GSO_NONE
        || checksum + 2 > size
    {
        return;
    }
    // The checksum field holds the sum over the addresses, which is not inverted.
    let complete = match !sum(packet, datagram, size) {
        // In UDP, zero means that there is no checksum.
        0 => u16::MAX,
        complete => complete,
    };
    packet.write_at(checksum, &complete.to_be_bytes());
    let flags = flags & !(VIRTIO_NET_HDR_F_NEEDS_CSUM as u8);
    packet.write_at(0, &[flags]);
    packet.write_at(START_AND_OFFSET, &[0; HEADER_SIZE - START_AND_OFFSET]);
}

/// Computes the ones' complement sum (RFC 1071) of the bytes of `packet` from `start` up to `end`.
fn sum(packet: &GuestBuffers, start: usize, end: usize) -> u16 {
    let mut sum = 0;
    // Its size is even, so that each piece begins with the upper byte of a word.
    let mut piece = [0; 256];
    for start in (start..end).step_by(piece.len()) {
        let piece = &mut piece[..(end - start).min(256)];
        packet.read_at(start, piece);
        for word in piece.chunks(2) {
            let bytes = [word[0], word.get(1).copied().unwrap_or(0)];
            sum += u64::from(u16::from_be_bytes(bytes));
        }
    }
    while let carry @ 1.. = sum >> 16 {
        sum = (sum & 0xffff) + carry;
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bantam_memory::GuestMemory;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    /// Distance between the parts of buffers, odd so that parts are also at odd addresses.
    const PART_DISTANCE: u64 = 0x1001;

    /// Puts `bytes` into guest memory, in buffers of the sizes `parts` and one for the rest.
    fn buffers(bytes: &[u8], parts: &[usize]) -> GuestBuffers {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mut buffers = GuestBuffers::new(Arc::new(memory));
        let mut left = bytes.len();
        for (index, &part) in parts.iter().chain([&usize::MAX]).enumerate() {
            let part = part.min(left);
            let address = GuestAddress(index as u64 * PART_DISTANCE);
            buffers.push(address, part as u32).unwrap();
            left -= part;
        }
        buffers.write_at(0, bytes);
        buffers
    }

    fn complete(packet: &[u8], parts: &[usize]) -> Vec<u8> {
        let mut buffers = buffers(packet, parts);
        complete_dhcp_checksum(&mut buffers, packet.len());
        let mut bytes = vec![0; packet.len()];
        buffers.read_at(0, &mut bytes);
        bytes
    }

    /// Makes an unfinished UDP datagram, after `start` other bytes.
    fn unfinished(start: usize, source_port: u16, address_sum: u16, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; PACKET_HEADER_SIZE];
        packet[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
        packet[6..8].copy_from_slice(&(start as u16).to_le_bytes());
        packet[8..10].copy_from_slice(&UDP_CHECKSUM_OFFSET.to_le_bytes());
        packet.resize(PACKET_HEADER_SIZE + start, 0xee);
        packet.extend(source_port.to_be_bytes());
        packet.extend(68u16.to_be_bytes());
        packet.extend((8 + payload.len() as u16).to_be_bytes());
        packet.extend(address_sum.to_be_bytes());
        packet.extend(payload);
        packet
    }

    /// Computes what a receiver does according to RFC 1071, in the plainest way.
    fn reference_sum(address_sum: u16, datagram: &[u8]) -> u16 {
        let words = datagram
            .chunks(2)
            .map(|word| u16::from(word[0]) << 8 | u16::from(*word.get(1).unwrap_or(&0)));
        words.fold(address_sum, |sum, word| {
            let (sum, carry) = sum.overflowing_add(word);
            sum + u16::from(carry)
        })
    }

    #[test]
    fn a_sum_of_ones_is_not_mistaken_for_no_checksum() {
        // All words of the datagram sum up to 0xffff, whose inverse is zero.
        let rest = 67 + 68 + 10;
        let packet = unfinished(34, 67, 0xffff - rest - 0x100, &[1, 0]);
        assert_eq!(
            complete(&packet, &[])[PACKET_HEADER_SIZE + 40..][..2],
            [0xff; 2]
        );
    }

    #[test]
    fn only_finished_by_its_header_what_a_server_sends() {
        let packet = unfinished(34, 67, 0x1234, b"offer");
        assert_ne!(complete(&packet, &[]), packet);
        let changed = |place: usize, value: u8| {
            let mut packet = packet.clone();
            packet[place] = value;
            packet
        };
        for other in [
            unfinished(34, 68, 0x1234, b"offer"),
            unfinished(34, 67 << 8, 0x1234, b"offer"),
            changed(0, 0),
            changed(0, 2),
            // UDP that is still to be segmented, and the checksum of TCP.
            changed(1, 5),
            changed(8, 16),
            changed(9, 1),
            // Offsets beyond the end of the packet.
            changed(6, 42),
            changed(7, 1),
        ] {
            assert_eq!(complete(&other, &[]), other);
        }
    }

    proptest! {
        #[test]
        fn the_receiver_finds_the_checksum_right(
            start in prop_oneof![Just(34), Just(38), 0..100usize],
            address_sum: u16,
            payload in vec(any::<u8>(), 0..700),
            parts in vec(0..60usize, 0..40),
        ) {
            let packet = unfinished(start, 67, address_sum, &payload);
            let completed = complete(&packet, &parts);
            let datagram = PACKET_HEADER_SIZE + start;
            // The checksum has replaced the sum over the addresses.
            prop_assert_eq!(reference_sum(address_sum, &completed[datagram..]), 0xffff);
            prop_assert_ne!(&completed[datagram + 6..][..2], &[0, 0]);
            // The rest is unchanged, and the header asks for nothing any more.
            prop_assert_eq!(&completed[..PACKET_HEADER_SIZE], &[0; PACKET_HEADER_SIZE]);
            let mut rest = completed;
            rest[datagram + 6..][..2].copy_from_slice(&address_sum.to_be_bytes());
            prop_assert_eq!(&rest[PACKET_HEADER_SIZE..], &packet[PACKET_HEADER_SIZE..]);
        }

        #[test]
        fn any_packet_is_taken(
            packet in vec(any::<u8>(), 0..200),
            start in 0..300u16,
            parts in vec(0..20usize, 0..9),
        ) {
            let mut packet = packet;
            let header = unfinished(start.into(), 67, 0, b"");
            let len = packet.len().min(HEADER_SIZE);
            packet[..len].copy_from_slice(&header[..len]);
            complete(&packet, &parts);
        }
    }
}
