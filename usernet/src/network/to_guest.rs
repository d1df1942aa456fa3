//! Where the next frame for the guest comes from.

use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags, EpollTimeout};

use super::{Source, UserNetwork};
use crate::frame::{FrameBuffer, WrittenFrame};
use crate::icmp::undelivered;
use crate::output::Output;
use crate::tcp::Produced;
use crate::udp::Received;
use crate::wire::ETHERNET_SIZE;

/// After this many frames without a pause, the host is asked for events all the same.
const FRAMES_PER_POLL: u32 = 32;
/// Most events that the host reports at once.
const EVENTS_PER_POLL: usize = 64;

impl UserNetwork {
    /// Writes the next frame for the guest to `buffer`, if there is one.
    ///
    /// After the last one, the host may have more by now; the descriptor tells.
    pub fn receive(&mut self, buffer: &mut dyn FrameBuffer) -> Option<WrittenFrame> {
        self.flush();
        // Before a run of frames the host is asked, but only if there is nothing else, and not again behind the last
        // one: mostly there is one frame, an acknowledgment or an answer, and each question delays what comes next.
        let mut frame = self.next_frame(buffer);
        if frame.is_none() && !self.is_receiving {
            self.poll();
            frame = self.next_frame(buffer);
        }
        self.is_receiving = frame.is_some();
        frame
    }

    fn next_frame(&mut self, buffer: &mut dyn FrameBuffer) -> Option<WrittenFrame> {
        loop {
            let reply = self.parts.pop_front();
            if let Some(reply) = reply.or_else(|| self.replies.pop_front()) {
                let mut output = Output {
                    link: &self.link,
                    buffer,
                    scratch: &mut self.scratch,
                };
                return Some(output.put(&reply));
            }
            if self.frames_since_poll >= FRAMES_PER_POLL {
                self.poll();
                continue;
            }
            let source = self.ready.pop_front()?;
            if let Some(frame) = self.produce(source, buffer) {
                self.frames_since_poll += 1;
                return Some(frame);
            }
        }
    }

    /// Takes the host's events.
    fn poll(&mut self) {
        self.frames_since_poll = 0;
        let mut events = [EpollEvent::empty(); EVENTS_PER_POLL];
        // An interruption is of no consequence: the descriptor stays readable.
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        for event in &events[..count] {
            let source = Source::of_token(event.data());
            match source {
                Source::Timer => self.take_tick(),
                Source::Tcp(index) => {
                    let flags = event.events();
                    let ended = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
                    let is_writable = flags.intersects(EpollFlags::EPOLLOUT | ended);
                    let last = EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLPRI | ended;
                    let is_readable = flags.intersects(EpollFlags::EPOLLIN | last);
                    let reads_on = flags.intersects(last);
                    if let Some(flow) = self.tcp.get(index) {
                        flow.socket_event(is_writable, is_readable, reads_on, &mut self.budget);
                        if flow.has_work() {
                            self.queue(source);
                        }
                    }
                }
                Source::Udp(_) | Source::Echo(_) | Source::Listener(_) => self.queue(source),
            }
        }
    }

    pub(super) fn produce(
        &mut self,
        source: Source,
        buffer: &mut dyn FrameBuffer,
    ) -> Option<WrittenFrame> {
        let now = Instant::now();
        match source {
            Source::Tcp(index) => self.produce_tcp(index, buffer, now),
            Source::Udp(index) => self.produce_udp(index, buffer, now),
            Source::Echo(index) => {
                self.echoes.unqueue(index);
                let flow = self.echoes.get(index)?;
                let frame = flow.produce(&mut self.scratch.payload)?;
                self.queue(source);
                let mut output = Output {
                    link: &self.link,
                    buffer,
                    scratch: &mut self.scratch,
                };
                let packet_size = output.max_packet_size();
                if frame.len() <= ETHERNET_SIZE + packet_size {
                    return Some(output.put(&frame));
                }
                self.reply_in_parts(&frame, packet_size);
                None
            }
            Source::Listener(index) => self.produce_listener(index, buffer, now),
            Source::Timer => None,
        }
    }

    fn produce_tcp(
        &mut self,
        index: usize,
        buffer: &mut dyn FrameBuffer,
        now: Instant,
    ) -> Option<WrittenFrame> {
        self.tcp.unqueue(index);
        let mut output = Output {
            link: &self.link,
            buffer,
            scratch: &mut self.scratch,
        };
        let flow = self.tcp.get(index)?;
        let produced = flow.produce(&mut output, now);
        for answer in flow.take_answers() {
            self.policy.learn(&answer, now);
        }
        let is_waiting = flow.is_waiting();
        let has_work = flow.has_work();
        match produced {
            Produced::Frame(frame) => {
                if has_work {
                    self.queue(Source::Tcp(index));
                }
                self.keep_time(is_waiting);
                Some(frame)
            }
            Produced::Last(frame) => {
                self.close_tcp(index);
                Some(frame)
            }
            Produced::Over => {
                self.close_tcp(index);
                None
            }
            Produced::Nothing => {
                self.keep_time(is_waiting);
                None
            }
        }
    }

    pub(super) fn produce_udp(
        &mut self,
        index: usize,
        buffer: &mut dyn FrameBuffer,
        now: Instant,
    ) -> Option<WrittenFrame> {
        self.udp.unqueue(index);
        let mut output = Output {
            link: &self.link,
            buffer,
            scratch: &mut self.scratch,
        };
        let packet_size = output.max_packet_size();
        let flow = self.udp.get(index)?;
        match flow.produce(&mut output, now) {
            Received::Frame(frame) => {
                self.queue(Source::Udp(index));
                Some(frame)
            }
            Received::Answer(frame, size) => {
                self.policy.learn(&self.scratch.payload[..size], now);
                self.queue(Source::Udp(index));
                Some(frame)
            }
            Received::Large(frame, answer) => {
                if let Some(size) = answer {
                    self.policy.learn(&self.scratch.payload[..size], now);
                }
                self.queue(Source::Udp(index));
                self.reply_in_parts(&frame, packet_size);
                None
            }
            Received::Undelivered(datagram, reason) => {
                let frame = undelivered(flow.route(), &datagram, reason);
                self.reply(frame);
                self.queue(Source::Udp(index));
                None
            }
            Received::Nothing => None,
        }
    }
}
