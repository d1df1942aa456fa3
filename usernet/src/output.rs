//! How frames to the guest are written.

use crate::frame::{FrameBuffer, PartialChecksum, WrittenFrame};
use crate::wire::{ETHERNET_SIZE, Mac, Route, fold, put16, sum, udp_checksum};

/// The network's end of the link to the guest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    /// The Ethernet address of everything that the guest reaches.
    pub(crate) mac: Mac,
    /// Largest IP packet in bytes.
    pub(crate) mtu: u16,
    /// Whether checksums can be left to the guest's driver.
    pub(crate) leaves_checksums: bool,
}

/// Memory that is used again for each frame.
#[derive(Default)]
pub(crate) struct Scratch {
    pub(crate) headers: Vec<u8>,
    /// Room for the largest payload.
    pub(crate) payload: Vec<u8>,
}

/// The place for a frame, and what it takes to fill it.
pub(crate) struct Output<'a> {
    pub(crate) link: &'a Link,
    pub(crate) buffer: &'a mut dyn FrameBuffer,
    pub(crate) scratch: &'a mut Scratch,
}

/// Where the payload of a frame is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Payload {
    /// In the frame's buffer already, of this size. The checksum is left to the driver.
    InBuffer(usize),
    /// At the start of the scratch memory for payload, of this size.
    InScratch(usize),
}

impl Output<'_> {
    /// Writes a frame that is complete.
    pub(crate) fn put(&mut self, frame: &[u8]) -> WrittenFrame {
        self.buffer.write_at(0, frame);
        WrittenFrame {
            size: frame.len(),
            checksum: None,
        }
    }

    /// Completes a frame from the headers in the scratch memory, the last of them that of `protocol`, and its
    /// payload. `checksum_offset` is where that header has its checksum.
    pub(crate) fn finish(
        &mut self,
        route: &Route,
        protocol: u8,
        checksum_offset: usize,
        payload: Payload,
    ) -> WrittenFrame {
        let Scratch {
            headers,
            payload: bytes,
        } = &mut *self.scratch;
        let start = route.headers_size();
        let (Payload::InBuffer(size) | Payload::InScratch(size)) = payload;
        let pseudo = route.pseudo_sum(protocol, headers.len() - start + size);
        let mut partial = None;
        let checksum = match payload {
            Payload::InBuffer(_) => {
                partial = Some(PartialChecksum {
                    start: start as u16,
                    offset: checksum_offset as u16,
                });
                fold(pseudo)
            }
            Payload::InScratch(size) => {
                // Headers have an even number of bytes, so the two can be added up one by one.
                let total = pseudo + sum(&headers[start..]) + sum(&bytes[..size]);
                udp_checksum(total)
            }
        };
        put16(headers, start + checksum_offset, checksum);
        self.buffer.write_at(0, headers);
        if let Payload::InScratch(size) = payload {
            self.buffer.write_at(headers.len(), &bytes[..size]);
        }
        WrittenFrame {
            size: headers.len() + size,
            checksum: partial,
        }
    }

    /// Returns a frame as [`Output::finish`] completes it, whose payload of `size` bytes is in the scratch memory, and which
    /// is larger than the guest takes.
    pub(crate) fn whole(
        &mut self,
        route: &Route,
        protocol: u8,
        checksum_offset: usize,
        size: usize,
    ) -> Vec<u8> {
        let Scratch { headers, payload } = &*self.scratch;
        let start = route.headers_size();
        let mut frame = Vec::with_capacity(headers.len() + size);
        frame.extend(headers);
        frame.extend(&payload[..size]);
        let pseudo = route.pseudo_sum(protocol, frame.len() - start);
        let checksum = udp_checksum(pseudo + sum(&frame[start..]));
        put16(&mut frame, start + checksum_offset, checksum);
        frame
    }

    /// Returns the most bytes that an IP packet can have.
    pub(crate) fn max_packet_size(&self) -> usize {
        let packet = self.buffer.size().saturating_sub(ETHERNET_SIZE);
        packet.min(self.link.mtu.into())
    }

    /// Returns how many bytes of payload a packet can have behind headers of `headers_size` bytes.
    pub(crate) fn room(&self, headers_size: usize) -> usize {
        let frame = (ETHERNET_SIZE + usize::from(self.link.mtu)).min(self.buffer.size());
        frame.saturating_sub(headers_size)
    }
}
