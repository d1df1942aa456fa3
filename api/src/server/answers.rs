//! Answers requests in HTTP.

use std::sync::Arc;
use std::time::Duration;

use bantam_serving::Place;
use bantam_vmm::BoundedLog;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::{Request as HttpRequest, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::{task, time};

use crate::fault::Fault;
use crate::instance::Instance;
use crate::reply::Reply;
use crate::request::Request;
use crate::resources::parse_request;
use crate::view::View;

/// How long it may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How much of the rest of a body that is too large is read and discarded.
const PASSED_OVER_SIZE: usize = 4 << 20;

/// All that is needed to answer requests.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) view: View,
    pub(super) instance: Arc<Mutex<Instance>>,
    /// Maximum size of a request's body in bytes.
    pub(super) body_size: usize,
    /// Warns of requests that are refused.
    pub(super) refusals: Arc<BoundedLog>,
    /// Warns of failures of the host.
    pub(super) failures: Arc<BoundedLog>,
}

type Answer = Response<Full<Bytes>>;

impl Service {
    /// Reads a request of the client at `place`, and returns the answer to it.
    pub(super) async fn answer(&self, request: HttpRequest<Incoming>, place: &Place) -> Answer {
        let (head, body) = request.into_parts();
        let body = match time::timeout(BODY_TIME, read_body(body, self.body_size)).await {
            Ok(Ok(Some(body))) => body,
            Ok(Ok(None)) => {
                let limit = self.body_size;
                let message = format!("The body is larger than the limit of {limit} bytes");
                return last_answer(StatusCode::BAD_REQUEST, &message);
            }
            Ok(Err(error)) => {
                let message = format!("The body cannot be read: {error}");
                return last_answer(StatusCode::BAD_REQUEST, &message);
            }
            Err(_) => {
                let message = "The body has not come in time";
                return last_answer(StatusCode::REQUEST_TIMEOUT, message);
            }
        };
        place.work();
        let path = head.uri.path();
        let result = match parse_request(head.method.as_str(), path, &body) {
            Ok(request) => match request.answer(&self.view) {
                Some(result) => result,
                None => self.execute_apart(request).await,
            },
            Err(fault) => Err(fault),
        };
        match result {
            Ok(reply) => {
                tracing::debug!("API: {} {path}", head.method);
                match reply {
                    Reply::Done => answer_with(StatusCode::NO_CONTENT, None),
                    Reply::Value(value) => answer_with(StatusCode::OK, Some(&value)),
                }
            }
            Err(fault) => {
                let message = fault.message();
                if let Some(suppressed) = self.refusals.admit() {
                    tracing::warn!(
                        "API: {} {path} is refused: {message}{suppressed}",
                        head.method
                    );
                }
                let status = match fault.is_too_large() {
                    true => StatusCode::PAYLOAD_TOO_LARGE,
                    false => StatusCode::BAD_REQUEST,
                };
                answer_with(status, Some(&fault_body(&message)))
            }
        }
    }

    /// Executes a request that changes something, on another thread and after the requests before it. It may
    /// take long: requests that only read are answered meanwhile.
    async fn execute_apart(&self, request: Request) -> Result<Reply, Fault> {
        let mut instance = self.instance.clone().lock_owned().await;
        let work = task::spawn_blocking(move || request.execute(&mut instance));
        match work.await {
            Ok(result) => result,
            Err(error) => Err(Fault::Value {
                what: "request",
                reason: format!("it has made the API fail, which is a bug: {error}"),
            }),
        }
    }
}

/// Reads a body. Returns `None` if it is larger than `limit`. The rest of a body that is only somewhat larger
/// is read and discarded, because few clients look at an answer before they have sent everything.
async fn read_body(mut body: Incoming, limit: usize) -> hyper::Result<Option<Vec<u8>>> {
    let most = limit.saturating_add(PASSED_OVER_SIZE);
    let announced = body.size_hint().lower();
    if announced > most as u64 {
        return Ok(None);
    }
    let mut kept = Vec::new();
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        size += data.len();
        if size <= limit {
            kept.extend_from_slice(&data);
        } else if size > most {
            break;
        }
    }
    Ok((size <= limit).then_some(kept))
}

fn fault_body(message: &str) -> Value {
    json!({ "fault_message": message })
}

/// Creates an answer after which the connection is closed, because the rest of the request may still come.
fn last_answer(status: StatusCode, message: &str) -> Answer {
    let mut answer = answer_with(status, Some(&fault_body(message)));
    let headers = answer.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    answer
}

fn answer_with(status: StatusCode, body: Option<&Value>) -> Answer {
    let text = body.map(Value::to_string).unwrap_or_default();
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Bantam API"));
    if body.is_some() {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    answer
}
