//! Serves the API on a Unix socket: HTTP/1.1, with bounded memory and time for each client.

mod answers;
mod connections;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bantam_serving::{Clients, runtime};
use bantam_vmm::{BoundedLog, ListeningSocket};
use tokio::sync::{Mutex, Notify};
use tokio::task;
use tokio::time::{self, MissedTickBehavior};

use self::answers::Service;
use crate::instance::Instance;
use crate::view::View;

/// Maximum number of threads besides that of the server: one executes a request that changes something, and
/// one waits for metrics to be written.
const WORK_THREADS: usize = 2;
/// How long clients may take at the end to receive the answers to their requests.
const LAST_ANSWERS_TIME: Duration = Duration::from_secs(1);
/// How long it may take to write the last metrics.
const LAST_METRICS_TIME: Duration = Duration::from_millis(250);
/// Time between two lines of metrics.
const METRICS_PERIOD: Duration = Duration::from_secs(60);

/// Limits of a server.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Maximum size of a request's body in bytes.
    pub body_size: usize,
    /// Maximum number of clients at a time. Another client takes the place of the one that the server has
    /// waited for longest; if all of them wait for the server, it is told to come back later.
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

/// Why a server cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The host is out of threads or descriptors.
    #[error("cannot serve the API: {0}")]
    Runtime(#[from] io::Error),
}

/// Serves the API of one instance on a Unix socket, which is removed at the end.
pub struct Server {
    view: View,
    instance: Arc<Mutex<Instance>>,
    listener: Option<ListeningSocket>,
    limits: ServerLimits,
    ending: Arc<Notify>,
}

impl Server {
    /// Creates a server of the clients that connect to `listener`. Without a listener it only writes metrics.
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

    /// Returns what ends [`Server::run`] when it is notified.
    pub fn ending(&self) -> Arc<Notify> {
        self.ending.clone()
    }

    /// Serves clients on the calling thread until [`Server::ending`] is notified.
    ///
    /// # Errors
    /// If the host is out of descriptors.
    pub fn run(self) -> Result<(), ServerError> {
        let runtime = runtime("bantam-api-work", WORK_THREADS)?;
        let clients = Clients::new(self.limits.clients);
        let result = runtime.block_on(async {
            let serving = async {
                match &self.listener {
                    Some(listener) => connections::serve(listener, &clients, &self.service()).await,
                    None => std::future::pending().await,
                }
            };
            let served = tokio::select! {
                failed = serving => failed.map(|never| match never {}).map_err(ServerError::from),
                () = write_metrics(&self.view) => Ok(()),
                () = self.ending.notified() => Ok(()),
            };
            // Requests are still answered: a machine may end as soon as it is started.
            let _ = time::timeout(LAST_ANSWERS_TIME, clients.leave()).await;
            // A request or file that is stuck is not waited for.
            let _ = time::timeout(LAST_METRICS_TIME, flush_metrics(&self.view)).await;
            served
        });
        runtime.shutdown_background();
        result
    }
}

async fn write_metrics(view: &View) {
    let mut period = time::interval(METRICS_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // The first tick comes at once.
    period.tick().await;
    loop {
        period.tick().await;
        flush_metrics(view).await;
    }
}

async fn flush_metrics(view: &View) {
    let view = view.clone();
    // On another thread, because writing a file may take long.
    if let Ok(Err(error)) = task::spawn_blocking(move || view.flush_metrics()).await {
        tracing::warn!("cannot write metrics: {error}");
    }
}
