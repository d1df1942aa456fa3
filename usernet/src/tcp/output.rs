//! Segments to the guest.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::time::Instant;

use super::{Answers, Produced, Stage, TcpFlow, WINDOW, is_before};
use crate::frame::WrittenFrame;
use crate::output::{Output, Payload};
use crate::sys;
use crate::wire::{ETHERNET_SIZE, PROTOCOL_TCP, TCP_SIZE, Tcp, tcp_flag};

/// How a socket's queue is read, and left as it is.
const PEEK: libc::c_int = libc::MSG_PEEK | libc::MSG_DONTWAIT;
/// How windows to the guest are scaled if the guest can.
const WINDOW_SCALE: u8 = 3;
/// What a guest may have on the way if the host cannot peek behind the front of a queue.
const MAX_IN_FLIGHT_WITHOUT_OFFSET: u32 = 64 << 10;

impl TcpFlow {
    /// Writes the next frame to the guest.
    pub(crate) fn produce(&mut self, output: &mut Output<'_>, now: Instant) -> Produced {
        if self.must_reset {
            let flags = match self.stage {
                Stage::Calling => tcp_flag::RST,
                _ => tcp_flag::RST | tcp_flag::ACK,
            };
            // Before the guest has been answered, it expects no sequence number.
            return Produced::Last(self.control(output, flags, self.next));
        }
        match self.stage {
            Stage::Connecting => return Produced::Nothing,
            Stage::Answering | Stage::Calling => return self.open(output, now),
            Stage::Open => {}
        }
        if let Some(frame) = self.data(output, now) {
            return Produced::Frame(frame);
        }
        if self.must_reset {
            return self.produce(output, now);
        }
        if self.must_finish() {
            let sequence = self.next;
            if self.unacknowledged == self.next {
                self.progress = now;
            }
            self.next = self.next.wrapping_add(1);
            self.sent_finish = true;
            let flags = tcp_flag::FIN | tcp_flag::ACK;
            return Produced::Frame(self.control(output, flags, sequence));
        }
        if std::mem::take(&mut self.must_probe) {
            // Something that the guest has acknowledged already makes it say what its window is.
            let sequence = self.unacknowledged.wrapping_sub(1);
            return Produced::Frame(self.control(output, tcp_flag::ACK, sequence));
        }
        if self.must_acknowledge {
            let frame = self.control(output, tcp_flag::ACK, self.next);
            return match self.is_done() {
                true => Produced::Last(frame),
                false => Produced::Frame(frame),
            };
        }
        match self.is_done() {
            true => Produced::Over,
            false => Produced::Nothing,
        }
    }

    /// Writes the segment that opens the connection, if it has to be sent.
    fn open(&mut self, output: &mut Output<'_>, now: Instant) -> Produced {
        if self.next != self.unacknowledged {
            return Produced::Nothing;
        }
        let sequence = self.next;
        self.next = self.next.wrapping_add(1);
        self.progress = now;
        let flags = match self.stage {
            Stage::Calling => tcp_flag::SYN,
            _ => tcp_flag::SYN | tcp_flag::ACK,
        };
        Produced::Frame(self.control(output, flags, sequence))
    }

    /// Writes a segment without payload.
    fn control(&mut self, output: &mut Output<'_>, flags: u8, sequence: u32) -> WrittenFrame {
        let mut header = self.header(flags, sequence);
        if flags & tcp_flag::SYN != 0 {
            let headers_size = self.route.headers_size() + TCP_SIZE;
            let mtu = usize::from(output.link.mtu);
            let mss = (mtu + ETHERNET_SIZE).saturating_sub(headers_size);
            header.mss = Some(mss as u16);
            header.window_scale = match self.stage {
                Stage::Calling => Some(WINDOW_SCALE),
                _ => self.guest_scale.map(|_| WINDOW_SCALE),
            };
        }
        self.finish(output, &header, Payload::InScratch(0))
    }

    fn header(&mut self, flags: u8, sequence: u32) -> Tcp {
        let is_first = flags & tcp_flag::SYN != 0;
        let scale = match self.guest_scale {
            Some(_) if !is_first => WINDOW_SCALE,
            _ => 0,
        };
        if self.pending.is_empty() {
            let size = WINDOW.min(u32::from(u16::MAX) << scale);
            let end = self.expected.wrapping_add(size);
            if is_before(self.window_end, end) {
                self.window_end = end;
            }
        }
        // A guest that sends more than it may has no window left.
        let window = match is_before(self.window_end, self.expected) {
            true => 0,
            false => self.window_end.wrapping_sub(self.expected) >> scale,
        };
        if flags & tcp_flag::ACK != 0 {
            self.must_acknowledge = false;
        }
        Tcp {
            source: self.source,
            destination: self.destination,
            sequence,
            acknowledgment: if flags & tcp_flag::ACK != 0 {
                self.expected
            } else {
                0
            },
            flags,
            window: window.min(u16::MAX.into()) as u16,
            ..Tcp::default()
        }
    }

    fn finish(&self, output: &mut Output<'_>, header: &Tcp, payload: Payload) -> WrittenFrame {
        let (Payload::InBuffer(size) | Payload::InScratch(size)) = payload;
        let headers = &mut output.scratch.headers;
        let segment_size = header.written_size() + size;
        self.route.write(headers, PROTOCOL_TCP, segment_size, None);
        header.write(headers);
        output.finish(&self.route, PROTOCOL_TCP, Tcp::CHECKSUM_OFFSET, payload)
    }

    /// Writes a segment with what the socket has received, if there is something and the guest's window is
    /// open.
    fn data(&mut self, output: &mut Output<'_>, now: Instant) -> Option<WrittenFrame> {
        if !self.is_readable || self.host_finished {
            return None;
        }
        let in_flight = self.next.wrapping_sub(self.unacknowledged);
        let headers_size = self.route.headers_size() + TCP_SIZE;
        let window = match self.can_peek_at_offset {
            true => self.guest_window,
            false => self.guest_window.min(MAX_IN_FLIGHT_WITHOUT_OFFSET),
        };
        let limit = (window.saturating_sub(in_flight) as usize)
            .min(self.guest_mss.into())
            .min(output.room(headers_size));
        if limit == 0 {
            return None;
        }
        let (read, payload) = if !self.can_peek_at_offset {
            let skipped = in_flight as usize;
            let bytes = &mut output.scratch.payload;
            bytes.resize(bytes.len().max(skipped + limit), 0);
            let read = sys::receive(&self.socket, &mut bytes[..skipped + limit], PEEK);
            // As long as nothing follows what is on the way, the end cannot be told from a pause.
            let read = match read {
                Ok(size) if size > 0 && size <= skipped => Err(ErrorKind::WouldBlock.into()),
                Ok(size) if size > 0 => Ok(size - skipped),
                other => other,
            };
            if let Ok(size) = read {
                bytes.copy_within(skipped..skipped + size, 0);
            }
            (read, Payload::InScratch as fn(usize) -> Payload)
        } else if output.link.leaves_checksums && self.answers.is_none() {
            let socket = self.socket.as_fd();
            let read = output
                .buffer
                .receive_at(headers_size, limit, &mut [], socket, PEEK);
            (read, Payload::InBuffer as fn(usize) -> Payload)
        } else {
            let bytes = &mut output.scratch.payload;
            bytes.resize(bytes.len().max(limit), 0);
            let read = sys::receive(&self.socket, &mut bytes[..limit], PEEK);
            (read, Payload::InScratch as fn(usize) -> Payload)
        };
        match read {
            Ok(0) => {
                self.host_finished = true;
                None
            }
            Ok(size) => {
                let sequence = self.next;
                if in_flight == 0 {
                    self.progress = now;
                }
                self.last_use = now;
                self.next = self.next.wrapping_add(size as u32);
                if let Some(answers) = &mut self.answers {
                    answers.take(sequence, &output.scratch.payload[..size]);
                }
                let mut flags = tcp_flag::ACK;
                if size < limit {
                    flags |= tcp_flag::PSH;
                    // The host tells of what comes after that.
                    self.is_readable = self.reads_on;
                }
                let header = self.header(flags, sequence);
                Some(self.finish(output, &header, payload(size)))
            }
            Err(error) => {
                match error.kind() {
                    ErrorKind::WouldBlock => self.is_readable = false,
                    _ => self.failed(&error),
                }
                None
            }
        }
    }
}

impl Answers {
    /// Takes bytes that are sent to the guest, perhaps again.
    fn take(&mut self, sequence: u32, bytes: &[u8]) {
        let known = self.next.wrapping_sub(sequence) as usize;
        if let Some(bytes) = bytes.get(known..) {
            self.next = self.next.wrapping_add(bytes.len() as u32);
            let messages = &mut self.messages;
            self.stream
                .take(bytes, |message| messages.push(message.to_vec()));
        }
    }
}
