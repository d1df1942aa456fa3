//! The other end of the serial port, and of what is like it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use super::ConfigError;

/// Other end of the guest's serial port, of its virtio console, or of a channel.
///
/// On the command line and in a machine file `stdio`, `pty`, `file=PATH`, `socket=PATH` or `none`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum SerialConfig {
    /// Standard input and output of the monitor, or what an embedding program gives in their place.
    #[default]
    Stdio,
    /// A new pseudoterminal.
    Pty,
    /// A file that gets what the guest writes; the guest reads nothing.
    File(PathBuf),
    /// A Unix domain socket that one client at a time can connect to.
    Socket(PathBuf),
    /// Nothing: what the guest writes is dropped.
    None,
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "pty" => Ok(Self::Pty),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err(ConfigError::Serial { text: text.into() }),
        }
    }
}

impl TryFrom<String> for SerialConfig {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl fmt::Display for SerialConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::Socket(path) => write!(f, "socket={}", path.display()),
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_other_text() {
        for text in ["", "tty", "file", "file=", "socket=", "stdio=x", "STDIO"] {
            let error = text.parse::<SerialConfig>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "invalid end '{text}': \
                     expected stdio, pty, file=PATH, socket=PATH or none"
                )
            );
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(kind in 0..5, path in ".+") {
            let serial = match kind {
                0 => SerialConfig::Stdio,
                1 => SerialConfig::Pty,
                2 => SerialConfig::File(path.into()),
                3 => SerialConfig::Socket(path.into()),
                _ => SerialConfig::None,
            };
            prop_assert_eq!(serial.to_string().parse::<SerialConfig>().unwrap(), serial);
        }
    }
}
