//! Networks of the host that devices are on, and namespaces.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bantam_network::NetworkName;
use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::random;

/// A network of the host that a network device is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostNetwork {
    /// One that is defined by `bantam network`.
    Network(NetworkName),
    /// What is on a bridge.
    Bridge(String),
    /// What an interface leads to.
    Beside(String),
}

impl fmt::Display for HostNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostNetwork::Network(name) => write!(f, "network '{name}'"),
            HostNetwork::Bridge(name) => write!(f, "bridge '{name}'"),
            HostNetwork::Beside(name) => write!(f, "interface '{name}'"),
        }
    }
}

/// A network namespace: a name that `ip netns` lists, or a path such as `/proc/7/ns/net`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Namespace(String);

impl Namespace {
    /// Where `ip netns` keeps namespaces by name.
    const FOLDER: &'static str = "/run/netns";

    /// Returns the file that is the namespace.
    pub fn path(&self) -> PathBuf {
        // An absolute path replaces the folder.
        Path::new(Self::FOLDER).join(&self.0)
    }
}

impl TryFrom<String> for Namespace {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let is_name = !text.contains('/') && text != "." && text != "..";
        if text.is_empty() || text.contains('\0') || !(is_name || text.starts_with('/')) {
            return Err(ConfigError::Namespace { text });
        }
        Ok(Namespace(text))
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns a number that is another one in each process.
pub(super) fn random_seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| {
        let random = random::random().map(u64::from_ne_bytes);
        random.unwrap_or_else(|_| std::process::id().into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_has_a_name_or_a_path() {
        let path = |text: &str| Namespace::try_from(text.to_owned()).map(|it| it.path());
        assert_eq!(path("blue").unwrap(), Path::new("/run/netns/blue"));
        assert_eq!(path("/proc/7/ns/net").unwrap(), Path::new("/proc/7/ns/net"));
        for text in ["", ".", "..", "a/b", "../a", "a\0"] {
            path(text).unwrap_err();
        }
    }
}
