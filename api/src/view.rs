//! The part of an instance that can be read at any time, even while it executes a request.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use bantam_serving::lock;
use bantam_vmm::{Controller, MetadataStore, State};
use serde_json::Value;

use crate::configuration::Configuration;
use crate::fault::Fault;
use crate::latencies::Latencies;
use crate::method::Method;
use crate::metrics_file::MetricsFile;
use crate::metrics_groups::{Group, groups};
use crate::request_counts::RequestCounts;
use crate::startup_times::StartupTimes;

/// Gives what can be read of an instance, and writes its metrics, without a wait for a request that changes
/// the instance. Clones are views of the same one.
///
/// Its locks are held for moments, except the one of the metrics file, which no request to read takes.
#[derive(Clone)]
pub struct View(Arc<Parts>);

struct Parts {
    id: String,
    controller: Controller,
    configuration: Mutex<Arc<Configuration>>,
    /// The metadata, unless the machine has taken it over.
    metadata: Mutex<MetadataStore>,
    requests: Mutex<RequestCounts>,
    latencies: Mutex<Latencies>,
    startup_times: StartupTimes,
    /// The groups of metrics of the resources.
    metrics_groups: Vec<Group>,
    /// Locked while a line is written, for a second or two at most.
    metrics_file: Mutex<Option<MetricsFile>>,
}

impl View {
    pub(crate) fn new(
        id: String,
        controller: Controller,
        metadata: MetadataStore,
        startup_times: StartupTimes,
        metrics_groups: Vec<Group>,
    ) -> View {
        View(Arc::new(Parts {
            id,
            controller,
            configuration: Mutex::default(),
            metadata: Mutex::new(metadata),
            requests: Mutex::default(),
            latencies: Mutex::default(),
            startup_times,
            metrics_groups,
            metrics_file: Mutex::new(None),
        }))
    }

    /// Counts a request that was answered, given its method and name.
    pub(crate) fn count(&self, request: (Method, &'static str), refused: bool) {
        lock(&self.0.requests).count(request, refused);
    }

    /// Counts the use of a field that clients are to do without.
    pub(crate) fn count_deprecated(&self) {
        lock(&self.0.requests).count_deprecated();
    }

    /// Has the machine do `work`, for a request that was received at `received`, and records how long it took if it
    /// succeeds. The metrics call it `name`.
    pub(crate) fn timed<T>(
        &self,
        name: &'static str,
        received: Instant,
        work: impl FnOnce() -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let begun = Instant::now();
        let done = work()?;
        let ended = Instant::now();
        lock(&self.0.latencies).set(name, ended - received, ended - begun);
        Ok(done)
    }

    pub(crate) fn id(&self) -> &str {
        &self.0.id
    }

    pub(crate) fn controller(&self) -> &Controller {
        &self.0.controller
    }

    /// Returns the current configuration.
    pub(crate) fn configuration(&self) -> Arc<Configuration> {
        lock(&self.0.configuration).clone()
    }

    /// Replaces the configuration.
    pub(crate) fn set_configuration(&self, configuration: Configuration) {
        *lock(&self.0.configuration) = Arc::new(configuration);
    }

    /// The metadata, unless the machine has taken it over.
    pub(crate) fn own_metadata(&self) -> MutexGuard<'_, MetadataStore> {
        lock(&self.0.metadata)
    }

    /// Returns the metadata that the guest is told, or will be told after the start.
    pub(crate) fn metadata(&self) -> Result<Option<Value>, Fault> {
        match self.serves_metadata() {
            true => Ok(self.0.controller.metadata()?),
            false => Ok(self.own_metadata().get().cloned()),
        }
    }

    /// Whether the machine has taken the metadata over.
    pub(crate) fn serves_metadata(&self) -> bool {
        self.configuration().mmds_config.is_some() && self.require_started().is_ok()
    }

    pub(crate) fn require_started(&self) -> Result<(), Fault> {
        match self.0.controller.state() {
            State::NotConfigured | State::Configured | State::Starting => Err(Fault::BeforeStart),
            _ => Ok(()),
        }
    }

    /// Whether there is a file of metrics.
    pub(crate) fn has_metrics_file(&self) -> bool {
        lock(&self.0.metrics_file).is_some()
    }

    pub(crate) fn set_metrics_file(&self, file: MetricsFile) {
        *lock(&self.0.metrics_file) = Some(file);
    }

    /// Writes the metrics to their file, if they have one and the machine has been started.
    ///
    /// # Errors
    /// If they cannot be written. The next line then includes what this one would have said.
    pub(crate) fn flush_metrics(&self) -> io::Result<()> {
        let mut file = lock(&self.0.metrics_file);
        let (Ok(metrics), Some(file)) = (self.0.controller.metrics(), &mut *file) else {
            return Ok(());
        };
        let machine = serde_json::to_value(metrics)?;
        let ids = self.configuration().names().ids();
        let mut totals = groups(&self.0.metrics_groups, &machine, &ids);
        let startup_times = serde_json::to_value(self.0.startup_times)?;
        totals.insert("api_server".to_string(), startup_times);
        lock(&self.0.requests).add_to(&mut totals);
        lock(&self.0.latencies).add_to(&mut totals);
        file.write(Value::Object(totals))
    }
}
