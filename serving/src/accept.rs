//! Accepts clients for as long as the host can.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::time::{Duration, Instant};

use bantam_vmm::BoundedLog;
use tokio::net::{UnixListener, UnixStream};
use tokio::time;

use crate::clients::{Clients, Place};

/// How long the server pauses after it has failed to accept a client.
const RETRY_TIME: Duration = Duration::from_millis(100);
/// How long clients must have been accepted without a failure before the log says that the failures are
/// over: if descriptors are scarce, one becomes free now and then.
const CALM_TIME: Duration = Duration::from_secs(1);

/// Accepts clients of `listener` for as long as it is polled, and serves each by `serve` in a task of its own.
/// A client for which there is no place gets `too_many` instead. Warns of the host's failures in `failures`.
pub async fn accept_clients<S, T>(
    listener: &UnixListener,
    clients: &Clients,
    failures: &BoundedLog,
    too_many: &[u8],
    serve: S,
) -> Infallible
where
    S: Fn(UnixStream, Place) -> T,
    T: Future<Output = ()> + Send + 'static,
{
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
            failures.warn(format_args!("clients are accepted again"));
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
                    failures.warn(format_args!("cannot accept clients: {error}"));
                }
                time::sleep(RETRY_TIME).await;
                continue;
            }
        };
        match clients.place().await {
            Some(place) => drop(tokio::spawn(serve(client, place))),
            // If the socket's buffer has no room for this, the client goes without.
            None => drop(client.try_write(too_many)),
        }
    }
}
