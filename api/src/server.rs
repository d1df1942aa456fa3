//! The API on a Unix socket: HTTP/1.1, with bounded memory and time for each client.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_vmm::{BoundedLog, ListeningSocket};
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue, SERVER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request as HttpRequest, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Notify};
use tokio::task;
use tokio::time::{self, MissedTickBehavior};
use tokio_io_timeout::TimeoutStream;

use crate::clients::{Clients, Place};
use crate::fault::Fault;
use crate::instance::Instance;
use crate::reply::Reply;
use crate::request::Request;
use crate::view::View;

/// How long it may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How long it may not take any of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Most bytes of a request's head, and of what is kept of a client's data before it is looked at.
const MAX_HEAD_SIZE: usize = 16 << 10;
/// How much of a body that is too large is passed over.
const PASSED_OVER_SIZE: usize = 4 << 20;
/// Most threads that work: one executes a request that changes something, and one writes metrics.
const WORK_THREADS: usize = 2;
/// How long such a thread waits for more work before it ends.
const WORK_THREAD_TIME: Duration = Duration::from_secs(1);
/// How long no client is accepted after that has failed.
const RETRY_TIME: Duration = Duration::from_millis(100);
/// How long none must have failed to be accepted until that is said to be over: where descriptors are scarce,
/// one becomes free now and then.
const CALM_TIME: Duration = Duration::from_secs(1);
/// How long clients may take to receive the answers to what they have asked for by the end.
const LAST_ANSWERS_TIME: Duration = Duration::from_secs(1);
/// How long it may take to write the last metrics.
const LAST_METRICS_TIME: Duration = Duration::from_millis(250);
/// What a client is told for whom there is no place.
const TOO_MANY_CLIENTS: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nServer: Bantam API\r\n\
    Connection: close\r\nContent-Type: application/json\r\nContent-Length: 48\r\n\r\n\
    {\"fault_message\":\"Too many clients of the API.\"}";
/// Time between two lines of metrics.
const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// What one server takes.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Most bytes of a request's body.
    pub body_size: usize,
    /// Most clients at a time. Another takes the place of whoever the server has waited for longest; if all
    /// of them wait for the server, it is told to come back later.
    pub clients: usize,
}

impl Default for ServerLimits {
    /// 51,200 bytes, and 128 clients.
    fn default() -> ServerLimits {
        ServerLimits {
            body_size: 51_200,
            clients: 128,
        }
    }
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The host has no thread or descriptor for it.
    #[error("cannot serve the API: {0}")]
    Runtime(#[from] io::Error),
}

/// The API of one instance on a Unix socket, which is removed in the end.
pub struct Server {
    view: View,
    instance: Arc<Mutex<Instance>>,
    listener: Option<ListeningSocket>,
    limits: ServerLimits,
    ending: Arc<Notify>,
}

impl Server {
    /// A server of those who connect to `listener`. Without one it only writes the metrics.
    pub fn new(
        instance: Instance,
        listener: Option<ListeningSocket>,
        limits: ServerLimits,
    ) -> Server {
        Server {
            view: instance.view().clone(),
            instance: Arc::new(Mutex::new(instance)),
            listener,
            limits,
            ending: Arc::new(Notify::new()),
        }
    }

    fn service(&self) -> Service {
        Service {
            view: self.view.clone(),
            instance: self.instance.clone(),
            body_size: self.limits.body_size,
            refusals: Arc::new(BoundedLog::new("API")),
            failures: Arc::new(BoundedLog::new("API")),
        }
    }

    /// What ends [`Server::run`] when one is notified.
    pub fn ending(&self) -> Arc<Notify> {
        self.ending.clone()
    }

    /// Serves clients on the calling thread until [`Server::ending`] is notified.
    ///
    /// # Errors
    /// When the host has no descriptors for it.
    pub fn run(self) -> Result<(), ServerError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_name("bantam-api-work")
            .max_blocking_threads(WORK_THREADS)
            .thread_keep_alive(WORK_THREAD_TIME)
            .build()?;
        let clients = Clients::new(self.limits.clients);
        let result = runtime.block_on(async {
            let serving = async {
                match &self.listener {
                    Some(listener) => serve(listener, &clients, &self.service()).await,
                    None => std::future::pending().await,
                }
            };
            let served = tokio::select! {
                failed = serving => failed,
                () = write_metrics(&self.view) => Ok(()),
                () = self.ending.notified() => Ok(()),
            };
            // Whoever has asked for something still hears of it: a machine may end as soon as it is
            // started.
            let _ = time::timeout(LAST_ANSWERS_TIME, clients.leave()).await;
            // A request or file that is stuck is not waited for.
            let _ = time::timeout(LAST_METRICS_TIME, flush_metrics(&self.view)).await;
            served
        });
        runtime.shutdown_background();
        result
    }
}

/// What every client is served.
#[derive(Clone)]
struct Service {
    view: View,
    instance: Arc<Mutex<Instance>>,
    /// Most bytes of a request's body.
    body_size: usize,
    /// Warns of requests that are refused.
    refusals: Arc<BoundedLog>,
    /// Warns of what fails on the host.
    failures: Arc<BoundedLog>,
}

async fn write_metrics(view: &View) {
    let mut period = time::interval(METRICS_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first is at once.
    period.tick().await;
    loop {
        period.tick().await;
        flush_metrics(view).await;
    }
}

async fn flush_metrics(view: &View) {
    let view = view.clone();
    // Apart, as a file may take its time.
    if let Ok(Err(error)) = task::spawn_blocking(move || view.flush_metrics()).await {
        tracing::warn!("cannot write metrics: {error}");
    }
}

async fn serve(
    listener: &ListeningSocket,
    clients: &Clients,
    service: &Service,
) -> Result<(), ServerError> {
    let listener = UnixListener::from_std(listener.try_clone_listener()?)?;
    // When the last client could not be accepted, until that is over.
    let mut last_failure: Option<Instant> = None;
    loop {
        let accepted = match last_failure {
            Some(_) => time::timeout(CALM_TIME, listener.accept()).await.ok(),
            None => Some(listener.accept().await),
        };
        let is_calm = last_failure.is_some_and(|last| last.elapsed() >= CALM_TIME);
        if is_calm && !matches!(accepted, Some(Err(_))) {
            last_failure = None;
            service
                .failures
                .warn(format_args!("clients are accepted again"));
        }
        let client = match accepted {
            Some(Ok((client, _))) => client,
            None => continue,
            // The client has gone.
            Some(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Some(Err(error)) => {
                // Such as too many open files. It passes, and trying again at once helps nobody.
                if last_failure.replace(Instant::now()).is_none() {
                    service
                        .failures
                        .warn(format_args!("cannot accept clients: {error}"));
                }
                time::sleep(RETRY_TIME).await;
                continue;
            }
        };
        let Some(place) = clients.place().await else {
            // What does not fit into the socket's buffer is not waited for.
            let _ = client.try_write(TOO_MANY_CLIENTS);
            continue;
        };
        let service = service.clone();
        tokio::spawn(async move {
            let served = tokio::select! {
                biased;
                () = place.needed() => Err(ClientError::PlaceNeeded),
                served = serve_client(client, &place, &service) => served,
            };
            if let Err(error) = served {
                tracing::debug!("a client of the API: {error}");
            }
        });
    }
}

/// Why a client's connection ends before the client wants it to.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error("its place is needed for another")]
    PlaceNeeded,
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

async fn serve_client(
    client: UnixStream,
    place: &Place,
    service: &Service,
) -> Result<(), ClientError> {
    let mut client = TimeoutStream::new(client);
    client.set_write_timeout(Some(ANSWER_TIME));
    let answer = service_fn(|request| async move {
        let answer = answer(request, place, service).await;
        place.wait_for_client();
        Ok::<_, Infallible>(answer)
    });
    let connection = http1::Builder::new()
        // A client keeps its place, idle or in the middle of a head, until that is needed for another.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_SIZE)
        // A client may close its end when it has asked.
        .half_close(true)
        .serve_connection(TokioIo::new(Box::pin(client)), answer);
    let mut connection = pin!(connection);
    tokio::select! {
        served = connection.as_mut() => served?,
        () = place.leaving() => {
            connection.as_mut().graceful_shutdown();
            connection.await?;
        }
    }
    Ok(())
}

type Answer = Response<Full<Bytes>>;

async fn answer(request: HttpRequest<Incoming>, place: &Place, service: &Service) -> Answer {
    let (head, body) = request.into_parts();
    let body = match time::timeout(BODY_TIME, read_body(body, service.body_size)).await {
        Ok(Ok(Some(body))) => body,
        Ok(Ok(None)) => {
            let limit = service.body_size;
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
    let result = match Request::parse(head.method.as_str(), path, &body) {
        Ok(request) => match service.view.answer(&request) {
            Some(result) => result,
            None => execute_apart(service.instance.clone(), request).await,
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
            if let Some(suppressed) = service.refusals.admit() {
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

/// Reads a body. None if it is larger than `limit`: as much of it as others send by mistake is then passed
/// over, as few clients look at an answer before they have sent everything.
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

/// Executes a request that may take its time on a thread of its own, after those before it. Clients go on
/// being heard, and those that only read are answered.
async fn execute_apart(instance: Arc<Mutex<Instance>>, request: Request) -> Result<Reply, Fault> {
    let mut instance = instance.lock_owned().await;
    let work = task::spawn_blocking(move || instance.execute(request));
    match work.await {
        Ok(result) => result,
        Err(error) => Err(Fault::Value {
            what: "request",
            reason: format!("it has made the API fail, which is a bug: {error}"),
        }),
    }
}

fn fault_body(message: &str) -> Value {
    json!({ "fault_message": message })
}

/// An answer after which the connection is closed, as more of the request may come.
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

#[cfg(test)]
mod tests;
