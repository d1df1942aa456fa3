//! What is due after some time.

use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{Expiration, TimerSetTimeFlags};

use super::configuration::ADVERTISEMENT_TICK;
use super::{Source, UserNetwork};
use crate::icmp::EchoFlow;
use crate::tcp::Fate;

/// How long a flow of echoes lives without requests (RFC 5508, section 3.2).
const ECHO_IDLE_TIME: Duration = Duration::from_secs(60);
/// How often flows are looked after while one waits for the guest, and while none does.
const FAST_TICK: Duration = Duration::from_millis(250);
const SLOW_TICK: Duration = Duration::from_secs(5);

impl UserNetwork {
    /// Has the timer expire often enough for flows, of which one `is_waiting` for the guest.
    pub(super) fn keep_time(&mut self, is_waiting: bool) {
        let wanted = if is_waiting { FAST_TICK } else { SLOW_TICK };
        if self.tick.is_none_or(|tick| tick > wanted) {
            self.set_tick(Some(wanted));
        }
    }

    fn set_tick(&mut self, tick: Option<Duration>) {
        let done = match tick {
            Some(tick) => {
                let expiration = Expiration::Interval(TimeSpec::from_duration(tick));
                self.timer.set(expiration, TimerSetTimeFlags::empty())
            }
            None => self.timer.unset(),
        };
        // It does not fail for valid times; if it did, the next flow would set it again.
        self.tick = tick.filter(|_| done.is_ok());
    }

    /// Takes note that the timer has expired.
    pub(super) fn take_tick(&mut self) {
        // Reading the timer makes it wait for its next expiry.
        let mut expiries = [0; 8];
        let _ = nix::unistd::read(&self.timer, &mut expiries);
        self.look_after_flows(Instant::now());
    }

    /// Ends flows that have been idle too long at `now`, and sends again what was not acknowledged.
    pub(crate) fn look_after_flows(&mut self, now: Instant) {
        let mut is_waiting = false;
        for index in self.tcp.indices() {
            let Some(flow) = self.tcp.get(index) else {
                continue;
            };
            let fate = flow.tick(now);
            is_waiting |= flow.is_waiting();
            if fate == Fate::Over {
                self.close_tcp(index);
            } else if flow.has_work() {
                self.queue(Source::Tcp(index));
            }
        }
        for index in self.udp.indices() {
            let Some(flow) = self.udp.get(index) else {
                continue;
            };
            if flow.is_idle(now) {
                let server = flow.silent_server(now);
                self.udp.remove(index);
                if let Some(server) = server {
                    self.resolver.give_up(server);
                }
            }
        }
        for index in self.echoes.indices() {
            let is_idle = |flow: &mut EchoFlow| now.duration_since(flow.last_use) >= ECHO_IDLE_TIME;
            if self.echoes.get(index).is_some_and(is_idle) {
                self.echoes.remove(index);
            }
        }
        for index in 0..self.listeners.len() {
            self.queue(Source::Listener(index));
        }
        let is_empty = self.tcp.is_empty() && self.udp.is_empty() && self.echoes.is_empty();
        self.advertise_again(now);
        self.set_tick(match (is_empty, is_waiting) {
            (true, _) => self.advertised.map(|_| ADVERTISEMENT_TICK),
            (false, true) => Some(FAST_TICK),
            (false, false) => Some(SLOW_TICK),
        });
    }
}
