//! The instance that the API controls: a configuration, and the machine that is built from it.

use std::path::PathBuf;
use std::time::Duration;

use bantam_vmm::config::SerialConfig;
use bantam_vmm::{Controller, MetadataStore, Snapshot, State};
use serde_json::Value;

use crate::bodies::logger::Logger;
use crate::bodies::metrics::Metrics;
use crate::bounded::Bounded;
use crate::configuration::Configuration;
use crate::fault::Fault;
use crate::metrics_file::MetricsFile;
use crate::metrics_groups::Group;
use crate::startup_times::StartupTimes;
use crate::view::View;

/// How long it may take to open a file for the log or the metrics.
const OPEN_TIME: Duration = Duration::from_secs(5);

/// What the file of the log is called in messages.
const LOG_FILE: &str = "log file";

/// What the file of the metrics is called in messages.
const METRICS_FILE: &str = "metrics file";

/// The log of the program, as far as clients can set it.
pub trait ProgramLog: Send {
    /// Applies the settings in `logger`, and leaves others as they are. This may take as long as a file takes
    /// to open.
    ///
    /// # Errors
    /// If its file cannot be used.
    fn set(&mut self, logger: &Logger) -> Result<(), Fault>;
}

/// Options of an [`Instance`], which the program sets.
pub struct InstanceOptions {
    /// Its name.
    pub id: String,
    /// The program's log.
    pub log: Box<dyn ProgramLog>,
    /// The file that the log goes to already, if any.
    pub log_path: Option<PathBuf>,
    /// How long the process took to start.
    pub startup_times: StartupTimes,
    /// Called when a machine that has the console has been started.
    pub on_start: Box<dyn FnMut() + Send>,
    /// Whether the guest has a device by which it reports that it has booted.
    pub boot_timer: bool,
    /// Maximum size of the metadata in bytes.
    pub metadata_size: usize,
}

/// Holds a configuration and its machine. A request that only reads needs only its [`View`].
pub struct Instance {
    view: View,
    log: Bounded<Box<dyn ProgramLog>>,
    /// The file that the log goes to.
    log_path: Option<PathBuf>,
    /// Opens the file of metrics.
    opener: Bounded<()>,
    on_start: Box<dyn FnMut() + Send>,
    boot_timer: bool,
    /// Whether clients have begun to configure a machine that boots.
    will_boot: bool,
}

impl Instance {
    /// An instance with nothing configured, whose machine `controller` will own, with these groups of metrics
    /// beside those that every instance has.
    pub(crate) fn new(
        controller: Controller,
        options: InstanceOptions,
        metrics_groups: Vec<Group>,
    ) -> Instance {
        let metadata = MetadataStore::new(options.metadata_size);
        Instance {
            view: View::new(
                options.id,
                controller,
                metadata,
                options.startup_times,
                metrics_groups,
            ),
            log: Bounded::new(options.log),
            log_path: options.log_path,
            opener: Bounded::new(()),
            on_start: options.on_start,
            boot_timer: options.boot_timer,
            will_boot: false,
        }
    }

    /// Applies the content of a configuration file.
    ///
    /// # Errors
    /// If a part of it cannot be used.
    pub fn configure(&mut self, configuration: Configuration) -> Result<(), Fault> {
        let configuration = configuration.check()?;
        let (logger, metrics) = (configuration.logger.clone(), configuration.metrics.clone());
        // The rest comes first, so that neither file can be one that the machine uses.
        self.record(|before| {
            *before = Configuration {
                logger: before.logger.take(),
                metrics: before.metrics.take(),
                ..configuration
            };
        });
        if let Some(logger) = logger {
            self.put_logger(logger)?;
        }
        if let Some(metrics) = metrics {
            self.put_metrics(metrics)?;
        }
        Ok(())
    }

    /// The part of it that can be read at any time.
    pub fn view(&self) -> &View {
        &self.view
    }

    pub(crate) fn controller(&self) -> &Controller {
        self.view.controller()
    }

    /// Changes the configuration of a machine that boots, which is allowed only before the start. A refused change has no
    /// effect, except that no snapshot can be loaded any more, as in Firecracker.
    pub(crate) fn change(
        &mut self,
        change: impl FnOnce(&mut Configuration) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.will_boot = true;
        self.change_any(change)
    }

    /// Does the same with a part of the configuration after which a snapshot can still be loaded.
    pub(crate) fn change_any(
        &mut self,
        change: impl FnOnce(&mut Configuration) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        self.require_not_started()?;
        let mut configuration = Configuration::clone(&self.view.configuration());
        change(&mut configuration)?;
        self.view.set_configuration(configuration);
        Ok(())
    }

    /// Records in the configuration a change that the machine has already made.
    pub(crate) fn record(&mut self, change: impl FnOnce(&mut Configuration)) {
        let mut configuration = Configuration::clone(&self.view.configuration());
        change(&mut configuration);
        self.view.set_configuration(configuration);
    }

    pub(crate) fn require_not_started(&self) -> Result<(), Fault> {
        match self.controller().state() {
            State::NotConfigured | State::Configured => Ok(()),
            _ => Err(Fault::AfterStart),
        }
    }

    /// Starts the machine that is configured.
    ///
    /// # Errors
    /// If it has been started, or cannot be.
    pub fn start(&mut self) -> Result<(), Fault> {
        self.require_not_started()?;
        let configuration = self.view.configuration();
        let boot_timer = self.boot_timer;
        self.run(&configuration, boot_timer, Controller::start)
    }

    /// Checks that a snapshot can be loaded: nothing has been configured but what it does not have.
    pub(crate) fn require_loadable(&self) -> Result<(), Fault> {
        self.require_not_started()?;
        match self.will_boot {
            true => Err(Fault::LoadAfterConfiguration),
            false => Ok(()),
        }
    }

    /// Starts the machine with this configuration from a snapshot. It is paused then.
    pub(crate) fn restore(
        &mut self,
        snapshot: &Snapshot,
        configuration: Configuration,
    ) -> Result<(), Fault> {
        self.require_loadable()?;
        let boot_timer = snapshot.config().boot_timer;
        let restore = |controller: &Controller| controller.restore(snapshot);
        self.run(&configuration, boot_timer, restore)?;
        self.view.set_configuration(configuration);
        Ok(())
    }

    /// Has `start` start the machine with this configuration.
    fn run(
        &mut self,
        configuration: &Configuration,
        boot_timer: bool,
        start: impl FnOnce(&Controller) -> Result<(), bantam_vmm::Error>,
    ) -> Result<(), Fault> {
        let mut config = configuration.machine()?;
        self.check_outputs(configuration)?;
        config.boot_timer = boot_timer;
        if let Some(metadata) = &mut config.metadata {
            let store = self.view.own_metadata();
            metadata.size_limit = store.size_limit();
            metadata.contents = store.get().cloned();
        }
        let has_console = config.serial == SerialConfig::Stdio;
        self.controller().configure(config)?;
        start(self.controller())?;
        if has_console {
            (self.on_start)();
        }
        Ok(())
    }

    /// Checks that the log and the metrics do not go to a file that the machine of `configuration` uses.
    pub(crate) fn check_outputs(&self, configuration: &Configuration) -> Result<(), Fault> {
        if let Some(path) = &self.log_path {
            configuration.check_output(LOG_FILE, path)?;
        }
        match &configuration.metrics {
            Some(metrics) => configuration.check_output(METRICS_FILE, &metrics.metrics_path),
            None => Ok(()),
        }
    }

    /// Replaces the metadata.
    ///
    /// # Errors
    /// If it is too large.
    pub fn put_metadata(&mut self, contents: Value) -> Result<(), Fault> {
        match self.view.serves_metadata() {
            true => Ok(self.controller().put_metadata(contents)?),
            false => Ok(self.view.own_metadata().put(contents)?),
        }
    }

    pub(crate) fn patch_metadata(&mut self, patch: Value) -> Result<(), Fault> {
        match self.view.serves_metadata() {
            true => Ok(self.controller().patch_metadata(patch)?),
            false => Ok(self.view.own_metadata().patch(patch)?),
        }
    }

    /// Sets the program's log. If the file takes too long to open, the request is refused; the log is set all
    /// the same if the file opens in the end.
    pub(crate) fn put_logger(&mut self, logger: Logger) -> Result<(), Fault> {
        let (wanted, configuration) = (logger.clone(), self.view.configuration());
        let set = self.log.run(OPEN_TIME, move |log| {
            if let Some(path) = &wanted.log_path {
                configuration.check_output(LOG_FILE, path)?;
            }
            log.set(&wanted)
        });
        match set {
            Ok(set) => set?,
            Err(error) => {
                let path = logger.log_path.unwrap_or_default();
                return Err(Fault::file(LOG_FILE, &path, &error));
            }
        }
        if logger.log_path.is_some() {
            self.log_path.clone_from(&logger.log_path);
        }
        self.record(|configuration| configuration.logger = Some(logger));
        Ok(())
    }

    pub(crate) fn put_metrics(&mut self, metrics: Metrics) -> Result<(), Fault> {
        if self.view.has_metrics_file() {
            return Err(Fault::SetTwice { what: METRICS_FILE });
        }
        let (path, configuration) = (metrics.metrics_path.clone(), self.view.configuration());
        let opened = self.opener.run(OPEN_TIME, move |()| {
            configuration.check_output(METRICS_FILE, &path)?;
            MetricsFile::open(&path).map_err(|error| Fault::file(METRICS_FILE, &path, &error))
        });
        let opened =
            opened.map_err(|error| Fault::file(METRICS_FILE, &metrics.metrics_path, &error))?;
        let file = opened?;
        self.view.set_metrics_file(file);
        self.record(|configuration| configuration.metrics = Some(metrics));
        Ok(())
    }
}
