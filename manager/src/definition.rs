//! What is kept of a machine: its machine file, and settings of the manager beside it.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use bantam_vmm::config::{ConfigError, MachineConfig, MachineTable, OnReboot};
use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The key for what a reboot does.
const ON_REBOOT: &str = "on-reboot";

/// Reads the text of the machine file `path` of a named machine. It has the keys of any machine file; a reboot of the
/// guest starts it again unless the file says otherwise.
///
/// The files that it names are not looked at.
///
/// # Errors
/// If it is not TOML, or has a key or a value that a machine file does not have. The error names the line.
pub fn parse_machine_file(text: &str, path: &Path) -> Result<MachineConfig, Error> {
    let table = MachineTable::from_toml(text, path)?;
    Ok(table.over(defaults()?).into_unopened_config()?)
}

/// Writes a machine file that [`parse_machine_file`] reads.
pub fn machine_file(config: &MachineConfig) -> String {
    let text = config.to_toml();
    match config.on_reboot {
        OnReboot::Restart => text,
        // It is the default of other machine files, which are therefore written without it.
        OnReboot::Exit => format!("{ON_REBOOT} = \"exit\"\n{text}"),
    }
}

/// Returns the defaults of a named machine that differ from those of others, to lay under options and files.
///
/// # Errors
/// None in practice: it is the table of a constant.
pub fn defaults() -> Result<MachineTable, ConfigError> {
    MachineTable::from_toml(&format!("{ON_REBOOT} = \"restart\""), Path::new(""))
}

/// When a machine that has ended by itself is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    Never,
    /// If its guest has crashed, halted or ended it with a number that is not 0, or the monitor had an error.
    OnFailure,
    /// Whenever it was not its user who ended it.
    Always,
}

impl fmt::Display for RestartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RestartPolicy::Never => "never",
            RestartPolicy::OnFailure => "on-failure",
            RestartPolicy::Always => "always",
        })
    }
}

impl FromStr for RestartPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<RestartPolicy, String> {
        [
            RestartPolicy::Never,
            RestartPolicy::OnFailure,
            RestartPolicy::Always,
        ]
        .into_iter()
        .find(|policy| policy.to_string() == text)
        .ok_or_else(|| "it is never, on-failure or always".to_owned())
    }
}

/// Returns a new UUID.
pub(crate) fn random_uuid() -> Result<String, Error> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let id = fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(id.trim().to_owned())
}

/// What the manager knows of a machine beside its machine file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// A UUID, which the machine keeps for its life.
    pub id: String,
    /// When it is started again.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// A few words for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// The snapshot that the machine has last made or gone back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_snapshot: Option<String>,
    /// Whether the machine is a template: it cannot be started, and linked copies can be made of it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub template: bool,
    /// What cloud-init in its guest knows it by, if there is a disk for cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<String>,
}

fn is_false(value: &bool) -> bool {
    !value
}

impl Settings {
    /// Makes settings for a new machine.
    ///
    /// # Errors
    /// If the kernel's random numbers cannot be read.
    pub fn new(restart: RestartPolicy) -> Result<Settings, Error> {
        Ok(Settings {
            id: random_uuid()?,
            restart,
            title: None,
            current_snapshot: None,
            template: false,
            instance_id: None,
        })
    }

    /// Reads settings.
    ///
    /// # Errors
    /// If they are damaged.
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Settings, Error> {
        toml::from_str(text).map_err(|error| {
            let reason = error.message().replace('\n', " ");
            Error::file("read", path)(std::io::Error::other(reason))
        })
    }

    /// Writes what [`Settings::parse`] reads.
    pub(crate) fn to_toml(&self) -> String {
        toml::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use bantam_vmm::config::SerialConfig;

    use super::*;

    fn parse(text: &str) -> MachineConfig {
        parse_machine_file(text, Path::new("/m/machine.toml")).unwrap()
    }

    #[test]
    fn a_reboot_restarts_a_named_machine_unless_its_file_says_otherwise() {
        let config = parse("kernel = \"vmlinux\"");
        assert_eq!(config.on_reboot, OnReboot::Restart);
        assert_eq!(config.kernel, Path::new("/m/vmlinux"));
        assert_eq!(config.serial, SerialConfig::Stdio);
        let config = parse("kernel = \"/k\"\non-reboot = \"exit\"\nconsole = \"stdio\"");
        assert_eq!(config.on_reboot, OnReboot::Exit);
        assert_eq!(config.serial, SerialConfig::None);
    }

    #[test]
    fn a_machine_file_is_read_as_it_was_written() {
        for text in [
            "kernel = \"/k\"",
            "kernel = \"/k\"\non-reboot = \"exit\"\n[[disk]]\npath = \"/d\"",
            "kernel = \"/k\"\nserial = \"none\"\n[balloon]\nsize = \"16M\"",
            "kernel = \"/k\"\nconsole = \"stdio\"",
        ] {
            let config = parse(text);
            assert_eq!(parse(&machine_file(&config)), config, "{text}");
        }
    }

    #[test]
    fn a_mistake_is_reported_with_its_line() {
        let path = Path::new("/m/machine.toml");
        let error = parse_machine_file("kernel = \"k\"\ncups = 2", path).unwrap_err();
        assert!(error.to_string().contains("machine.toml:2: "), "{error}");
        let error = parse_machine_file("cpus = 2", path).unwrap_err();
        assert!(error.to_string().contains("kernel"), "{error}");
    }

    #[test]
    fn settings_are_read_as_they_were_written() {
        let mut settings = Settings::new(RestartPolicy::OnFailure).unwrap();
        assert_eq!(settings.id.len(), 36);
        settings.current_snapshot = Some("before".to_owned());
        let path = Path::new("settings.toml");
        assert_eq!(
            Settings::parse(&settings.to_toml(), path).unwrap(),
            settings
        );
        assert!(Settings::parse("id = 1", path).is_err());
    }
}
