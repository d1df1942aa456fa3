//! Names of devices.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// Name by which the owner of a machine speaks of one of its devices: 1 to 64 letters, digits, `-`, `_` and
/// `.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

impl DeviceName {
    /// Most bytes of a name.
    pub const MAX_SIZE: usize = 64;

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name of the device of its kind at the place `index`, counted from zero, such as `disk0`.
    pub(crate) fn numbered(kind: &str, index: usize) -> DeviceName {
        DeviceName(format!("{kind}{index}"))
    }

    /// Name of the virtio console.
    pub fn console() -> DeviceName {
        DeviceName::of_kind("console")
    }

    /// Name of the balloon.
    pub fn balloon() -> DeviceName {
        DeviceName::of_kind("balloon")
    }

    /// Name of the only device of its kind.
    pub(crate) fn of_kind(kind: &str) -> DeviceName {
        DeviceName(kind.to_owned())
    }
}

impl TryFrom<String> for DeviceName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<DeviceName, ConfigError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if !(1..=Self::MAX_SIZE).contains(&text.len()) || !text.bytes().all(allowed) {
            return Err(ConfigError::DeviceName { text });
        }
        Ok(DeviceName(text))
    }
}

impl FromStr for DeviceName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<DeviceName, ConfigError> {
        text.to_owned().try_into()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.0
    }
}

impl Borrow<str> for DeviceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
