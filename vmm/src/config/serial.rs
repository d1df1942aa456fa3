//! The other end of the serial port, the console or a channel.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, path};

/// Describes the other end of the guest's serial port, of its virtio console, or of a channel.
///
/// On the command line and in a machine file `stdio`, `pty`, `file=PATH`, `socket=PATH` or `none`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output of the monitor, or what an embedding program provides in their place.
    #[default]
    Stdio,
    /// A new pseudoterminal.
    Pty,
    /// A file that gets what the guest writes. The guest has nothing to read.
    File(PathBuf),
    /// A Unix domain socket that one client at a time can connect to.
    Socket(PathBuf),
    /// Nothing: what the guest writes is dropped.
    None,
}

impl FromStr for SerialConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for SerialConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        let bytes = text.as_bytes();
        let path = |prefix: &[u8]| {
            let path = bytes.strip_prefix(prefix)?;
            (!path.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(path)))
        };
        match bytes {
            b"stdio" => Ok(Self::Stdio),
            b"pty" => Ok(Self::Pty),
            b"none" => Ok(Self::None),
            _ => path(b"file=")
                .map(Self::File)
                .or_else(|| path(b"socket=").map(Self::Socket))
                .ok_or_else(|| ConfigError::Serial {
                    text: text.to_string_lossy().into_owned(),
                }),
        }
    }
}

impl Serialize for SerialConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kind, path) = match self {
            Self::File(path) => ("file=", path),
            Self::Socket(path) => ("socket=", path),
            Self::Stdio | Self::Pty | Self::None => return serializer.collect_str(self),
        };
        let mut text = OsString::from(kind);
        text.push(path);
        path::serialize_text(&text, serializer)
    }
}

impl<'de> Deserialize<'de> for SerialConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = path::deserialize_text(deserializer, "a string")?;
        Self::try_from(text.as_os_str()).map_err(D::Error::custom)
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

    #[test]
    fn a_path_may_be_any_bytes() {
        let serial = SerialConfig::try_from(OsStr::from_bytes(b"file=\xe9=,"));
        let path = OsStr::from_bytes(b"\xe9=,");
        assert_eq!(serial.unwrap(), SerialConfig::File(path.into()));
        let refused = SerialConfig::try_from(OsStr::from_bytes(b"t\xe9"));
        assert!(refused.unwrap_err().to_string().contains("'t\u{fffd}'"));
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
