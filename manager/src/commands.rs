//! Commands to a machine that runs.

use std::io;
use std::thread;
use std::time::{Duration, Instant};

use bantam_control::{ControlClient, ControlError};
use bantam_vmm::config::{DeviceName, MachineConfig, MemorySize};
use bantam_vmm::{Answer, Command, DeviceAnswer, DeviceCommand, Event, ShutDown, State};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::error::Error;
use crate::machine::{Machine, MachineState};
use crate::start::StartOptions;

/// How long a machine that was just started may take until it can be controlled.
const CONTROL_TIME: Duration = Duration::from_secs(2);
/// How long the process of a machine may take to end when its power is cut, until it is killed.
const END_TIME: Duration = Duration::from_secs(5);
/// How long a guest may take to shut down that is to reboot, if it does not say how long it needs.
const REBOOT_TIME: Duration = Duration::from_secs(120);

impl Machine {
    /// Connects to the control socket, to `action` the machine.
    ///
    /// # Errors
    /// If it does not run, or its process does not answer.
    pub fn connect(&self, action: &'static str) -> Result<ControlClient, Error> {
        let begin = Instant::now();
        loop {
            let error = match ControlClient::connect(&self.control_socket()) {
                Ok(client) => return Ok(client),
                Err(error) => error,
            };
            if !self.is_active()? {
                let name = self.name().clone();
                return Err(Error::NotRunning { action, name });
            }
            let is_early = matches!(error, ControlError::NoSocket | ControlError::Abandoned);
            if !is_early || begin.elapsed() >= CONTROL_TIME {
                return Err(self.control_error(action, error));
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn control_error(&self, action: &'static str, source: ControlError) -> Error {
        Error::Control {
            action,
            name: self.name().clone(),
            source,
        }
    }

    /// Has the machine execute a command, to `action` it.
    ///
    /// # Errors
    /// If it does not run, its process does not answer, or it refuses the command.
    pub fn execute(&self, action: &'static str, command: Command) -> Result<Answer, Error> {
        let mut client = self.connect(action)?;
        let answer = client.execute(command);
        answer.map_err(|error| self.control_error(action, error))
    }

    /// Has the guest stand still.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn suspend(&self) -> Result<(), Error> {
        self.execute("suspend", Command::Pause).map(drop)
    }

    /// Lets a paused guest go on.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn resume(&self) -> Result<(), Error> {
        self.execute("resume", Command::Resume).map(drop)
    }

    /// Asks the guest to shut itself down, and returns how it was asked. With `timeout` its power is cut after that time, and
    /// at once if it listens neither to the power button nor to Ctrl-Alt-Del. Does not wait for the end.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn shutdown(&self, timeout: Option<Duration>) -> Result<ShutDown, Error> {
        match self.execute("shut down", Command::ShutDown { timeout })? {
            Answer::ShutDown(how) => Ok(how),
            _ => Err(self.unexpected("shut down")),
        }
    }

    pub(crate) fn unexpected(&self, action: &'static str) -> Error {
        let reason = "it gives the answer to another command".to_owned();
        self.control_error(action, ControlError::Foreign { reason })
    }

    /// Ends the machine as if its power were cut, and returns when it has no process any more. With `grace` the guest is
    /// asked to shut itself down before that, and has that time. A process that does not end is killed.
    ///
    /// # Errors
    /// If the machine does not run, or even the kernel does not end its process.
    pub fn destroy(&self, grace: Option<Duration>) -> Result<(), Error> {
        if !self.is_active()? {
            let name = self.name().clone();
            return Err(Error::NotRunning {
                action: "destroy",
                name,
            });
        }
        if let Some(grace) = grace
            && self.shutdown(Some(grace)).is_ok()
            && self.wait_until_shut_off(Some(grace + END_TIME))?
        {
            return Ok(());
        }
        let asked = self.execute("destroy", Command::Stop);
        if asked.is_ok() && self.wait_until_shut_off(Some(END_TIME))? {
            return Ok(());
        }
        self.kill()
    }

    /// Kills the process of the machine.
    fn kill(&self) -> Result<(), Error> {
        let process = self.process();
        if let Some(process) = process {
            match kill(process, Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    let error = io::Error::from(errno);
                    return Err(Error::io(format!("kill process {process}"))(error));
                }
            }
        }
        if self.wait_until_shut_off(Some(END_TIME))? {
            self.remove_control_group();
            return Ok(());
        }
        Err(Error::Late {
            name: self.name().clone(),
            state: match process {
                Some(process) => format!("was killed, but process {process} does not end"),
                None => "has a process that you cannot see".to_owned(),
            },
            remedy: "ask the host's administrator".to_owned(),
        })
    }

    /// Has the guest reboot: by Ctrl-Alt-Del if it listens to that, otherwise by the power button and another start.
    /// Does not wait for a guest that reboots by itself.
    ///
    /// # Errors
    /// Those of [`Machine::execute`], and if the guest listens to neither or has not shut down in time.
    pub fn reboot(&self) -> Result<(), Error> {
        match self.execute("reboot", Command::PressCtrlAltDel) {
            Err(Error::Control {
                source: ControlError::Refused(_),
                ..
            }) => {}
            result => return result.map(drop),
        }
        let change = self.change("reboot")?;
        if self.shutdown(None)? == ShutDown::Unheard {
            let name = self.name().clone();
            return Err(Error::Unheard { name });
        }
        if !self.wait_until_shut_off(Some(REBOOT_TIME))? {
            return Err(Error::Late {
                name: self.name().clone(),
                state: format!(
                    "has not shut down within {} s of the power button",
                    REBOOT_TIME.as_secs()
                ),
                remedy: format!("reset it (bantam reset {})", self.name()),
            });
        }
        self.start_with(&change, &StartOptions::default()).map(drop)
    }

    /// Cuts the power of a machine that runs, and starts it again.
    ///
    /// # Errors
    /// If it does not run, another command is at work on it, or it cannot be started again.
    pub fn reset(&self) -> Result<(), Error> {
        let change = self.change("reset")?;
        self.destroy(None)?;
        self.start_with(&change, &StartOptions::default()).map(drop)
    }

    /// Returns the configuration of the machine that runs, with all changes since its start.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn live_config(&self) -> Result<MachineConfig, Error> {
        match self.execute("examine", Command::Configuration)? {
            Answer::Configuration(config) => Ok(*config),
            _ => Err(self.unexpected("examine")),
        }
    }

    /// Returns the counters of the machine that runs.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn counters(&self) -> Result<Value, Error> {
        match self.execute("examine", Command::Metrics)? {
            Answer::Metrics(counters) => Ok(counters),
            _ => Err(self.unexpected("examine")),
        }
    }

    /// Has the guest give memory back to the host, or lets it take memory back, so that it has `size`.
    ///
    /// # Errors
    /// If the machine has no balloon or less memory than that; otherwise those of [`Machine::execute`].
    pub fn set_memory(&self, size: MemorySize) -> Result<(), Error> {
        let action = "set the memory of";
        let config = self.live_config()?;
        if config.balloon.is_none() {
            let reason = "it has no balloon; give it one in its machine file ([balloon] with size = 0), and start it again";
            return Err(self.refused(action, reason));
        }
        let Some(given_up) = config.memory.bytes().checked_sub(size.bytes()) else {
            let most = config.memory.bytes() >> 20;
            let reason = format!("it has {most} MiB at most; change that in its machine file");
            return Err(self.refused(action, reason));
        };
        let mib = u32::try_from(given_up >> 20).unwrap_or(u32::MAX);
        let command = DeviceCommand::SetBalloonTarget { mib };
        let name: DeviceName = "balloon".parse()?;
        self.execute(action, Command::Device { name, command })
            .map(drop)
    }

    /// Makes the image of a disk larger, and tells the guest. Returns the size in bytes.
    ///
    /// # Errors
    /// Those of [`Machine::execute`].
    pub fn grow_disk(&self, disk: &DeviceName, size: u64) -> Result<u64, Error> {
        let action = "resize a disk of";
        let command = Command::Device {
            name: disk.clone(),
            command: DeviceCommand::Grow { size },
        };
        match self.execute(action, command)? {
            Answer::Device(DeviceAnswer::Size(size)) => Ok(size),
            _ => Err(self.unexpected(action)),
        }
    }

    /// Waits until the machine is `awaited`, up to `limit`. Returns whether it is.
    ///
    /// # Errors
    /// Those of [`Machine::state`].
    pub fn wait_for_state(&self, awaited: MachineState, limit: Duration) -> Result<bool, Error> {
        let begin = Instant::now();
        while self.state()? != awaited {
            if begin.elapsed() >= limit {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(true)
    }

    /// Calls `take` for each event of the machine that runs, until it has ended for good.
    ///
    /// # Errors
    /// Those of [`Machine::connect`], and those of `take`.
    pub fn follow<E: From<Error>>(
        &self,
        mut take: impl FnMut(&Event) -> Result<(), E>,
    ) -> Result<(), E> {
        let action = "follow";
        let mut client = self.connect(action)?;
        let subscribed = client.subscribe();
        subscribed.map_err(|error| self.control_error(action, error))?;
        let mut has_ended = false;
        loop {
            match client.next_event(None) {
                Ok(Some(event)) => {
                    has_ended = matches!(
                        event,
                        Event::State {
                            state: State::Stopped
                        }
                    );
                    take(&event)?;
                }
                Ok(None) => {}
                Err(ControlError::Ended) => {
                    if !has_ended {
                        take(&Event::State {
                            state: State::Stopped,
                        })?;
                    }
                    return Ok(());
                }
                Err(error) => return Err(self.control_error(action, error).into()),
            }
        }
    }
}
