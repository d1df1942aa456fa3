//! The pages of the host that guest memory consists of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, variant_by_name};

/// The pages of the host that guest memory consists of. Larger pages save the processor work when it
/// translates addresses, and save memory for page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Ordinary pages of 4 KiB, unless the host turns all memory into huge pages.
    #[default]
    None,
    /// Huge pages that the host forms from ordinary ones when it can (transparent huge pages).
    Transparent,
    /// Pages of 2 MiB that the host has set aside (hugetlbfs). The machine takes all of them at its start,
    /// whether the guest uses them or not.
    #[serde(rename = "2M")]
    TwoMib,
}

impl HugePages {
    /// Returns the size in bytes that guest memory must be a multiple of. Its regions then are, too.
    pub fn page_size(self) -> u64 {
        match self {
            Self::None | Self::Transparent => 4 << 10,
            Self::TwoMib => 2 << 20,
        }
    }
}

impl FromStr for HugePages {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        variant_by_name(text).ok_or_else(|| ConfigError::HugePages { text: text.into() })
    }
}

impl fmt::Display for HugePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Transparent => "transparent",
            Self::TwoMib => "2M",
        })
    }
}
