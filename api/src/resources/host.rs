//! What of the monitor itself a client can set.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Body of `PUT /logger`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// File or named pipe for the log, in place of standard output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// How much is logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines say their level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines say where in the source they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Path of the module whose lines alone are logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How much is logged. It is read in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// And what is suspicious.
    Warning,
    /// And what happens.
    Info,
    /// And why.
    Debug,
    /// And all else.
    Trace,
}

impl LogLevel {
    const NAMES: [(&'static str, LogLevel); 7] = [
        ("Off", LogLevel::Off),
        ("Error", LogLevel::Error),
        ("Warning", LogLevel::Warning),
        ("Warn", LogLevel::Warning),
        ("Info", LogLevel::Info),
        ("Debug", LogLevel::Debug),
        ("Trace", LogLevel::Trace),
    ];
}

/// A text that is no level.
#[derive(Debug, thiserror::Error)]
#[error("invalid log level '{text}': expected Off, Error, Warning, Info, Debug or Trace")]
pub struct LogLevelError {
    text: String,
}

impl FromStr for LogLevel {
    type Err = LogLevelError;

    fn from_str(text: &str) -> Result<LogLevel, LogLevelError> {
        let is_name = |(name, _): &&(&str, LogLevel)| name.eq_ignore_ascii_case(text);
        match LogLevel::NAMES.iter().find(is_name) {
            Some(&(_, level)) => Ok(level),
            None => Err(LogLevelError { text: text.into() }),
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_level = |(_, level): &&(&str, LogLevel)| level == self;
        let name = LogLevel::NAMES.iter().find(is_level);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl Serialize for LogLevel {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<LogLevel, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Body of `PUT /metrics`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// File or named pipe to which metrics are written, one line of JSON at a time.
    #[serde(serialize_with = "serialize_path")]
    pub metrics_path: PathBuf,
}

/// Shows a path that came from the command line, where it may be other than UTF-8.
fn serialize_path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

/// Body of `PUT /mmds/config`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetadataConfig {
    /// Whether the guest needs a token to read.
    #[serde(default)]
    pub version: MetadataVersion,
    /// Names of the interfaces on which the guest reaches the service.
    pub network_interfaces: Vec<String>,
    /// The service's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4_address: Option<Ipv4Addr>,
    /// Whether answers are plain text whatever the guest accepts.
    #[serde(default)]
    pub imds_compat: bool,
}

/// How a guest asks for metadata.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetadataVersion {
    /// By a plain request.
    #[default]
    V1,
    /// With a token that it has asked for before.
    V2,
}

impl From<MetadataVersion> for bantam_vmm::config::MetadataVersion {
    fn from(version: MetadataVersion) -> Self {
        match version {
            MetadataVersion::V1 => Self::V1,
            MetadataVersion::V2 => Self::V2,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_path_that_is_not_utf_8_can_be_shown() {
        let metrics = Metrics {
            metrics_path: OsStr::from_bytes(b"m\xe9").into(),
        };
        assert_eq!(
            serde_json::to_value(metrics).unwrap(),
            serde_json::json!({"metrics_path": "m\u{fffd}"})
        );
    }

    #[test]
    fn levels_are_read_in_any_case_and_written_in_one() {
        for (text, name) in [
            ("info", "Info"),
            ("WARNING", "Warning"),
            ("warn", "Warning"),
        ] {
            let level: LogLevel = serde_json::from_str(&format!("\"{text}\"")).unwrap();
            assert_eq!(
                serde_json::to_string(&level).unwrap(),
                format!("\"{name}\"")
            );
        }
        let error = serde_json::from_str::<LogLevel>("\"loud\"").unwrap_err();
        assert!(error.to_string().contains("expected Off, Error"), "{error}");
    }
}
