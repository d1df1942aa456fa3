use super::*;
use crate::event_loop::Subscriber;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::PathBuf;

use event_manager::{EventManager, SubscriberOps};
use vmm_sys_util::tempdir::TempDir;

use super::super::history::CAPACITY;
use crate::InterruptLine;
use crate::bus::BusDevice;
use crate::device_log::DeviceLog;
use crate::serial::SerialEndpoint;

const LIMIT: Duration = Duration::from_secs(60);
const DATA: u64 = 0;
const LINE_STATUS: u64 = 5;

struct NoInterrupt;

impl InterruptLine for NoInterrupt {
    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A guest with a serial port, and the event loop that serves it.
struct Guest {
    port: Arc<Mutex<Serial>>,
    manager: EventManager<Subscriber>,
    path: PathBuf,
    sent: u64,
    _folder: TempDir,
}

fn byte(position: u64) -> u8 {
    (position * 7 + position / 251) as u8
}

impl Guest {
    fn new() -> Guest {
        let folder = TempDir::new().unwrap();
        let path = folder.as_path().join("serial");
        let listener = ListeningSocket::bind(&path).unwrap();
        let port = Serial::new(Box::new(NoInterrupt), None, DeviceLog::new("serial port")).unwrap();
        let port = Arc::new(Mutex::new(port));
        let mut manager = EventManager::new().unwrap();
        let worker = SerialEndpoint::Listener(listener).serve(port.clone());
        manager.add_subscriber(Subscriber::Resident(worker.unwrap()));
        Guest {
            port,
            manager,
            path,
            sent: 0,
            _folder: folder,
        }
    }

    /// Lets the worker run until it has nothing to do.
    fn rest(&mut self) {
        for _ in 0..10_000 {
            if self.manager.run_with_timeout(0).unwrap() == 0 {
                return;
            }
        }
        panic!("the event loop does not come to rest");
    }

    fn is_busy(&self) -> bool {
        let mut status = [0];
        lock(&self.port).read(LINE_STATUS, &mut status);
        status[0] & 0x20 == 0
    }

    /// Sends up to `count` bytes of the pattern until the port is busy, without letting the worker run;
    /// returns how many.
    fn try_send(&mut self, count: u64) -> u64 {
        for sent in 0..count {
            if self.is_busy() {
                self.rest();
                if self.is_busy() {
                    return sent;
                }
            }
            lock(&self.port).write(DATA, &[byte(self.sent)]);
            self.sent += 1;
        }
        self.rest();
        count
    }

    #[track_caller]
    fn send(&mut self, count: u64) {
        assert_eq!(self.try_send(count), count, "the port is busy");
    }

    fn received(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let (mut status, mut data) = ([0], [0]);
            lock(&self.port).read(LINE_STATUS, &mut status);
            if status[0] & 1 == 0 {
                self.rest();
                lock(&self.port).read(LINE_STATUS, &mut status);
                if status[0] & 1 == 0 {
                    return bytes;
                }
            }
            lock(&self.port).read(DATA, &mut data);
            bytes.push(data[0]);
        }
    }

    fn client(&mut self) -> UnixStream {
        let client = UnixStream::connect(&self.path).unwrap();
        client.set_nonblocking(true).unwrap();
        self.rest();
        client
    }

    /// Reads what is there for a client until nothing is left.
    fn read(&mut self, client: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match client.read(&mut chunk) {
                Ok(0) => return bytes,
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    if self.manager.run_with_timeout(0).unwrap() == 0 {
                        return bytes;
                    }
                }
            }
        }
    }

    #[track_caller]
    fn assert_reads(&mut self, client: &mut UnixStream, from: u64) {
        let expected: Vec<_> = (from..self.sent).map(byte).collect();
        let read = self.read(client);
        assert_eq!(read.len(), expected.len());
        assert!(read == expected);
    }
}

/// Whether the other end has closed the stream.
fn is_closed(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0; 1]), Ok(0))
}

#[test]
fn whoever_comes_late_gets_the_last_output_and_all_that_follows() {
    let mut guest = Guest::new();
    guest.send(1000);
    let mut first = guest.client();
    guest.assert_reads(&mut first, 0);
    drop(first);
    guest.send(2 * CAPACITY as u64);
    let start = guest.sent - CAPACITY as u64;
    let mut second = guest.client();
    guest.assert_reads(&mut second, start);
    let position = guest.sent;
    guest.send(5000);
    guest.assert_reads(&mut second, position);
}

#[test]
fn each_client_gets_all_output_and_the_guest_the_input_of_all() {
    let mut guest = Guest::new();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| guest.client()).collect();
    guest.send(10_000);
    for client in &mut clients {
        guest.assert_reads(client, 0);
    }
    for (index, client) in clients.iter_mut().enumerate() {
        client.write_all(&[index as u8; 500]).unwrap();
    }
    guest.rest();
    let received = guest.received();
    for index in 0..MAX_CLIENTS {
        let count = received.iter().filter(|&&byte| byte == index as u8);
        assert_eq!(count.count(), 500);
    }
    let mut one_more = guest.client();
    assert!(is_closed(&mut one_more));
    clients.pop();
    guest.rest();
    let mut another = guest.client();
    guest.assert_reads(&mut another, 0);
}

#[test]
fn a_client_that_reads_slowly_loses_nothing() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    let mut read = Vec::new();
    let mut chunk = [0; 10_000];
    let total = 1 << 20;
    let deadline = Instant::now() + LIMIT;
    let mut was_busy = false;
    while read.len() < total {
        let wanted = total as u64 - guest.sent;
        was_busy |= guest.try_send(wanted) < wanted;
        match client.read(&mut chunk) {
            Ok(count) => read.extend_from_slice(&chunk[..count]),
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        assert!(Instant::now() < deadline, "after {} bytes", read.len());
    }
    assert!(was_busy);
    assert!(read.iter().copied().eq((0..total as u64).map(byte)));
}

#[test]
fn the_guest_waits_a_moment_for_a_client_that_stops_reading_and_then_goes_on() {
    let mut guest = Guest::new();
    let mut stopped = guest.client();
    let mut reader = guest.client();
    let start = Instant::now();
    let total = 1 << 20;
    let mut read = 0;
    while guest.sent < total {
        guest.try_send((total - guest.sent).min(32 << 10));
        read += guest.read(&mut reader).len() as u64;
        guest.manager.run_with_timeout(1).unwrap();
        assert!(start.elapsed() < LIMIT, "after {} bytes", guest.sent);
    }
    read += guest.read(&mut reader).len() as u64;
    assert_eq!(read, total, "the other has lost nothing");
    assert!(start.elapsed() >= super::super::client::PATIENCE);
    // It gets what the kernel had kept for it, and then the last output.
    let seen = guest.read(&mut stopped);
    assert!((seen.len() as u64) < total);
    let last: Vec<_> = (total - CAPACITY as u64..total).map(byte).collect();
    assert!(seen.ends_with(&last));
    // It is then treated like the others again.
    guest.send(100_000);
    guest.assert_reads(&mut stopped, total);
}

#[test]
fn a_client_that_is_late_and_reads_nothing_holds_up_nobody() {
    let mut guest = Guest::new();
    guest.send(CAPACITY as u64);
    let _clients: Vec<_> = (0..4).map(|_| guest.client()).collect();
    // The port is never found busy.
    guest.send(4 * CAPACITY as u64);
}

#[test]
fn one_that_only_reads_or_only_writes_is_served() {
    let mut guest = Guest::new();
    let mut viewer = guest.client();
    viewer.shutdown(Shutdown::Write).unwrap();
    guest.send(100);
    guest.assert_reads(&mut viewer, 0);
    // Input of a client that leaves at once still arrives.
    let mut writer = guest.client();
    writer.write_all(&[1; 1000]).unwrap();
    drop(writer);
    guest.rest();
    guest.send(100);
    assert_eq!(guest.received(), [1; 1000]);
    guest.assert_reads(&mut viewer, 100);
    drop(viewer);
    guest.rest();
    assert_eq!(guest.manager.run_with_timeout(20).unwrap(), 0);
}

#[test]
fn those_that_have_left_make_room_though_the_guest_reads_nothing() {
    let mut guest = Guest::new();
    for _ in 0..2 * MAX_CLIENTS {
        let mut writer = guest.client();
        writer.write_all(&[1; 1000]).unwrap();
        guest.rest();
    }
    guest.rest();
    assert_eq!(
        guest.manager.run_with_timeout(20).unwrap(),
        0,
        "no busy loop"
    );
    let mut client = guest.client();
    guest.send(100);
    guest.assert_reads(&mut client, 0);
}

#[test]
fn input_waits_until_the_guest_reads() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    let sent: Vec<_> = (0..256 << 10).map(byte).collect();
    let mut left = &sent[..];
    let mut received = Vec::new();
    let deadline = Instant::now() + LIMIT;
    while received.len() < sent.len() {
        match client.write(left) {
            Ok(count) => left = &left[count..],
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        guest.rest();
        received.extend(guest.received());
        assert!(Instant::now() < deadline);
    }
    assert!(received == sent);
}

#[test]
fn the_last_words_reach_clients_that_read() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    guest.send(300_000);
    // Not served any more until the end.
    for _ in 0..100 {
        lock(&guest.port).write(DATA, &[byte(guest.sent)]);
        guest.sent += 1;
    }
    let sent = guest.sent;
    client.set_nonblocking(false).unwrap();
    let path = guest.path.clone();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap();
        bytes
    });
    drop(guest);
    let read = reader.join().unwrap();
    assert!(read.into_iter().eq((0..sent).map(byte)));
    assert!(!path.exists());
}

#[test]
fn the_end_does_not_wait_long_for_clients_that_do_not_read() {
    let mut guest = Guest::new();
    let _client = guest.client();
    guest.try_send(1 << 20);
    let start = Instant::now();
    drop(guest);
    assert!(start.elapsed() < Duration::from_secs(20));
}
