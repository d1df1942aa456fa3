//! Accepts the connections of clients, and serves each on its own.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::time::Duration;

use bantam_serving::{Clients, Place, accept_clients};
use bantam_vmm::ListeningSocket;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_io_timeout::TimeoutStream;

use super::answers::Service;

/// How long a client may go without reading any of an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// Maximum size in bytes of a request's head, and of a client's data that is buffered before it is parsed.
const MAX_HEAD_SIZE: usize = 16 << 10;
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
) -> io::Result<Infallible> {
    let listener = UnixListener::from_std(listener.try_clone_listener()?)?;
    let serve = |client, place: Place| {
        let service = service.clone();
        async move {
            let served = tokio::select! {
                biased;
                () = place.needed() => Err(ClientError::PlaceNeeded),
                served = serve_client(client, &place, &service) => served,
            };
            if let Err(error) = served {
                tracing::debug!("a client of the API: {error}");
            }
        }
    };
    Ok(accept_clients(
        &listener,
        clients,
        &service.failures,
        TOO_MANY_CLIENTS,
        serve,
    )
    .await)
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
