//! Numbers of bytes or operations.

use std::fmt;
use std::str::FromStr;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{ConfigError, whole_number};

/// Suffixes and the exponents of the powers of two that they stand for.
const UNITS: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

/// A number of bytes or operations from 1 to 2^63 - 1.
///
/// As text, a number with an optional binary unit in either case: `500`, `64K`, `10M`, `1G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Quantity(u64);

impl Quantity {
    /// Returns the number as an integer.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<i64> for Quantity {
    type Error = ConfigError;

    fn try_from(number: i64) -> Result<Self, ConfigError> {
        match u64::try_from(number) {
            Ok(number @ 1..) => Ok(Self(number)),
            _ => Err(ConfigError::Quantity {
                text: number.to_string(),
            }),
        }
    }
}

impl FromStr for Quantity {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let invalid = || ConfigError::Quantity { text: text.into() };
        let with_unit = UNITS.iter().find_map(|&(unit, shift)| {
            let digits = text.strip_suffix([unit, unit.to_ascii_lowercase()])?;
            Some((digits, shift))
        });
        let (digits, shift) = with_unit.unwrap_or((text, 0));
        let number: i64 = digits.parse().map_err(|_| invalid())?;
        let number = number.checked_mul(1 << shift).ok_or_else(invalid)?;
        Self::try_from(number).map_err(|_| invalid())
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(QuantityVisitor)
    }
}

struct QuantityVisitor;

impl Visitor<'_> for QuantityVisitor {
    type Value = Quantity;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number such as 500 or \"10M\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Quantity, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Quantity, E> {
        whole_number::visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Quantity, E> {
        Quantity::try_from(number).map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary() {
        for (text, number) in [
            ("1", 1),
            ("500", 500),
            ("64K", 64 << 10),
            ("10m", 10 << 20),
            ("2G", 2 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse::<Quantity>().unwrap().get(), number);
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "0", "-1", "K", "1.5M", "10MB", "8388608T", "é", "1 K"] {
            let error = text.parse::<Quantity>().unwrap_err().to_string();
            assert!(error.contains("such as 500 or 10M"), "{error}");
        }
    }
}
