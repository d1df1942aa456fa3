// SPDX-License-Identifier: Apache-2.0

//! Commands about sockets to the host.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::pattern;
use crate::sys;
use crate::system::rate;

const CHUNK: usize = 64 << 10;
/// How long the peer may be silent.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The data to exchange: on each connection the pattern of a different seed, in both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    pub port: u32,
    pub connections: u32,
    /// Bytes in each direction.
    pub length: u64,
}

/// Connects to the host several times, and exchanges data on all connections at once.
pub fn connect(exchange: Exchange) -> Result<String> {
    let mut streams = Vec::new();
    for number in 0..exchange.connections {
        let stream = sys::vsock_connect(exchange.port).context(format_args!(
            "connection {number} to port {}",
            exchange.port
        ))?;
        streams.push(UnixStream::from(stream));
    }
    all_at_once(streams, exchange.length)
}

/// Reports that it is waiting, accepts connections of the host, and exchanges data on all of them
/// at once.
pub fn listen(exchange: Exchange, waiting: impl Fn()) -> Result<String> {
    let listener = sys::vsock_listen(exchange.port, exchange.connections)
        .context(format_args!("listen on port {}", exchange.port))?;
    waiting();
    let mut streams = Vec::new();
    for _ in 0..exchange.connections {
        let stream = sys::accept(&listener).context("accept")?;
        streams.push(UnixStream::from(stream));
    }
    all_at_once(streams, exchange.length)
}

/// Reports that it is waiting, and returns to each connection of the host what it sends.
pub fn echo(port: u32, waiting: impl Fn()) -> Result<String> {
    const BACKLOG: u32 = 4;
    let listener =
        sys::vsock_listen(port, BACKLOG).context(format_args!("listen on port {port}"))?;
    waiting();
    loop {
        let mut stream = UnixStream::from(sys::accept(&listener).context("accept")?);
        thread::spawn(move || {
            let mut buffer = vec![0; CHUNK];
            // The connection ends with the host's, or when the machine goes on elsewhere.
            while let Ok(size @ 1..) = stream.read(&mut buffer) {
                if stream.write_all(&buffer[..size]).is_err() {
                    break;
                }
            }
        });
    }
}

fn all_at_once(streams: Vec<UnixStream>, length: u64) -> Result<String> {
    let started = Instant::now();
    let count = streams.len() as u64;
    let threads: Vec<_> = streams
        .into_iter()
        .map(|stream| thread::spawn(move || transfer(stream, length)))
        .collect();
    for thread in threads {
        let result = thread.join();
        result.map_err(|_| Error::new("a thread panicked"))??;
    }
    let bytes = 2 * count * length;
    Ok(format!(
        "bytes={bytes} rate={}",
        rate(bytes, started.elapsed())
    ))
}

/// The first eight bytes received are the seed of the data that follows; the data sent is the
/// pattern of the next seed.
fn transfer(mut stream: UnixStream, length: u64) -> Result<()> {
    stream
        .set_read_timeout(Some(TIMEOUT))
        .context("set a timeout")?;
    let mut seed = [0; 8];
    stream.read_exact(&mut seed).context("read the seed")?;
    let seed = u64::from_le_bytes(seed);
    let writer = stream.try_clone().context("clone a stream")?;
    let sending = thread::spawn(move || send(writer, length, seed.wrapping_add(1)));
    let mut buffer = vec![0; CHUNK];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(size) => {
                let data = &buffer[..size];
                if let Some(position) = pattern::first_difference(seed, received, data) {
                    return Err(Error::new(format!("byte {position} is wrong")));
                }
                received += size as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                return Err(error).context(format_args!("receive after {received} bytes"));
            }
        }
    }
    if received != length {
        return Err(Error::new(format!("the data ends after {received} bytes")));
    }
    let sent = sending.join();
    sent.map_err(|_| Error::new("a thread panicked"))?
}

fn send(mut stream: UnixStream, length: u64, seed: u64) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut sent = 0;
    while sent < length {
        let size = usize::try_from(length - sent).map_or(CHUNK, |left| left.min(CHUNK));
        pattern::fill(seed, sent, &mut buffer[..size]);
        stream
            .write_all(&buffer[..size])
            .context(format_args!("send after {sent} bytes"))?;
        sent += size as u64;
    }
    stream.shutdown(Shutdown::Write).context("end of data")
}
