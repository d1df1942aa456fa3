//! Flow control: how much each side may send before the other has taken it (section 5.10.6.3).

use super::packet::Header;

/// Size in bytes of the buffer for data that the guest has sent on a connection and the host's program has
/// not taken. It is announced to the guest.
pub(super) const BUFFER_SIZE: u32 = 256 << 10;
/// The guest is told that there is room again once there are this many more bytes of room than it knows of.
const UPDATE_SIZE: u32 = BUFFER_SIZE / 4;

/// The account of one connection. All counts wrap.
#[derive(Debug, Default)]
pub(super) struct Credit {
    /// Bytes sent to the guest.
    sent: u32,
    /// Size of the guest's buffer, as the guest reports it.
    guest_buffer: u32,
    /// Bytes that have left that buffer, as the guest reports it.
    guest_forwarded: u32,
    /// Bytes of the guest that have left the buffer on this side.
    forwarded: u32,
    /// How many of those bytes the guest knows of.
    announced: u32,
}

impl Credit {
    /// Takes note of the credit in a packet of the guest. If the guest reports it wrongly, only this
    /// connection stalls.
    pub(super) fn learn(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
    }

    /// Returns how many bytes the guest has room for now.
    pub(super) fn available(&self) -> usize {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way) as usize
    }

    /// Counts bytes that are sent to the guest, at most the available ones.
    pub(super) fn send(&mut self, count: usize) {
        self.sent = self.sent.wrapping_add(count as u32);
    }

    /// Counts bytes of the guest that take up no more room.
    pub(super) fn forward(&mut self, count: usize) {
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Whether the guest should be told of the room that there is.
    pub(super) fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= UPDATE_SIZE
    }

    /// Writes the room that there is into the header of a packet.
    pub(super) fn write_to(&self, header: &mut Header) {
        header.buf_alloc = BUFFER_SIZE;
        header.fwd_cnt = self.forwarded;
    }

    /// Takes note that such a packet has been sent.
    pub(super) fn has_announced(&mut self) {
        self.announced = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header {
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    #[test]
    fn the_guest_gets_no_more_than_it_takes() {
        let mut credit = Credit::default();
        assert_eq!(credit.available(), 0);
        credit.learn(&says(100, 0));
        credit.send(60);
        assert_eq!(credit.available(), 40);
        credit.learn(&says(100, 30));
        assert_eq!(credit.available(), 70);
        credit.learn(&says(20, 30));
        assert_eq!(credit.available(), 0, "a buffer that has become smaller");
        credit.learn(&says(100, 61));
        assert_eq!(credit.available(), 0, "more than there were");
    }

    #[test]
    fn counts_wrap() {
        let mut credit = Credit {
            sent: u32::MAX - 5,
            forwarded: u32::MAX - 5,
            announced: u32::MAX - 5,
            ..Credit::default()
        };
        credit.learn(&says(100, u32::MAX - 5));
        credit.send(10);
        assert_eq!(credit.available(), 90);
        credit.forward(UPDATE_SIZE as usize - 1);
        assert!(!credit.is_update_due());
        credit.forward(1);
        assert!(credit.is_update_due());
        let mut header = Header::default();
        credit.write_to(&mut header);
        assert_eq!(header, says(BUFFER_SIZE, UPDATE_SIZE - 6));
        assert!(credit.is_update_due());
        credit.has_announced();
        assert!(!credit.is_update_due());
    }
}
