//! What the API speaks for: a configuration that clients put together, and the machine that is made of it.

use std::io;
use std::num::NonZeroU32;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bantam_vmm::config::SerialConfig;
use bantam_vmm::{
    Console, Controller, Error, HintingCommand, KeyboardError, MetadataStore, ReplaceError, State,
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::configuration::{Configuration, file_fault, net_limits};
use crate::fault::Fault;
use crate::metrics_file::MetricsFile;
use crate::metrics_groups::groups;
use crate::request::Request;
use crate::request_counts::{RequestCounts, names_of};
use crate::resources::{
    Action, ActionType, Balloon, BalloonHintingStatus, BalloonUpdate, Drive, DriveUpdate,
    InstanceInformation, Logger, Metrics, NetworkInterface, NetworkInterfaceUpdate, RateLimiter,
    Version, Vm, VmState,
};
use crate::startup_times::StartupTimes;
use crate::version::API_VERSION;

const NO_BALLOON: Fault = Fault::NotConfigured { kind: "balloon" };

/// The log of the program, as far as clients can set it.
pub trait ProgramLog: Send {
    /// Sets what `logger` says; what it leaves out stays as it is.
    ///
    /// # Errors
    /// When its file cannot be used.
    fn set(&mut self, logger: &Logger) -> Result<(), Fault>;
}

/// What an [`Instance`] is given by the program.
pub struct InstanceOptions {
    /// Its name.
    pub id: String,
    /// The program's end of the serial port, for a machine whose output goes to no file.
    pub console: Console,
    /// The program's log.
    pub log: Box<dyn ProgramLog>,
    /// How long the process took to start.
    pub startup_times: StartupTimes,
    /// What is called when a machine has been started that has the console.
    pub on_start: Box<dyn FnMut() + Send>,
    /// Whether the guest has a device by which it says when it has booted.
    pub boot_timer: bool,
    /// Most bytes of metadata.
    pub metadata_size: usize,
}

/// How a request was answered.
#[derive(Debug)]
pub enum Reply {
    /// It is done, and there is nothing to say.
    Done,
    /// What was asked for.
    Value(Value),
}

impl Reply {
    fn value(value: &impl Serialize) -> Result<Reply, Fault> {
        let value = serde_json::to_value(value).map_err(|error| Fault::Value {
            what: "answer",
            reason: error.to_string(),
        })?;
        Ok(Reply::Value(value))
    }
}

/// An instance as far as it can be told of while it does something that takes its time.
#[derive(Clone)]
pub struct Status {
    id: String,
    controller: Controller,
    requests: Arc<Mutex<RequestCounts>>,
}

impl Status {
    /// The answer to a request that asks for no more than this. None for any other.
    pub(crate) fn answer(&self, request: &Request) -> Option<Result<Reply, Fault>> {
        let result = match request {
            Request::GetInstance => self.instance(),
            Request::GetVersion => version(),
            _ => return None,
        };
        self.count(names_of(request), result.is_err());
        Some(result)
    }

    fn instance(&self) -> Result<Reply, Fault> {
        Reply::value(&InstanceInformation {
            app_name: "Bantam",
            id: self.id.clone(),
            state: match self.controller.state() {
                State::NotConfigured | State::Configured | State::Starting => "Not started",
                State::Running | State::Pausing | State::Stopped => "Running",
                State::Paused | State::Resuming => "Paused",
            },
            vmm_version: API_VERSION,
        })
    }

    fn requests(&self) -> MutexGuard<'_, RequestCounts> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, names: (&'static str, &str), refused: bool) {
        self.requests().count(names, refused);
    }
}

fn version() -> Result<Reply, Fault> {
    Reply::value(&Version {
        firecracker_version: API_VERSION,
    })
}

/// A configuration and its machine.
pub struct Instance {
    status: Status,
    controller: Controller,
    console: Option<Console>,
    log: Box<dyn ProgramLog>,
    startup_times: StartupTimes,
    on_start: Box<dyn FnMut() + Send>,
    boot_timer: bool,
    /// Metadata before the start, and of a machine that serves none.
    metadata: MetadataStore,
    configuration: Configuration,
    metrics_file: Option<MetricsFile>,
}

impl Instance {
    /// An instance of which nothing is configured, whose machine `controller` will own.
    pub fn new(controller: Controller, options: InstanceOptions) -> Instance {
        Instance {
            status: Status {
                id: options.id,
                controller: controller.clone(),
                requests: Arc::default(),
            },
            controller,
            console: Some(options.console),
            log: options.log,
            startup_times: options.startup_times,
            on_start: options.on_start,
            boot_timer: options.boot_timer,
            metadata: MetadataStore::new(options.metadata_size),
            configuration: Configuration::default(),
            metrics_file: None,
        }
    }

    /// Takes what a configuration file says.
    ///
    /// # Errors
    /// When a part of it cannot be used.
    pub fn configure(&mut self, configuration: Configuration) -> Result<(), Fault> {
        let configuration = configuration.check()?;
        if let Some(logger) = configuration.logger.clone() {
            self.put_logger(logger)?;
        }
        if let Some(metrics) = configuration.metrics.clone() {
            self.put_metrics(metrics)?;
        }
        self.configuration = Configuration {
            logger: self.configuration.logger.take(),
            metrics: self.configuration.metrics.take(),
            ..configuration
        };
        Ok(())
    }

    /// Does what `request` asks for.
    ///
    /// # Errors
    /// When it is refused.
    pub fn execute(&mut self, request: Request) -> Result<Reply, Fault> {
        let names = names_of(&request);
        let result = self.answer(request);
        self.status.count(names, result.is_err());
        result
    }

    /// What can be told of it without waiting for what it does.
    pub fn status(&self) -> Status {
        self.status.clone()
    }

    fn answer(&mut self, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::GetInstance => return self.status.instance(),
            Request::GetVersion => return version(),
            Request::GetConfiguration => return Reply::value(&self.configuration),
            Request::GetMachineConfiguration => {
                return Reply::value(&self.configuration.machine_config);
            }
            Request::GetBalloon => return Reply::value(self.balloon()?),
            Request::GetBalloonStatistics => return self.balloon_statistics(),
            Request::GetBalloonHinting => return self.balloon_hinting(),
            Request::GetMetadata => {
                let contents = match self.serves_metadata() {
                    true => self.controller.metadata()?,
                    false => self.metadata.get().cloned(),
                };
                return Reply::value(&match contents {
                    None | Some(Value::Null) => json!({}),
                    Some(contents) => contents,
                });
            }
            Request::PutAction(Action { action_type }) => self.act(action_type)?,
            Request::PatchVm(Vm { state }) => self.go_to(state)?,
            Request::PutMachineConfiguration(wanted) => {
                self.change()?.put_machine_config(wanted)?;
            }
            Request::PatchMachineConfiguration(update) => {
                let configuration = self.change()?;
                let wanted = update.applied_to(&configuration.machine_config);
                configuration.put_machine_config(wanted)?;
            }
            Request::PutBootSource(boot_source) => self.change()?.put_boot_source(boot_source)?,
            Request::PutDrive(drive) => self.change()?.put_drive(drive)?,
            Request::PatchDrive(update) => self.update_drive(update)?,
            Request::PutNetworkInterface(interface) => {
                self.change()?.put_network_interface(interface)?;
            }
            Request::PatchNetworkInterface(update) => self.update_network_interface(update)?,
            Request::PutBalloon(balloon) => self.change()?.put_balloon(balloon)?,
            Request::PatchBalloon(update) => self.update_balloon(update)?,
            Request::PatchBalloonStatistics(update) => {
                self.update_balloon_interval(update.stats_polling_interval_s)?;
            }
            Request::StartBalloonHinting(wanted) => self.hint_balloon(HintingCommand::Start {
                acknowledge_on_stop: wanted.acknowledge_on_stop,
            })?,
            Request::StopBalloonHinting => self.hint_balloon(HintingCommand::Stop)?,
            Request::PutVsock(vsock) => self.change()?.put_vsock(vsock)?,
            Request::PutEntropy(entropy) => self.change()?.entropy = Some(entropy),
            Request::PutSerial(serial) => self.change()?.serial = Some(serial),
            Request::PutLogger(logger) => {
                self.change()?;
                self.put_logger(logger)?;
            }
            Request::PutMetrics(metrics) => {
                self.change()?;
                self.put_metrics(metrics)?;
            }
            Request::PutCpuConfig(config) => self.change()?.put_cpu_config(config)?,
            Request::PutMetadataConfig(metadata) => self.change()?.put_metadata_config(metadata)?,
            Request::PutMetadata(contents) => self.put_metadata(contents)?,
            Request::PatchMetadata(patch) if self.serves_metadata() => {
                self.controller.patch_metadata(patch)?;
            }
            Request::PatchMetadata(patch) => self.metadata.patch(patch)?,
        }
        Ok(Reply::Done)
    }

    /// Pauses the machine or lets it go on, unless it is as wanted already.
    fn go_to(&mut self, wanted: VmState) -> Result<(), Fault> {
        self.require_started()?;
        match (wanted, self.controller.state()) {
            (VmState::Paused, State::Paused) | (VmState::Resumed, State::Running) => {}
            (VmState::Paused, _) => self.controller.pause()?,
            (VmState::Resumed, _) => self.controller.resume()?,
        }
        Ok(())
    }

    fn balloon(&self) -> Result<&Balloon, Fault> {
        self.configuration.balloon.as_ref().ok_or(NO_BALLOON)
    }

    fn balloon_statistics(&self) -> Result<Reply, Fault> {
        self.require_started()?;
        if self.balloon()?.stats_polling_interval_s == 0 {
            return Err(Fault::NotConfigured {
                kind: "interval of the balloon's statistics",
            });
        }
        Reply::value(&self.controller.balloon_statistics()?)
    }

    fn balloon_hinting(&self) -> Result<Reply, Fault> {
        self.require_balloon_driver()?;
        let status = self.controller.balloon_statistics()?.hinting;
        let status = status.ok_or(Fault::NotConfigured {
            kind: "free page hinting",
        })?;
        Reply::value(&BalloonHintingStatus {
            host_cmd: status.host_command,
            guest_cmd: status.guest_command,
        })
    }

    fn hint_balloon(&self, command: HintingCommand) -> Result<(), Fault> {
        self.require_balloon_driver()?;
        Ok(self.controller.hint_balloon(command)?)
    }

    /// Checks that the guest would do what it is asked for. Firecracker refuses it otherwise, and its
    /// clients may try again then.
    fn require_balloon_driver(&self) -> Result<(), Fault> {
        self.require_started()?;
        self.balloon()?;
        match self.controller.balloon_statistics()?.has_driver {
            true => Ok(()),
            false => Err(Fault::NoBalloonDriver),
        }
    }

    fn update_balloon(&mut self, update: BalloonUpdate) -> Result<(), Fault> {
        self.require_balloon_driver()?;
        let balloon = self.configuration.balloon.as_mut().ok_or(NO_BALLOON)?;
        self.controller.set_balloon_target(update.amount_mib)?;
        balloon.amount_mib = update.amount_mib;
        Ok(())
    }

    fn update_drive(&mut self, update: DriveUpdate) -> Result<(), Fault> {
        self.require_started()?;
        let is_it = |drive: &Drive| drive.drive_id == update.drive_id;
        let place = self.configuration.drives_in_order().position(is_it);
        let mut drives = self.configuration.drives.iter_mut();
        let (Some(place), Some(drive)) = (place, drives.find(|drive| is_it(drive))) else {
            return Err(Fault::NoSuchDevice {
                kind: "drive",
                id: update.drive_id,
            });
        };
        if let Some(path) = update.path_on_host {
            let replaced = self.controller.replace_disk(place, &path);
            // The other image is there also when the one before could not be flushed.
            let is_there = matches!(
                replaced,
                Ok(()) | Err(Error::ReplaceDisk(ReplaceError::Flush { .. }))
            );
            if is_there {
                drive.path_on_host = Some(path);
            }
            replaced?;
        }
        if let Some(limiter) = update.rate_limiter {
            let limiter = limiter.applied_to(drive.rate_limiter);
            let limits = RateLimiter::limits(Some(&limiter));
            self.controller.set_disk_limits(place, &limits)?;
            drive.rate_limiter = Some(limiter);
        }
        Ok(())
    }

    fn update_network_interface(&mut self, update: NetworkInterfaceUpdate) -> Result<(), Fault> {
        self.require_started()?;
        let interfaces = &mut self.configuration.network_interfaces;
        let is_it = |interface: &NetworkInterface| interface.iface_id == update.iface_id;
        let Some(place) = interfaces.iter().position(is_it) else {
            return Err(Fault::NoSuchDevice {
                kind: "network interface",
                id: update.iface_id,
            });
        };
        let mut interface = interfaces[place].clone();
        let applied = |update: Option<RateLimiter>, before: Option<RateLimiter>| match update {
            Some(update) => Some(update.applied_to(before)),
            None => before,
        };
        interface.rx_rate_limiter = applied(update.rx_rate_limiter, interface.rx_rate_limiter);
        interface.tx_rate_limiter = applied(update.tx_rate_limiter, interface.tx_rate_limiter);
        self.controller
            .set_network_limits(place, &net_limits(&interface))?;
        interfaces[place] = interface;
        Ok(())
    }

    fn update_balloon_interval(&mut self, seconds: u16) -> Result<(), Fault> {
        self.require_started()?;
        let balloon = self.configuration.balloon.as_mut().ok_or(NO_BALLOON)?;
        let before = balloon.stats_polling_interval_s;
        match NonZeroU32::new(seconds.into()) {
            Some(interval) if before != 0 => self.controller.set_balloon_interval(interval)?,
            None if before == 0 => {}
            _ => return Err(Fault::BalloonStatistics),
        }
        balloon.stats_polling_interval_s = seconds;
        Ok(())
    }

    /// Puts metadata in the place of that which there is.
    ///
    /// # Errors
    /// When it is too large.
    pub fn put_metadata(&mut self, contents: Value) -> Result<(), Fault> {
        if self.serves_metadata() {
            self.controller.put_metadata(contents)?;
        } else {
            self.metadata.put(contents)?;
        }
        Ok(())
    }

    /// Whether the machine has taken the metadata over.
    fn serves_metadata(&self) -> bool {
        self.configuration.mmds_config.is_some() && self.require_started().is_ok()
    }

    fn act(&mut self, action: ActionType) -> Result<(), Fault> {
        match action {
            ActionType::InstanceStart => self.start()?,
            ActionType::SendCtrlAltDel => {
                self.require_started()?;
                match self.controller.press_ctrl_alt_del() {
                    // A guest without a driver for the keyboard may have one for the button.
                    Err(Error::Keyboard(KeyboardError::Disabled)) => {
                        self.controller.press_power_button()?;
                    }
                    pressed => pressed?,
                }
            }
            ActionType::FlushMetrics => {
                self.require_started()?;
                self.flush_metrics().map_err(|error| Fault::Value {
                    what: "metrics file",
                    reason: error.to_string(),
                })?;
            }
        }
        Ok(())
    }

    /// Starts the machine that is configured.
    ///
    /// # Errors
    /// When it has been started, or cannot be.
    pub fn start(&mut self) -> Result<(), Fault> {
        let mut config = self.change()?.machine()?;
        config.boot_timer = self.boot_timer;
        if let Some(metadata) = &mut config.metadata {
            metadata.size_limit = self.metadata.size_limit();
            metadata.contents = self.metadata.get().cloned();
        }
        let console = match &self.console {
            Some(console) => console.try_clone().map_err(|error| Fault::Value {
                what: "console",
                reason: error.to_string(),
            })?,
            None => Console::default(),
        };
        let has_console = config.serial == SerialConfig::Stdio;
        self.controller.configure(config, console)?;
        self.controller.start()?;
        // The machine has its own. Whoever reads its output sees it end with the machine.
        self.console = None;
        if has_console {
            (self.on_start)();
        }
        Ok(())
    }

    /// The configuration, as long as it can be changed.
    fn change(&mut self) -> Result<&mut Configuration, Fault> {
        match self.controller.state() {
            State::NotConfigured | State::Configured => Ok(&mut self.configuration),
            _ => Err(Fault::AfterStart),
        }
    }

    fn require_started(&self) -> Result<(), Fault> {
        match self.controller.state() {
            State::NotConfigured | State::Configured | State::Starting => Err(Fault::BeforeStart),
            _ => Ok(()),
        }
    }

    fn put_logger(&mut self, logger: Logger) -> Result<(), Fault> {
        self.log.set(&logger)?;
        self.configuration.logger = Some(logger);
        Ok(())
    }

    fn put_metrics(&mut self, metrics: Metrics) -> Result<(), Fault> {
        if self.metrics_file.is_some() {
            return Err(Fault::SetTwice {
                what: "metrics file",
            });
        }
        let path = &metrics.metrics_path;
        let opened = MetricsFile::open(path);
        let file = opened.map_err(|error| file_fault("metrics file", path, &error))?;
        self.metrics_file = Some(file);
        self.configuration.metrics = Some(metrics);
        Ok(())
    }

    /// Writes the metrics to their file, if they have one and the machine has been started.
    ///
    /// # Errors
    /// When they cannot be written. What they say is then said by the next.
    pub fn flush_metrics(&mut self) -> io::Result<()> {
        let (Ok(metrics), Some(file)) = (self.controller.metrics(), &mut self.metrics_file) else {
            return Ok(());
        };
        let machine = serde_json::to_value(metrics)?;
        let drives = self.configuration.drives_in_order();
        let drives: Vec<&str> = drives.map(|drive| drive.drive_id.as_str()).collect();
        let interfaces = &self.configuration.network_interfaces;
        let mut totals = groups(&machine, |list, index| match list {
            "disks" => drives.get(index).copied(),
            "networks" => Some(interfaces.get(index)?.iface_id.as_str()),
            _ => None,
        });
        let startup_times = serde_json::to_value(self.startup_times)?;
        totals.insert("api_server".to_string(), startup_times);
        self.status.requests().add_to(&mut totals);
        file.write(Value::Object(totals))
    }
}
