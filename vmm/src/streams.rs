//! The console and the channels of a machine: their devices, and where they lead.

use std::path::PathBuf;
use std::sync::Arc;

use bantam_devices::virtio::console::{ConsoleHandle, ConsoleMetrics};

use crate::config::{MachineConfig, SerialConfig};
use crate::console::Console;
use crate::devices::VirtioDevices;
use crate::error::Error;
use crate::serial::{self, SerialGuard};

/// The console and the channels of a machine.
#[derive(Default)]
pub(crate) struct Streams {
    console: Option<ConsoleHandle>,
    channels: Option<ConsoleHandle>,
}

/// What must outlive the devices of the machine, and where a user finds them.
#[derive(Default)]
pub(crate) struct StreamGuards {
    console: SerialGuard,
    channels: Vec<SerialGuard>,
}

/// Where a user finds the console and the channels, each if it is a pseudoterminal, file or socket.
#[derive(Debug, Default)]
pub(crate) struct StreamPaths {
    pub(crate) console: Option<PathBuf>,
    pub(crate) channels: Vec<Option<PathBuf>>,
}

impl Streams {
    /// Attaches the devices that `config` asks for, which lead nowhere yet.
    pub(crate) fn attach(
        config: &MachineConfig,
        virtio: &mut VirtioDevices<'_>,
    ) -> Result<Streams, Error> {
        let mut streams = Streams::default();
        if config.console != SerialConfig::None {
            streams.console = Some(virtio.attach_console()?);
        }
        if !config.channels.is_empty() {
            let names = config.channels.iter();
            let names = names.map(|channel| channel.name.as_str().to_string());
            streams.channels = Some(virtio.attach_channels(names.collect())?);
        }
        Ok(streams)
    }

    /// Opens what the console and the channels lead to. `stdio` is the program's end of the one that
    /// leads to standard input and output.
    pub(crate) fn connect(
        &self,
        config: &MachineConfig,
        stdio: &mut Console,
    ) -> Result<StreamGuards, Error> {
        let mut guards = StreamGuards::default();
        if let Some(console) = &self.console {
            guards.console = connect(console, 0, "the console", &config.console, stdio)?;
        }
        if let Some(device) = &self.channels {
            for (port, channel) in (1..).zip(&config.channels) {
                let name = format!("channel '{}'", channel.name);
                let guard = connect(device, port, &name, &channel.end, stdio)?;
                guards.channels.push(guard);
            }
        }
        Ok(guards)
    }

    /// Tells the guest the size of the console in characters.
    pub(crate) fn resize_console(&self, columns: u16, rows: u16) -> Result<(), Error> {
        let console = self.console.as_ref().ok_or(Error::NoConsole)?;
        console.resize(columns, rows);
        Ok(())
    }

    /// What the console counts, and what the channels do.
    pub(crate) fn metrics(&self) -> [Option<Arc<ConsoleMetrics>>; 2] {
        [&self.console, &self.channels]
            .map(|device| device.as_ref().map(|device| device.metrics().clone()))
    }
}

impl StreamGuards {
    pub(crate) fn paths(&self) -> StreamPaths {
        let path = |guard: &SerialGuard| guard.path().map(Into::into);
        StreamPaths {
            console: path(&self.console),
            channels: self.channels.iter().map(path).collect(),
        }
    }
}

fn connect(
    device: &ConsoleHandle,
    port: usize,
    name: &str,
    end: &SerialConfig,
    stdio: &mut Console,
) -> Result<SerialGuard, Error> {
    let stdio = match end {
        SerialConfig::Stdio => std::mem::take(stdio),
        _ => Console::default(),
    };
    let open = serial::open(name, end, stdio)?;
    if let Some(endpoint) = open.endpoint {
        device.connect(port, endpoint);
    }
    Ok(open.guard)
}
