use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{EventManager, SubscriberOps};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use proptest::prelude::*;

use super::*;
use crate::InterruptLine;
use crate::bus::BusDevice;
use crate::device_log::DeviceLog;
use crate::event_loop::Subscriber;
use crate::serial::{INTERRUPT_ENABLE, LINE_STATUS, SerialEndpoint, lock};
use crate::suspend_test::{SuspendCase, suspend_tests};

const DATA: u64 = 0;
const IDENTIFICATION: u64 = 2;
const SCRATCH: u64 = 7;
const ALL_INTERRUPTS: u8 = 3;

#[derive(Clone, Default)]
struct Counter(Arc<AtomicUsize>);

impl Counter {
    fn take(&self) -> usize {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl InterruptLine for Counter {
    fn trigger(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

/// A guest whose port is connected to two pipes, and the event loop that serves it.
struct Guest {
    port: Arc<Mutex<Serial>>,
    manager: EventManager<Subscriber>,
    interrupts: Counter,
    to_guest: File,
    from_guest: File,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap()
}

fn port(interrupts: &Counter) -> Serial {
    let log = DeviceLog::new("serial port");
    Serial::new(Box::new(interrupts.clone()), None, log).unwrap()
}

impl Guest {
    fn new() -> Guest {
        let interrupts = Counter::default();
        let port = Arc::new(Mutex::new(port(&interrupts)));
        let ((input, to_guest), (from_guest, output)) = (pipe(), pipe());
        let endpoint = SerialEndpoint::Descriptors {
            input: Some(input),
            output: Some(output),
        };
        let mut manager = EventManager::new().unwrap();
        let worker = endpoint.serve(port.clone()).unwrap();
        manager.add_subscriber(Subscriber::Resident(worker));
        Guest {
            port,
            manager,
            interrupts,
            to_guest: to_guest.into(),
            from_guest: from_guest.into(),
        }
    }

    fn rest(&mut self) {
        for _ in 0..1000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    fn read(&mut self, offset: u64) -> u8 {
        let mut value = [0];
        lock(&self.port).read(offset, &mut value);
        value[0]
    }

    fn write(&mut self, offset: u64, value: u8) {
        lock(&self.port).write(offset, &[value]);
    }

    fn send(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write(DATA, byte);
        }
    }

    /// Returns all input that is there, which the guest takes byte by byte.
    fn received(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.rest();
        while self.read(LINE_STATUS.into()) & DATA_READY != 0 {
            bytes.push(self.read(DATA));
            self.rest();
        }
        bytes
    }

    /// Returns all output that has arrived.
    fn sent(&mut self) -> Vec<u8> {
        self.rest();
        let mut bytes = Vec::new();
        match self.from_guest.read_to_end(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            result => drop(result.unwrap()),
        }
        bytes
    }

    fn pause(&self) {
        lock(&self.port).pause().unwrap();
    }

    fn resume(&self) {
        lock(&self.port).resume().unwrap();
    }

    fn save(&self) -> Section {
        lock(&self.port).save().unwrap()
    }

    /// Ends this guest, and makes another that continues it. Also returns the output that still reached the
    /// first host.
    fn moved(self) -> (Guest, Vec<u8>) {
        let section = self.save();
        let Guest {
            port,
            manager,
            mut from_guest,
            ..
        } = self;
        drop((manager, port));
        let mut last = Vec::new();
        from_guest.read_to_end(&mut last).unwrap();
        let guest = Guest::new();
        lock(&guest.port).restore(&section).unwrap();
        guest.resume();
        (guest, last)
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

impl SuspendCase for Guest {
    fn new() -> Guest {
        Guest::new()
    }

    fn set_up(&mut self) {
        // Output outlives a reset.
        self.sent();
        self.write(INTERRUPT_ENABLE.into(), ALL_INTERRUPTS);
        self.write(SCRATCH, 0x5a);
    }

    fn work(&mut self) {
        self.send(b"to the host");
        assert_eq!(self.sent(), b"to the host");
        self.to_guest.write_all(b"to the guest").unwrap();
        assert_eq!(self.received(), b"to the guest");
    }

    fn begin(&mut self) {
        self.to_guest.write_all(&pattern(100)).unwrap();
        self.rest();
        self.send(b"begun");
    }

    fn end(&mut self) {
        assert_eq!(self.sent(), b"begun");
        assert_eq!(self.received(), pattern(100));
    }

    fn device<R>(&mut self, act: impl FnOnce(&mut dyn Device) -> R) -> R {
        act(&mut *lock(&self.port))
    }

    fn replace(&mut self) {
        *self = Guest::new();
    }

    fn visible_state(&mut self) -> Vec<u8> {
        [1, 3, 4, 5, 6, 7].map(|offset| self.read(offset)).to_vec()
    }
}

suspend_tests!(Guest);

#[test]
fn output_is_sent_once_and_by_one() {
    let mut guest = Guest::new();
    // Bytes in the host's pipe count as taken, and so do those that the worker has.
    let output = pattern(200_000);
    let mut sent = 0;
    for _ in 0..10 {
        while sent < output.len() && guest.read(LINE_STATUS.into()) & 0x20 != 0 {
            guest.send(&output[sent..(sent + 16).min(output.len())]);
            sent = (sent + 16).min(output.len());
        }
        guest.rest();
    }
    assert!(sent < output.len(), "the port is busy");
    guest.pause();
    let mut arrived = guest.sent();
    let in_port = lock(&guest.port).uart.writer().bytes.len();
    assert!(in_port > OUTPUT_CAPACITY / 2, "{in_port} bytes wait");
    guest.rest();
    assert_eq!(lock(&guest.port).uart.writer().bytes.len(), in_port);
    let (mut guest, last) = guest.moved();
    arrived.extend(last);
    assert_eq!(arrived.len() + in_port, sent);
    // The guest has found the port busy, and is told that it is free.
    guest.write(INTERRUPT_ENABLE.into(), ALL_INTERRUPTS);
    arrived.extend(guest.sent());
    while arrived.len() < sent {
        arrived.extend(guest.sent());
    }
    assert!(arrived == output[..sent]);
}

#[test]
fn the_last_output_of_a_paused_port_that_was_not_saved_is_sent() {
    let mut guest = Guest::new();
    guest.pause();
    guest.send(b"last words");
    assert_eq!(guest.sent(), b"");
    // Saved, but resumed since.
    guest.save();
    guest.resume();
    guest.pause();
    let Guest {
        manager,
        mut from_guest,
        ..
    } = guest;
    drop(manager);
    let mut last = Vec::new();
    from_guest.read_to_end(&mut last).unwrap();
    assert_eq!(last, b"last words");
}

#[test]
fn a_paused_port_takes_no_input_and_raises_no_interrupt() {
    let mut guest = Guest::new();
    guest.write(INTERRUPT_ENABLE.into(), ALL_INTERRUPTS);
    guest.read(IDENTIFICATION);
    guest.interrupts.take();
    guest.pause();
    let section = guest.save();
    guest.to_guest.write_all(b"input").unwrap();
    guest.rest();
    assert_eq!(guest.save(), section);
    assert_eq!(guest.interrupts.take(), 0);
    guest.resume();
    guest.rest();
    assert_eq!(guest.interrupts.take(), 1);
    assert_eq!(guest.received(), b"input");
}

#[test]
fn input_that_was_read_goes_on_elsewhere() {
    let mut guest = Guest::new();
    guest.write(INTERRUPT_ENABLE.into(), ALL_INTERRUPTS);
    guest.to_guest.write_all(&pattern(300)).unwrap();
    guest.rest();
    guest.pause();
    let (mut moved, _) = guest.moved();
    // The interrupt may not have reached the driver.
    assert_eq!(moved.interrupts.take(), 1);
    // The content of the receive FIFO, and the input read after it.
    assert_eq!(moved.received(), pattern(2 * INPUT_CHUNK));
}

#[test]
fn state_that_no_port_can_have_is_refused() {
    let mut guest = Guest::new();
    guest.write(INTERRUPT_ENABLE.into(), ALL_INTERRUPTS);
    guest.to_guest.write_all(b"x").unwrap();
    guest.rest();
    guest.pause();
    let state: PortState = guest.save().decode().unwrap();
    let contradictions: [fn(&mut PortState); 8] = [
        |state| state.receive_fifo = vec![0; 65],
        |state| state.pending_input = vec![0; 65],
        |state| state.output = vec![0; OUTPUT_CAPACITY + 1],
        |state| state.interrupt_enable = 0x10,
        |state| state.interrupt_identification = 0,
        |state| state.interrupt_identification = 3,
        |state| state.interrupt_identification = 0xc1,
        |state| {
            state.interrupt_identification = identification::RECEIVED_DATA;
            state.receive_fifo.clear();
        },
    ];
    for contradiction in contradictions {
        let mut state = state.clone();
        contradiction(&mut state);
        let section = Section::of(&state).unwrap();
        let mut other = Guest::new();
        let error = lock(&other.port).restore(&section).unwrap_err();
        assert!(matches!(error, RestoreError::Invalid { .. }), "{error}");
        other.resume();
        other.work();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However often a port is paused and moved, no byte is lost, repeated or out of order.
    #[test]
    fn all_bytes_pass_in_order(steps in prop::collection::vec((0..5_u8, 1..100_usize), 1..60)) {
        let mut guest = Guest::new();
        let (mut all_input, mut received) = (Vec::new(), Vec::new());
        let (mut sent, mut arrived) = (Vec::new(), Vec::new());
        let mut next = 0_u8;
        let mut bytes = |count: usize| -> Vec<u8> {
            (0..count).map(|_| { next = next.wrapping_add(1); next }).collect()
        };
        for (step, count) in steps {
            match step {
                0 => {
                    let bytes = bytes(count);
                    guest.send(&bytes);
                    sent.extend(bytes);
                }
                1 => {
                    let bytes = bytes(count);
                    guest.to_guest.write_all(&bytes).unwrap();

                    all_input.extend(bytes);
                }
                2 => arrived.extend(guest.sent()),
                3 => received.extend(guest.received()),
                _ => {
                    guest.pause();
                    guest.rest();
                    if count % 2 == 0 {
                        guest.resume();
                        continue;
                    }
                    arrived.extend(guest.sent());
                    // Input that was not read from the old host stays there.
                    let port = lock(&guest.port);
                    let kept = port.uart.state().in_buffer.len() + port.pending_input.len();
                    drop(port);
                    all_input.truncate(received.len() + kept);
                    let (moved, last) = guest.moved();
                    guest = moved;
                    arrived.extend(last);
                }
            }
        }
        received.extend(guest.received());
        arrived.extend(guest.sent());
        prop_assert_eq!(received, all_input);
        prop_assert_eq!(arrived, sent);
    }
}
