//! Names of devices.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, FIXED_DEVICE_NAMES};

/// What a device of the machine is called on the host: 1 to 64 letters, digits and the characters `.`, `-`
/// and `_`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct DeviceName(String);

impl DeviceName {
    /// Most characters of a name.
    pub const MAX_SIZE: usize = 64;

    /// The name of the device of a kind that has no other: the kind, and its place counted from zero.
    pub(super) fn by_place(kind: &str, place: usize) -> Self {
        Self(format!("{kind}{place}"))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the name of a device that a machine has once at most, such as `console`. No disk or
    /// network device can have it.
    pub fn is_fixed(&self) -> bool {
        FIXED_DEVICE_NAMES.contains(&self.as_str())
    }

    /// Whether a device could have it by its kind and place.
    pub(super) fn is_by_place(&self) -> bool {
        let place = ["disk", "net"]
            .into_iter()
            .find_map(|kind| self.0.strip_prefix(kind));
        place.is_some_and(|place| {
            !place.is_empty() && place.bytes().all(|byte| byte.is_ascii_digit())
        })
    }

    /// Name of the serial port.
    pub fn serial() -> DeviceName {
        DeviceName::of_kind("serial")
    }

    /// Name of the virtio console.
    pub fn console() -> DeviceName {
        DeviceName::of_kind("console")
    }

    /// Name of the only device of its kind, one of `FIXED_DEVICE_NAMES`.
    pub(crate) fn of_kind(kind: &str) -> DeviceName {
        DeviceName(kind.to_owned())
    }
}

impl TryFrom<String> for DeviceName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if (1..=Self::MAX_SIZE).contains(&text.len()) && text.chars().all(is_allowed) {
            Ok(Self(text))
        } else {
            Err(ConfigError::DeviceName { text })
        }
    }
}

impl FromStr for DeviceName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        text.to_string().try_into()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_1_to_64_letters_digits_and_marks() {
        for name in ["a", "root-disk_1.x", &"x".repeat(64)] {
            assert_eq!(name.parse::<DeviceName>().unwrap().as_str(), name);
        }
        for name in ["", "a b", "a/b", "é", "a,b", &"x".repeat(65)] {
            let error = name.parse::<DeviceName>().unwrap_err().to_string();
            assert!(
                error.contains("1 to 64 letters, digits and '.', '-', '_'"),
                "{error}"
            );
        }
    }

    #[test]
    fn names_that_other_devices_have_are_known() {
        let name = |text: &str| text.parse::<DeviceName>().unwrap();
        assert!(name("console").is_fixed() && !name("console0").is_fixed());
        assert!(name("disk0").is_by_place() && name("net17").is_by_place());
        assert!(!name("disk").is_by_place() && !name("disk0a").is_by_place());
        assert_eq!(DeviceName::by_place("net", 3), name("net3"));
    }
}
