//! The header before every packet (section 5.10.6).

/// Size of a header in bytes.
pub(super) const HEADER_SIZE: usize = 44;

/// The context identifier of the host (section 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`: a stream socket, which has no message boundaries.
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations of packets.
#[allow(missing_docs, reason = "the names are those of the standard")]
pub(super) mod operation {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN` (section 5.10.6.6).
pub(super) mod shutdown {
    /// The sender receives no more data.
    pub const RECEIVE: u32 = 1 << 0;
    /// The sender sends no more data.
    pub const SEND: u32 = 1 << 1;
    /// Both.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// The two ports of a connection, which identify it in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Size of the data that follows, in bytes.
    pub(super) len: u32,
    pub(super) socket_type: u16,
    pub(super) operation: u16,
    pub(super) flags: u32,
    /// Size of the sender's buffer for the connection, in bytes.
    pub(super) buf_alloc: u32,
    /// How many bytes have left that buffer; the count wraps.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub(super) fn from_bytes(bytes: &[u8; HEADER_SIZE]) -> Header {
        let mut fields = Fields(bytes);
        Header {
            src_cid: u64::from_le_bytes(fields.next()),
            dst_cid: u64::from_le_bytes(fields.next()),
            src_port: u32::from_le_bytes(fields.next()),
            dst_port: u32::from_le_bytes(fields.next()),
            len: u32::from_le_bytes(fields.next()),
            socket_type: u16::from_le_bytes(fields.next()),
            operation: u16::from_le_bytes(fields.next()),
            flags: u32::from_le_bytes(fields.next()),
            buf_alloc: u32::from_le_bytes(fields.next()),
            fwd_cnt: u32::from_le_bytes(fields.next()),
        }
    }

    /// Returns the header as it is in a buffer.
    pub(super) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.socket_type.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.operation.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// Makes the header of a packet to the guest without data, for `operation` on a connection.
    pub(super) fn to_guest(guest_cid: u64, ports: Ports, operation: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            socket_type: TYPE_STREAM,
            operation,
            ..Header::default()
        }
    }

    /// Returns the ports of the connection that a packet of the guest belongs to.
    pub(super) fn ports(&self) -> Ports {
        Ports {
            host: self.dst_port,
            guest: self.src_port,
        }
    }

    /// Makes the reset that tells the sender of this packet that there is no such connection; `None` if this
    /// packet is itself a reset.
    pub(super) fn refusal(&self) -> Option<Header> {
        (self.operation != operation::RST).then_some(Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            socket_type: self.socket_type,
            operation: operation::RST,
            ..Header::default()
        })
    }
}

/// Splits the bytes of a header into consecutive fields. There must be enough bytes.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn next<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fields_are_where_the_standard_has_them() {
        let bytes: [u8; HEADER_SIZE] = std::array::from_fn(|index| index as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!((header.socket_type, header.operation), (0x1d1c, 0x1f1e));
        assert_eq!(header.fwd_cnt, 0x2b2a_2928);
    }

    #[test]
    fn a_refusal_goes_back_and_is_not_refused() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 10,
            dst_port: 20,
            len: 5,
            socket_type: TYPE_STREAM,
            operation: operation::RW,
            ..Header::default()
        };
        let refusal = header.refusal().unwrap();
        assert_eq!((refusal.src_cid, refusal.dst_cid), (2, 3));
        assert_eq!((refusal.src_port, refusal.dst_port), (20, 10));
        assert_eq!((refusal.len, refusal.operation), (0, operation::RST));
        assert_eq!(refusal.refusal(), None);
    }

    proptest! {
        #[test]
        fn headers_are_written_as_they_are_read(bytes in any::<[[u8; 11]; 4]>()) {
            let bytes: [u8; HEADER_SIZE] = bytes.concat().try_into().unwrap();
            prop_assert_eq!(Header::from_bytes(&bytes).to_bytes(), bytes);
        }
    }
}
