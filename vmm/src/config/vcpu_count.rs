//! Number of vCPUs.

use std::fmt;
use std::str::FromStr;

use bantam_arch::layout::MAX_VCPUS;
use serde::{Deserialize, Deserializer, Serialize};

use super::ConfigError;
use super::whole_number;

/// Number of vCPUs, from 1 to [`MAX_VCPUS`]; one by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuCount(u8);

impl VcpuCount {
    /// Returns the number as an integer.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl Default for VcpuCount {
    fn default() -> Self {
        Self(1)
    }
}

impl TryFrom<i64> for VcpuCount {
    type Error = ConfigError;

    fn try_from(count: i64) -> Result<Self, ConfigError> {
        match u8::try_from(count) {
            Ok(count @ 1..=MAX_VCPUS) => Ok(Self(count)),
            _ => Err(ConfigError::VcpuCount {
                text: count.to_string(),
            }),
        }
    }
}

impl FromStr for VcpuCount {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let count: i64 = text
            .parse()
            .map_err(|_| ConfigError::VcpuCount { text: text.into() })?;
        Self::try_from(count)
    }
}

impl<'de> Deserialize<'de> for VcpuCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_number::deserialize(deserializer, Self::try_from)
    }
}

impl fmt::Display for VcpuCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_the_range_and_nothing_else() {
        assert_eq!("1".parse::<VcpuCount>().unwrap().get(), 1);
        assert_eq!("32".parse::<VcpuCount>().unwrap().get(), 32);
        for text in ["0", "33", "1000", "-1", "two", "", "99999999999999999999"] {
            let error = text.parse::<VcpuCount>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!("invalid number of vCPUs '{text}': expected 1 to 32")
            );
        }
    }
}
