//! What one source, the command line or a machine file, says about a machine.

use std::path::{Path, PathBuf};

use bantam_boot::{CommandLine, CommandLineError};
use serde::Deserialize;

use super::{
    BalloonConfig, BootProtocolOption, ChannelConfig, ConfigError, DiskConfig, ExitStatus,
    HugePages, MachineConfig, MemorySize, NetConfig, OnHalt, OnReboot, SerialConfig,
    ShutdownTimeout, VcpuCount, VsockConfig, forms, read_text_file, rebase,
};

/// What one source says about a machine; `None` where it says nothing.
///
/// A machine file is TOML. Its keys are the long options of the command line without `--`:
///
/// ```toml
/// kernel = "vmlinux"
/// memory = "512M"
/// on-reboot = "restart"
///
/// [[disk]]
/// path = "root.img"
/// readonly = true
///
/// [[net]]
/// tap = "tap0"
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MachineOptions {
    /// See [`MachineConfig::kernel`].
    pub kernel: Option<PathBuf>,
    /// See [`MachineConfig::initrd`].
    pub initrd: Option<PathBuf>,
    /// See [`MachineConfig::cmdline`].
    pub cmdline: Option<String>,
    /// Texts that make up [`MachineConfig::append`]; a string or a list of strings in a machine file.
    #[serde(default, deserialize_with = "forms::texts")]
    pub append: Option<Vec<String>>,
    /// See [`MachineConfig::cpus`].
    pub cpus: Option<VcpuCount>,
    /// See [`MachineConfig::memory`].
    pub memory: Option<MemorySize>,
    /// See [`MachineConfig::huge_pages`].
    pub huge_pages: Option<HugePages>,
    /// See [`MachineConfig::disks`].
    #[serde(rename = "disk", default, deserialize_with = "forms::disks")]
    pub disks: Option<Vec<DiskConfig>>,
    /// See [`MachineConfig::nets`].
    #[serde(rename = "net", default, deserialize_with = "forms::nets")]
    pub nets: Option<Vec<NetConfig>>,
    /// See [`MachineConfig::vsock`].
    #[serde(default, deserialize_with = "forms::vsock")]
    pub vsock: Option<VsockConfig>,
    /// See [`MachineConfig::serial`].
    pub serial: Option<SerialConfig>,
    /// See [`MachineConfig::console`].
    pub console: Option<SerialConfig>,
    /// See [`MachineConfig::channels`].
    #[serde(rename = "channel", default, deserialize_with = "forms::channels")]
    pub channels: Option<Vec<ChannelConfig>>,
    /// See [`MachineConfig::rng`].
    pub rng: Option<bool>,
    /// See [`MachineConfig::balloon`].
    #[serde(default, deserialize_with = "forms::balloon")]
    pub balloon: Option<BalloonConfig>,
    /// See [`MachineConfig::boot_protocol`].
    pub boot_protocol: Option<BootProtocolOption>,
    /// See [`MachineConfig::on_reboot`].
    pub on_reboot: Option<OnReboot>,
    /// See [`MachineConfig::restart_limit`].
    pub restart_limit: Option<u32>,
    /// See [`MachineConfig::shutdown_timeout`].
    pub shutdown_timeout: Option<ShutdownTimeout>,
    /// See [`MachineConfig::exit_status`].
    pub exit_status: Option<ExitStatus>,
    /// See [`MachineConfig::on_halt`].
    pub on_halt: Option<OnHalt>,
    /// See [`MachineConfig::host_workarounds`].
    pub host_workarounds: Option<bool>,
}

impl MachineOptions {
    /// Reads a machine file, as [`read_text_file`] does. Relative paths in a pipe or device are
    /// relative to the current folder.
    ///
    /// # Errors
    ///
    /// When it cannot be read, and as [`Self::from_toml`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text_file(path).map_err(|source| ConfigError::ReadMachineFile {
            path: path.into(),
            source,
        })?;
        let mut options = Self::parse(&text, path)?;
        if path.is_file() {
            options.rebase_paths(path);
        }
        Ok(options)
    }

    /// Reads the text of the machine file `path`. Relative paths in it are relative to the folder
    /// of that file.
    ///
    /// # Errors
    ///
    /// When the text is not TOML, has an option that does not exist or a value that an option
    /// cannot have. The error names the line.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut options = Self::parse(text, path)?;
        options.rebase_paths(path);
        Ok(options)
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| ConfigError::MachineFile {
            path: path.into(),
            line: line_number(text, error.span().map_or(0, |span| span.start)),
            message: describe(error.message()),
        })
    }

    /// Makes relative paths relative to the folder of `machine_file`.
    fn rebase_paths(&mut self, machine_file: &Path) {
        let Some(folder) = machine_file.parent() else {
            return;
        };
        let channels = self.channels.iter_mut().flatten();
        let streams = self
            .serial
            .iter_mut()
            .chain(&mut self.console)
            .chain(channels.map(|channel| &mut channel.end))
            .filter_map(|end| match end {
                SerialConfig::File(path) | SerialConfig::Socket(path) => Some(path),
                SerialConfig::Stdio | SerialConfig::Pty | SerialConfig::None => None,
            });
        let vsock = self.vsock.as_mut().map(|vsock| &mut vsock.socket);
        let disks = self.disks.iter_mut().flatten().map(|disk| &mut disk.path);
        for path in self
            .kernel
            .iter_mut()
            .chain(&mut self.initrd)
            .chain(vsock)
            .chain(streams)
            .chain(disks)
        {
            rebase(path, folder);
        }
    }

    /// Takes from `fallback` what `self` does not say. Disks are taken all or none, and so are
    /// network devices and channels.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        Self {
            kernel: self.kernel.or(fallback.kernel),
            initrd: self.initrd.or(fallback.initrd),
            cmdline: self.cmdline.or(fallback.cmdline),
            append: self.append.or(fallback.append),
            cpus: self.cpus.or(fallback.cpus),
            memory: self.memory.or(fallback.memory),
            huge_pages: self.huge_pages.or(fallback.huge_pages),
            disks: self.disks.or(fallback.disks),
            nets: self.nets.or(fallback.nets),
            vsock: self.vsock.or(fallback.vsock),
            serial: self.serial.or(fallback.serial),
            console: self.console.or(fallback.console),
            channels: self.channels.or(fallback.channels),
            rng: self.rng.or(fallback.rng),
            balloon: self.balloon.or(fallback.balloon),
            boot_protocol: self.boot_protocol.or(fallback.boot_protocol),
            on_reboot: self.on_reboot.or(fallback.on_reboot),
            restart_limit: self.restart_limit.or(fallback.restart_limit),
            shutdown_timeout: self.shutdown_timeout.or(fallback.shutdown_timeout),
            exit_status: self.exit_status.or(fallback.exit_status),
            on_halt: self.on_halt.or(fallback.on_halt),
            host_workarounds: self.host_workarounds.or(fallback.host_workarounds),
        }
    }

    /// Fills in the defaults. A serial port of which nothing is said leads nowhere if the console or a
    /// channel leads to standard input and output.
    ///
    /// # Errors
    ///
    /// When there is no kernel, when a text to append is not part of a kernel command line, and as
    /// [`MachineConfig::validate`].
    pub fn into_config(self) -> Result<MachineConfig, ConfigError> {
        let defaults = MachineConfig::new(self.kernel.ok_or(ConfigError::NoKernel)?);
        let console = self.console.unwrap_or(defaults.console);
        let channels = self.channels.unwrap_or(defaults.channels);
        let is_stdio = |end: &SerialConfig| *end == SerialConfig::Stdio;
        let is_stdio_taken =
            is_stdio(&console) || channels.iter().any(|channel| is_stdio(&channel.end));
        let default_serial = match is_stdio_taken {
            true => SerialConfig::None,
            false => defaults.serial,
        };
        let config = MachineConfig {
            kernel: defaults.kernel,
            initrd: self.initrd,
            cmdline: self.cmdline,
            append: self.append.map(|texts| join_words(&texts)).transpose()?,
            cpus: self.cpus.unwrap_or(defaults.cpus),
            smt: defaults.smt,
            cpu: defaults.cpu,
            memory: self.memory.unwrap_or(defaults.memory),
            huge_pages: self.huge_pages.unwrap_or(defaults.huge_pages),
            disks: self.disks.unwrap_or(defaults.disks),
            nets: self.nets.unwrap_or(defaults.nets),
            vsock: self.vsock,
            metadata: defaults.metadata,
            serial: self.serial.unwrap_or(default_serial),
            serial_limit: defaults.serial_limit,
            console,
            channels,
            rng: self.rng.unwrap_or(defaults.rng),
            rng_limits: defaults.rng_limits,
            balloon: self.balloon,
            boot_protocol: self.boot_protocol.unwrap_or(defaults.boot_protocol),
            on_reboot: self.on_reboot.unwrap_or(defaults.on_reboot),
            restart_limit: self.restart_limit,
            shutdown_timeout: self.shutdown_timeout.unwrap_or(defaults.shutdown_timeout),
            exit_status: self.exit_status.unwrap_or(defaults.exit_status),
            on_halt: self.on_halt.unwrap_or(defaults.on_halt),
            host_workarounds: self.host_workarounds.unwrap_or(defaults.host_workarounds),
            boot_timer: defaults.boot_timer,
        };
        config.validate()?;
        Ok(config)
    }
}

/// Puts kernel parameters of all `texts` before a `--`, and arguments for init after it.
fn join_words(texts: &[String]) -> Result<String, CommandLineError> {
    let mut line = CommandLine::default();
    for text in texts {
        line.append(text)?;
    }
    Ok(line.to_string())
}

/// Number, from 1, of the line with the byte at `offset`.
fn line_number(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|&byte| byte == b'\n')
        .count()
}

/// Serde's words for a struct in those of a configuration file, on one line.
fn describe(message: &str) -> String {
    let message = message.replace('`', "'").replace('\n', " ");
    for (serde_words, words) in [
        ("unknown field", "unknown option"),
        ("missing field", "missing option"),
    ] {
        if let Some(rest) = message.strip_prefix(serde_words) {
            return format!("{words}{rest}");
        }
    }
    message
}
