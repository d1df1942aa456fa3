//! Accepts the connections of clients, and serves each on its own.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::{Duration, Instant};

use bantam_vmm::ListeningSocket;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio::time;
use tokio_io_timeout::TimeoutStream;

use super::ServerError;
use super::answers::Service;
use crate::clients::{Clients, Place};

/// How long a client may go without reading any of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Maximum size in bytes of a request's head, and of a client's data that is buffered before it is parsed.
const MAX_HEAD_SIZE: usize = 16 << 10;
/// How long the server pauses after it has failed to accept a client.
const RETRY_TIME: Duration = Duration::from_millis(100);
/// How long clients must have been accepted without a failure before the log says that the failures are
/// over: if descriptors are scarce, one becomes free now and then.
const CALM_TIME: Duration = Duration::from_secs(1);
/// What a client is told if there is no place for it.
const TOO_MANY_CLIENTS: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nServer: Bantam API\r\n\
    Connection: close\r\nContent-Type: application/json\r\nContent-Length: 48\r\n\r\n\
    {\"fault_message\":\"Too many clients of the API.\"}";

/// Accepts clients of `listener` and serves each, as long as the host can.
///
/// # Errors
/// If the host is out of descriptors at the beginning.
pub(super) async fn serve(
    listener: &ListeningSocket,
    clients: &Clients,
    service: &Service,
) -> Result<(), ServerError> {
    let listener = UnixListener::from_std(listener.try_clone_listener()?)?;
    // The time of the last failure, until clients are accepted again.
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
                // Such as too many open files. That passes once a client has left, but trying again at once would
                // be in vain.
                clients.make_room();
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
            // If the socket's buffer has no room for this, the client goes without.
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
        let answer = service.answer(request, place).await;
        place.wait_for_client();
        Ok::<_, Infallible>(answer)
    });
    let connection = http1::Builder::new()
        // A client keeps its place, even when idle or in the middle of a head, until another needs it.
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD_SIZE)
        // A client may close its end after it has sent its request.
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
