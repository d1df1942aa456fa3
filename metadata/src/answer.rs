//! The protocol between the service and programs of the guest: the answer to each request.
//!
//! It is that of Firecracker's metadata service, statuses and texts included, so that programs
//! written for that service work.

use std::time::Instant;

use crate::metadata::{Metadata, MetadataVersion};
use crate::request::{BadRequest, Field, Method, Request};
use crate::response::{Response, Status};
use crate::store::{Format, LookupError};
use crate::token::LIFETIMES;

/// Path of requests for tokens.
const TOKEN_PATH: [&str; 3] = ["latest", "api", "token"];

/// Answers a request that arrived at `now`.
pub(crate) fn answer(metadata: &Metadata, request: &Request<'_>, now: Instant) -> Response {
    let Some(path) = request.path else {
        return Response::text(Status::BadRequest, "Invalid URI.");
    };
    match request.method {
        Method::Get => get(metadata, path, request, now),
        Method::Put => put(metadata, path, request, now),
        Method::Head | Method::Other => {
            Response::text(Status::MethodNotAllowed, "Not allowed HTTP method.")
        }
    }
}

/// Answers bytes that are not a valid request.
pub(crate) fn answer_bad(error: BadRequest) -> Response {
    let (status, text) = match error {
        BadRequest::Malformed => (Status::BadRequest, "Invalid request."),
        BadRequest::Version => (Status::NotImplemented, "Unsupported HTTP version."),
        BadRequest::HeadTooLarge => (Status::HeadTooLarge, "The request is too large."),
        BadRequest::BodyTooLarge => (Status::ContentTooLarge, "The request is too large."),
        BadRequest::Coding => (Status::NotImplemented, "Unsupported transfer coding."),
        BadRequest::Expectation => (Status::ExpectationFailed, "Unsupported expectation."),
    };
    Response::text(status, text)
}

fn get(metadata: &Metadata, path: &str, request: &Request<'_>, now: Instant) -> Response {
    let refusal = match request.token {
        None => {
            metadata.metrics().rx_no_token.add(1);
            Some(
                "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` \
                 header to specify the session token.",
            )
        }
        Some(token) if !metadata.tokens().is_valid(token, now) => {
            metadata.metrics().rx_invalid_token.add(1);
            Some("MMDS token not valid.")
        }
        Some(_) => None,
    };
    if metadata.version() == MetadataVersion::V2
        && let Some(refusal) = refusal
    {
        return Response::text(Status::Unauthorized, refusal);
    }
    let format = if metadata.imds_compat() {
        Format::Text
    } else {
        request.format
    };
    match metadata.store().look_up(path, format) {
        Ok(body) => Response {
            format,
            ..Response::text(Status::Ok, body)
        },
        Err(LookupError::NotFound) => not_found(path),
        Err(LookupError::NoText) => Response::text(
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        ),
    }
}

fn put(metadata: &Metadata, path: &str, request: &Request<'_>, now: Instant) -> Response {
    // A request through a proxy does not come from the guest itself.
    if let Some(name) = request.forwarded_for {
        return Response::text(
            Status::BadRequest,
            format!("Invalid header. Reason: Unsupported header name. Key: {name}"),
        );
    }
    let segments = path.split('/').filter(|segment| !segment.is_empty());
    if path.ends_with('/') || !segments.eq(TOKEN_PATH) {
        return not_found(path);
    }
    let Some(Field { name, value }) = request.token_lifetime else {
        return Response::text(
            Status::BadRequest,
            "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
             `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.",
        );
    };
    let value = String::from_utf8_lossy(value);
    let Ok(lifetime) = value.parse() else {
        return Response::text(
            Status::BadRequest,
            format!("Invalid header. Reason: Invalid value. Key:{name}; Value:{value}"),
        );
    };
    match metadata.tokens().issue(lifetime, now) {
        Some(token) => Response {
            field: Some((name.to_owned(), lifetime.to_string())),
            ..Response::text(Status::Ok, token)
        },
        None => Response::text(
            Status::BadRequest,
            format!(
                "Invalid time to live value provided for token: {lifetime}. Please provide a value \
                 between {} and {}.",
                LIFETIMES.start(),
                LIFETIMES.end()
            ),
        ),
    }
}

fn not_found(path: &str) -> Response {
    Response::text(Status::NotFound, format!("Resource not found: {path}."))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::metadata::{MetadataOptions, test_metadata};
    use crate::request::{Parsed, parse};

    fn metadata(version: MetadataVersion) -> Metadata {
        test_metadata(
            version,
            json!({"latest": {"name": "x", "count": 3}, "list": [1]}),
        )
    }

    fn ask_at(metadata: &Metadata, request: &str, now: Instant) -> Response {
        match parse(request.replace('\n', "\r\n").as_bytes()) {
            Parsed::Complete(request, _) => answer(metadata, &request, now),
            other => panic!("{request}: {other:?}"),
        }
    }

    fn ask(metadata: &Metadata, request: &str) -> Response {
        ask_at(metadata, request, Instant::now())
    }

    #[track_caller]
    fn check(metadata: &Metadata, request: &str, status: Status, body: &str) {
        let response = ask(metadata, request);
        assert_eq!(
            (response.status, response.body.as_str()),
            (status, body),
            "{request}"
        );
    }

    fn token(metadata: &Metadata, lifetime: u32, now: Instant) -> String {
        let request =
            format!("PUT /latest/api/token HTTP/1.1\nX-metadata-token-ttl-seconds: {lifetime}\n\n");
        let response = ask_at(metadata, &request, now);
        assert_eq!(response.status, Status::Ok);
        assert_eq!(response.format, Format::Text);
        response.body
    }

    #[test]
    fn the_first_version_needs_no_token() {
        let metadata = metadata(MetadataVersion::V1);
        check(&metadata, "GET /latest/name HTTP/1.1\n\n", Status::Ok, "x");
        assert_eq!(metadata.metrics().rx_no_token.total(), 1);
        let request = "GET /latest/name HTTP/1.1\nX-metadata-token: invalid\n\n";
        check(&metadata, request, Status::Ok, "x");
        assert_eq!(metadata.metrics().rx_invalid_token.total(), 1);
        let token = token(&metadata, 60, Instant::now());
        let request = format!("GET /latest/name HTTP/1.1\nX-metadata-token: {token}\n\n");
        check(&metadata, &request, Status::Ok, "x");
        assert_eq!(metadata.metrics().rx_no_token.total(), 1);
        assert_eq!(metadata.metrics().rx_invalid_token.total(), 1);
    }

    #[test]
    fn the_second_version_needs_a_token_that_has_not_expired() {
        let metadata = metadata(MetadataVersion::V2);
        let response = ask(&metadata, "GET /latest/name HTTP/1.1\n\n");
        assert_eq!(response.status, Status::Unauthorized);
        let request = "GET /latest/name HTTP/1.1\nX-metadata-token: invalid\n\n";
        check(
            &metadata,
            request,
            Status::Unauthorized,
            "MMDS token not valid.",
        );
        let now = Instant::now();
        let token = token(&metadata, 10, now);
        for field in ["X-metadata-token", "x-aws-ec2-metadata-token"] {
            let request = format!("GET /latest/name HTTP/1.1\n{field}: {token}\n\n");
            check(&metadata, &request, Status::Ok, "x");
            let later = now + Duration::from_secs(10);
            let response = ask_at(&metadata, &request, later);
            assert_eq!(response.status, Status::Unauthorized);
        }
        assert_eq!(metadata.metrics().rx_no_token.total(), 1);
        assert_eq!(metadata.metrics().rx_invalid_token.total(), 3);
    }

    #[test]
    fn tokens_are_given_by_the_rules() {
        for version in [MetadataVersion::V1, MetadataVersion::V2] {
            let metadata = metadata(version);
            let put = |path: &str, fields: &str| {
                ask(&metadata, &format!("PUT {path} HTTP/1.1\n{fields}\n"))
            };
            let lifetime = "X-aws-ec2-metadata-token-ttl-seconds: 21600\n";
            let response = put("//latest/api//token", lifetime);
            assert_eq!(response.status, Status::Ok);
            let field = ("X-aws-ec2-metadata-token-ttl-seconds", "21600");
            assert_eq!(response.field, Some((field.0.into(), field.1.into())));

            let response = put("/latest/api/token", "");
            assert_eq!(response.status, Status::BadRequest);
            assert!(response.body.starts_with("Token time to live"));
            for (value, body) in [
                (
                    "0",
                    "Invalid time to live value provided for token: 0. Please provide a value \
                     between 1 and 21600.",
                ),
                (
                    "21601",
                    "Invalid time to live value provided for token: 21601. Please provide a value \
                     between 1 and 21600.",
                ),
                (
                    "soon",
                    "Invalid header. Reason: Invalid value. Key:X-metadata-token-ttl-seconds; \
                     Value:soon",
                ),
            ] {
                let fields = format!("X-metadata-token-ttl-seconds: {value}\n");
                let response = put("/latest/api/token", &fields);
                assert_eq!(response.status, Status::BadRequest);
                assert_eq!(response.body, body);
            }
            let fields = format!("{lifetime}x-Forwarded-For: 10.0.0.1\n");
            let response = put("/latest/api/token", &fields);
            assert_eq!(response.status, Status::BadRequest);
            assert_eq!(
                response.body,
                "Invalid header. Reason: Unsupported header name. Key: x-Forwarded-For"
            );
            for path in ["/latest/api/token/", "/latest/api", "/latest/name", "/"] {
                let response = put(path, lifetime);
                assert_eq!(response.status, Status::NotFound, "{path}");
                assert_eq!(response.body, format!("Resource not found: {path}."));
            }
        }
    }

    #[test]
    fn parts_are_read_in_the_format_that_is_asked_for() {
        let metadata = metadata(MetadataVersion::V1);
        let json = "Accept: application/json\n";
        for (path, fields, format, body) in [
            ("/", "", Format::Text, "latest/\nlist"),
            ("/latest/", "", Format::Text, "count\nname"),
            ("/latest", json, Format::Json, r#"{"count":3,"name":"x"}"#),
            ("/latest/count", json, Format::Json, "3"),
            ("/list/0", json, Format::Json, "1"),
        ] {
            let response = ask(&metadata, &format!("GET {path} HTTP/1.1\n{fields}\n"));
            let expected = Response {
                format,
                ..Response::text(Status::Ok, body)
            };
            assert_eq!(response, expected, "{path}");
        }
        check(
            &metadata,
            "GET /latest/count HTTP/1.1\n\n",
            Status::NotImplemented,
            "Cannot retrieve value. The value has an unsupported type.",
        );
        check(
            &metadata,
            "GET /latest//gone HTTP/1.1\nAccept: application/json\n\n",
            Status::NotFound,
            "Resource not found: /latest//gone.",
        );
    }

    #[test]
    fn a_compatible_service_answers_only_text() {
        let options = MetadataOptions {
            imds_compat: true,
            ..MetadataOptions::default()
        };
        let metadata = Metadata::new(&options).unwrap();
        metadata.put(json!({"a": {"b": "c"}})).unwrap();
        let response = ask(&metadata, "GET /a HTTP/1.1\nAccept: application/json\n\n");
        let expected = Response::text(Status::Ok, "b");
        assert_eq!(response, expected);
    }

    #[test]
    fn other_requests_are_refused() {
        let metadata = metadata(MetadataVersion::V2);
        for method in ["POST", "PATCH", "DELETE", "HEAD", "OPTIONS", "get"] {
            let response = ask(&metadata, &format!("{method} /latest HTTP/1.1\n\n"));
            assert_eq!(response.status, Status::MethodNotAllowed, "{method}");
            let bytes = response.encode(crate::response::Version::Http11, true, false);
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains("\r\nAllow: GET, PUT\r\n"), "{text}");
        }
        check(
            &metadata,
            "GET http://169.254.169.254 HTTP/1.1\n\n",
            Status::BadRequest,
            "Invalid URI.",
        );
    }
}
