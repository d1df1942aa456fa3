//! The HTTP state of one connection: requests, which arrive in pieces, and the responses to them.

use std::time::Instant;

use crate::answer::{answer, answer_bad};
use crate::metadata::Metadata;
use crate::request::{MAX_BODY_SIZE, MAX_HEAD_SIZE, Method, Parsed, parse};
use crate::response::Version;

/// Most bytes that wait to be parsed. A whole request fits.
const MAX_RECEIVED: usize = MAX_HEAD_SIZE + MAX_BODY_SIZE;

/// The state of a connection. Its requests are answered one after the other, each once the response
/// before it has been taken.
#[derive(Default)]
pub(crate) struct Connection {
    /// The bytes of the next request so far.
    received: Vec<u8>,
    response: Vec<u8>,
    /// How much of the response has been taken.
    taken: usize,
    /// Whether the response is the last.
    closing: bool,
}

impl Connection {
    /// Takes bytes of the client, as far as there is room, and returns their number.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> usize {
        // What the client sends after the last response is ignored.
        if self.closing {
            return bytes.len();
        }
        let count = bytes.len().min(MAX_RECEIVED - self.received.len());
        self.received.extend_from_slice(&bytes[..count]);
        count
    }

    /// Answers the next request, if it is complete and the previous response has been taken.
    pub(crate) fn answer(&mut self, metadata: &Metadata, now: Instant) -> bool {
        if !self.response().is_empty() || self.closing {
            return false;
        }
        let size = match parse(&self.received) {
            Parsed::Incomplete => return false,
            Parsed::Complete(request, size) => {
                let response = answer(metadata, &request, now);
                let head_only = request.method == Method::Head;
                self.closing = !request.keep_alive;
                self.response = response.encode(request.version, request.keep_alive, head_only);
                size
            }
            Parsed::Bad(error) => {
                self.closing = true;
                self.response = answer_bad(error).encode(Version::Http11, false, false);
                self.received.len()
            }
        };
        self.taken = 0;
        self.received.drain(..size);
        true
    }

    /// Returns the bytes that are left of the response.
    pub(crate) fn response(&self) -> &[u8] {
        &self.response[self.taken..]
    }

    /// Removes the first `count` bytes that are left of the response.
    pub(crate) fn take(&mut self, count: usize) {
        self.taken += count.min(self.response().len());
        if self.response().is_empty() {
            // It can be large.
            self.response = Vec::new();
            self.taken = 0;
        }
    }

    /// Returns whether the last response has been taken.
    pub(crate) fn is_finished(&self) -> bool {
        self.closing && self.response().is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::metadata::{MetadataVersion, test_metadata};

    /// Returns all that a client receives when it sends these pieces.
    fn talk(pieces: &[&[u8]]) -> (String, Connection) {
        let metadata = test_metadata(MetadataVersion::V1, json!({"a": "b", "c": "d"}));
        let mut connection = Connection::default();
        let mut answers = Vec::new();
        for piece in pieces {
            let mut rest = *piece;
            loop {
                let count = connection.receive(rest);
                rest = &rest[count..];
                while connection.answer(&metadata, Instant::now()) {
                    while !connection.response().is_empty() {
                        // In small pieces too.
                        let count = connection.response().len().min(7);
                        answers.extend_from_slice(&connection.response()[..count]);
                        connection.take(count);
                    }
                }
                assert!(connection.received.len() <= MAX_RECEIVED);
                if rest.is_empty() || count == 0 {
                    break;
                }
            }
            assert!(rest.is_empty(), "what cannot be understood is answered");
        }
        (String::from_utf8(answers).unwrap(), connection)
    }

    fn statuses(answers: &str) -> Vec<&str> {
        let starts = answers.split("HTTP/1.").skip(1);
        starts.map(|answer| &answer[2..5]).collect()
    }

    #[test]
    fn requests_are_answered_in_order_however_they_come() {
        let requests =
            b"GET /a HTTP/1.1\r\n\r\nPUT /a HTTP/1.1\r\nContent-Length: 3\r\n\r\nGETGET /c \
                         HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /c HTTP/1.1\r\n\r\n";
        let (whole, connection) = talk(&[requests]);
        assert_eq!(statuses(&whole), ["200", "404", "200", "200"]);
        assert!(whole.ends_with("Content-Length: 1\r\n\r\nd"), "{whole}");
        assert!(!connection.is_finished());
        let pieces: Vec<_> = requests.chunks(1).collect();
        assert_eq!(talk(&pieces).0, whole);
    }

    #[test]
    fn the_last_request_ends_the_connection() {
        for (requests, expected) in [
            (
                &b"GET /a HTTP/1.0\r\n\r\nGET /a HTTP/1.0\r\n\r\n"[..],
                "200",
            ),
            (b"GET /a HTTP/1.1\r\nConnection: close\r\n\r\nGET", "200"),
            (b"\0\0\0\0GET /a HTTP/1.0\r\n\r\n", "400"),
            (b"GET /a HTTP/3.0\r\n\r\n", "501"),
        ] {
            let (answers, connection) = talk(&[requests]);
            assert_eq!(statuses(&answers), [expected], "{requests:?}");
            assert!(answers.contains("\r\nConnection: close\r\n"), "{answers}");
            assert!(connection.is_finished());
        }
    }

    #[test]
    fn a_request_without_end_is_answered_and_forgotten() {
        let line = b"a: bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb\r\n";
        let mut pieces = vec![&b"GET /a HTTP/1.1\r\n"[..]];
        pieces.extend([&line[..]; 1000]);
        let (answers, connection) = talk(&pieces);
        assert_eq!(statuses(&answers), ["431"]);
        assert!(connection.received.is_empty());
    }

    #[test]
    fn a_client_that_takes_no_body_gets_none() {
        let (answers, _) = talk(&[b"HEAD /a HTTP/1.1\r\n\r\n"]);
        assert_eq!(statuses(&answers), ["405"]);
        assert!(answers.ends_with("\r\n\r\n"), "{answers}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_accepted_or_refused(pieces in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..3000), 0..20,
        )) {
            let pieces: Vec<_> = pieces.iter().map(Vec::as_slice).collect();
            talk(&pieces);
        }
    }
}
