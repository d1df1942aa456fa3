//! The program's log.

use std::fmt;
use std::path::PathBuf;
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
    /// Whether lines name the place in the source that they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Path of the only module whose lines are logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How much is logged. Its name is read whether it is in upper or lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// Also what is suspicious.
    Warning,
    /// Also what happens.
    Info,
    /// Also why it happens.
    Debug,
    /// Everything.
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

/// A text that is not a level.
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

#[cfg(test)]
mod tests {
    use super::*;

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
