//! Numbers of 64 bits, half of which do not fit into an integer in TOML.

use std::fmt;

use serde::de::{Deserializer, Error, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// Any number of 64 bits. In a machine file it is an integer or a string: decimal, or hexadecimal after
/// `0x`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WideNumber(pub(super) u64);

impl Serialize for WideNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(self.0) {
            Ok(number) => serializer.serialize_i64(number),
            Err(_) => serializer.collect_str(&format_args!("{:#x}", self.0)),
        }
    }
}

impl<'de> Deserialize<'de> for WideNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(WideNumberVisitor)
    }
}

struct WideNumberVisitor;

impl Visitor<'_> for WideNumberVisitor {
    type Value = WideNumber;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number of 64 bits, such as 500 or \"0xffffffffffffffff\"")
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<WideNumber, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<WideNumber, E> {
        Ok(WideNumber(number))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<WideNumber, E> {
        let (digits, radix) = match text.strip_prefix("0x") {
            Some(digits) => (digits, 16),
            None => (text, 10),
        };
        let is_signed = digits.starts_with(['+', '-']);
        u64::from_str_radix(digits, radix)
            .ok()
            .filter(|_| !is_signed)
            .map(WideNumber)
            .ok_or_else(|| {
                E::custom(format_args!(
                    "invalid number '{text}': expected one of 64 bits, such as 500 or 0xffffffffffffffff"
                ))
            })
    }
}
