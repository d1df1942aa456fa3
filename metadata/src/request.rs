//! Requests in HTTP/1.0 and HTTP/1.1 (RFC 9112).

use httparse::{EMPTY_HEADER, Header, Status as ParseStatus};

use crate::response::Version;
use crate::store::Format;

/// Most bytes of a request before its body.
pub(crate) const MAX_HEAD_SIZE: usize = 8 << 10;
/// Most bytes of a body. No request needs one.
pub(crate) const MAX_BODY_SIZE: usize = 8 << 10;
/// Most header fields of a request.
const MAX_FIELDS: usize = 64;

/// The method of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    Get,
    Put,
    /// Handled like other methods, but the response has no body.
    Head,
    Other,
}

/// A field that gives a token's lifetime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    /// As the client wrote it.
    pub name: &'a str,
    pub value: &'a [u8],
}

/// The parts of a request that the service uses.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Request<'a> {
    pub method: Method,
    /// The path, if there is one.
    pub path: Option<&'a str>,
    pub version: Version,
    /// Whether further requests may follow on the same connection.
    pub keep_alive: bool,
    pub format: Format,
    pub token: Option<&'a [u8]>,
    pub token_lifetime: Option<Field<'a>>,
    /// The name of the field that a proxy adds, as it was written.
    pub forwarded_for: Option<&'a str>,
}

/// Why bytes are not a request that can be served. The bytes after them are ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BadRequest {
    /// They are not HTTP.
    Malformed,
    /// Of another version of HTTP.
    Version,
    /// Too long, or with too many fields.
    HeadTooLarge,
    BodyTooLarge,
    /// Its body has a transfer coding.
    Coding,
    /// It expects something before it sends its body.
    Expectation,
}

/// What the parser found at the start of bytes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Parsed<'a> {
    /// The beginning of a request.
    Incomplete,
    /// A request, and how many bytes it takes, body included.
    Complete(Request<'a>, usize),
    Bad(BadRequest),
}

/// Looks for a request at the start of `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let mut fields = [EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let head_size = match request.parse(bytes) {
        Ok(ParseStatus::Complete(size)) if size <= MAX_HEAD_SIZE => size,
        Ok(ParseStatus::Partial) if bytes.len() < MAX_HEAD_SIZE => return Parsed::Incomplete,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Parsed::Bad(BadRequest::HeadTooLarge);
        }
        Err(httparse::Error::Version) => return Parsed::Bad(BadRequest::Version),
        Err(_) => return Parsed::Bad(BadRequest::Malformed),
    };
    let (Some(method), Some(target), Some(version)) =
        (request.method, request.path, request.version)
    else {
        return Parsed::Bad(BadRequest::Malformed);
    };
    let body_size = match body_size(request.headers) {
        Ok(size) => size,
        Err(error) => return Parsed::Bad(error),
    };
    let size = head_size + body_size;
    if bytes.len() < size {
        return Parsed::Incomplete;
    }
    let version = match version {
        0 => Version::Http10,
        _ => Version::Http11,
    };
    let mut parsed = Request {
        method: match method {
            "GET" => Method::Get,
            "PUT" => Method::Put,
            "HEAD" => Method::Head,
            _ => Method::Other,
        },
        path: path(target),
        version,
        keep_alive: version == Version::Http11,
        format: Format::Text,
        token: None,
        token_lifetime: None,
        forwarded_for: None,
    };
    for field in request.headers.iter() {
        parsed.take_field(field);
    }
    Parsed::Complete(parsed, size)
}

impl<'a> Request<'a> {
    fn take_field(&mut self, field: &Header<'a>) {
        let Header { name, value } = *field;
        let is = |other: &str| name.eq_ignore_ascii_case(other);
        if is("connection") {
            for option in list(value) {
                if option.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if option.eq_ignore_ascii_case(b"keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if is("accept") {
            self.format = accepted_format(value);
        } else if is("x-metadata-token") || is("x-aws-ec2-metadata-token") {
            self.token = Some(value);
        } else if is("x-metadata-token-ttl-seconds") || is("x-aws-ec2-metadata-token-ttl-seconds") {
            self.token_lifetime = Some(Field { name, value });
        } else if is("x-forwarded-for") {
            self.forwarded_for = Some(name);
        }
    }
}

/// Returns the path of a request's target, which may have a scheme and host (RFC 9112, section
/// 3.2).
fn path(target: &str) -> Option<&str> {
    let path = match target.strip_prefix("http://") {
        Some(rest) => &rest[rest.find('/')?..],
        None => target,
    };
    path.starts_with('/').then_some(path)
}

/// Returns the first supported format of an `Accept` field. The rest of the field, including
/// weights, does not matter: all other formats get text.
fn accepted_format(value: &[u8]) -> Format {
    for range in list(value) {
        let end = range.iter().position(|&byte| byte == b';');
        let range = range[..end.unwrap_or(range.len())].trim_ascii();
        if range.eq_ignore_ascii_case(b"application/json") {
            return Format::Json;
        }
        if range.eq_ignore_ascii_case(b"text/plain") {
            return Format::Text;
        }
    }
    Format::Text
}

/// Returns the members of a comma-separated list.
fn list(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

/// Returns how many bytes follow the fields (RFC 9112, section 6).
fn body_size(fields: &[Header<'_>]) -> Result<usize, BadRequest> {
    let mut length = None;
    for Header { name, value } in fields {
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(BadRequest::Coding);
        }
        if name.eq_ignore_ascii_case("expect") {
            return Err(BadRequest::Expectation);
        }
        if !name.eq_ignore_ascii_case("content-length") {
            continue;
        }
        // A proxy that chooses the other of two lengths would see other requests than we do.
        for text in list(value) {
            let this = digits(text).ok_or(BadRequest::Malformed)?;
            if length.is_some_and(|other| other != this) {
                return Err(BadRequest::Malformed);
            }
            length = Some(this);
        }
    }
    let length = length.unwrap_or(0);
    if length > MAX_BODY_SIZE {
        return Err(BadRequest::BodyTooLarge);
    }
    Ok(length)
}

/// Parses a number that consists of decimal digits only. It may be arbitrarily large.
fn digits(text: &[u8]) -> Option<usize> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_usize, |number, byte| {
        let digit = byte.is_ascii_digit().then(|| usize::from(byte - b'0'))?;
        Some(number.saturating_mul(10).saturating_add(digit))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn complete(bytes: &[u8]) -> (Request<'_>, usize) {
        match parse(bytes) {
            Parsed::Complete(request, size) => (request, size),
            other => panic!("{:?}: {other:?}", String::from_utf8_lossy(bytes)),
        }
    }

    fn with_fields(fields: &str) -> Vec<u8> {
        format!("GET /a HTTP/1.1\r\n{fields}\r\n").into_bytes()
    }

    #[test]
    fn a_request_is_found_once_all_of_it_is_there() {
        let bytes = b"PUT /latest/api/token HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET";
        for end in 0..bytes.len() - 3 {
            assert_eq!(parse(&bytes[..end]), Parsed::Incomplete, "{end} bytes");
        }
        let (request, size) = complete(bytes);
        assert_eq!(size, bytes.len() - 3);
        assert_eq!(request.method, Method::Put);
        assert_eq!(request.path, Some("/latest/api/token"));
        assert_eq!(request.version, Version::Http11);
    }

    #[test]
    fn targets_are_written_in_two_ways() {
        for (target, path) in [
            ("/", Some("/")),
            ("/a/b?c", Some("/a/b?c")),
            ("//a", Some("//a")),
            ("http://169.254.169.254/a/b", Some("/a/b")),
            ("http://169.254.169.254:80/", Some("/")),
            ("http:///a", Some("/a")),
            ("http://169.254.169.254", None),
            ("http://", None),
            ("a", None),
            ("*", None),
            ("ftp://x/a", None),
        ] {
            let bytes = format!("GET {target} HTTP/1.0\r\n\r\n");
            assert_eq!(complete(bytes.as_bytes()).0.path, path, "{target}");
        }
    }

    #[test]
    fn a_connection_is_kept_as_its_version_says() {
        for (version, connection, keep_alive) in [
            ("1.1", "", true),
            ("1.0", "", false),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "connection: foo , Close\r\n", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
        ] {
            let bytes = format!("GET / HTTP/{version}\r\n{connection}\r\n");
            let (request, _) = complete(bytes.as_bytes());
            assert_eq!(request.keep_alive, keep_alive, "{bytes}");
        }
    }

    #[test]
    fn the_format_is_that_of_the_accept_field() {
        for (accept, format) in [
            ("", Format::Text),
            ("Accept:\r\n", Format::Text),
            ("Accept: */*\r\n", Format::Text),
            ("Accept: text/html\r\n", Format::Text),
            ("Accept: text/plain\r\n", Format::Text),
            ("Accept: application/json\r\n", Format::Json),
            ("accept:  Application/JSON ;q=0.9, */*\r\n", Format::Json),
            ("Accept: text/plain, application/json\r\n", Format::Text),
        ] {
            assert_eq!(complete(&with_fields(accept)).0.format, format, "{accept}");
        }
    }

    #[test]
    fn fields_of_tokens_have_two_names_each() {
        let bytes = with_fields("X-Metadata-Token: abc\r\nX-metadata-token-ttl-seconds: 60\r\n");
        let (request, _) = complete(&bytes);
        assert_eq!(request.token, Some(&b"abc"[..]));
        let lifetime = request.token_lifetime.unwrap();
        assert_eq!(lifetime.name, "X-metadata-token-ttl-seconds");
        assert_eq!(lifetime.value, b"60");
        assert_eq!(request.forwarded_for, None);

        let bytes = with_fields(
            "x-aws-ec2-metadata-token: d\r\nX-aws-ec2-metadata-token-ttl-seconds: 1\r\n\
             X-FORWARDED-FOR: 10.0.0.1\r\n",
        );
        let (request, _) = complete(&bytes);
        assert_eq!(request.token, Some(&b"d"[..]));
        assert_eq!(request.token_lifetime.unwrap().value, b"1");
        assert_eq!(request.forwarded_for, Some("X-FORWARDED-FOR"));
    }

    #[test]
    fn bytes_that_are_not_a_request_are_distinguished_by_reason() {
        let many = "a: b\r\n".repeat(MAX_FIELDS + 1);
        let long = format!("a: {}\r\n", "b".repeat(MAX_HEAD_SIZE));
        for (bytes, error) in [
            (b"GET / HTTP/2.0\r\n\r\n".to_vec(), BadRequest::Version),
            (b"GET /\r\n\r\n".to_vec(), BadRequest::Malformed),
            (b"\0\0\0\0".to_vec(), BadRequest::Malformed),
            (
                b"GET / HTTP/1.1\r\n a\r\n\r\n".to_vec(),
                BadRequest::Malformed,
            ),
            (with_fields("Content-Length: -1\r\n"), BadRequest::Malformed),
            (with_fields("Content-Length: +1\r\n"), BadRequest::Malformed),
            (with_fields("Content-Length:\r\n"), BadRequest::Malformed),
            (
                with_fields("Content-Length: 1, 2\r\n"),
                BadRequest::Malformed,
            ),
            (
                with_fields("Content-Length: 1\r\nContent-Length: 2\r\n"),
                BadRequest::Malformed,
            ),
            (
                with_fields("Content-Length: 8193\r\n"),
                BadRequest::BodyTooLarge,
            ),
            (
                with_fields("Content-Length: 99999999999999999999999999\r\n"),
                BadRequest::BodyTooLarge,
            ),
            (
                with_fields("Transfer-Encoding: chunked\r\n"),
                BadRequest::Coding,
            ),
            (
                with_fields("Expect: 100-continue\r\n"),
                BadRequest::Expectation,
            ),
            (with_fields(&many), BadRequest::HeadTooLarge),
            (with_fields(&long), BadRequest::HeadTooLarge),
            (b"\r\n".repeat(MAX_HEAD_SIZE / 2), BadRequest::HeadTooLarge),
        ] {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert_eq!(parse(&bytes), Parsed::Bad(error), "{text:?}");
        }
    }

    /// Generates bytes that are often almost a request.
    fn almost_a_request() -> impl Strategy<Value = Vec<u8>> {
        const PIECES: [&str; 10] = [
            "GET / HTTP/1.1\r\n",
            "PUT ",
            "Content-Length: 1",
            "Accept: ",
            "Connection:",
            "http://",
            "\r\n",
            "\n",
            " ",
            ", ;",
        ];
        let piece = prop_oneof![
            3 => prop::sample::select(&PIECES[..]).prop_map(|piece| piece.as_bytes().to_vec()),
            1 => prop::collection::vec(any::<u8>(), 0..20),
        ];
        prop::collection::vec(piece, 0..20).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn more_bytes_do_not_change_the_result(
            bytes in almost_a_request(),
            more in almost_a_request(),
        ) {
            let longer = [&bytes[..], &more].concat();
            match parse(&bytes) {
                Parsed::Incomplete => {}
                Parsed::Complete(request, size) => {
                    prop_assert!(size <= bytes.len());
                    prop_assert_eq!(parse(&longer), Parsed::Complete(request, size));
                }
                Parsed::Bad(error) => prop_assert_eq!(parse(&longer), Parsed::Bad(error)),
            }
        }
    }
}
