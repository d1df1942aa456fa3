//! Clients of the API, which check every answer against `docs/openapi.yaml`.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::CONTENT_TYPE;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use jsonschema::Validator;
use serde_json::{Value, json};

/// How long the socket may take to appear, and an answer to arrive.
const PATIENCE: Duration = Duration::from_secs(20);
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// The description of the API.
static DESCRIPTION: LazyLock<Value> = LazyLock::new(|| {
    let text = include_str!("../../docs/openapi.yaml");
    serde_saphyr::from_str(text).expect("the description is YAML")
});

/// An answer of the API, which fits its description.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body, if there is one.
    pub body: Option<Value>,
}

/// A client of the API on a Unix socket. Each request uses a new connection.
pub struct ApiClient {
    socket: PathBuf,
}

impl ApiClient {
    /// Makes a client of the API on `socket`, which may take a moment to appear.
    ///
    /// # Panics
    ///
    /// If the API does not appear in time.
    pub fn new(socket: &Path) -> ApiClient {
        let client = ApiClient {
            socket: socket.to_path_buf(),
        };
        client.connect();
        client
    }

    /// Opens a connection for arbitrary bytes. Its reads and writes time out.
    ///
    /// # Panics
    ///
    /// If it cannot connect.
    pub fn connect(&self) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => {
                    stream
                        .set_read_timeout(Some(PATIENCE))
                        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
                        .expect("sockets have time-outs");
                    return stream;
                }
                Err(error) => {
                    let path = self.socket.display();
                    assert!(Instant::now() < deadline, "no API on '{path}': {error}");
                    thread::sleep(RETRY_INTERVAL);
                }
            }
        }
    }

    /// Sends `bytes` and returns all answers until the server closes the connection, or until a
    /// time-out shows that it does not.
    ///
    /// # Panics
    ///
    /// If it cannot connect.
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // The server may have closed the connection before it has read everything.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Sends a request, and checks the answer against the description of the API.
    ///
    /// # Panics
    ///
    /// If there is no answer, or it does not fit the description.
    #[track_caller]
    pub fn request(&self, method: &str, path: &str, body: &str) -> Answer {
        let (status, content_type, text) = self.send(method, path, body);
        let context = format!("{method} {path} {body}: {status} {text}");
        let answer = Answer {
            status: status.as_u16(),
            body: (!text.is_empty()).then(|| {
                assert_eq!(content_type, "application/json", "{context}");
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{context}: {error}"))
            }),
        };
        check_answer(method, path, &answer, &context);
        if answer.status == 204 {
            check_request(method, path, body, &context);
        }
        answer
    }

    fn send(&self, method: &str, path: &str, body: &str) -> (StatusCode, String, String) {
        let stream = self.connect();
        stream.set_nonblocking(true).expect("sockets can be");
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("Host", "localhost")
            .body(Full::new(Bytes::from(body.to_owned())))
            .expect("tests send what hyper can");
        let exchange = async {
            let stream = tokio::net::UnixStream::from_std(stream).expect("it is a socket");
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            let connection = tokio::spawn(connection);
            let answer = sender.send_request(request).await?;
            let status = answer.status();
            let content_type = answer.headers().get(CONTENT_TYPE);
            let content_type = content_type.map(|value| value.as_bytes().to_vec());
            let text = answer.into_body().collect().await?.to_bytes();
            connection.abort();
            Ok::<_, hyper::Error>((status, content_type.unwrap_or_default(), text))
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("there are descriptors");
        let (status, content_type, text) = runtime
            .block_on(async { tokio::time::timeout(PATIENCE, exchange).await })
            .unwrap_or_else(|_| panic!("{method} {path} is not answered"))
            .unwrap_or_else(|error| panic!("{method} {path} is not answered: {error}"));
        let words = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("answers are text");
        (status, words(&content_type), words(&text))
    }

    /// Returns the answer of a resource to `GET`.
    ///
    /// # Panics
    ///
    /// If the answer is empty, and in the cases of [`ApiClient::request`].
    #[track_caller]
    pub fn get(&self, path: &str) -> Value {
        let answer = self.request("GET", path, "");
        assert_eq!(answer.status, 200, "GET {path}: {answer:?}");
        answer.body.expect("a status of 200 has a body")
    }

    /// Puts a resource, which must succeed.
    ///
    /// # Panics
    ///
    /// If it does not, and as [`ApiClient::request`].
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) {
        self.done("PUT", path, body);
    }

    /// Changes a resource, which must succeed.
    ///
    /// # Panics
    ///
    /// If it does not, and as [`ApiClient::request`].
    #[track_caller]
    pub fn patch(&self, path: &str, body: &Value) {
        self.done("PATCH", path, body);
    }

    #[track_caller]
    fn done(&self, method: &str, path: &str, body: &Value) {
        let answer = self.request(method, path, &body.to_string());
        assert_eq!(answer.status, 204, "{method} {path} {body}: {answer:?}");
    }

    /// `PUT /actions`, which must succeed.
    ///
    /// # Panics
    ///
    /// If it does not, and as [`ApiClient::request`].
    #[track_caller]
    pub fn act(&self, action: &str) {
        self.put("/actions", &json!({ "action_type": action }));
    }

    /// Sends a request that has to be refused, and returns the reason.
    ///
    /// # Panics
    ///
    /// If it is not, and in the cases of [`ApiClient::request`].
    #[track_caller]
    pub fn refused(&self, method: &str, path: &str, body: &str) -> String {
        let answer = self.request(method, path, body);
        assert_eq!(answer.status, 400, "{method} {path} {body}: {answer:?}");
        let body = answer.body.expect("a status of 400 has a body");
        body["fault_message"].as_str().expect("text").to_owned()
    }
}

/// Checks that the description lists the answer's status for the request, and its body. A request
/// that the description does not list has to be refused.
#[track_caller]
fn check_answer(method: &str, path: &str, answer: &Answer, context: &str) {
    let status = answer.status.to_string();
    let listed = match operation(method, path) {
        Some(operation) => &operation["responses"][&status],
        None => {
            let refusals = &DESCRIPTION["paths"]["/"]["get"]["responses"];
            assert!(answer.status >= 400, "not listed: {context}");
            &refusals[&status]
        }
    };
    assert!(listed.is_object(), "status not listed: {context}");
    let response = resolved(listed);
    match (
        &response["content"]["application/json"]["schema"],
        &answer.body,
    ) {
        (Value::Null, None) => {}
        (Value::Null, Some(_)) => panic!("a body is not listed: {context}"),
        (_, None) => panic!("a body is listed: {context}"),
        (schema, Some(body)) => check_value(schema, body, context),
    }
}

/// Checks that the description lists a body that was accepted.
#[track_caller]
fn check_request(method: &str, path: &str, body: &str, context: &str) {
    let operation = operation(method, path).expect("what is not listed is refused");
    let listed = &operation["requestBody"];
    if body.is_empty() && listed["required"] != true {
        return;
    }
    let schema = &listed["content"]["application/json"]["schema"];
    let body = serde_json::from_str(body).unwrap_or_else(|error| panic!("{context}: {error}"));
    check_value(schema, &body, context);
}

#[track_caller]
fn check_value(schema: &Value, value: &Value, context: &str) {
    let errors: Vec<String> = validator(schema)
        .iter_errors(value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{context}: {}", errors.join("; "));
}

/// Returns a validator of `schema`, which may refer to the description's components.
fn validator(schema: &Value) -> Validator {
    let whole = json!({"allOf": [schema], "components": DESCRIPTION["components"]});
    jsonschema::validator_for(&whole).expect("the description has valid schemas")
}

/// Returns the operation that a request asks for, if the description lists it.
fn operation(method: &str, path: &str) -> Option<&'static Value> {
    let paths = DESCRIPTION["paths"].as_object()?;
    let (_, item) = paths.iter().find(|(template, _)| fits(template, path))?;
    item.get(method.to_ascii_lowercase())
}

fn fits(template: &str, path: &str) -> bool {
    let (template, path) = (template.split('/'), path.split('/'));
    template.clone().count() == path.clone().count()
        && template
            .zip(path)
            .all(|(wanted, part)| wanted == part || wanted.starts_with('{') && !part.is_empty())
}

/// Returns the target of a reference.
fn resolved(value: &'static Value) -> &'static Value {
    match value["$ref"].as_str() {
        None => value,
        Some(reference) => {
            let pointer = reference.trim_start_matches('#');
            DESCRIPTION
                .pointer(pointer)
                .unwrap_or_else(|| panic!("the description has no {reference}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_the_description_refers_to_is_there_and_every_schema_is_valid() {
        fn visit(value: &'static Value) {
            match value {
                Value::Object(members) => {
                    resolved(value);
                    members.values().for_each(visit);
                }
                Value::Array(items) => items.iter().for_each(visit),
                _ => {}
            }
        }
        visit(&DESCRIPTION);
        let schemas = DESCRIPTION["components"]["schemas"].as_object().unwrap();
        assert!(!schemas.is_empty());
        schemas.values().map(validator).for_each(drop);
    }

    #[test]
    fn paths_fit_their_templates_only() {
        assert!(operation("PUT", "/drives/root").is_some());
        assert!(operation("GET", "/").is_some());
        for (method, path) in [
            ("PUT", "/drives"),
            ("PUT", "/drives/"),
            ("DELETE", "/drives/a"),
            ("GET", "/vm"),
        ] {
            assert!(operation(method, path).is_none(), "{method} {path}");
        }
    }

    #[test]
    #[should_panic(expected = "Additional properties are not allowed")]
    fn an_answer_with_more_than_is_listed_fails() {
        let answer = Answer {
            status: 200,
            body: Some(json!({"firecracker_version": "1.17.0", "more": 1})),
        };
        check_answer("GET", "/version", &answer, "");
    }

    #[test]
    #[should_panic(expected = "status not listed")]
    fn a_status_that_is_not_listed_fails() {
        let answer = Answer {
            status: 500,
            body: None,
        };
        check_answer("GET", "/version", &answer, "");
    }
}
