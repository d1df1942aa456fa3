//! A TCP connection (RFC 9293) that sends zeros and counts what it receives. It knows no congestion: on the link
//! to the monitor there is none. What is lost all the same is sent again, and all behind it.

use alloc::format;
use alloc::string::String;

use super::link::Link;
use super::packet::{Addresses, IP_AND_TCP_SIZE, Segment, flag};

/// The window that the peer gets, by 2 to the power of [`WINDOW_SCALE`]: 2 MiB.
const WINDOW: u16 = u16::MAX;
const WINDOW_SCALE: u8 = 5;
/// The payload of segments to a peer that does not say what it takes (RFC 9293, section 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// After so many acknowledgments of the same byte, what follows it is lost (RFC 5681, section 3.2).
const DUPLICATES_OF_LOSS: u8 = 3;
/// Most attempts to send something.
const MAX_ATTEMPTS: u32 = 20;

/// One connection. Bytes that the guest sends are counted from 0, with the end of the stream as the last one.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    port: u16,
    peer_port: u16,
    /// Sequence number of byte 0.
    first: u32,
    is_open: bool,
    sent_opening: bool,
    /// Whether the peer has been told that its answer to the opening has come.
    has_greeted: bool,
    /// Bytes acknowledged, sent, and sent before those after a loss were sent again.
    acknowledged: u64,
    sent: u64,
    ever_sent: u64,
    /// Bytes that there are to send, and whether the stream ends behind them.
    to_send: u64,
    finishes: bool,
    window: u64,
    max_window: u64,
    /// The byte behind the last that the peer was asked not to hold back.
    pushed: u64,
    scale: u8,
    mss: usize,
    duplicates: u8,
    expected: u32,
    received: u64,
    peer_has_finished: bool,
    must_acknowledge: bool,
    /// When something was last acknowledged, or sent first.
    progress: u64,
    attempts: u32,
}

impl Connection {
    /// Makes a connection from `port` to `peer_port`, which the next [`send`](Self::send) opens.
    pub fn new(port: u16, peer_port: u16, now: u64) -> Self {
        Self {
            port,
            peer_port,
            // It grows by more than what is sent, as the peer expects of connections between the same ports.
            first: (now >> 6) as u32,
            is_open: false,
            sent_opening: false,
            has_greeted: false,
            acknowledged: 0,
            sent: 0,
            ever_sent: 0,
            to_send: 0,
            finishes: false,
            window: 0,
            max_window: 0,
            pushed: 0,
            scale: 0,
            mss: DEFAULT_MSS.into(),
            duplicates: 0,
            expected: 0,
            received: 0,
            peer_has_finished: false,
            must_acknowledge: false,
            progress: now,
            attempts: 0,
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the peer has opened it too.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Returns how many bytes the peer has acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.min(self.to_send)
    }

    /// Returns how many bytes have come.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether the peer sends nothing more.
    pub fn peer_has_finished(&self) -> bool {
        self.peer_has_finished
    }

    /// Whether both have said all, and the peer knows it.
    pub fn is_over(&self) -> bool {
        self.peer_has_finished && self.is_finished()
    }

    /// Whether the peer knows that this side sends nothing more.
    pub fn is_finished(&self) -> bool {
        self.finishes && self.acknowledged > self.to_send
    }

    /// Has this many bytes sent, counted from the first.
    pub fn send_up_to(&mut self, count: u64) {
        self.to_send = count;
    }

    /// Ends the stream behind what was sent so far.
    pub fn finish(&mut self) {
        if !self.finishes {
            self.to_send = self.ever_sent;
            self.finishes = true;
        }
    }

    /// Takes a segment of the peer to the connection's port.
    ///
    /// # Errors
    ///
    /// If the peer resets the connection.
    pub fn take(&mut self, segment: &Segment, now: u64) -> Result<(), String> {
        if segment.flags & flag::RST != 0 {
            return Err(format!(
                "the connection to port {} was reset",
                self.peer_port
            ));
        }
        let opens = segment.flags & flag::SYN != 0;
        if opens {
            let answers = segment.acknowledgment == self.first;
            if !self.is_open && answers && segment.flags & flag::ACK != 0 {
                self.is_open = true;
                self.scale = segment.window_scale.unwrap_or(0);
                self.mss = segment.mss.unwrap_or(DEFAULT_MSS).max(1).into();
                self.window = segment.window.into();
                self.max_window = self.window;
                self.expected = segment.sequence.wrapping_add(1);
                self.progress = now;
                self.attempts = 0;
            }
            self.must_acknowledge = true;
            return Ok(());
        }
        if !self.is_open || segment.flags & flag::ACK == 0 {
            return Ok(());
        }
        self.take_acknowledgment(segment, now);
        let has_finish = segment.flags & flag::FIN != 0;
        if segment.payload_size == 0 && !has_finish {
            // A probe whether the connection lives.
            self.must_acknowledge |= segment.sequence != self.expected;
            return Ok(());
        }
        self.must_acknowledge = true;
        if segment.sequence == self.expected && !self.peer_has_finished {
            self.received += segment.payload_size as u64;
            self.expected = self.expected.wrapping_add(segment.payload_size as u32);
            if has_finish {
                self.expected = self.expected.wrapping_add(1);
                self.peer_has_finished = true;
            }
        }
        Ok(())
    }

    fn take_acknowledgment(&mut self, segment: &Segment, now: u64) {
        let before = self.number(self.acknowledged);
        let count = u64::from(segment.acknowledgment.wrapping_sub(before));
        if count > self.ever_sent - self.acknowledged {
            return;
        }
        let window = u64::from(segment.window) << self.scale;
        let is_duplicate = count == 0
            && segment.payload_size == 0
            && window == self.window
            && self.sent > self.acknowledged;
        self.window = window;
        self.max_window = self.max_window.max(window);
        if count > 0 {
            self.acknowledged += count;
            self.sent = self.sent.max(self.acknowledged);
            self.progress = now;
            self.attempts = 0;
            self.duplicates = 0;
        } else if is_duplicate {
            self.duplicates = self.duplicates.saturating_add(1);
            if self.duplicates == DUPLICATES_OF_LOSS {
                self.sent = self.acknowledged;
            }
        }
    }

    /// Whether something that was sent is still to be answered.
    pub fn waits(&self) -> bool {
        !self.is_open || self.sent > self.acknowledged
    }

    /// Sends again what was not acknowledged for `time` ticks before `now`.
    ///
    /// # Errors
    ///
    /// If that has happened too often.
    pub fn send_again_after(&mut self, time: u64, now: u64) -> Result<(), String> {
        if self.waits() && now.saturating_sub(self.progress) > time {
            self.attempts += 1;
            if self.attempts > MAX_ATTEMPTS {
                return Err(format!("port {} does not answer", self.peer_port));
            }
            self.progress = now;
            self.sent_opening = false;
            self.sent = self.acknowledged;
        }
        Ok(())
    }

    /// Sends what there is to send and the peer's window has room for, as far as `link` has buffers.
    ///
    /// # Errors
    ///
    /// Those of `link`.
    pub fn send(
        &mut self,
        link: &mut Link<'_>,
        addresses: &Addresses,
        now: u64,
    ) -> Result<(), String> {
        if !self.is_open {
            if !self.sent_opening {
                let opening = Segment {
                    mss: Some(link.mtu - IP_AND_TCP_SIZE as u16),
                    window_scale: Some(WINDOW_SCALE),
                    sequence: self.first.wrapping_sub(1),
                    ..self.segment(flag::SYN)
                };
                self.sent_opening = self.write(link, addresses, &opening)?;
            }
            return Ok(());
        }
        if !self.has_greeted {
            // By itself, as Linux does: passt passes over data that comes with it.
            let segment = self.segment(flag::ACK);
            if !self.write(link, addresses, &segment)? {
                return Ok(());
            }
            self.has_greeted = true;
        }
        let max_payload = if link.offloads.segmentation {
            // Whole pieces, so that the device makes no small ones.
            self.mss * (link.max_payload() / self.mss).max(1)
        } else {
            link.max_payload().min(self.mss)
        } as u64;
        loop {
            let left = self.to_send.saturating_sub(self.sent);
            let window = (self.acknowledged + self.window).saturating_sub(self.sent);
            let size = left.min(window).min(max_payload);
            // A small segment waits for a larger window, unless it is all that there is (RFC 9293, section 3.8.6.2.1).
            let is_small = size < max_payload && size < left && self.sent > self.acknowledged;
            if size == 0 || is_small {
                break;
            }
            // As Linux does: also twice in a window, so that no peer delays its acknowledgment of a full one.
            let half_window = self.max_window / 2;
            let flags = if size == left || self.sent + size > self.pushed + half_window {
                self.pushed = self.sent + size;
                flag::ACK | flag::PSH
            } else {
                flag::ACK
            };
            let segment = Segment {
                payload_size: size as usize,
                ..self.segment(flags)
            };
            if !self.write(link, addresses, &segment)? {
                return Ok(());
            }
            self.advance(size, now);
        }
        if self.finishes && self.sent == self.to_send {
            let segment = self.segment(flag::ACK | flag::FIN);
            if self.write(link, addresses, &segment)? {
                self.advance(1, now);
            }
        }
        if self.must_acknowledge {
            let segment = self.segment(flag::ACK);
            self.write(link, addresses, &segment)?;
        }
        Ok(())
    }

    fn advance(&mut self, count: u64, now: u64) {
        if self.sent == self.acknowledged {
            self.progress = now;
        }
        self.sent += count;
        self.ever_sent = self.ever_sent.max(self.sent);
    }

    fn number(&self, byte: u64) -> u32 {
        self.first.wrapping_add(byte as u32)
    }

    fn segment(&self, flags: u8) -> Segment {
        let acknowledges = flags & flag::ACK != 0;
        Segment {
            source: self.port,
            destination: self.peer_port,
            sequence: self.number(self.sent),
            acknowledgment: if acknowledges { self.expected } else { 0 },
            flags,
            window: WINDOW,
            ..Segment::default()
        }
    }

    fn write(
        &mut self,
        link: &mut Link<'_>,
        addresses: &Addresses,
        segment: &Segment,
    ) -> Result<bool, String> {
        let (offloads, piece) = (link.offloads, self.mss);
        let is_sent = link.send(|frame| segment.write(frame, addresses, offloads, piece))?;
        if is_sent && segment.flags & flag::ACK != 0 {
            self.must_acknowledge = false;
        }
        Ok(is_sent)
    }
}
