// SPDX-License-Identifier: Apache-2.0

//! Commands about metadata, which the monitor serves on a link-local address.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::thread;
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::net;
use crate::sys;

const SERVICE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(169, 254, 169, 254), 80);
/// The guest's own address in the same network.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 7);
const MASK: [u8; 4] = [255, 255, 0, 0];
const TIMEOUT: Duration = Duration::from_secs(20);

/// Gives an interface an address from which it reaches the service.
fn configure(interface: &str) -> Result<()> {
    let control = sys::control_socket().context("socket")?;
    // An additional address, besides the one that it may have.
    let alias = format!("{interface}:1");
    sys::set_interface_address(&control, &alias, ADDRESS.octets(), MASK)
}

/// Reads metadata without a session.
pub fn get(interface: &str, path: &str) -> Result<String> {
    configure(interface)?;
    let (status, body) = ask("GET", path, "")?;
    Ok(format!("status={status} body={}", one_word(&body)))
}

/// Reads metadata in a session, over and over while a pattern is sent to a peer.
pub fn session(path: &str, peer: SocketAddrV4, length: u64, seed: u64) -> Result<String> {
    let (status, token) = ask(
        "PUT",
        "/latest/api/token",
        "X-metadata-token-ttl-seconds: 600\r\n",
    )?;
    if status != 200 {
        return Err(Error::new(format!("status {status} in place of a token")));
    }
    let field = format!("X-metadata-token: {token}\r\nAccept: application/json\r\n");
    let sending = thread::spawn(move || net::tcp_send(peer, length, seed));
    let mut requests = 0;
    let mut last: Option<String> = None;
    while requests < 3 || !sending.is_finished() {
        let (status, body) = ask("GET", path, &field)?;
        if status != 200 || last.as_ref().is_some_and(|last| *last != body) {
            return Err(Error::new(format!("status {status} and {body}")));
        }
        last = Some(body);
        requests += 1;
    }
    let sent = sending
        .join()
        .map_err(|_| Error::new("the sender panicked"))??;
    let body = one_word(&last.unwrap_or_default());
    Ok(format!("requests={requests} body={body} {sent}"))
}

/// Sends a request on a new connection, and returns status and body of the response.
fn ask(method: &str, path: &str, fields: &str) -> Result<(u16, String)> {
    let mut stream =
        TcpStream::connect_timeout(&SERVICE.into(), TIMEOUT).context("connect to metadata")?;
    stream
        .set_read_timeout(Some(TIMEOUT))
        .context("set a timeout")?;
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: metadata\r\nConnection: close\r\n{fields}\r\n");
    stream
        .write_all(request.as_bytes())
        .context("send a request")?;
    let mut response = String::new();
    stream
        .read_to_string(&mut response)
        .context("receive a response")?;
    let invalid = || Error::new(format!("{response:?} is no response"));
    let (head, body) = response.split_once("\r\n\r\n").ok_or_else(invalid)?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.ok_or_else(invalid)?, body.to_owned()))
}

/// Makes text part of a line of the answer.
fn one_word(text: &str) -> String {
    text.replace(['\n', ' '], "+")
}
