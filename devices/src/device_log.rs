//! Bounded logs of devices: a guest can cause messages without end.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::lock::lock;
use crate::notice::{DeviceNotice, DeviceObserver};
use crate::rate_limiter::{RateLimit, RateLimiter};

/// One message a minute, and ten at once after a quiet period.
const LIMIT: RateLimit = RateLimit {
    size: 10,
    refill_time: Duration::from_secs(600),
    one_time_burst: 0,
};
/// How often it is useful to repeat the same message.
const REPEAT_TIME: Duration = Duration::from_secs(60);

/// Logs warnings about one thing: at most ten at once, and then one a minute. The others are counted, and the
/// next warning that is logged says how many there were.
#[derive(Debug)]
pub struct BoundedLog {
    name: String,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limiter: RateLimiter,
    /// Messages suppressed since the last one that was logged.
    suppressed: u64,
}

/// What happens to a message.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// It is logged; this many before it were not.
    Log(u64),
    /// It is the first one that is not logged.
    SuppressFirst,
    /// It is not logged.
    Suppress,
}

impl BoundedLog {
    /// Makes a log that says `name` in each of its lines.
    pub fn new(name: impl Into<String>) -> BoundedLog {
        BoundedLog {
            name: name.into(),
            state: Mutex::new(State {
                limiter: RateLimiter::new(LIMIT, Instant::now()),
                suppressed: 0,
            }),
        }
    }

    /// Logs a warning if the bound lets it through.
    pub fn warn(&self, message: fmt::Arguments<'_>) {
        if let Some(suppressed) = self.admit() {
            tracing::warn!("{}: {message}{suppressed}", self.name);
        }
    }

    /// Decides whether the bound lets a message through, and if so returns the text to append to it. For
    /// callers that do their own logging.
    pub fn admit(&self) -> Option<Suppressed> {
        let verdict = lock(&self.state).admit(Instant::now());
        match verdict {
            Verdict::Log(suppressed) => Some(Suppressed(suppressed)),
            Verdict::SuppressFirst => {
                let name = &self.name;
                tracing::warn!("{name}: too many messages; more are suppressed for now");
                None
            }
            Verdict::Suppress => None,
        }
    }
}

/// How many messages were suppressed before one that is logged. Displays as nothing if there were none.
#[derive(Clone, Copy, Debug)]
pub struct Suppressed(u64);

impl fmt::Display for Suppressed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} messages before were suppressed)"),
        }
    }
}

impl State {
    fn admit(&mut self, now: Instant) -> Verdict {
        if self.limiter.wait_time(now).is_zero() {
            self.limiter.take(1, now);
            return Verdict::Log(std::mem::take(&mut self.suppressed));
        }
        self.suppressed = self.suppressed.saturating_add(1);
        match self.suppressed {
            1 => Verdict::SuppressFirst,
            _ => Verdict::Suppress,
        }
    }
}

/// Logs the messages of one device, and passes its notices to an observer if there is one. Clones share its
/// bounds.
///
/// Faults of the guest and failures of the host have separate bounds, so that a guest cannot hide a failure
/// of the host.
#[derive(Clone, Debug)]
pub struct DeviceLog {
    accounts: Arc<Accounts>,
    observer: Option<Arc<dyn DeviceObserver>>,
}

#[derive(Debug)]
struct Accounts {
    guest: BoundedLog,
    host: BoundedLog,
}

impl DeviceLog {
    /// Makes the log of the device called `name`.
    pub fn new(name: impl Into<String>) -> DeviceLog {
        let name = name.into();
        DeviceLog {
            accounts: Arc::new(Accounts {
                guest: BoundedLog::new(name.clone()),
                host: BoundedLog::new(name),
            }),
            observer: None,
        }
    }

    /// Returns the same log, which also passes the device's notices to `observer`.
    #[must_use]
    pub fn observed_by(self, observer: Arc<dyn DeviceObserver>) -> DeviceLog {
        DeviceLog {
            observer: Some(observer),
            ..self
        }
    }

    /// Passes `notice` to the observer, if there is one.
    pub fn notify(&self, notice: DeviceNotice<'_>) {
        if let Some(observer) = &self.observer {
            observer.notice(notice);
        }
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.accounts.guest.name
    }

    /// Warns of something that the guest can cause whenever it likes.
    pub fn warn_of_guest(&self, message: fmt::Arguments<'_>) {
        self.accounts.guest.warn(message);
    }

    /// Warns of something that fails on the host, and tells the observer of each failure.
    pub fn warn_of_host(&self, message: fmt::Arguments<'_>) {
        self.notify(DeviceNotice::HostError { text: message });
        self.accounts.host.warn(message);
    }
}

impl From<String> for DeviceLog {
    fn from(name: String) -> DeviceLog {
        DeviceLog::new(name)
    }
}

/// The logs of all devices of a machine. Clones share them: a machine that is started again gets the logs of
/// the machine before it, so that its guest cannot escape the bounds by restarting.
#[derive(Clone, Debug, Default)]
pub struct MachineLog(Arc<Mutex<BTreeMap<String, DeviceLog>>>);

impl MachineLog {
    /// Returns the log of the device called `name`: the same one each time.
    pub fn device(&self, name: &str) -> DeviceLog {
        let mut devices = lock(&self.0);
        let device = devices.entry(name.to_string());
        device.or_insert_with(|| DeviceLog::new(name)).clone()
    }
}

/// Limits a repeated message to one a minute.
#[derive(Debug, Default)]
pub(crate) struct Repeat {
    last: Option<Instant>,
}

impl Repeat {
    /// Whether the message is due because it was not logged for a minute. If so, it counts as logged now.
    pub(crate) fn is_due(&mut self) -> bool {
        self.is_due_at(Instant::now())
    }

    fn is_due_at(&mut self, now: Instant) -> bool {
        let is_due = self.last.is_none_or(|last| now - last >= REPEAT_TIME);
        if is_due {
            self.last = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(state: &mut State, attempts: u32, now: Instant) -> u32 {
        let is_logged = |_: &u32| matches!(state.admit(now), Verdict::Log(_));
        (0..attempts).filter(is_logged).count() as u32
    }

    #[test]
    fn a_burst_is_logged_and_then_a_message_a_minute() {
        let start = Instant::now();
        let mut state = State {
            limiter: RateLimiter::new(LIMIT, start),
            suppressed: 0,
        };
        // One more message begins within the limit.
        assert_eq!(logged(&mut state, 11, start), 11);
        assert_eq!(state.admit(start), Verdict::SuppressFirst);
        assert_eq!(logged(&mut state, 1000, start), 0);
        assert_eq!(state.suppressed, 1001);

        let later = start + Duration::from_secs(60);
        assert_eq!(state.admit(later), Verdict::Log(1001));
        assert_eq!(state.admit(later), Verdict::SuppressFirst);

        // A day of messages without end.
        let hours = (1..=24).map(|hour| later + Duration::from_secs(3600) * hour);
        let lines: u32 = hours.map(|hour| logged(&mut state, 1000, hour)).sum();
        assert!(lines <= 24 * 11, "{lines}");
    }

    #[test]
    fn a_guest_cannot_use_up_what_failures_of_the_host_have() {
        let log = DeviceLog::new("device");
        for _ in 0..100 {
            log.warn_of_guest(format_args!("it did it again"));
        }
        let Accounts { guest, host } = &*log.accounts;
        assert!(lock(&guest.state).suppressed > 0);
        let verdict = lock(&host.state).admit(Instant::now());
        assert_eq!(verdict, Verdict::Log(0));
    }

    #[test]
    fn a_device_of_a_machine_that_starts_again_has_used_up_what_it_had() {
        let machine = MachineLog::default();
        for _ in 0..100 {
            let device = machine.clone().device("disk");
            device.warn_of_guest(format_args!("it did it again"));
        }
        let suppressed = |name| lock(&machine.device(name).accounts.guest.state).suppressed;
        assert_eq!(suppressed("disk"), 89);
        assert_eq!(suppressed("another disk"), 0);
    }

    #[test]
    fn what_stays_the_same_is_said_once_a_minute() {
        let start = Instant::now();
        let mut repeat = Repeat::default();
        let due = [0, 1, 59, 60, 61, 119, 120]
            .map(|seconds| repeat.is_due_at(start + Duration::from_secs(seconds)));
        assert_eq!(due, [true, false, false, true, false, false, true]);
    }
}
