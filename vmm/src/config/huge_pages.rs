//! Which pages of the host guest memory is made of.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, variant_by_name};

/// Which pages of the host guest memory is made of. Larger ones save the processor work when it
/// translates addresses, and memory for page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Ordinary ones of 4 KiB, unless the host makes huge ones of all memory.
    #[default]
    None,
    /// Those that the host makes of ordinary ones when it can (transparent huge pages).
    Transparent,
    /// Those of 2 MiB that the host has set aside (hugetlbfs). They are the machine's from its start
    /// on, used or not.
    #[serde(rename = "2M")]
    TwoMib,
}

impl HugePages {
    /// What guest memory must be a multiple of, in bytes; its parts are then too.
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
