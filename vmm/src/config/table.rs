//! The part of a configuration that one source gives: the command line or a machine file.

use std::path::Path;

use serde::Serialize;
use toml::Table;

use super::{ConfigError, ExitStatus, MachineConfig, SerialConfig, read_text_file};

/// Holds what one source says about a machine: keys of a machine file, each with a valid value.
///
/// A machine file is TOML. Its keys are those of [`MachineConfig`], most of them also long options of the
/// command line:
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
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MachineTable(Table);

impl MachineTable {
    /// Reads a machine file by [`read_text_file`]. Relative paths in a pipe or device are relative to the
    /// current folder.
    ///
    /// # Errors
    ///
    /// If it cannot be read, and those of [`Self::from_toml`].
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = read_text_file(path).map_err(|source| ConfigError::ReadMachineFile {
            path: path.into(),
            source,
        })?;
        let folder = path.parent().filter(|_| path.is_file());
        Self::parse(&text, path, folder)
    }

    /// Reads the text of the machine file `path`. Relative paths in it are relative to the folder
    /// of that file.
    ///
    /// # Errors
    ///
    /// If the text is not TOML, or has an option that does not exist or a value that an option cannot have.
    /// The error names the line.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        Self::parse(text, path, path.parent())
    }

    fn parse(text: &str, path: &Path, folder: Option<&Path>) -> Result<Self, ConfigError> {
        let wrong_line = |error: toml::de::Error| ConfigError::MachineFile {
            path: path.into(),
            line: line_number(text, error.span().map_or(0, |span| span.start)),
            message: describe(error.message()),
        };
        let given: Table = toml::from_str(text).map_err(wrong_line)?;
        // This has defaults for what the file leaves out.
        let mut config: MachineConfig = toml::from_str(text).map_err(wrong_line)?;
        if let Some(folder) = folder {
            config.rebase_paths(folder);
        }
        let mut table = config.to_table();
        table.retain(|key, _| given.contains_key(key));
        Ok(Self(table))
    }

    /// Creates a table from `options`, which serialize to keys of a machine file and their values.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Options`] if they serialize to something that TOML does not have.
    pub fn from_options(options: &impl Serialize) -> Result<Self, ConfigError> {
        let table = Table::try_from(options).map_err(|error| ConfigError::Options {
            message: describe(&error.to_string()),
        })?;
        Ok(Self(table))
    }

    /// Takes from `fallback` each key that `self` does not have. Disks are one key, so they are taken all or
    /// none; so are network devices and channels.
    #[must_use]
    pub fn over(self, fallback: Self) -> Self {
        let Self(mut table) = fallback;
        table.extend(self.0);
        Self(table)
    }

    /// Whether the source has this key.
    pub fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// Returns what the exit status of the program is about.
    pub fn exit_status(&self) -> ExitStatus {
        let status = self.0.get("exit-status").cloned();
        status
            .and_then(|status| status.try_into().ok())
            .unwrap_or_default()
    }

    /// Fills in the defaults. If the serial port is not mentioned, and the console or a channel leads to
    /// standard input and output, the serial port leads nowhere.
    ///
    /// # Errors
    ///
    /// Those of [`MachineTable::into_unopened_config`], and those of [`MachineConfig::validate`].
    pub fn into_config(self) -> Result<MachineConfig, ConfigError> {
        let config = self.into_unopened_config()?;
        config.validate()?;
        Ok(config)
    }

    /// Does the same as [`MachineTable::into_config`], and does not look at the files that the configuration names.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Options`] if a key or a value is not one of a machine file, or texts to append are not
    /// parts of a kernel command line. Otherwise those of [`MachineConfig::validate_values`].
    pub fn into_unopened_config(self) -> Result<MachineConfig, ConfigError> {
        let says_serial = self.0.contains_key("serial");
        // From text, like a machine file: a deserializer of tables would be the same code once more.
        let mut config: MachineConfig =
            toml::from_str(&self.0.to_string()).map_err(|error| ConfigError::Options {
                message: describe(error.message()),
            })?;
        if !says_serial {
            let default = std::mem::replace(&mut config.serial, SerialConfig::None);
            if !config.uses_stdio() {
                config.serial = default;
            }
        }
        config.validate_values()?;
        Ok(config)
    }
}

/// Returns the number, from 1, of the line with the byte at `offset`.
fn line_number(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|&byte| byte == b'\n')
        .count()
}

/// Rewrites serde's message about a struct in terms of a configuration file, on one line.
pub(super) fn describe(message: &str) -> String {
    let mut message = message.replace('`', "'").replace('\n', " ");
    for (rust_type, max) in [
        ("u8", u64::from(u8::MAX)),
        ("u16", u16::MAX.into()),
        ("u32", u32::MAX.into()),
    ] {
        message = message.replace(
            &format!("expected {rust_type}"),
            &format!("expected a number from 0 to {max}"),
        );
    }
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
