//! The controller, which owns a machine from its configuration to its end.

mod arrival;
mod fork;
mod migrate;
mod migration_progress;
mod snapshot;
mod throttle;
mod write_log;

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand, PresentImage};
use bantam_memory::GuestMemory;
use bantam_metadata::Metadata;
use bantam_state::Section;
use bantam_storage::ImageFormat;
use bantam_usernet::ForwardedPort;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::command::{Answer, Command, DiskSnapshot, ForkDescriptors, Forked, ShutDown};
use crate::config::{DeviceName, MachineConfig};
use crate::console::Console;
use crate::devices::{DeviceTable, Stream};
use crate::error::Error;
use crate::events::{EventSender, Events};
use crate::exit_reason::ExitReason;
use crate::hooks::ControllerOptions;
use crate::lock::{lock, wait};
use crate::machine::{Machine, MachineContext, Origin};
use crate::metrics::MachineMetrics;
use crate::run_control::RunControl;
use crate::state::State;

use migration_progress::UnderWay;

pub use arrival::Arrival;
pub use migrate::{AtTimeout, Migrated, MigrationOptions};
pub use migration_progress::MigrationProgress;

/// How long vCPUs may take to leave the guest. A vCPU leaves at once unless the host does not schedule its
/// thread, or it is accessing a device that waits for the host.
const PAUSE_TIME: Duration = Duration::from_secs(5);

/// Controls one machine, from any thread. Clones control the same machine, which is stopped when the last
/// of them is dropped.
///
/// [`Controller::execute`] executes a [`Command`], or returns [`Error::WrongState`] at once if the
/// machine's state does not allow it. The other methods are the commands by name, and ways to wait.
#[derive(Clone)]
pub struct Controller(Arc<Inner>);

impl Controller {
    /// Creates the controller of a machine that is not configured yet, with the default
    /// [`ControllerOptions`].
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn new() -> Result<Controller, Error> {
        Controller::with(ControllerOptions::default())
    }

    /// Creates the controller of a machine that is not configured yet.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn with(options: ControllerOptions) -> Result<Controller, Error> {
        let events = EventSender::default();
        let control = RunControl::new(events.clone());
        let control = control.map_err(Error::resource("the machine's exit event"))?;
        Ok(Controller(Arc::new(Inner {
            context: MachineContext {
                control: Arc::new(control),
                log: options.log,
                events,
                opener: options.opener,
                place_keeper: options.place_keeper,
                thread_hook: options.thread_hook,
            },
            console: Mutex::default(),
            life: Mutex::new(Life::NotConfigured),
            changed: Condvar::new(),
            config: Mutex::new(None),
            metrics: OnceLock::new(),
            devices: OnceLock::new(),
            snapshots: Mutex::new(()),
            migration: Mutex::new(None),
            handed_over: Mutex::new(None),
        })))
    }

    /// Executes `command`.
    ///
    /// # Errors
    /// [`Error::WrongState`] if the machine's state does not allow it; otherwise the errors of the method
    /// with the command's name.
    pub fn execute(&self, command: Command) -> Result<Answer, Error> {
        match command {
            Command::Configure(config) => self.configure(*config)?,
            Command::Start => self.start()?,
            Command::Pause => self.pause()?,
            Command::Resume => self.resume()?,
            Command::PressPowerButton => self.press_power_button()?,
            Command::PressCtrlAltDel => self.press_ctrl_alt_del()?,
            Command::ShutDown { timeout } => return Ok(Answer::ShutDown(self.shut_down(timeout))),
            Command::Stop => self.stop(),
            Command::Query => return Ok(Answer::State(self.state())),
            Command::Configuration => {
                return Ok(Answer::Configuration(Box::new(self.configuration()?)));
            }
            Command::Device { name, command } => {
                return Ok(Answer::Device(self.device(&name, command)?));
            }
            Command::SnapshotDisks(disks) => {
                let held_up = self.snapshot_disks(disks)?;
                return Ok(Answer::Snapshot { held_up });
            }
            Command::Snapshot(options) => {
                return Ok(Answer::SnapshotTaken(self.snapshot(*options)?));
            }
            Command::Fork(disks) => {
                let (snapshot, paused_for) = self.fork(&disks)?;
                let descriptors = snapshot.descriptors()?.into_iter().map(Arc::new);
                let snapshot = ForkDescriptors(descriptors.collect());
                return Ok(Answer::Forked(Forked {
                    paused_for,
                    snapshot,
                }));
            }
            Command::Migrate(order) => return self.migrate_to(&order),
            Command::CancelMigration => self.cancel_migration(),
            Command::MigrationProgress => {
                return Ok(Answer::MigrationProgress(self.migration_progress()));
            }
            Command::TakeBack => self.take_back()?,
            Command::PutMetadata(contents) => self.put_metadata(contents)?,
            Command::PatchMetadata(patch) => self.patch_metadata(patch)?,
            Command::Metadata => return Ok(Answer::Metadata(self.metadata()?)),
            Command::Metrics => {
                let metrics = serde_json::to_value(self.metrics()?);
                return Ok(Answer::Metrics(metrics.map_err(|error| {
                    Error::Resource {
                        what: "a copy of the counters",
                        source: error.into(),
                    }
                })?));
            }
        }
        Ok(Answer::Done)
    }

    /// Subscribes to the events of the machine from now on.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn subscribe(&self) -> Result<Events, Error> {
        let events = self.0.context.events.subscribe();
        events.map_err(Error::resource("an event queue"))
    }

    /// Sets the configuration, replacing any earlier one ([`Command::Configure`]).
    ///
    /// # Errors
    /// If the configuration contradicts itself, or the machine has been started.
    pub fn configure(&self, mut config: MachineConfig) -> Result<(), Error> {
        config.fix_mac_addresses();
        // Without the lock: this looks at files, which may be on a server that does not answer.
        let validated = config.validate();
        let mut life = self.0.life();
        match &*life {
            Life::NotConfigured | Life::Configured(_) if !self.0.is_stopping() => {
                validated?;
                self.0.enter(&mut life, Life::Configured(Box::new(config)));
                Ok(())
            }
            life => Err(self.0.wrong_state(life, "configure the machine")),
        }
    }

    /// Sets the program's end of the stream that is configured as `stdio`: the serial port, the console or a
    /// channel. It replaces any earlier one.
    ///
    /// # Errors
    /// If the machine has been started.
    pub fn set_console(&self, console: Console) -> Result<(), Error> {
        let life = self.0.life();
        match &*life {
            Life::NotConfigured | Life::Configured(_) if !self.0.is_stopping() => {
                *lock(&self.0.console) = console;
                Ok(())
            }
            life => Err(self.0.wrong_state(life, "give the machine a console")),
        }
    }

    /// Returns the configuration with all changes since the start ([`Command::Configuration`]).
    ///
    /// # Errors
    /// If the machine is not configured.
    pub fn configuration(&self) -> Result<MachineConfig, Error> {
        let life = self.0.life();
        if let Life::Configured(config) = &*life {
            return Ok((**config).clone());
        }
        let config = lock(&self.0.config).clone();
        config.ok_or_else(|| self.0.wrong_state(&life, "tell the configuration"))
    }

    /// Builds the machine and runs its vCPUs ([`Command::Start`]).
    ///
    /// # Errors
    /// If the host cannot run machines, a file or device that the configuration names cannot be used,
    /// or the machine is not configured or has been started.
    pub fn start(&self) -> Result<(), Error> {
        self.0.start(Origin::Kernel)
    }

    /// Starts the machine from saved state instead of booting it. It goes on from where another machine of
    /// the same configuration was when its state was saved: `memory` is a copy of that machine's memory, and
    /// `processors` comes from [`Controller::save_processors`].
    ///
    /// The guest sees nothing of the time in between: its clocks go on from where they were. On a host whose
    /// KVM cannot set the time stamp counter, such as one without hardware virtualization, the guest sees the
    /// host's counter, which has gone on.
    ///
    /// This is only a part of restoring a machine. Devices start as after a reset, so the guest must not have
    /// begun to use any that keeps state, and nothing checks that the host has the processor features that
    /// the guest was promised.
    ///
    /// # Errors
    /// Those of [`Controller::start`], and [`Error::Restore`] if the state is damaged, belongs to another
    /// machine, or cannot be set in a vCPU on this host.
    pub fn start_from(&self, memory: GuestMemory, processors: &[Section]) -> Result<(), Error> {
        self.0.start(Origin::Saved { memory, processors })
    }

    /// Returns the memory of the guest. The guest and its devices may change it at any time unless the
    /// machine is paused.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused.
    pub fn memory(&self) -> Result<Arc<GuestMemory>, Error> {
        self.0
            .of_machine("find the memory", |machine| machine.memory().clone())
    }

    /// Returns the state of all vCPUs and of what KVM emulates for them: interrupt controllers, interval
    /// timer and clock. The machine stays paused, and can go on.
    ///
    /// This is only a part of a machine's state: it includes neither memory nor devices.
    ///
    /// # Errors
    /// If the machine is not paused or ends meanwhile, or KVM does not return a part of the state.
    pub fn save_processors(&self) -> Result<Vec<Section>, Error> {
        self.while_paused("save the processors", |parts| self.read_processors(parts))
    }

    /// Takes the vCPUs out of the guest and brings the devices to rest ([`Command::Pause`]).
    ///
    /// # Errors
    /// If the machine does not run or ends meanwhile. Also if a vCPU does not leave the guest within 5 seconds,
    /// or the host does not finish what a device has under way within 10 seconds; the machine then keeps
    /// running.
    pub fn pause(&self) -> Result<(), Error> {
        let action = "pause the machine";
        let (vcpu_count, devices) = {
            let mut life = self.0.life();
            match self.0.take(&mut life) {
                Some(Life::Running(machine)) => {
                    let parts = (machine.vcpu_count(), machine.devices().clone());
                    self.0.enter(&mut life, Life::Pausing(machine));
                    parts
                }
                other => return Err(self.0.put_back(life, other, action)),
            }
        };
        // Without the lock: others can ask for the state meanwhile, or stop the machine.
        let paused = self.pause_vcpus_and_devices(vcpu_count, &devices);
        let mut life = self.0.life();
        match self.0.take(&mut life) {
            Some(Life::Pausing(machine)) => {
                let next = match paused {
                    Ok(()) => Life::Paused(machine),
                    Err(_) => Life::Running(machine),
                };
                self.0.enter(&mut life, next);
                paused
            }
            other => Err(self.0.put_back(life, other, action)),
        }
    }

    /// Pauses the vCPUs and then the devices. If either fails, both go on.
    fn pause_vcpus_and_devices(
        &self,
        vcpu_count: usize,
        devices: &DeviceTable,
    ) -> Result<(), Error> {
        if !self.0.control().pause_vcpus(vcpu_count, PAUSE_TIME) {
            // A vCPU whose guest resets a device waits for the end of the device's work.
            return Err(match devices.no_answer() {
                Some(source) => Error::DeviceLife {
                    action: "pause the machine",
                    source,
                },
                None => Error::PauseTimeout {
                    seconds: PAUSE_TIME.as_secs(),
                },
            });
        }
        let paused = devices.pause();
        if paused.is_err() && !self.0.is_stopping() {
            if let Err(error) = devices.resume() {
                tracing::error!("{error}");
            }
            self.0.control().resume_vcpus();
        }
        paused
    }

    /// Lets the devices and vCPUs of a paused machine go on ([`Command::Resume`]).
    ///
    /// # Errors
    /// If the machine is not paused.
    pub fn resume(&self) -> Result<(), Error> {
        let action = "resume the machine";
        let devices = {
            let mut life = self.0.life();
            self.require_own(action)?;
            match self.0.take(&mut life) {
                Some(Life::Paused(machine)) => {
                    let devices = machine.devices().clone();
                    self.0.enter(&mut life, Life::Resuming(machine));
                    devices
                }
                other => return Err(self.0.put_back(life, other, action)),
            }
        };
        // A device that cannot go on asks its driver for a reset, so the guest has to go on.
        if let Err(error) = devices.resume()
            && !self.0.is_stopping()
        {
            tracing::error!("{error}");
        }
        let mut life = self.0.life();
        match self.0.take(&mut life) {
            Some(Life::Resuming(machine)) => {
                self.0.enter(&mut life, Life::Running(machine));
                self.0.control().resume_vcpus();
                Ok(())
            }
            other => Err(self.0.put_back(life, other, action)),
        }
    }

    /// Presses the ACPI power button ([`Command::PressPowerButton`]). A paused guest sees it when it goes on.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, or the host refuses to deliver the interrupt.
    pub fn press_power_button(&self) -> Result<(), Error> {
        self.0
            .devices("press the power button")?
            .press_power_button()
    }

    /// Presses Ctrl-Alt-Del on the keyboard ([`Command::PressCtrlAltDel`]). A paused guest sees it when it
    /// goes on.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, or [`Error::Keyboard`] if the guest does not listen to the
    /// keyboard or has not taken the keys that were pressed before.
    pub fn press_ctrl_alt_del(&self) -> Result<(), Error> {
        self.0.devices("press Ctrl-Alt-Del")?.press_ctrl_alt_del()
    }

    /// Asks the guest to shut itself down, and cuts its power if it has not after `timeout`
    /// ([`Command::ShutDown`]). A paused guest cannot do anything: its power is cut at once if there is a time.
    /// Returns at once: [`Controller::wait`] waits for the end.
    pub fn shut_down(&self, timeout: Option<Duration>) -> ShutDown {
        let life = self.0.life();
        match &*life {
            Life::Running(machine) | Life::Resuming(machine) if !self.0.is_stopping() => {
                machine.shut_down(timeout)
            }
            Life::Pausing(_) | Life::Paused(_) if timeout.is_none() && !self.0.is_stopping() => {
                ShutDown::Unheard
            }
            _ => {
                self.0.stop();
                ShutDown::PowerCut
            }
        }
    }

    /// Ends the machine as if its power were cut ([`Command::Stop`]).
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Returns the state of the machine ([`Command::Query`]).
    pub fn state(&self) -> State {
        self.0.state(&self.0.life())
    }

    /// Changes a device or asks it something ([`Command::Device`]).
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, has no such device, uses a disk's new image otherwise, or
    /// for a reason that [`DeviceError`](crate::DeviceError) lists. A command that needs an answer of the
    /// host, such as a file that it opens, is given up after 10 seconds.
    pub fn device(&self, name: &DeviceName, command: DeviceCommand) -> Result<DeviceAnswer, Error> {
        let devices = self.0.devices("change a device")?;
        let changed = match &command {
            DeviceCommand::ReplaceImage { .. } => lock(&self.0.config).clone().map(|mut config| {
                config.apply(name, &command);
                config
            }),
            _ => None,
        };
        let check = move || changed.map_or(Ok(()), |config| Ok(config.validate_files()?));
        // A command that the host does not answer must not keep the machine.
        let inner = Arc::downgrade(&self.0);
        let noted_name = name.clone();
        devices.execute(name, command, check, move |command, answer| {
            if let Some(inner) = inner.upgrade() {
                inner.record(|config| {
                    config.apply(&noted_name, command);
                    if let Some(DeviceAnswer::Image(image)) = answer {
                        config.apply_image(&noted_name, image);
                    }
                });
            }
        })
    }

    /// Takes a snapshot of disks ([`Command::SnapshotDisks`]), and returns for how long requests to them had to wait.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, has no such disk, or for a reason that
    /// [`SnapshotError`](crate::SnapshotError) lists. If the host does not answer, the command is given up after 10
    /// seconds.
    pub fn snapshot_disks(&self, disks: Vec<DiskSnapshot>) -> Result<Duration, Error> {
        let devices = self.0.devices("take a snapshot of disks")?;
        // A command that the host does not answer must not keep the machine.
        let inner = Arc::downgrade(&self.0);
        devices.snapshot(disks, move |disk, block_size| {
            if let Some(inner) = inner.upgrade() {
                let image = PresentImage {
                    path: disk.path.clone(),
                    format: ImageFormat::Qcow2,
                    block_size,
                };
                inner.record(|config| {
                    config.apply_image(&disk.disk, &image);
                    config.allow_backing(&disk.disk);
                });
            }
        })
    }

    /// Replaces the metadata that the guest is told ([`Command::PutMetadata`]).
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, was not configured with metadata, or the contents are too
    /// large. The metadata then stays as it was.
    pub fn put_metadata(&self, contents: Value) -> Result<(), Error> {
        let devices = self.0.devices("change the metadata")?;
        let metadata = devices.metadata()?;
        metadata.put(contents)?;
        self.0.record_metadata(metadata);
        Ok(())
    }

    /// Changes the metadata by a merge patch ([`Command::PatchMetadata`]).
    ///
    /// # Errors
    /// Those of [`Controller::put_metadata`], and if there are no contents yet.
    pub fn patch_metadata(&self, patch: Value) -> Result<(), Error> {
        let devices = self.0.devices("change the metadata")?;
        let metadata = devices.metadata()?;
        metadata.patch(patch)?;
        self.0.record_metadata(metadata);
        Ok(())
    }

    /// Returns the metadata, or `None` if none has been set yet ([`Command::Metadata`]).
    ///
    /// # Errors
    /// If the machine neither runs nor is paused, or was not configured with metadata.
    pub fn metadata(&self) -> Result<Option<Value>, Error> {
        let devices = self.0.devices("read the metadata")?;
        Ok(devices.metadata()?.get())
    }

    /// Returns the counters of the machine, which can be read at any time from then on
    /// ([`Command::Metrics`]).
    ///
    /// # Errors
    /// If the machine was never started.
    pub fn metrics(&self) -> Result<Arc<MachineMetrics>, Error> {
        match self.0.metrics.get() {
            Some(metrics) => Ok(metrics.clone()),
            None => Err(self.0.wrong_state(&self.0.life(), "read the counters")),
        }
    }

    /// Returns the path of `stream`, if it leads to a pseudoterminal, file or socket.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused.
    pub fn stream_path(&self, stream: &Stream) -> Result<Option<PathBuf>, Error> {
        let devices = self.0.devices("find a stream")?;
        Ok(devices.stream_path(stream).map(Path::to_path_buf))
    }

    /// Returns the ports of the host that lead to the guest by user networks.
    ///
    /// # Errors
    /// If the machine neither runs nor is paused.
    pub fn forwarded_ports(&self) -> Result<Vec<ForwardedPort>, Error> {
        let devices = self.0.devices("find the forwarded ports")?;
        Ok(devices.forwarded_ports.clone())
    }

    /// Returns a descriptor that becomes readable when the machine has ended, for whatever reason.
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.0.control().exit_event()
    }

    /// Waits for the machine to end, and returns the reason. By then all its threads have ended, what the
    /// guest wrote is on stable storage, and nothing of the host is in use any more, except by a command that
    /// another thread is still executing. Several threads can wait.
    ///
    /// # Errors
    /// If neither the guest nor the owner ended the machine, its disks could not be flushed, or it was never
    /// started.
    pub fn wait(&self) -> Result<ExitReason, Arc<Error>> {
        loop {
            if let Some(reason) = self.wait_by(None)? {
                return Ok(reason);
            }
        }
    }

    /// Waits like [`Controller::wait`], but not longer than `time`. Returns `None` if the machine has not ended
    /// by then, or not all of it: storage that no longer answers can hold up a device without end, and
    /// [`Controller::held_up`] names it. The end goes on meanwhile, on a thread of its own, and any method waits
    /// for it again. A program that does not want to wait can only end its process.
    ///
    /// # Errors
    /// Those of [`Controller::wait`].
    pub fn wait_within(&self, time: Duration) -> Result<Option<ExitReason>, Arc<Error>> {
        self.wait_by(Instant::now().checked_add(time))
    }

    fn wait_by(&self, deadline: Option<Instant>) -> Result<Option<ExitReason>, Arc<Error>> {
        {
            let mut life = self.0.life();
            while matches!(*life, Life::Starting) && !self.0.is_stopping() {
                match self.0.wait_for_change(life, deadline) {
                    Some(changed) => life = changed,
                    None => return Ok(None),
                }
            }
            if matches!(*life, Life::NotConfigured | Life::Configured(_)) && !self.0.is_stopping() {
                // It may never be started.
                return Err(Arc::new(self.0.wrong_state(&life, "wait for the machine")));
            }
        }
        if !wait_readable(self.exit_event(), deadline)? {
            return Ok(None);
        }
        self.0.take_down(deadline).transpose()
    }

    /// Returns the devices that wait for an answer of the host at this moment, by their names in the log, such
    /// as `disk 'root.img'`. This is meant for a message: a device may go on just then.
    pub fn held_up(&self) -> Vec<String> {
        let devices = self.0.devices.get().and_then(Weak::upgrade);
        devices.map_or_else(Vec::new, |devices| devices.held_up())
    }
}

struct Inner {
    context: MachineContext,
    /// The program's end of a byte stream, until the machine has been started. Locked after `life`.
    console: Mutex<Console>,
    life: Mutex<Life>,
    /// Signalled when the machine is no longer being started, and when it is gone.
    changed: Condvar,
    /// The configuration of the machine that was started, with all changes since. Locked after `life`.
    config: Mutex<Option<MachineConfig>>,
    /// The counters, which are kept after the machine's end.
    metrics: OnceLock<Arc<MachineMetrics>>,
    /// The devices of the machine that was started, also while it is taken down.
    devices: OnceLock<Weak<DeviceTable>>,
    /// Locked while a snapshot is taken and written, or the machine is forked; before `life`.
    snapshots: Mutex<()>,
    /// The migration that is under way.
    migration: Mutex<Option<Arc<UnderWay>>>,
    /// Whether the machine, which was handed over, ran. It may run elsewhere now.
    handed_over: Mutex<Option<bool>>,
}

/// The stage of the machine's life, with what the machine has in that stage.
enum Life {
    NotConfigured,
    Configured(Box<MachineConfig>),
    Starting,
    Running(Machine),
    Pausing(Machine),
    Paused(Machine),
    /// Its devices go on first, and then its vCPUs.
    Resuming(Machine),
    /// A thread is taking it down.
    Ending,
    /// All of it has been taken down; the result is why it ended.
    Gone(Result<ExitReason, Arc<Error>>),
}

impl Life {
    /// Returns the machine, from its start until it is taken down.
    fn machine(&self) -> Option<&Machine> {
        match self {
            Life::Running(machine)
            | Life::Pausing(machine)
            | Life::Paused(machine)
            | Life::Resuming(machine) => Some(machine),
            _ => None,
        }
    }
}

impl Inner {
    fn life(&self) -> MutexGuard<'_, Life> {
        lock(&self.life)
    }

    fn control(&self) -> &Arc<RunControl> {
        &self.context.control
    }

    fn is_stopping(&self) -> bool {
        self.control().is_stopping()
    }

    /// Replaces `life` with `next`, and sends the new state to subscribers.
    fn enter(&self, life: &mut Life, next: Life) {
        *life = next;
        self.context.events.send_state(self.state(life));
    }

    fn state(&self, life: &Life) -> State {
        if self.is_stopping() {
            return State::Stopped;
        }
        match life {
            Life::NotConfigured => State::NotConfigured,
            Life::Configured(_) => State::Configured,
            Life::Starting => State::Starting,
            Life::Running(_) => State::Running,
            Life::Pausing(_) => State::Pausing,
            Life::Paused(_) => State::Paused,
            Life::Resuming(_) => State::Resuming,
            Life::Ending | Life::Gone(_) => State::Stopped,
        }
    }

    fn wrong_state(&self, life: &Life, action: &'static str) -> Error {
        let state = self.state(life);
        Error::WrongState { action, state }
    }

    /// Takes what `life` holds, for a command that puts something in its place before it releases the lock.
    /// Returns `None` for a machine that has ended, which no command changes.
    fn take(&self, life: &mut Life) -> Option<Life> {
        (!self.is_stopping()).then(|| std::mem::replace(life, Life::Ending))
    }

    /// Undoes [`Inner::take`], and returns the error for a state that does not allow `action`.
    fn put_back(
        &self,
        mut life: MutexGuard<'_, Life>,
        taken: Option<Life>,
        action: &'static str,
    ) -> Error {
        if let Some(taken) = taken {
            *life = taken;
        }
        self.wrong_state(&life, action)
    }

    /// Returns the devices of a machine that runs or is paused.
    fn devices(&self, action: &'static str) -> Result<Arc<DeviceTable>, Error> {
        self.of_machine(action, |machine| machine.devices().clone())
    }

    /// Returns what `get` returns for a machine that runs or is paused.
    fn of_machine<T>(
        &self,
        action: &'static str,
        get: impl FnOnce(&Machine) -> T,
    ) -> Result<T, Error> {
        let life = self.life();
        match life.machine() {
            Some(machine) if !self.is_stopping() => Ok(get(machine)),
            _ => Err(self.wrong_state(&life, action)),
        }
    }

    fn start(&self, origin: Origin<'_>) -> Result<(), Error> {
        let config = {
            let mut life = self.life();
            match self.take(&mut life) {
                Some(Life::Configured(config)) => {
                    self.enter(&mut life, Life::Starting);
                    config
                }
                other => return Err(self.put_back(life, other, "start the machine")),
            }
        };
        // Without the lock: others can ask for the state meanwhile, or stop the machine.
        let console = lock(&self.console).try_clone();
        let built = console
            .map_err(Error::resource("the serial console"))
            .and_then(|console| Machine::new(&config, origin, console, &self.context));
        let (next, result) = match built {
            Ok(mut built) => match built.start() {
                Ok(()) => {
                    let _ = self.devices.set(Arc::downgrade(built.devices()));
                    let _ = self.metrics.set(built.devices().metrics.clone());
                    *lock(&self.config) = Some(*config);
                    // The machine has duplicates of its own. With these closed, a reader of the output sees
                    // its end when the machine ends.
                    self.close_console();
                    let next = match built.starts_paused() {
                        true => Life::Paused(built),
                        false => Life::Running(built),
                    };
                    (next, Ok(()))
                }
                Err(error) => {
                    // Some of its vCPUs may have run.
                    self.stop();
                    drop(built);
                    self.close_console();
                    let error = Arc::new(error);
                    let gone = Life::Gone(Err(error.clone()));
                    (gone, Err(Error::Shared(error)))
                }
            },
            Err(error) => (Life::Configured(config), Err(error)),
        };
        self.enter(&mut self.life(), next);
        self.changed.notify_all();
        result
    }

    fn close_console(&self) {
        *lock(&self.console) = Console::default();
    }

    /// Records a change in the configuration of the machine that was started.
    fn record(&self, change: impl FnOnce(&mut MachineConfig)) {
        if let Some(config) = &mut *lock(&self.config) {
            change(config);
        }
    }

    /// Records the current metadata in the configuration.
    fn record_metadata(&self, metadata: &Metadata) {
        self.record(|config| {
            if let Some(config) = &mut config.metadata {
                config.contents = metadata.get();
            }
        });
    }

    fn stop(&self) {
        self.control().finish(Ok(ExitReason::Stopped));
    }

    /// Takes down a machine that is stopping, or waits until another thread has done so. Returns `None` if that
    /// is not done by `deadline`. Without a deadline, the calling thread takes it down.
    fn take_down(
        self: &Arc<Inner>,
        deadline: Option<Instant>,
    ) -> Option<Result<ExitReason, Arc<Error>>> {
        let mut life = self.life();
        loop {
            match std::mem::replace(&mut *life, Life::Ending) {
                Life::Running(machine)
                | Life::Pausing(machine)
                | Life::Paused(machine)
                | Life::Resuming(machine) => {
                    drop(life);
                    match deadline {
                        Some(_) => self.end_on_another_thread(machine),
                        None => self.end(machine),
                    }
                    life = self.life();
                }
                Life::NotConfigured | Life::Configured(_) => {
                    self.close_console();
                    *life = Life::Gone(Ok(ExitReason::Stopped));
                }
                Life::Gone(outcome) => {
                    *life = Life::Gone(outcome.clone());
                    return Some(outcome);
                }
                other @ (Life::Starting | Life::Ending) => {
                    *life = other;
                    life = self.wait_for_change(life, deadline)?;
                }
            }
        }
    }

    fn end_on_another_thread(self: &Arc<Inner>, machine: Machine) {
        // Shared, so that it is not lost with a thread that cannot be started.
        let machine = Arc::new(Mutex::new(Some(machine)));
        let (inner, shared) = (self.clone(), machine.clone());
        let end = move |inner: &Inner, shared: &Mutex<Option<Machine>>| {
            let machine = lock(shared).take();
            if let Some(machine) = machine {
                inner.end(machine);
            }
        };
        let started = thread::Builder::new()
            .name("bantam-end".into())
            .spawn(move || end(&inner, &shared));
        if let Err(error) = started {
            tracing::warn!("cannot start a thread that ends the machine: {error}");
            // What the guest has written counts for more than the time.
            end(self, &machine);
        }
    }

    /// Takes down `machine`, which is stopping, in state [`Life::Ending`].
    fn end(&self, mut machine: Machine) {
        let outcome = machine.end().map_err(Arc::new);
        drop(machine);
        *self.life() = Life::Gone(outcome);
        self.changed.notify_all();
    }

    /// Waits until the state may have changed; `None` at `deadline`.
    fn wait_for_change<'a>(
        &self,
        life: MutexGuard<'a, Life>,
        deadline: Option<Instant>,
    ) -> Option<MutexGuard<'a, Life>> {
        let Some(deadline) = deadline else {
            return Some(wait(&self.changed, life));
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        let waited = self.changed.wait_timeout(life, left);
        Some(waited.unwrap_or_else(PoisonError::into_inner).0)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Waits until `event` is readable; `false` if it is not by `deadline`.
fn wait_readable(event: BorrowedFd<'_>, deadline: Option<Instant>) -> Result<bool, Error> {
    loop {
        let mut events = [PollFd::new(event, PollFlags::POLLIN)];
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            // Rounded up, so that this does not spin at the end.
            let left = left + Duration::from_micros(999);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut events, timeout) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(Error::resource("a wait for the machine")(errno.into())),
        }
    }
}
