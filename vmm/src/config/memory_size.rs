//! Size of guest memory.

use std::fmt;
use std::str::FromStr;

use bantam_arch::layout::{MAX_MEMORY_SIZE, MIN_MEMORY_SIZE};
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{ConfigError, whole_number};

const PAGE_SIZE: u64 = 4096;
pub(super) const MIB: u64 = 1 << 20;

/// Suffixes and the exponents of the powers of two that they stand for, largest first.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

/// Size of guest memory: from [`MIN_MEMORY_SIZE`] to [`MAX_MEMORY_SIZE`], in whole pages of 4 KiB;
/// 256 MiB by default.
///
/// As text, a number with a binary unit in either case: `65536K`, `512M`, `2G`, `1T`. `iB` may follow the
/// unit (`512MiB`). A number alone counts MiB, as users of QEMU expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(u64);

impl MemorySize {
    /// Creates a size from bytes.
    ///
    /// # Errors
    ///
    /// If it is out of range or not a whole number of pages.
    pub fn from_bytes(bytes: u64) -> Result<Self, ConfigError> {
        if !(MIN_MEMORY_SIZE..=MAX_MEMORY_SIZE).contains(&bytes) {
            return Err(ConfigError::MemorySizeRange {
                text: Bytes(bytes).to_string(),
            });
        }
        if !bytes.is_multiple_of(PAGE_SIZE) {
            return Err(ConfigError::MemorySizePages {
                text: Bytes(bytes).to_string(),
            });
        }
        Ok(Self(bytes))
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl Default for MemorySize {
    fn default() -> Self {
        Self(256 * MIB)
    }
}

impl FromStr for MemorySize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match parse_bytes(text) {
            Some(u64::MAX) => Err(ConfigError::MemorySizeRange { text: text.into() }),
            Some(bytes) => Self::from_bytes(bytes),
            None => Err(ConfigError::MemorySizeFormat { text: text.into() }),
        }
    }
}

/// Reads a number of bytes that is written as a memory size. Returns `u64::MAX` if it is too
/// large, and `None` if `text` is not written so.
pub(super) fn parse_bytes(text: &str) -> Option<u64> {
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let shift = unit_shift(unit).filter(|_| !digits.is_empty())?;
    // Digits alone fail to parse only if they overflow.
    let count = digits.parse().unwrap_or(u64::MAX);
    Some(count.saturating_mul(1 << shift))
}

fn unit_shift(unit: &str) -> Option<u32> {
    let mut letters = unit.chars();
    let Some(letter) = letters.next() else {
        return Some(MIB.ilog2());
    };
    let (_, shift) = UNITS
        .into_iter()
        .find(|(unit, _)| letter.eq_ignore_ascii_case(unit))?;
    let rest = letters.as_str();
    (rest.is_empty() || rest.eq_ignore_ascii_case("ib")).then_some(shift)
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Bytes(self.0).fmt(f)
    }
}

/// A number of bytes, shown in the largest unit that divides it.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let divides = |&(_, shift): &(char, u32)| self.0.is_multiple_of(1 << shift);
        match UNITS.into_iter().find(divides) {
            Some((unit, shift)) if self.0 != 0 => write!(f, "{}{unit}", self.0 >> shift),
            _ if self.0 == 0 => f.write_str("0"),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

impl Serialize for MemorySize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(MemorySizeVisitor)
    }
}

struct MemorySizeVisitor;

impl Visitor<'_> for MemorySizeVisitor {
    type Value = MemorySize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a memory size such as \"512M\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<MemorySize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<MemorySize, E> {
        whole_number::visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, mebibytes: i64) -> Result<MemorySize, E> {
        let bytes = u64::try_from(mebibytes)
            .ok()
            .and_then(|count| count.checked_mul(MIB));
        match bytes {
            Some(bytes) => MemorySize::from_bytes(bytes).map_err(E::custom),
            None => Err(E::custom(ConfigError::MemorySizeRange {
                text: format!("{mebibytes}M"),
            })),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(text: &str) -> u64 {
        text.parse::<MemorySize>().unwrap().bytes()
    }

    fn error(text: &str) -> String {
        text.parse::<MemorySize>().unwrap_err().to_string()
    }

    #[test]
    fn units_are_binary_and_a_plain_number_counts_mebibytes() {
        assert_eq!(bytes("512"), 512 << 20);
        assert_eq!(bytes("512M"), 512 << 20);
        assert_eq!(bytes("512m"), 512 << 20);
        assert_eq!(bytes("512MiB"), 512 << 20);
        assert_eq!(bytes("65536K"), 64 << 20);
        assert_eq!(bytes("2G"), 2 << 30);
        assert_eq!(bytes("16M"), MIN_MEMORY_SIZE);
        assert_eq!(bytes("1023G"), MAX_MEMORY_SIZE);
    }

    #[test]
    fn sizes_out_of_range_name_the_limits() {
        for text in ["1M", "15M", "1T", "2T", "99999999999999T"] {
            assert_eq!(
                error(text),
                format!("memory size {text} is out of range: 16M to 1023G")
            );
        }
        assert_eq!(error("0"), "memory size 0 is out of range: 16M to 1023G");
        assert!(error("99999999999999999999999M").contains("out of range"));
    }

    #[test]
    fn sizes_are_whole_pages() {
        assert_eq!(
            error("65537K"),
            "memory size 65537K is not a multiple of 4K"
        );
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "", "M", "1P", "lots", "-1", "1.5G", "512MB", "512 M", "512Mi", "１G",
        ] {
            let error = error(text);
            assert!(
                error.starts_with(&format!("invalid memory size '{text}'")),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(pages in MIN_MEMORY_SIZE / PAGE_SIZE..=MAX_MEMORY_SIZE / PAGE_SIZE) {
            let size = MemorySize::from_bytes(pages * PAGE_SIZE).unwrap();
            prop_assert_eq!(size.to_string().parse::<MemorySize>().unwrap(), size);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*|[0-9]{0,30}[a-zA-Z]{0,4}") {
            if let Ok(size) = text.parse::<MemorySize>() {
                prop_assert!((MIN_MEMORY_SIZE..=MAX_MEMORY_SIZE).contains(&size.bytes()));
            }
        }
    }
}
