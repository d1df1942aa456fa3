//! What happens to a machine, as a stream that its owner can follow.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use bantam_devices::notice::{DeviceNotice, DeviceObserver};
use bantam_devices::virtio::owner::JobStatus;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::config::DeviceName;
use crate::lock::{lock, wait};
use crate::state::State;

/// Maximum number of events that wait for a subscriber. A guest can cause events without end.
const CAPACITY: usize = 256;

/// Something that has happened to a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// The state of the machine has changed.
    State {
        /// The new state.
        state: State,
    },
    /// A device has become part of the machine.
    Attached {
        /// The device.
        device: DeviceName,
    },
    /// A device is no longer part of the machine.
    Detached {
        /// The device.
        device: DeviceName,
    },
    /// A device has stopped, and the guest's driver must reset it.
    NeedsReset {
        /// The device.
        device: DeviceName,
        /// What the driver did, or what failed on the host.
        reason: String,
    },
    /// Something that a device needs failed on the host, such as a read of its image.
    HostError {
        /// The device.
        device: DeviceName,
        /// What failed, and why.
        text: String,
    },
    /// The guest has returned another amount of memory to the host by a device. Successive amounts that have not
    /// been received yet become one event.
    MemoryReturned {
        /// The device.
        device: DeviceName,
        /// How many MiB it has returned in all, rounded down.
        mib: u32,
    },
    /// Guest memory cannot be read any more from where the snapshot has it, which ends the machine.
    MemoryLost {
        /// Why not.
        reason: String,
    },
    /// The job of a disk is ready, or has ended.
    Job {
        /// The disk.
        device: DeviceName,
        /// How far the job is.
        status: JobStatus,
    },
    /// Events were lost here, because the subscriber did not receive them in time.
    Missed {
        /// How many were lost.
        count: u64,
    },
}

/// Receives the events of a machine from the subscription on, in order.
///
/// A subscriber that does not receive them in time loses the latest ones, and is told so by
/// [`Event::Missed`]. The descriptor ([`AsFd`]) is readable while there are events.
pub struct Events(Arc<Queue>);

/// The events that one subscriber has not received yet.
struct Queue {
    waiting: Mutex<Waiting>,
    added: Condvar,
    ready: EventFd,
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<Event>,
    missed: u64,
}

impl Events {
    /// Returns the next event, if there is one.
    pub fn try_next(&self) -> Option<Event> {
        self.0.take(&mut lock(&self.0.waiting))
    }

    /// Waits up to `time` for the next event.
    pub fn next_within(&self, time: Duration) -> Option<Event> {
        let deadline = Instant::now().checked_add(time);
        let mut waiting = lock(&self.0.waiting);
        loop {
            if let Some(event) = self.0.take(&mut waiting) {
                return Some(event);
            }
            let Some(deadline) = deadline else {
                waiting = wait(&self.0.added, waiting);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            waiting = match self.0.added.wait_timeout(waiting, left) {
                Ok((waiting, _)) => waiting,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the queue owns the descriptor, and `self` keeps the queue for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.ready.as_raw_fd()) }
    }
}

impl Queue {
    fn push(&self, event: Event) {
        let mut waiting = lock(&self.waiting);
        if let (
            Event::MemoryReturned { device, .. },
            Some(Event::MemoryReturned { device: last, .. }),
        ) = (&event, waiting.events.back())
            && device == last
        {
            waiting.events.pop_back();
        }
        // The end of the machine comes only once, and no guest may keep the owner from hearing of it.
        let is_end = matches!(
            event,
            Event::State {
                state: State::Stopped
            }
        );
        if waiting.events.len() >= CAPACITY && !is_end {
            waiting.missed = waiting.missed.saturating_add(1);
            return;
        }
        if waiting.missed > 0 {
            let count = std::mem::take(&mut waiting.missed);
            waiting.events.push_back(Event::Missed { count });
        }
        waiting.events.push_back(event);
        self.added.notify_one();
        // The counter has room: each take that finds no event resets it.
        let _ = self.ready.write(1);
    }

    fn take(&self, waiting: &mut Waiting) -> Option<Event> {
        let next = waiting.events.pop_front();
        if next.is_some() {
            return next;
        }
        let missed = std::mem::take(&mut waiting.missed);
        // This fails if the event was not signalled; then there is nothing to reset.
        let _ = self.ready.read();
        (missed > 0).then_some(Event::Missed { count: missed })
    }
}

/// Sends events of the parts of a machine. Clones send to the same subscribers.
#[derive(Clone, Default)]
pub(crate) struct EventSender(Arc<Mutex<Subscribers>>);

#[derive(Default)]
struct Subscribers {
    queues: Vec<Weak<Queue>>,
    /// The state that was last sent, if any.
    state: Option<State>,
}

impl EventSender {
    /// Adds a subscriber.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub(crate) fn subscribe(&self) -> io::Result<Events> {
        let queue = Arc::new(Queue {
            waiting: Mutex::default(),
            added: Condvar::new(),
            ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let queues = &mut lock(&self.0).queues;
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(&queue));
        Ok(Events(queue))
    }

    /// Sends the event that `event` returns. `event` is not called if there is no subscriber.
    pub(crate) fn send(&self, event: impl FnOnce() -> Event) {
        lock(&self.0).send(event);
    }

    /// Sends the state of the machine if it differs from the last one sent. A stopped machine stays stopped,
    /// which a thread that is about to change the state may not know yet.
    pub(crate) fn send_state(&self, state: State) {
        let mut subscribers = lock(&self.0);
        if subscribers.state != Some(state) && subscribers.state != Some(State::Stopped) {
            subscribers.state = Some(state);
            subscribers.send(|| Event::State { state });
        }
    }

    /// Returns an observer that turns the notices of `device` into events.
    pub(crate) fn observer(&self, device: &DeviceName) -> Arc<dyn DeviceObserver> {
        Arc::new(Observer {
            events: self.clone(),
            device: device.clone(),
        })
    }
}

impl Subscribers {
    fn send(&self, event: impl FnOnce() -> Event) {
        let mut queues = self.queues.iter().filter_map(Weak::upgrade).peekable();
        if queues.peek().is_none() {
            return;
        }
        let event = event();
        for queue in queues {
            queue.push(event.clone());
        }
    }
}

struct Observer {
    events: EventSender,
    device: DeviceName,
}

impl DeviceObserver for Observer {
    fn notice(&self, notice: DeviceNotice<'_>) {
        self.events.send(|| {
            let device = self.device.clone();
            match notice {
                DeviceNotice::NeedsReset { reason } => Event::NeedsReset {
                    device,
                    reason: reason.to_string(),
                },
                DeviceNotice::HostError { text } => Event::HostError {
                    device,
                    text: text.to_string(),
                },
                DeviceNotice::MemoryReturned { mib } => Event::MemoryReturned { device, mib },
                DeviceNotice::Job { status } => Event::Job {
                    device,
                    status: status.clone(),
                },
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    fn name(text: &str) -> DeviceName {
        text.parse().unwrap()
    }

    fn host_error(number: usize) -> Event {
        Event::HostError {
            device: name("disk0"),
            text: number.to_string(),
        }
    }

    fn is_readable(events: &Events) -> bool {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() > 0
    }

    #[test]
    fn every_subscriber_has_the_events_since_its_subscription() {
        let sender = EventSender::default();
        sender.send(|| unreachable!("nobody has subscribed"));
        let first = sender.subscribe().unwrap();
        sender.send(|| host_error(1));
        let second = sender.subscribe().unwrap();
        sender.send(|| host_error(2));
        assert!(is_readable(&first) && is_readable(&second));
        assert_eq!(first.try_next(), Some(host_error(1)));
        assert_eq!(first.try_next(), Some(host_error(2)));
        assert_eq!(first.try_next(), None);
        assert_eq!(second.try_next(), Some(host_error(2)));
        assert!(is_readable(&second), "nobody has seen that it is empty");
        assert_eq!(second.try_next(), None);
        assert!(!is_readable(&first) && !is_readable(&second));
        drop(first);
        drop(second);
        sender.send(|| unreachable!("nobody is left"));
    }

    #[test]
    fn a_subscriber_that_does_not_receive_costs_a_bounded_amount_of_memory_and_is_told() {
        let sender = EventSender::default();
        let events = sender.subscribe().unwrap();
        for number in 0..CAPACITY + 10 {
            sender.send(|| host_error(number));
        }
        for number in 0..CAPACITY {
            assert_eq!(events.try_next(), Some(host_error(number)));
        }
        assert_eq!(events.try_next(), Some(Event::Missed { count: 10 }));
        sender.send(|| host_error(0));
        assert_eq!(events.try_next(), Some(host_error(0)));
        assert_eq!(events.try_next(), None);
    }

    #[test]
    fn events_are_missed_where_they_would_have_been_and_the_end_is_not() {
        let sender = EventSender::default();
        let events = sender.subscribe().unwrap();
        for number in 0..CAPACITY + 1 {
            sender.send(|| host_error(number));
        }
        assert_eq!(events.try_next(), Some(host_error(0)));
        sender.send(|| host_error(1000));
        sender.send(|| host_error(1001));
        sender.send_state(State::Stopped);
        let last: Vec<Event> = std::iter::from_fn(|| events.try_next())
            .skip(CAPACITY - 1)
            .collect();
        let stopped = Event::State {
            state: State::Stopped,
        };
        assert_eq!(
            last,
            [
                Event::Missed { count: 1 },
                host_error(1000),
                Event::Missed { count: 1 },
                stopped,
            ]
        );
    }

    #[test]
    fn amounts_of_memory_that_nobody_has_received_are_one_event() {
        let sender = EventSender::default();
        let events = sender.subscribe().unwrap();
        let observer = sender.observer(&name("device"));
        for mib in 0..10_000 {
            observer.notice(DeviceNotice::MemoryReturned { mib });
        }
        let device = name("device");
        let last = Event::MemoryReturned { device, mib: 9_999 };
        assert_eq!(events.try_next(), Some(last));
        assert_eq!(events.try_next(), None);
    }

    #[test]
    fn a_subscriber_that_waits_is_woken() {
        let sender = EventSender::default();
        let events = sender.subscribe().unwrap();
        assert_eq!(events.next_within(Duration::ZERO), None);
        let waiting = thread::spawn(move || events.next_within(Duration::from_secs(30)));
        sender.send(|| host_error(1));
        assert_eq!(waiting.join().unwrap(), Some(host_error(1)));
    }

    #[test]
    fn events_travel_as_json() {
        for (event, text) in [
            (
                Event::State {
                    state: State::NotConfigured,
                },
                r#"{"event":"state","state":"not-configured"}"#,
            ),
            (
                Event::NeedsReset {
                    device: name("net0"),
                    reason: "a loop".to_owned(),
                },
                r#"{"event":"needs-reset","device":"net0","reason":"a loop"}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&event).unwrap(), text);
            assert_eq!(serde_json::from_str::<Event>(text).unwrap(), event);
        }
    }
}
