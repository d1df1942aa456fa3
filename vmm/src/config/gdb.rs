//! Where gdb connects.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, path};

/// Says where gdb connects to debug the guest.
///
/// On the command line and in a machine file `tcp:ADDRESS:PORT` or `unix:PATH`. Anyone who can connect there
/// controls the guest and reads all of its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbConfig {
    /// A TCP port. With port 0 the host chooses one, which the log tells.
    Tcp(SocketAddr),
    /// A Unix domain socket.
    Unix(PathBuf),
}

impl FromStr for GdbConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for GdbConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        let bytes = text.as_bytes();
        let path = bytes.strip_prefix(b"unix:").filter(|path| !path.is_empty());
        let tcp = || text.to_str()?.strip_prefix("tcp:")?.parse().ok();
        path.map(|path| Self::Unix(OsStr::from_bytes(path).into()))
            .or_else(|| tcp().map(Self::Tcp))
            .ok_or_else(|| ConfigError::Gdb {
                text: text.to_string_lossy().into_owned(),
            })
    }
}

impl Serialize for GdbConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tcp(_) => serializer.collect_str(self),
            Self::Unix(path) => {
                let mut text = OsString::from("unix:");
                text.push(path);
                path::serialize_text(&text, serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for GdbConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = path::deserialize_text(deserializer, "a string")?;
        Self::try_from(text.as_os_str()).map_err(D::Error::custom)
    }
}

impl fmt::Display for GdbConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "tcp:{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_an_address_or_a_path() {
        let tcp = |text: &str| GdbConfig::Tcp(text.parse().unwrap());
        for (text, expected) in [
            ("tcp:127.0.0.1:1234", tcp("127.0.0.1:1234")),
            ("tcp:[::1]:0", tcp("[::1]:0")),
            ("unix:/run/gdb", GdbConfig::Unix("/run/gdb".into())),
            ("unix:tcp:1", GdbConfig::Unix("tcp:1".into())),
        ] {
            let parsed: GdbConfig = text.parse().unwrap();
            assert_eq!(parsed, expected);
            assert_eq!(parsed.to_string(), text);
        }
        let path = GdbConfig::try_from(OsStr::from_bytes(b"unix:\xe9"));
        assert_eq!(
            path.unwrap(),
            GdbConfig::Unix(OsStr::from_bytes(b"\xe9").into())
        );
    }

    #[test]
    fn refuses_other_text() {
        for text in [
            "",
            "tcp:",
            "unix:",
            "tcp:1234",
            "tcp::1234",
            "tcp:host:1",
            "/run/gdb",
            "tcp:127.0.0.1:65536",
        ] {
            let error = text.parse::<GdbConfig>().unwrap_err().to_string();
            let expected = "expected tcp:ADDRESS:PORT, such as tcp:127.0.0.1:1234, or unix:PATH";
            assert_eq!(error, format!("invalid place for gdb '{text}': {expected}"));
        }
    }
}
