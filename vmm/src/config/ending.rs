//! What the end of a machine leads to, and how long it may take.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, variant_by_name, whole_number};

/// What happens when all vCPUs have halted with interrupts off, so that nothing can wake them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnHalt {
    /// The log says so, and the machine stays until it is ended from outside.
    #[default]
    Wait,
    /// The machine ends.
    Exit,
}

impl FromStr for OnHalt {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::OnHalt { text: text.into() })
    }
}

impl fmt::Display for OnHalt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wait => "wait",
            Self::Exit => "exit",
        })
    }
}

/// What the exit status of the program that runs the machine is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitStatus {
    /// The guest: each way of ending has a status of its own.
    #[default]
    Guest,
    /// The monitor: 0 however the guest ended, and 1 if there was an error.
    Monitor,
}

impl FromStr for ExitStatus {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::ExitStatus { text: text.into() })
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest",
            Self::Monitor => "monitor",
        })
    }
}

/// How long a guest may take to shut itself down: up to an hour, 10 seconds by default. With zero, the
/// guest is not asked at all.
///
/// As text it is a number of seconds, or one with a unit: `10s`, `500ms`, `2m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownTimeout(Duration);

impl ShutdownTimeout {
    /// No time: the power is cut at once.
    pub const NONE: Self = Self(Duration::ZERO);
    /// The longest time.
    const MAX: Duration = Duration::from_secs(3600);

    /// Returns the time.
    pub fn get(self) -> Duration {
        self.0
    }

    fn from_millis(milliseconds: Option<u64>, text: &str) -> Result<Self, ConfigError> {
        milliseconds
            .map(Duration::from_millis)
            .filter(|&time| time <= Self::MAX)
            .map(Self)
            .ok_or_else(|| ConfigError::ShutdownTimeout { text: text.into() })
    }
}

impl Default for ShutdownTimeout {
    fn default() -> Self {
        Self(Duration::from_secs(10))
    }
}

impl FromStr for ShutdownTimeout {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = match unit {
            "ms" => Some(1),
            "" | "s" => Some(1000),
            "m" => Some(60_000),
            _ => None,
        };
        let number = number.parse::<u64>().ok();
        let milliseconds = number.zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
        Self::from_millis(milliseconds, text)
    }
}

impl Serialize for ShutdownTimeout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ShutdownTimeout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ShutdownTimeoutVisitor)
    }
}

struct ShutdownTimeoutVisitor;

impl Visitor<'_> for ShutdownTimeoutVisitor {
    type Value = ShutdownTimeout;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a time such as \"10s\", or a number of seconds")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<ShutdownTimeout, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<ShutdownTimeout, E> {
        whole_number::visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, seconds: i64) -> Result<ShutdownTimeout, E> {
        self.visit_str(&seconds.to_string())
    }
}

impl fmt::Display for ShutdownTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_millis() {
            whole if whole % 1000 == 0 => write!(f, "{}s", whole / 1000),
            part => write!(f, "{part}ms"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn times_have_units() {
        for (text, milliseconds, shown) in [
            ("0", 0, "0s"),
            ("10", 10_000, "10s"),
            ("10s", 10_000, "10s"),
            ("500ms", 500, "500ms"),
            ("2m", 120_000, "120s"),
            ("60m", 3_600_000, "3600s"),
        ] {
            let timeout: ShutdownTimeout = text.parse().unwrap();
            assert_eq!(timeout.get(), Duration::from_millis(milliseconds), "{text}");
            assert_eq!(timeout.to_string(), shown);
        }
        for text in [
            "",
            "s",
            "-1",
            "1.5s",
            "10 s",
            "1h",
            "61m",
            "99999999999999999999",
        ] {
            assert_eq!(
                text.parse::<ShutdownTimeout>().unwrap_err().to_string(),
                format!(
                    "invalid time '{text}' to shut down: expected a number of seconds, or one with a \
                     unit (500ms, 10s, 2m), up to an hour"
                )
            );
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for on_halt in [OnHalt::Wait, OnHalt::Exit] {
            assert_eq!(on_halt.to_string().parse::<OnHalt>().unwrap(), on_halt);
        }
        for status in [ExitStatus::Guest, ExitStatus::Monitor] {
            assert_eq!(status.to_string().parse::<ExitStatus>().unwrap(), status);
        }
        assert!("restart".parse::<OnHalt>().is_err());
        assert!("".parse::<ExitStatus>().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text: String) {
            if let Ok(timeout) = text.parse::<ShutdownTimeout>() {
                prop_assert_eq!(timeout.to_string().parse::<ShutdownTimeout>().unwrap(), timeout);
            }
        }
    }
}
