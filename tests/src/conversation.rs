//! What the host exchanges with a guest that goes from machine to machine, and what must not be heard from that.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::{PacketSocket, accept, first_difference, pattern};

/// What Linux says about a processor or a task that has not gone on, and the agent about a command that has failed.
pub const COMPLAINTS: [&str; 7] = [
    "lockup",
    "stall",
    "blocked for more than",
    "Marking clocksource",
    "I/O error",
    "Call Trace",
    " failed ",
];

/// A thread of the host that counts what it gets from the guest, until it is dropped.
pub struct Counting {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Counting {
    fn start(work: impl FnOnce(&AtomicU64, &AtomicBool) + Send + 'static) -> Counting {
        let (count, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let thread = thread::spawn({
            let (count, stop) = (count.clone(), stop.clone());
            move || work(&count, &stop)
        });
        Counting {
            count,
            stop,
            thread: Some(thread),
        }
    }

    /// Returns what it has counted.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Ends the thread, and returns what it has counted.
    ///
    /// # Panics
    /// If it has found a fault.
    pub fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("it ends once");
        thread.join().expect("it has found no fault");
        self.count()
    }
}

/// Counts bytes of the guest's stream, which are those of `seed` and go on as if nothing had happened.
///
/// # Panics
/// If the guest does not connect.
pub fn receive(listener: TcpListener, seed: u64) -> Counting {
    Counting::start(move |count, stop| {
        let mut stream: TcpStream = accept(&listener);
        let timeout = Some(Duration::from_millis(100));
        stream.set_read_timeout(timeout).expect("sockets can be");
        let mut bytes = vec![0; 1 << 16];
        while !stop.load(Ordering::Relaxed) {
            // Nothing comes for a while.
            let Ok(size) = stream.read(&mut bytes) else {
                continue;
            };
            assert_ne!(size, 0, "the guest has ended its stream");
            let offset = count.fetch_add(size as u64, Ordering::Relaxed);
            assert_eq!(first_difference(seed, offset, &bytes[..size]), None);
        }
    })
}

/// Counts announcements of the address of `guest` on an interface.
///
/// # Panics
/// If there is no such interface.
pub fn announcements(interface: &str, guest: Ipv4Addr) -> Counting {
    let socket = PacketSocket::open(interface);
    let address = guest.octets();
    Counting::start(move |count, stop| {
        // RFC 5227: sender and target have the same address.
        let is_announcement = |frame: &[u8]| {
            frame.get(12..14) == Some(&[8, 6])
                && frame.get(28..32) == Some(&address)
                && frame.get(38..42) == Some(&address)
        };
        while !stop.load(Ordering::Relaxed) {
            let frame = socket.receive(Duration::from_millis(100), is_announcement);
            count.fetch_add(u64::from(frame.is_some()), Ordering::Relaxed);
        }
    })
}

/// Sends by the socket device in each machine anew, to `port`, and counts the bytes that come back. `socket` returns where
/// the present machine's is.
pub fn echo(socket: impl Fn() -> PathBuf + Send + 'static, port: u32) -> Counting {
    const CHUNK: usize = 4096;
    const SEED: u64 = 7;
    Counting::start(move |count, stop| {
        let exchange = || -> std::io::Result<()> {
            let mut stream = UnixStream::connect(socket())?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            writeln!(stream, "CONNECT {port}")?;
            let mut byte = [0];
            while byte != *b"\n" {
                stream.read_exact(&mut byte)?;
            }
            for offset in (0..).step_by(CHUNK) {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                stream.write_all(&pattern(SEED, offset, CHUNK))?;
                let mut bytes = [0; CHUNK];
                stream.read_exact(&mut bytes)?;
                assert_eq!(first_difference(SEED, offset, &bytes), None);
                count.fetch_add(CHUNK as u64, Ordering::Relaxed);
            }
            Ok(())
        };
        while !stop.load(Ordering::Relaxed) {
            // The machine has ended, and the next one is not there yet or has reset the device.
            if exchange().is_err() {
                thread::sleep(Duration::from_millis(10));
            }
        }
    })
}
