//! Responses in HTTP/1.0 and HTTP/1.1.

use crate::store::Format;

/// A version of HTTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Http10,
    Http11,
}

/// The status of a response, with the numbers of RFC 9110, section 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    ContentTooLarge,
    ExpectationFailed,
    HeadTooLarge,
    NotImplemented,
}

impl Status {
    fn text(self) -> &'static str {
        match self {
            Status::Ok => "200 OK",
            Status::BadRequest => "400 Bad Request",
            Status::Unauthorized => "401 Unauthorized",
            Status::NotFound => "404 Not Found",
            Status::MethodNotAllowed => "405 Method Not Allowed",
            Status::ContentTooLarge => "413 Content Too Large",
            Status::ExpectationFailed => "417 Expectation Failed",
            Status::HeadTooLarge => "431 Request Header Fields Too Large",
            Status::NotImplemented => "501 Not Implemented",
        }
    }
}

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub status: Status,
    pub format: Format,
    /// An additional field: its name, which came from a request, and its value.
    pub field: Option<(String, String)>,
    pub body: String,
}

impl Response {
    /// Makes a response of text.
    pub(crate) fn text(status: Status, body: impl Into<String>) -> Response {
        Response {
            status,
            format: Format::Text,
            field: None,
            body: body.into(),
        }
    }

    /// Returns the bytes of the response, without its body if `head_only`.
    pub(crate) fn encode(&self, version: Version, keep_alive: bool, head_only: bool) -> Vec<u8> {
        let version = match version {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let content_type = match self.format {
            Format::Json => "application/json",
            Format::Text => "text/plain",
        };
        let mut text = format!(
            "{version} {}\r\nServer: Bantam\r\nConnection: {connection}\r\n",
            self.status.text()
        );
        if self.status == Status::MethodNotAllowed {
            text.push_str("Allow: GET, PUT\r\n");
        }
        text.push_str(&format!(
            "Content-Type: {content_type}\r\nContent-Length: {}\r\n",
            self.body.len()
        ));
        if let Some((name, value)) = &self.field {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        if !head_only {
            text.push_str(&self.body);
        }
        text.into_bytes()
    }
}
