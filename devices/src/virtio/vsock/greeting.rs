//! The first line that a program on the host sends: `CONNECT PORT` and a line feed.
//!
//! It is parsed as in Firecracker 1.17 (`read_local_stream_port` in its `vsock/unix/muxer.rs`): words
//! separated by white space of any kind, the first in upper or lower case, and anything after the second
//! ignored. Firecracker requires it to arrive in one piece; here it may arrive in several.

use std::io;

use super::stream::HostStream;

/// Shortest line in bytes.
const MIN_LINE_SIZE: usize = "connect 0\n".len();
/// Longest line in bytes. This many bytes are a line even without a line feed.
const MAX_LINE_SIZE: usize = 32;

/// The part of the line that has arrived.
#[derive(Debug, Default)]
pub(super) struct Greeting {
    line: [u8; MAX_LINE_SIZE],
    len: usize,
}

impl Greeting {
    /// Reads more of the line, but nothing after it: those bytes are for the guest.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if there is no more of it yet, and [`io::ErrorKind::InvalidData`] if it
    /// is not such a line.
    pub(super) fn read(&mut self, stream: &HostStream) -> io::Result<u32> {
        loop {
            let room = &mut self.line[self.len..];
            let seen = stream.peek(room)?;
            let seen = room.get(..seen).unwrap_or_default();
            if seen.is_empty() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let is_end = |(offset, &byte): (usize, &u8)| {
                byte == b'\n' && self.len + offset + 1 >= MIN_LINE_SIZE
            };
            let end = seen.iter().enumerate().position(is_end);
            let size = end.map_or(seen.len(), |end| end + 1);
            // These bytes are there, and nobody else takes them.
            let taken = stream.receive(&mut room[..size])?;
            self.len += taken;
            if end.is_some() && taken == size || self.len == MAX_LINE_SIZE {
                return port(&self.line[..self.len]).ok_or(io::ErrorKind::InvalidData.into());
            }
        }
    }
}

/// Returns the port that a whole line asks for.
fn port(line: &[u8]) -> Option<u32> {
    let mut words = str::from_utf8(line).ok()?.split_whitespace();
    let command = words.next()?;
    let port = words.next()?;
    command
        .eq_ignore_ascii_case("connect")
        .then(|| port.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, HostStream, UnixStream) {
        let (client, stream) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let other = stream.try_clone().unwrap();
        (client, HostStream::new(stream), other)
    }

    #[test]
    fn lines_that_ask_for_a_port_and_others() {
        for (line, expected) in [
            ("CONNECT 52\n", Some(52)),
            ("CONNECT 52\r\n", Some(52)),
            ("CONNECT 4294967295\n", Some(u32::MAX)),
            ("CONNECT 4294967296\n", None),
            ("CONNECT 0052\n", Some(52)),
            ("CONNECT +52\n", Some(52)),
            ("CONNECT -1\n", None),
            ("CONNECT    \n", None),
            ("CONNECT  5\n", Some(5)),
            ("CONNECT 5 \n", Some(5)),
            ("CONNECT\t5\n", Some(5)),
            ("  CONNECT 5\n", Some(5)),
            ("connect 1\n", Some(1)),
            ("CoNNect 1\n", Some(1)),
            ("CONNECT 5 more words\n", Some(5)),
            ("CONNECT 5more\n", None),
            ("CONNECT5 5\n", None),
            ("connect\n5\n", Some(5)),
            ("connect\n52\n", Some(52)),
            ("\n\n\n\n\n\n\n\n\n\n", None),
            ("GET / HTTP/1.1\n", None),
            ("CONNECT \u{e9}\n", None),
            ("CONNECT 4294967295             \n", Some(u32::MAX)),
            ("CONNECT 4294967295              ", Some(u32::MAX)),
            ("CONNECT 00000000000000000000000052\n", Some(0)),
        ] {
            let (mut client, stream, _) = pair();
            client.write_all(line.as_bytes()).unwrap();
            let found = Greeting::default().read(&stream).ok();
            assert_eq!(found, expected, "{line:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces() {
        let (mut client, stream, _) = pair();
        let mut greeting = Greeting::default();
        for piece in ["con", "nect\n", " ", "5", "2"] {
            client.write_all(piece.as_bytes()).unwrap();
            let error = greeting.read(&stream).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{piece:?}");
        }
        client.write_all(b"\n").unwrap();
        assert_eq!(greeting.read(&stream).unwrap(), 52);
    }

    #[test]
    fn a_line_without_end_that_asks_for_nothing_is_refused() {
        let (mut client, stream, _) = pair();
        client.write_all(&[b'1'; 2 * MAX_LINE_SIZE]).unwrap();
        let error = Greeting::default().read(&stream).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_client_that_leaves_is_refused() {
        let (mut client, stream, _) = pair();
        client.write_all(b"CONNECT 5").unwrap();
        let mut greeting = Greeting::default();
        let error = greeting.read(&stream).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(client);
        let error = greeting.read(&stream).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    proptest! {
        #[test]
        fn what_follows_the_line_stays(
            port in any::<u32>(),
            pieces in prop::collection::vec(1..12usize, 1..12),
            rest in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            let (mut client, stream, mut other) = pair();
            let line = format!("CONNECT {port}\n");
            let sent = [line.as_bytes(), &rest].concat();
            let mut greeting = Greeting::default();
            let mut left = &sent[..];
            let mut found = None;
            for size in pieces.into_iter().chain([sent.len()]) {
                let (piece, others) = left.split_at(size.min(left.len()));
                client.write_all(piece).unwrap();
                left = others;
                if found.is_none() {
                    match greeting.read(&stream) {
                        Ok(port) => found = Some(port),
                        Err(error) => prop_assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                    }
                }
            }
            prop_assert_eq!(found, Some(port));
            drop(client);
            let mut bytes = Vec::new();
            other.read_to_end(&mut bytes).unwrap();
            prop_assert_eq!(bytes, rest);
        }

        #[test]
        fn any_bytes_are_a_port_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = port(&bytes);
            let (mut client, stream, _) = pair();
            client.write_all(&bytes).unwrap();
            drop(client);
            let _ = Greeting::default().read(&stream);
        }
    }
}
