//! Reads whole numbers in option strings and machine files.

use std::fmt;

use serde::de::{Deserializer, Error, Unexpected, Visitor};

/// Reads a number and hands it to `check`, whose error text becomes the deserializer's error.
pub(super) fn deserialize<'de, D, T, E>(
    deserializer: D,
    check: impl FnOnce(i64) -> Result<T, E>,
) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    E: fmt::Display,
{
    let number = deserializer.deserialize_i64(WholeNumberVisitor)?;
    check(number).map_err(D::Error::custom)
}

struct WholeNumberVisitor;

impl Visitor<'_> for WholeNumberVisitor {
    type Value = i64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<i64, E> {
        visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<i64, E> {
        Ok(number)
    }
}

/// Visits a number that a format delivers as unsigned, as JSON does, like any other.
///
/// # Errors
///
/// If the visitor does not accept the number.
pub(super) fn visit_unsigned<'de, V: Visitor<'de>, E: Error>(
    visitor: V,
    number: u64,
) -> Result<V::Value, E> {
    match i64::try_from(number) {
        Ok(number) => visitor.visit_i64(number),
        Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &visitor)),
    }
}
