//! The one owner of a machine's life.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bantam_devices::virtio::owner::{DeviceAnswer, DeviceCommand};
use bantam_memory::GuestMemory;
use bantam_metadata::Metadata;
use bantam_state::Section;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;

use crate::command::{Answer, Command, ShutDown};
use crate::config::{DeviceName, MachineConfig};
use crate::console::Console;
use crate::devices::{DeviceTable, Stream};
use crate::error::Error;
use crate::events::{EventSender, Events};
use crate::exit_reason::ExitReason;
use crate::hooks::ControllerOptions;
use crate::kvm::{SavedProcessors, VmState};
use crate::lock::{lock, wait};
use crate::machine::{Machine, MachineContext, Origin};
use crate::metrics::MachineMetrics;
use crate::run_control::RunControl;
use crate::state::State;

/// How long vCPUs may take to leave the guest. Each does so at once unless the host withholds it from
/// its thread, or a device that it is at waits for the host.
const PAUSE_TIME: Duration = Duration::from_secs(5);

/// A machine and all that can be done with it, from any thread. Clones speak for the same machine,
/// which is stopped when the last of them is dropped.
///
/// [`Controller::execute`] does what a [`Command`] says, or gives [`Error::WrongState`] at once if the
/// machine's state does not allow it. The other methods are the commands by name, and ways to wait.
#[derive(Clone)]
pub struct Controller(Arc<Inner>);

impl Controller {
    /// A controller of a machine that is not configured yet, with the default of [`ControllerOptions`].
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn new() -> Result<Controller, Error> {
        Controller::with(ControllerOptions::default())
    }

    /// A controller of a machine that is not configured yet.
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
                thread_hook: options.thread_hook,
            },
            console: Mutex::default(),
            life: Mutex::new(Life::NotConfigured),
            changed: Condvar::new(),
            config: Mutex::new(None),
            metrics: OnceLock::new(),
        })))
    }

    /// Does what `command` says.
    ///
    /// # Errors
    /// [`Error::WrongState`] if the machine's state does not allow it, and otherwise like the method
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

    /// The events of the machine from now on.
    ///
    /// # Errors
    /// If the host is out of file descriptors.
    pub fn subscribe(&self) -> Result<Events, Error> {
        let events = self.0.context.events.subscribe();
        events.map_err(Error::resource("an event queue"))
    }

    /// [`Command::Configure`].
    ///
    /// # Errors
    /// If the configuration contradicts itself, or the machine has been started.
    pub fn configure(&self, config: MachineConfig) -> Result<(), Error> {
        // Without the lock, as it looks at files, which may be on a host that does not answer.
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

    /// Gives the machine the program's end of what is configured as `stdio`: serial port, console or a channel.
    /// It takes the place of the one before.
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

    /// [`Command::Configuration`].
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

    /// [`Command::Start`].
    ///
    /// # Errors
    /// When the host cannot run machines, a file or device that the configuration names cannot be used,
    /// or the machine is not configured or has been started.
    pub fn start(&self) -> Result<(), Error> {
        self.0.start(Origin::Kernel)
    }

    /// As [`Controller::start`], but has the machine go on from where another of the same configuration was
    /// when its state was saved, in place of a boot: with `memory`, a copy of that machine's, and with
    /// `processors`, from [`Controller::save_processors`].
    ///
    /// The guest sees nothing of the time in between: its clocks go on from where they were. On a host whose
    /// KVM cannot set the time stamp counter, such as one without hardware virtualization, that of the host
    /// goes on.
    ///
    /// This is a part of what restores a machine. Devices start as after a reset, so the guest must not have
    /// begun to use any that keeps state, and nothing checks that the host has the processor features that
    /// the guest was promised.
    ///
    /// # Errors
    /// As [`Controller::start`], and [`Error::Restore`] when the state is damaged, of another machine, or not
    /// one that this host can give a vCPU.
    pub fn start_from(&self, memory: GuestMemory, processors: &[Section]) -> Result<(), Error> {
        self.0.start(Origin::Saved { memory, processors })
    }

    /// The memory of the guest, which the guest and its devices change at any time unless the machine is
    /// paused.
    ///
    /// # Errors
    /// When the machine does not run.
    pub fn memory(&self) -> Result<Arc<GuestMemory>, Error> {
        self.0
            .of_machine("find the memory", |machine| machine.memory().clone())
    }

    /// The state of all vCPUs and of what KVM emulates for them: interrupt controllers, interval timer and
    /// clock. The machine stays paused, and can go on.
    ///
    /// That is a part of what a machine consists of: memory and devices are not in it.
    ///
    /// # Errors
    /// When the machine is not paused or ends meanwhile, or KVM does not give a part of the state.
    pub fn save_processors(&self) -> Result<Vec<Section>, Error> {
        let action = "save the processors";
        let (vm, vcpu_count) = {
            let mut life = self.0.life();
            match self.0.take(&mut life) {
                Some(Life::Paused(machine)) => {
                    let vm = machine.vm().clone();
                    let vcpu_count = machine.vcpu_count();
                    // So that nobody lets it go on.
                    self.0.enter(&mut life, Life::Pausing(machine));
                    (vm, vcpu_count)
                }
                other => return Err(self.0.put_back(life, other, action)),
            }
        };
        let saved = VmState::save(&vm).map(|vm| (vm, self.0.control().save_vcpus(vcpu_count)));
        let mut life = self.0.life();
        match self.0.take(&mut life) {
            Some(Life::Pausing(machine)) => self.0.enter(&mut life, Life::Paused(machine)),
            other => return Err(self.0.put_back(life, other, action)),
        }
        match saved? {
            (vm, Some(vcpus)) => Ok(SavedProcessors::new(vm, vcpus?).encode()?),
            // It has ended in this moment.
            (_, None) => Err(self.0.wrong_state(&life, action)),
        }
    }

    /// [`Command::Pause`].
    ///
    /// # Errors
    /// If the machine does not run or ends meanwhile. If a vCPU does not leave the guest in time, or the host
    /// does not end what a device has under way; the machine then runs on.
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

    /// Pauses both, or neither.
    fn pause_vcpus_and_devices(
        &self,
        vcpu_count: usize,
        devices: &DeviceTable,
    ) -> Result<(), Error> {
        if !self.0.control().pause_vcpus(vcpu_count, PAUSE_TIME) {
            return Err(Error::PauseTimeout {
                seconds: PAUSE_TIME.as_secs(),
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

    /// [`Command::Resume`].
    ///
    /// # Errors
    /// When the machine is not paused.
    pub fn resume(&self) -> Result<(), Error> {
        let action = "resume the machine";
        let devices = {
            let mut life = self.0.life();
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

    /// [`Command::PressPowerButton`]. A paused guest sees it when it goes on.
    ///
    /// # Errors
    /// When the machine does not run, or the host refuses to deliver the interrupt.
    pub fn press_power_button(&self) -> Result<(), Error> {
        self.0
            .devices("press the power button")?
            .press_power_button()
    }

    /// [`Command::PressCtrlAltDel`]. A paused guest sees it when it goes on.
    ///
    /// # Errors
    /// When the machine does not run, or [`Error::Keyboard`] when the guest does not listen to the
    /// keyboard or has not taken what was pressed before.
    pub fn press_ctrl_alt_del(&self) -> Result<(), Error> {
        self.0.devices("press Ctrl-Alt-Del")?.press_ctrl_alt_del()
    }

    /// [`Command::ShutDown`]. Returns at once: [`Controller::wait`] waits for the end.
    pub fn shut_down(&self, timeout: Duration) -> ShutDown {
        let life = self.0.life();
        match life.machine() {
            Some(machine) if !self.0.is_stopping() => machine.shut_down(timeout),
            _ => {
                self.0.stop();
                ShutDown::PowerCut
            }
        }
    }

    /// [`Command::Stop`].
    pub fn stop(&self) {
        self.0.stop();
    }

    /// [`Command::Query`].
    pub fn state(&self) -> State {
        self.0.state(&self.0.life())
    }

    /// [`Command::Device`].
    ///
    /// # Errors
    /// If the machine does not run, has no such device, or as [`DeviceError`](crate::DeviceError) says.
    pub fn device(&self, name: &DeviceName, command: DeviceCommand) -> Result<DeviceAnswer, Error> {
        let devices = self.0.devices("change a device")?;
        devices.execute(name, command, |command| {
            self.0.record(|config| config.apply(name, command));
        })
    }

    /// [`Command::PutMetadata`].
    ///
    /// # Errors
    /// When the machine does not run, was not configured with metadata, or the contents are too large; the
    /// guest is then told what it was told before.
    pub fn put_metadata(&self, contents: Value) -> Result<(), Error> {
        let devices = self.0.devices("change the metadata")?;
        let metadata = devices.metadata()?;
        metadata.put(contents)?;
        self.0.record_metadata(metadata);
        Ok(())
    }

    /// [`Command::PatchMetadata`].
    ///
    /// # Errors
    /// As [`Controller::put_metadata`], and when there are no contents yet.
    pub fn patch_metadata(&self, patch: Value) -> Result<(), Error> {
        let devices = self.0.devices("change the metadata")?;
        let metadata = devices.metadata()?;
        metadata.patch(patch)?;
        self.0.record_metadata(metadata);
        Ok(())
    }

    /// [`Command::Metadata`].
    ///
    /// # Errors
    /// When the machine does not run or was not configured with metadata.
    pub fn metadata(&self) -> Result<Option<Value>, Error> {
        let devices = self.0.devices("read the metadata")?;
        Ok(devices.metadata()?.get())
    }

    /// [`Command::Metrics`]. They can be read at any time from then on.
    ///
    /// # Errors
    /// When the machine was never started.
    pub fn metrics(&self) -> Result<Arc<MachineMetrics>, Error> {
        match self.0.metrics.get() {
            Some(metrics) => Ok(metrics.clone()),
            None => Err(self.0.wrong_state(&self.0.life(), "read the counters")),
        }
    }

    /// Where a user finds `stream`, if it leads to a pseudoterminal, file or socket.
    ///
    /// # Errors
    /// If the machine does not run.
    pub fn stream_path(&self, stream: &Stream) -> Result<Option<PathBuf>, Error> {
        let devices = self.0.devices("find a stream")?;
        Ok(devices.stream_path(stream).map(Path::to_path_buf))
    }

    /// Becomes readable when the machine has ended, whoever ended it.
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.0.control().exit_event()
    }

    /// Waits for the machine to end, and gives the reason. When it returns, all threads have ended, what
    /// the guest wrote is on stable storage, and nothing of the host is in use any more but by a command
    /// that another thread is still at. Several threads can wait.
    ///
    /// # Errors
    /// When the machine ended for another reason than its guest's or its owner's wish, its disks could not
    /// be flushed, or it was never started.
    pub fn wait(&self) -> Result<ExitReason, Arc<Error>> {
        {
            let mut life = self.0.life();
            while matches!(*life, Life::Starting) && !self.0.is_stopping() {
                life = wait(&self.0.changed, life);
            }
            if matches!(*life, Life::NotConfigured | Life::Configured(_)) && !self.0.is_stopping() {
                // Nothing says that anybody will ever start it.
                return Err(Arc::new(self.0.wrong_state(&life, "wait for the machine")));
            }
        }
        wait_readable(self.exit_event())?;
        self.0.take_down()
    }
}

struct Inner {
    context: MachineContext,
    /// The program's end of a stream, until the machine has been started. Locked after `life`.
    console: Mutex<Console>,
    life: Mutex<Life>,
    /// Signalled when the machine is no longer being started, and when it is gone.
    changed: Condvar,
    /// What the machine that was started is made of, with all changes since. Locked after `life`.
    config: Mutex<Option<MachineConfig>>,
    /// Kept beyond the machine's end.
    metrics: OnceLock<Arc<MachineMetrics>>,
}

/// Where the machine is in its life, with what it has there.
enum Life {
    NotConfigured,
    Configured(Box<MachineConfig>),
    Starting,
    Running(Machine),
    Pausing(Machine),
    Paused(Machine),
    /// Its devices go on, and then its vCPUs.
    Resuming(Machine),
    /// A thread takes it down.
    Ending,
    /// All of it is taken down, and this is why it ended.
    Gone(Result<ExitReason, Arc<Error>>),
}

impl Life {
    /// The machine, from its start until it is taken down.
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

    /// Puts the machine into the state that `next` stands for.
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

    /// What `life` holds, for a command that will put something in its place before it lets go of the
    /// lock. None for a machine that has ended: no command changes that.
    fn take(&self, life: &mut Life) -> Option<Life> {
        (!self.is_stopping()).then(|| std::mem::replace(life, Life::Ending))
    }

    /// Undoes [`Inner::take`]; gives the reason.
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

    /// The devices of a machine that runs or is paused.
    fn devices(&self, action: &'static str) -> Result<Arc<DeviceTable>, Error> {
        self.of_machine(action, |machine| machine.devices().clone())
    }

    /// What `get` gives of a machine that runs or is paused.
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
                    let _ = self.metrics.set(built.devices().metrics.clone());
                    *lock(&self.config) = Some(*config);
                    // The machine has its own, and the reader of its output sees it end with the machine.
                    self.close_console();
                    (Life::Running(built), Ok(()))
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

    /// Notes what was changed in the configuration of the machine that was started.
    fn record(&self, change: impl FnOnce(&mut MachineConfig)) {
        if let Some(config) = &mut *lock(&self.config) {
            change(config);
        }
    }

    /// Notes the metadata that there are now.
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

    /// Takes down a machine that is stopping, or waits until another thread has.
    fn take_down(&self) -> Result<ExitReason, Arc<Error>> {
        let mut life = self.life();
        loop {
            match std::mem::replace(&mut *life, Life::Ending) {
                Life::Running(mut machine)
                | Life::Pausing(mut machine)
                | Life::Paused(mut machine)
                | Life::Resuming(mut machine) => {
                    drop(life);
                    let outcome = machine.end().map_err(Arc::new);
                    drop(machine);
                    *self.life() = Life::Gone(outcome.clone());
                    self.changed.notify_all();
                    return outcome;
                }
                Life::NotConfigured | Life::Configured(_) => {
                    self.close_console();
                    *life = Life::Gone(Ok(ExitReason::Stopped));
                }
                Life::Gone(outcome) => {
                    *life = Life::Gone(outcome.clone());
                    return outcome;
                }
                other @ (Life::Starting | Life::Ending) => {
                    *life = other;
                    life = wait(&self.changed, life);
                }
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

fn wait_readable(event: BorrowedFd<'_>) -> Result<(), Error> {
    loop {
        let mut events = [PollFd::new(event, PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::NONE) {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::resource("a wait for the machine")(errno.into())),
        }
    }
}
