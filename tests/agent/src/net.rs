// SPDX-License-Identifier: Apache-2.0

//! Commands about network interfaces.

use std::collections::HashSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::pattern;
use crate::sys;
use crate::system::{attribute, number, rate};

const CHUNK: usize = 64 << 10;
const PING_INTERVAL: Duration = Duration::from_millis(500);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Configures an interface and waits until the peer answers a ping.
pub fn configure(interface: &str, address: Ipv4Addr, prefix: u8, peer: Ipv4Addr) -> Result<String> {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    let control = sys::control_socket().context("socket")?;
    sys::set_interface_address(&control, interface, address.octets(), mask.to_be_bytes())?;
    sys::bring_interface_up(&control, interface)?;
    let time = ping(peer)?;
    Ok(format!("rtt={}us", time.as_micros()))
}

fn ping(peer: Ipv4Addr) -> Result<Duration> {
    const ECHO_REPLY: u8 = 0;
    let socket = sys::icmp_socket().context("ICMP socket")?;
    socket
        .set_read_timeout(Some(PING_INTERVAL))
        .context("set a timeout")?;
    let deadline = Instant::now() + PING_TIMEOUT;
    let mut reason = String::from("no answer");
    for sequence in 1.. {
        let started = Instant::now();
        if started > deadline {
            break;
        }
        let message = echo_request(sequence);
        if let Err(error) = socket.send_to(&message, (peer, 0)) {
            reason = error.to_string();
            std::thread::sleep(PING_INTERVAL);
            continue;
        }
        let mut packet = [0; 128];
        while let Ok((size, sender)) = socket.recv_from(&mut packet) {
            // The IP header comes first; its length is counted in words.
            let header = usize::from(packet[0] & 15) * 4;
            let answer = packet[..size].get(header..).unwrap_or_default();
            let same_rest = answer.get(4..) == message.get(4..);
            if sender.ip() == IpAddr::V4(peer) && answer.first() == Some(&ECHO_REPLY) && same_rest {
                return Ok(started.elapsed());
            }
        }
    }
    Err(Error::new(format!("ping {peer}: {reason}")))
}

/// An ICMP echo request: type, code, checksum, identifier, sequence number.
fn echo_request(sequence: u16) -> [u8; 8] {
    const ECHO_REQUEST: u16 = 8 << 8;
    const IDENTIFIER: u16 = 0xba27;
    let words = [ECHO_REQUEST, IDENTIFIER, sequence];
    let sum = words.iter().fold(0_u32, |sum, &word| sum + u32::from(word));
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    let mut message = [0; 8];
    let fields = [ECHO_REQUEST, checksum, IDENTIFIER, sequence];
    for (bytes, field) in message.chunks_exact_mut(2).zip(fields) {
        bytes.copy_from_slice(&field.to_be_bytes());
    }
    message
}

pub fn info(interface: &str) -> Result<String> {
    // The numbers of ethtool's requests about offloads.
    const FEATURES: [(&str, u32); 6] = [
        ("rx-checksum", 0x14),
        ("tx-checksum", 0x16),
        ("scatter-gather", 0x18),
        ("tso", 0x1e),
        ("gso", 0x23),
        ("gro", 0x2b),
    ];
    let mut line = format!(
        "mac={} mtu={} state={}",
        mac(interface)?,
        mtu(interface)?,
        state(interface)?
    );
    let control = sys::control_socket().context("socket")?;
    for (name, question) in FEATURES {
        let value = sys::ethtool_value(&control, interface, question).context(name)?;
        line += &format!(" {name}={value}");
    }
    Ok(line)
}

pub fn mac(interface: &str) -> Result<String> {
    attribute(&format!("/sys/class/net/{interface}/address"))
}

pub fn mtu(interface: &str) -> Result<u64> {
    number(&format!("/sys/class/net/{interface}/mtu"))
}

fn state(interface: &str) -> Result<String> {
    attribute(&format!("/sys/class/net/{interface}/operstate"))
}

pub fn tcp_send(peer: SocketAddrV4, length: u64, seed: u64) -> Result<String> {
    let mut stream = TcpStream::connect(peer).context(format_args!("connect to {peer}"))?;
    let mut buffer = vec![0; CHUNK];
    let started = Instant::now();
    let mut sent = 0;
    while sent < length {
        let chunk = part(&mut buffer, length - sent);
        pattern::fill(seed, sent, chunk);
        stream
            .write_all(chunk)
            .context(format_args!("send after {sent} bytes"))?;
        sent += chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write).context("end of data")?;
    // The peer closes its side when it has everything: only then does the measured time end.
    let extra = stream
        .read(&mut buffer)
        .context("wait for the peer to finish")?;
    if extra != 0 {
        return Err(Error::new(format!("{extra} bytes came back")));
    }
    Ok(format!(
        "bytes={sent} rate={}",
        rate(sent, started.elapsed())
    ))
}

pub fn tcp_receive(peer: SocketAddrV4, length: u64, seed: u64) -> Result<String> {
    let mut stream = TcpStream::connect(peer).context(format_args!("connect to {peer}"))?;
    let mut buffer = vec![0; CHUNK];
    let started = Instant::now();
    let mut received = 0;
    while received < length {
        let chunk = part(&mut buffer, length - received);
        let size = match stream.read(chunk) {
            Ok(0) => return Err(Error::new(format!("the data ends after {received} bytes"))),
            Ok(size) => size,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(error).context(format_args!("receive after {received} bytes"));
            }
        };
        if let Some(position) = pattern::first_difference(seed, received, &chunk[..size]) {
            return Err(Error::new(format!("byte {position} is wrong")));
        }
        received += size as u64;
    }
    Ok(format!(
        "bytes={received} rate={}",
        rate(received, started.elapsed())
    ))
}

/// Reads a line from each of these connections once all are there.
pub fn tcp_crowd(peer: SocketAddrV4, connections: u32) -> Result<String> {
    let streams = (0..connections).map(|number| {
        TcpStream::connect(peer).context(format_args!("make connection {number} to {peer}"))
    });
    let streams = streams.collect::<Result<Vec<_>>>()?;
    let mut lines = HashSet::new();
    for (number, mut stream) in streams.into_iter().enumerate() {
        let mut line = String::new();
        stream
            .read_to_string(&mut line)
            .context(format_args!("read from connection {number}"))?;
        lines.insert(line);
    }
    Ok(format!("lines={}", lines.len()))
}

/// Returns the part of the buffer that is needed for the rest.
fn part(buffer: &mut [u8], left: u64) -> &mut [u8] {
    let size = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
    &mut buffer[..size]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn echo_requests_have_a_right_checksum() {
        for sequence in [0, 1, 0x4000, 0xffff] {
            let message = echo_request(sequence);
            let sum: u32 = message
                .chunks_exact(2)
                .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])))
                .sum();
            assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
        }
    }
}
