//! Packets: the headers of Ethernet, ARP (RFC 826), IPv4 (RFC 791), UDP (RFC 768) and TCP (RFC 9293).
//!
//! All payload that is sent is zero, so it adds nothing to a checksum and is never touched.

use core::net::Ipv4Addr;

use runtime::virtio::net::Header;

/// Size of the Ethernet header.
pub const ETHERNET_SIZE: usize = 14;
/// Size of the headers of IPv4 and TCP without options.
pub const IP_AND_TCP_SIZE: usize = IP_SIZE + TCP_SIZE;

const IP_SIZE: usize = 20;
const TCP_SIZE: usize = 20;
/// Options of a segment that opens a connection: its maximum segment size, and its window scale.
const OPTIONS_SIZE: usize = 8;
/// Offset of the header of TCP or UDP in a frame.
const TRANSPORT: usize = ETHERNET_SIZE + IP_SIZE;
const TCP_CHECKSUM_OFFSET: usize = 16;
const UDP_CHECKSUM_OFFSET: usize = 6;

const ETHER_TYPE_IPV4: [u8; 2] = [8, 0];
const ETHER_TYPE_ARP: [u8; 2] = [8, 6];
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;
const TIME_TO_LIVE: u8 = 64;
/// The flag of IPv4 that forbids fragments.
const DO_NOT_FRAGMENT: u8 = 0x40;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM` and `VIRTIO_NET_HDR_GSO_TCPV4` (virtio 1.3, section 5.1.6).
const NEEDS_CHECKSUM: u8 = 1;
const SEGMENTATION_TCPV4: u8 = 1;

/// Flags of a TCP segment.
pub mod flag {
    /// The sender sends nothing more.
    pub const FIN: u8 = 1;
    /// The segment opens a connection.
    pub const SYN: u8 = 2;
    /// There is no such connection.
    pub const RST: u8 = 4;
    /// The receiver should not wait for more.
    pub const PSH: u8 = 8;
    /// The acknowledgment number counts.
    pub const ACK: u8 = 16;
}

/// The addresses of packets to the peer.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The card's Ethernet address.
    pub mac: [u8; 6],
    /// The gateway's.
    pub gateway_mac: [u8; 6],
    /// The guest's IPv4 address.
    pub guest: Ipv4Addr,
    /// The peer's.
    pub peer: Ipv4Addr,
}

/// What the network card does for the driver.
#[derive(Debug, Clone, Copy)]
pub struct Offloads {
    /// It completes checksums.
    pub checksum: bool,
    /// It cuts TCP segments.
    pub segmentation: bool,
}

/// The header of a TCP segment.
#[derive(Debug, Clone, Copy, Default)]
pub struct Segment {
    /// Port of the sender.
    pub source: u16,
    /// Port of the receiver.
    pub destination: u16,
    /// Number of the first byte of payload.
    pub sequence: u32,
    /// Number of the byte that the sender expects next.
    pub acknowledgment: u32,
    /// Of `flag`.
    pub flags: u8,
    /// How much the sender takes, as the header has it.
    pub window: u16,
    /// The largest payload that the sender takes, and by how many bits its windows are shifted. A segment that
    /// is written has either both or none.
    pub mss: Option<u16>,
    /// As above.
    pub window_scale: Option<u8>,
    /// Bytes of payload.
    pub payload_size: usize,
}

impl Segment {
    /// Writes a frame with the segment, and returns the header for the device and the size of the frame. The
    /// payload is what `frame` has there, zeros. The device cuts it into pieces of `piece` bytes if it is larger.
    pub fn write(
        &self,
        frame: &mut [u8],
        addresses: &Addresses,
        offloads: Offloads,
        piece: usize,
    ) -> (Header, usize) {
        let is_opening = self.flags & flag::SYN != 0;
        let header_size = TCP_SIZE + if is_opening { OPTIONS_SIZE } else { 0 };
        let size = header_size + self.payload_size;
        write_ip(frame, addresses, PROTOCOL_TCP, size);
        let segment = &mut frame[TRANSPORT..];
        segment[..2].copy_from_slice(&self.source.to_be_bytes());
        segment[2..4].copy_from_slice(&self.destination.to_be_bytes());
        segment[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        segment[8..12].copy_from_slice(&self.acknowledgment.to_be_bytes());
        segment[12] = (header_size as u8 / 4) << 4;
        segment[13] = self.flags;
        segment[14..16].copy_from_slice(&self.window.to_be_bytes());
        segment[16..TCP_SIZE].fill(0);
        if is_opening {
            let [high, low] = self.mss.unwrap_or_default().to_be_bytes();
            let scale = self.window_scale.unwrap_or_default();
            let options = [2, 4, high, low, 1, 3, 3, scale];
            segment[TCP_SIZE..header_size].copy_from_slice(&options);
        } else {
            // Another frame may have had options there.
            let payload = &mut segment[TCP_SIZE..];
            let dirty = payload.len().min(OPTIONS_SIZE);
            payload[..dirty].fill(0);
        }
        let pseudo_sum = pseudo_sum(addresses, PROTOCOL_TCP, size);
        let mut header = Header::default();
        let checksum = if offloads.checksum {
            header.flags = NEEDS_CHECKSUM;
            header.checksum_start = TRANSPORT as u16;
            header.checksum_offset = TCP_CHECKSUM_OFFSET as u16;
            fold(pseudo_sum)
        } else {
            !fold(pseudo_sum + sum(&segment[..header_size]))
        };
        segment[TCP_CHECKSUM_OFFSET..][..2].copy_from_slice(&checksum.to_be_bytes());
        if self.payload_size > piece {
            header.segmentation = SEGMENTATION_TCPV4;
            header.header_length = (TRANSPORT + header_size) as u16;
            header.segment_size = piece as u16;
        }
        (header, TRANSPORT + size)
    }

    /// Reads the segment in a frame from the peer. `None` if there is none.
    pub fn read(frame: &[u8], addresses: &Addresses) -> Option<Self> {
        let packet = frame.get(ETHERNET_SIZE..)?;
        let is_from_peer = frame[12..ETHERNET_SIZE] == ETHER_TYPE_IPV4
            && *packet.first()? == 0x45
            && *packet.get(9)? == PROTOCOL_TCP
            && packet.get(12..16)? == addresses.peer.octets()
            && packet.get(16..20)? == addresses.guest.octets();
        if !is_from_peer {
            return None;
        }
        let packet = packet.get(..usize::from(number16(packet, 2)?))?;
        let segment = packet.get(IP_SIZE..)?;
        let header_size = usize::from(segment.get(12)? >> 4) * 4;
        let mut options = segment.get(TCP_SIZE..header_size)?;
        let mut header = Self {
            source: number16(segment, 0)?,
            destination: number16(segment, 2)?,
            sequence: number32(segment, 4)?,
            acknowledgment: number32(segment, 8)?,
            flags: *segment.get(13)?,
            window: number16(segment, 14)?,
            mss: None,
            window_scale: None,
            payload_size: segment.len() - header_size,
        };
        while let [kind, rest @ ..] = options {
            options = match (kind, rest) {
                (0, _) => break,
                (1, _) => rest,
                (2, [4, high, low, rest @ ..]) => {
                    header.mss = Some(u16::from_be_bytes([*high, *low]));
                    rest
                }
                (3, [3, scale, rest @ ..]) => {
                    header.window_scale = Some((*scale).min(14));
                    rest
                }
                (_, [size, ..]) if *size >= 2 => {
                    options.get(usize::from(*size)..).unwrap_or_default()
                }
                _ => break,
            };
        }
        Some(header)
    }
}

/// Writes a UDP datagram that fills `frame`.
pub fn write_datagram(frame: &mut [u8], addresses: &Addresses, source: u16, destination: u16) {
    let size = frame.len() - TRANSPORT;
    write_ip(frame, addresses, PROTOCOL_UDP, size);
    let datagram = &mut frame[TRANSPORT..];
    datagram[..2].copy_from_slice(&source.to_be_bytes());
    datagram[2..4].copy_from_slice(&destination.to_be_bytes());
    datagram[4..6].copy_from_slice(&(size as u16).to_be_bytes());
    let checksum = !fold(pseudo_sum(addresses, PROTOCOL_UDP, size) + sum(&datagram[..6]));
    datagram[UDP_CHECKSUM_OFFSET..][..2].copy_from_slice(&checksum.to_be_bytes());
}

/// Writes a frame that asks for the Ethernet address of `target`, and returns its size.
pub fn write_arp_request(
    frame: &mut [u8],
    mac: [u8; 6],
    guest: Ipv4Addr,
    target: Ipv4Addr,
) -> usize {
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac);
    frame[12..14].copy_from_slice(&ETHER_TYPE_ARP);
    frame[14..22].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    frame[22..28].copy_from_slice(&mac);
    frame[28..32].copy_from_slice(&guest.octets());
    frame[32..38].fill(0);
    frame[38..42].copy_from_slice(&target.octets());
    42
}

/// Returns the Ethernet address in an answer to that about `target`. `None` if the frame is not one.
pub fn read_arp_answer(frame: &[u8], target: Ipv4Addr) -> Option<[u8; 6]> {
    let is_answer = frame.get(12..14)? == ETHER_TYPE_ARP
        && frame.get(20..22)? == [0, 2]
        && frame.get(28..32)? == target.octets();
    if is_answer {
        frame.get(22..28)?.try_into().ok()
    } else {
        None
    }
}

fn write_ip(frame: &mut [u8], addresses: &Addresses, protocol: u8, payload_size: usize) {
    frame[..6].copy_from_slice(&addresses.gateway_mac);
    frame[6..12].copy_from_slice(&addresses.mac);
    frame[12..ETHERNET_SIZE].copy_from_slice(&ETHER_TYPE_IPV4);
    let packet = &mut frame[ETHERNET_SIZE..TRANSPORT];
    let size = (IP_SIZE + payload_size) as u16;
    packet[..2].copy_from_slice(&[0x45, 0]);
    packet[2..4].copy_from_slice(&size.to_be_bytes());
    packet[4..12].copy_from_slice(&[0, 0, DO_NOT_FRAGMENT, 0, TIME_TO_LIVE, protocol, 0, 0]);
    packet[12..16].copy_from_slice(&addresses.guest.octets());
    packet[16..20].copy_from_slice(&addresses.peer.octets());
    let checksum = !fold(sum(packet));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
}

/// Returns the sum of the pseudo-header before a datagram or segment of `size` bytes.
fn pseudo_sum(addresses: &Addresses, protocol: u8, size: usize) -> u32 {
    sum(&addresses.guest.octets())
        + sum(&addresses.peer.octets())
        + u32::from(protocol)
        + size as u32
}

/// Returns the sum of 16-bit words (RFC 1071).
fn sum(bytes: &[u8]) -> u32 {
    bytes
        .chunks_exact(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum()
}

fn fold(total: u32) -> u16 {
    let folded = (total & 0xffff) + (total >> 16);
    (folded + (folded >> 16)) as u16
}

fn number16(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn number32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(offset..)?.first_chunk()?))
}
