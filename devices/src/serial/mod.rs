//! The serial port: a 16550 whose bytes come from and go to a [`SerialEndpoint`] of the host.
//!
//! A vCPU only ever moves bytes into and out of memory here; a worker on the event loop reads and writes the
//! descriptors. A slow reader on the host makes the port look busy to the guest, as a slow line would.

mod client;
mod endpoint;
mod history;
mod socket;
mod state;
mod worker;

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bantam_metrics::Counter;
use serde::Serialize;
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use endpoint::SerialEndpoint;
pub(crate) use worker::{make_room_in_pipe, wait_for_reader};

use crate::InterruptLine;
use crate::bus::BusDevice;
use crate::device_log::{DeviceLog, Repeat};
use crate::interrupt::PausableLine;
use crate::lock::lock;
use crate::rate_limiter::{RateLimit, RateLimiter};

/// Interrupt enable register.
const INTERRUPT_ENABLE: u8 = 1;
/// Modem control register.
const MODEM_CONTROL: u8 = 4;
/// Line status register.
const LINE_STATUS: u8 = 5;
/// Bits of the line status register by which a driver sees that it can send: transmitter holding
/// register empty, transmitter empty.
const TRANSMITTER_EMPTY: u8 = 0x60;
/// Bytes that a driver may send after reading the line status once: the size of a 16550A's FIFO.
const TRANSMIT_FIFO_SIZE: usize = 16;
/// Bytes read from the host at a time: the size of the receive FIFO.
const INPUT_CHUNK: usize = 64;
/// Output that is kept until the host takes it, in bytes.
const OUTPUT_CAPACITY: usize = 64 << 10;

/// The registers of a 16550, eight ports.
pub struct Serial {
    uart: Uart,
    interrupt: Arc<PausableLine>,
    /// Input that is not in the receive FIFO yet: at most [`INPUT_CHUNK`] bytes.
    pending_input: VecDeque<u8>,
    /// While it is set, input and output stay where they are.
    is_paused: bool,
    /// Whether the state was saved since the pause. Output that is left then belongs to the saved machine.
    is_saved: Cell<bool>,
    attention: Arc<EventFd>,
    metrics: Arc<SerialMetrics>,
    log: DeviceLog,
    /// When the log last heard of lost output.
    loss_warning: Repeat,
}

type Uart = vm_superio::Serial<Line, Attention, Output>;

/// Counters of a serial port.
#[derive(Debug, Default, Serialize)]
pub struct SerialMetrics {
    /// Bytes that were dropped because the guest sent them beyond the port's limit.
    pub rate_limiter_dropped_bytes: Counter,
}

/// The event that wakes the worker.
struct Attention(Arc<EventFd>);

/// Bytes that the guest has sent and the host has not taken yet.
struct Output {
    bytes: VecDeque<u8>,
    attention: Arc<EventFd>,
    /// Whether anyone takes them.
    connected: bool,
    /// Whether the guest has found the port busy.
    was_full: bool,
    /// Enforces the limit on bytes, if there is one.
    limiter: Option<RateLimiter>,
    metrics: Arc<SerialMetrics>,
    log: DeviceLog,
}

impl Output {
    /// Whether the limit lets `count` more bytes through. If not, they are counted as dropped.
    fn admit(&mut self, count: usize) -> bool {
        let Some(limiter) = &mut self.limiter else {
            return true;
        };
        let (count, now) = (count as u64, Instant::now());
        if limiter.wait_time(now).is_zero() {
            limiter.take(count, now);
            return true;
        }
        let dropped = &self.metrics.rate_limiter_dropped_bytes;
        if dropped.total() == 0 {
            let RateLimit {
                size, refill_time, ..
            } = limiter.limit();
            self.log.warn_of_guest(format_args!(
                "output beyond {size} bytes in {refill_time:?} is dropped"
            ));
        }
        dropped.add(count);
        false
    }
}

struct Line(Arc<PausableLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

impl SerialEvents for Attention {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        signal(&self.0);
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.connected {
            return Ok(bytes.len());
        }
        if self.bytes.len() + bytes.len() > OUTPUT_CAPACITY {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if !self.admit(bytes.len()) {
            return Ok(bytes.len());
        }
        if self.bytes.is_empty() {
            signal(&self.attention);
        }
        self.bytes.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn signal(event: &EventFd) {
    // It fails only if the counter is full, and then the event is readable already.
    let _ = event.write(1);
}

impl Serial {
    /// Returns the port's log.
    fn log(&self) -> DeviceLog {
        self.log.clone()
    }

    /// Makes a port that raises `interrupt`, logs to `log`, and drops bytes that the guest sends beyond
    /// `limit`. Until a [`SerialEndpoint`] serves it, it has no input and drops its output.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn new(
        interrupt: Box<dyn InterruptLine>,
        limit: Option<RateLimit>,
        log: DeviceLog,
    ) -> io::Result<Serial> {
        let metrics = Arc::new(SerialMetrics::default());
        let attention = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let output = Output {
            bytes: VecDeque::new(),
            attention: attention.clone(),
            connected: false,
            was_full: false,
            limiter: limit.map(|limit| RateLimiter::new(limit, Instant::now())),
            metrics: metrics.clone(),
            log: log.clone(),
        };
        let interrupt = Arc::new(PausableLine::new(interrupt));
        Ok(Serial {
            uart: vm_superio::Serial::with_events(
                Line(interrupt.clone()),
                Attention(attention.clone()),
                output,
            ),
            interrupt,
            pending_input: VecDeque::new(),
            is_paused: false,
            is_saved: Cell::new(false),
            attention,
            metrics,
            log,
            loss_warning: Repeat::default(),
        })
    }

    /// Returns the port's counters.
    pub fn metrics(&self) -> Arc<SerialMetrics> {
        self.metrics.clone()
    }

    fn attention(&self) -> Arc<EventFd> {
        self.attention.clone()
    }

    /// Keeps output from now on, for a worker that takes it.
    fn connect(&mut self) {
        self.uart.writer_mut().connected = true;
    }

    /// Drops output from now on, and output that was not taken.
    fn disconnect(&mut self) {
        self.uart.writer_mut().connected = false;
        self.empty_output();
    }

    /// Whether there is output of the guest that may be taken.
    fn has_output(&self) -> bool {
        !self.is_paused && !self.uart.writer().bytes.is_empty()
    }

    /// Takes the guest's output, unless the port is paused. A guest that found the port busy is told that it
    /// is free.
    fn take_output(&mut self) -> VecDeque<u8> {
        if self.is_paused {
            return VecDeque::new();
        }
        self.empty_output()
    }

    /// Lets a worker that ends take the remaining output of a paused port, unless that output belongs to a
    /// saved machine.
    fn release_output(&mut self) {
        if self.is_saved.get() {
            self.disconnect();
        }
        self.is_paused = false;
    }

    fn empty_output(&mut self) -> VecDeque<u8> {
        let output = self.uart.writer_mut();
        let bytes = std::mem::take(&mut output.bytes);
        if std::mem::take(&mut output.was_full) {
            // Enabling an interrupt again raises it if its condition holds, and "transmitter empty" holds
            // from now on.
            let enabled = self.uart.read(INTERRUPT_ENABLE);
            self.write_register(INTERRUPT_ENABLE, enabled);
        }
        bytes
    }

    /// Gives the guest the bytes that `read` reads from the host, and returns how many. `None` if the guest
    /// has yet to take earlier input, or the port is paused; the worker is told when there is room.
    ///
    /// The port is locked while `read` runs. So bytes that were read belong to the port at once, and a pause
    /// finds none in transit.
    ///
    /// # Errors
    /// Those of `read`.
    fn read_input(
        &mut self,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<Option<usize>> {
        self.move_input();
        if self.is_paused || !self.pending_input.is_empty() {
            return Ok(None);
        }
        let mut bytes = [0; INPUT_CHUNK];
        let count = read(&mut bytes)?;
        self.pending_input.extend(&bytes[..count]);
        self.move_input();
        Ok(Some(count))
    }

    /// Moves input to the receive FIFO, as far as that has room.
    fn move_input(&mut self) {
        if self.is_paused || self.pending_input.is_empty() {
            return;
        }
        let mut pending = std::mem::take(&mut self.pending_input);
        let taken = self.receive(pending.make_contiguous());
        pending.drain(..taken);
        self.pending_input = pending;
    }

    /// Gives the guest those of `bytes` that its receive FIFO has room for, and returns how many.
    fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = self.uart.fifo_capacity().min(bytes.len());
        match self.uart.enqueue_raw_bytes(bytes) {
            Ok(count) => count,
            Err(vm_superio::serial::Error::FullFifo) => 0,
            Err(error) => {
                // The bytes are in the FIFO; only their interrupt is missing.
                self.log
                    .warn_of_host(format_args!("cannot raise its interrupt: {error}"));
                room
            }
        }
    }

    fn write_register(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.uart.write(offset, value) {
            match error {
                vm_superio::serial::Error::Trigger(error) => self
                    .log
                    .warn_of_host(format_args!("cannot raise its interrupt: {error}")),
                // A guest that does not check whether the port is busy loses many bytes.
                error if self.loss_warning.is_due() => self.log.warn_of_guest(format_args!(
                    "output was lost, as the guest did not wait for the port: {error}"
                )),
                _ => {}
            }
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let (&mut [ref mut value], Ok(offset)) = (&mut *data, u8::try_from(offset)) else {
            data.fill(0xff);
            return;
        };
        *value = self.uart.read(offset);
        if offset == LINE_STATUS {
            let output = self.uart.writer_mut();
            if output.connected && output.bytes.len() + TRANSMIT_FIFO_SIZE > OUTPUT_CAPACITY {
                output.was_full = true;
                *value &= !TRANSMITTER_EMPTY;
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (&[value], Ok(offset)) = (data, u8::try_from(offset)) {
            self.write_register(offset, value);
            if offset == MODEM_CONTROL {
                // Input that was held back during loopback can continue.
                signal(&self.attention);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    const DATA: u64 = 0;
    const THRE_INTERRUPT: u8 = 2;

    struct Line(Arc<AtomicUsize>);

    impl InterruptLine for Line {
        fn trigger(&self) -> io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    fn serial() -> (Serial, Arc<AtomicUsize>) {
        let interrupts = Arc::new(AtomicUsize::new(0));
        (
            Serial::new(Box::new(Line(interrupts.clone())), None, log()).unwrap(),
            interrupts,
        )
    }

    fn log() -> DeviceLog {
        DeviceLog::new("serial port")
    }

    fn line_status(serial: &mut Serial) -> u8 {
        let mut status = [0];
        serial.read(LINE_STATUS.into(), &mut status);
        status[0]
    }

    #[test]
    fn a_full_port_is_busy_until_the_host_takes_its_output() {
        let (mut serial, interrupts) = serial();
        serial.connect();
        serial.write(INTERRUPT_ENABLE.into(), &[THRE_INTERRUPT]);
        for _ in 0..OUTPUT_CAPACITY / TRANSMIT_FIFO_SIZE {
            let empty = line_status(&mut serial) & TRANSMITTER_EMPTY;
            assert_eq!(empty, TRANSMITTER_EMPTY);
            for _ in 0..TRANSMIT_FIFO_SIZE {
                serial.write(DATA, b"x");
            }
        }
        assert_eq!(line_status(&mut serial) & TRANSMITTER_EMPTY, 0);
        serial.write(DATA, b"y");
        let mut identification = [0];
        serial.read(2, &mut identification);
        let before = interrupts.load(Ordering::SeqCst);

        let output = serial.take_output();
        assert_eq!(output.len(), OUTPUT_CAPACITY);
        assert!(output.iter().all(|&byte| byte == b'x'));
        assert_eq!(interrupts.load(Ordering::SeqCst), before + 1);
        serial.read(2, &mut identification);
        assert_eq!(
            identification[0] & 0xf,
            2,
            "transmitter holding register empty"
        );
        assert_eq!(
            line_status(&mut serial) & TRANSMITTER_EMPTY,
            TRANSMITTER_EMPTY
        );
    }

    #[test]
    fn output_beyond_the_limit_is_dropped_and_counted() {
        let limit = RateLimit {
            size: 100,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 50,
        };
        let line = Line(Arc::new(AtomicUsize::new(0)));
        let mut serial = Serial::new(Box::new(line), Some(limit), log()).unwrap();
        serial.connect();
        for _ in 0..400 {
            assert_ne!(line_status(&mut serial) & TRANSMITTER_EMPTY, 0);
            serial.write(DATA, b"x");
        }
        // One more write begins within the limit and ends beyond it.
        assert_eq!(serial.take_output().len(), 151);
        assert_eq!(serial.metrics().rate_limiter_dropped_bytes.total(), 249);
    }

    #[test]
    fn output_nobody_takes_is_dropped() {
        let (mut serial, _) = serial();
        for _ in 0..2 * OUTPUT_CAPACITY {
            serial.write(DATA, b"x");
        }
        assert_eq!(
            line_status(&mut serial) & TRANSMITTER_EMPTY,
            TRANSMITTER_EMPTY
        );
        assert!(serial.take_output().is_empty());
    }

    #[test]
    fn input_waits_for_room() {
        let (mut serial, _) = serial();
        let bytes = [7; 100];
        let taken = serial.receive(&bytes);
        assert!((1..100).contains(&taken));
        assert_eq!(serial.receive(&bytes), 0);
        let attention = serial.attention();
        let mut data = [0];
        for _ in 0..taken {
            assert!(attention.read().is_err());
            serial.read(DATA, &mut data);
            assert_eq!(data, [7]);
        }
        assert!(attention.read().is_ok(), "the worker hears of the room");
        assert_eq!(serial.receive(&bytes), taken);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let (mut serial, _) = serial();
        for offset in 0..=9 {
            for size in [0, 2, 4, 8] {
                serial.read(offset, &mut vec![0; size]);
                serial.write(offset, &vec![0xff; size]);
            }
        }
    }
}
