//! Names of networks and of the machines on them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// Name of a network: 1 to [`NetworkName::MAX_SIZE`] letters, digits and the characters `.`, `_` and `-`, of which
/// the first is a letter or digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct NetworkName(String);

impl NetworkName {
    /// Maximum number of bytes.
    pub const MAX_SIZE: usize = 40;

    /// Returns the name of the network that machines with `--net nat` are on.
    pub fn nat() -> NetworkName {
        NetworkName("default".to_owned())
    }

    /// Returns the name of the network that machines with `--net hostonly` are on.
    pub fn host_only() -> NetworkName {
        NetworkName("hostonly".to_owned())
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the domain that a network has unless its definition says otherwise. The top-level domain `internal`
    /// is reserved for private use.
    pub(crate) fn domain(&self) -> String {
        let label = self.0.to_ascii_lowercase().replace(['.', '_'], "-");
        format!("{}.internal", label.trim_end_matches('-'))
    }
}

impl TryFrom<String> for NetworkName {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let first = text.bytes().next();
        if text.len() > Self::MAX_SIZE
            || !first.is_some_and(|byte| byte.is_ascii_alphanumeric())
            || !text.bytes().all(is_allowed)
        {
            return Err(NetworkError::Name { text });
        }
        Ok(NetworkName(text))
    }
}

impl FromStr for NetworkName {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Name of a machine on its network: one label of a domain name (RFC 1123, section 2.1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct HostName(String);

impl HostName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether both are the same name, as domain names have no case.
    pub(crate) fn is_same(&self, other: &HostName) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl TryFrom<String> for HostName {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        if !(1..=63).contains(&text.len())
            || !text.bytes().all(is_allowed)
            || text.starts_with('-')
            || text.ends_with('-')
        {
            return Err(NetworkError::HostName { text });
        }
        Ok(HostName(text))
    }
}

impl FromStr for HostName {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_are_safe_in_paths_and_configurations() {
        for name in ["a", "default", "Lab-1.x_y", &"a".repeat(40)] {
            assert!(name.parse::<NetworkName>().is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "-a",
            "_a",
            "a/b",
            "a b",
            "a\n",
            "é",
            &"a".repeat(41),
        ] {
            assert!(name.parse::<NetworkName>().is_err(), "{name}");
        }
        for name in ["a", "web-1", "1a"] {
            assert!(name.parse::<HostName>().is_ok(), "{name}");
        }
        for name in ["", "-a", "a-", "a.b", "a,b", "a\nb", &"a".repeat(64)] {
            assert!(name.parse::<HostName>().is_err(), "{name}");
        }
    }

    #[test]
    fn each_name_has_a_domain() {
        let domain = |name: &str| name.parse::<NetworkName>().unwrap().domain();
        assert_eq!(domain("default"), "default.internal");
        assert_eq!(domain("Lab_1.x-"), "lab-1-x.internal");
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".*") {
            let _ = text.parse::<NetworkName>();
            let _ = text.parse::<HostName>();
        }
    }
}
