//! The frames of the network load.

use runtime::virtio::net::Header;

/// Size of the Ethernet header.
pub const ETHERNET_SIZE: usize = 14;
/// The largest frame that is not segmented: an Ethernet header and 1500 bytes.
pub const MAX_UNCUT_SIZE: usize = 1514;
/// An EtherType reserved for experiments (IEEE 802), which nothing else sends.
pub const ETHER_TYPE: [u8; 2] = [0x88, 0xb5];

const ETHER_TYPE_IPV4: [u8; 2] = [0x08, 0x00];
/// Locally administered and unused: the host drops frames to it.
const TARGET: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Addresses from the range for tests of devices (RFC 2544).
const SOURCE_ADDRESS: [u8; 4] = [198, 18, 255, 1];
const TARGET_ADDRESS: [u8; 4] = [198, 18, 255, 2];

const IP_SIZE: usize = 20;
const TCP_SIZE: usize = 20;
const HEADERS_SIZE: usize = ETHERNET_SIZE + IP_SIZE + TCP_SIZE;
const PROTOCOL_TCP: u8 = 6;
const TCP_CHECKSUM_OFFSET: usize = 16;
/// Payload of a segment at an MTU of 1500.
const SEGMENT_SIZE: u16 = 1460;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` and `VIRTIO_NET_HDR_GSO_TCPV4` (section 5.1.6).
const NEEDS_CHECKSUM: u8 = 1;
const SEGMENTATION_TCPV4: u8 = 1;

/// Makes a frame that fills `frame`, which is zero, and its header for the device: a frame of the
/// EtherType for experiments or, if it has to be segmented, a TCP segment.
pub fn make(source: [u8; 6], frame: &mut [u8]) -> Header {
    frame[..6].copy_from_slice(&TARGET);
    frame[6..12].copy_from_slice(&source);
    if frame.len() <= MAX_UNCUT_SIZE {
        frame[12..ETHERNET_SIZE].copy_from_slice(&ETHER_TYPE);
        return Header::default();
    }
    frame[12..ETHERNET_SIZE].copy_from_slice(&ETHER_TYPE_IPV4);
    make_tcp(&mut frame[ETHERNET_SIZE..]);
    Header {
        flags: NEEDS_CHECKSUM,
        segmentation: SEGMENTATION_TCPV4,
        header_length: HEADERS_SIZE as u16,
        segment_size: SEGMENT_SIZE,
        checksum_start: (ETHERNET_SIZE + IP_SIZE) as u16,
        checksum_offset: TCP_CHECKSUM_OFFSET as u16,
        buffer_count: 0,
    }
}

/// An IPv4 packet (RFC 791) of a TCP segment (RFC 9293) whose checksum covers only the pseudo-header.
fn make_tcp(packet: &mut [u8]) {
    let size = packet.len() as u16;
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&size.to_be_bytes());
    packet[8] = 64;
    packet[9] = PROTOCOL_TCP;
    packet[12..16].copy_from_slice(&SOURCE_ADDRESS);
    packet[16..20].copy_from_slice(&TARGET_ADDRESS);
    let checksum = !sum(&packet[..IP_SIZE]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());

    let mut pseudo_header = [0; 12];
    pseudo_header[..8].copy_from_slice(&packet[12..20]);
    pseudo_header[9] = PROTOCOL_TCP;
    pseudo_header[10..].copy_from_slice(&(size - IP_SIZE as u16).to_be_bytes());
    let segment = &mut packet[IP_SIZE..];
    // Port 9, which discards.
    segment[..4].copy_from_slice(&[0, 9, 0, 9]);
    segment[12] = (TCP_SIZE as u8 / 4) << 4;
    // ACK.
    segment[13] = 0x10;
    segment[14..16].copy_from_slice(&[0xff, 0xff]);
    segment[TCP_CHECKSUM_OFFSET..][..2].copy_from_slice(&sum(&pseudo_header).to_be_bytes());
}

/// The ones' complement sum of 16-bit words (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let total: u32 = bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let folded = (total & 0xffff) + (total >> 16);
    (folded + (folded >> 16)) as u16
}
