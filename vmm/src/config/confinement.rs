//! What the process of a machine gives up before the guest runs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, variant_by_name};

/// What happens when a thread of the process makes a system call that its filter does not allow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Seccomp {
    /// The process is killed.
    #[default]
    Kill,
    /// The call is made, and the kernel's audit log gets a line.
    Log,
    /// There are no filters.
    Off,
}

impl FromStr for Seccomp {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::Seccomp { text: text.into() })
    }
}

impl fmt::Display for Seccomp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill",
            Self::Log => "log",
            Self::Off => "off",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for seccomp in [Seccomp::Kill, Seccomp::Log, Seccomp::Off] {
            assert_eq!(seccomp.to_string().parse::<Seccomp>().unwrap(), seccomp);
        }
        assert_eq!(
            "on".parse::<Seccomp>().unwrap_err().to_string(),
            "invalid filter of system calls 'on': expected kill, log or off"
        );
    }
}
