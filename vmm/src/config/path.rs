//! Reads and writes paths: they are bytes on the command line, and in a machine file text if they are UTF-8.
//! A field has `#[serde(with = "path")]`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use serde::de::{Error, SeqAccess, Visitor};
use serde::{Deserializer, Serialize, Serializer};

/// Writes a path as text, or as a list of its bytes if it is not UTF-8. Serde's own implementation refuses
/// the latter.
///
/// # Errors
///
/// Those of the serializer.
pub fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serialize_text(path.as_os_str(), serializer)
}

/// Reads a path; serde's own implementation accepts only UTF-8.
///
/// # Errors
///
/// If there is neither text nor bytes.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    deserialize_text(deserializer, "a path").map(PathBuf::from)
}

/// Writes text with a path in it, as [`serialize`] does.
pub(super) fn serialize_text<S: Serializer>(
    text: &OsStr,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match text.to_str() {
        Some(text) => serializer.serialize_str(text),
        None => text.as_bytes().serialize(serializer),
    }
}

/// Reads text with a path in it; `expecting` names it in errors.
pub(super) fn deserialize_text<'de, D: Deserializer<'de>>(
    deserializer: D,
    expecting: &'static str,
) -> Result<OsString, D::Error> {
    deserializer.deserialize_byte_buf(TextVisitor { expecting })
}

struct TextVisitor {
    expecting: &'static str,
}

impl<'de> Visitor<'de> for TextVisitor {
    type Value = OsString;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expecting)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<OsString, E> {
        Ok(text.into())
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<OsString, E> {
        Ok(OsStr::from_bytes(bytes).into())
    }

    fn visit_byte_buf<E: Error>(self, bytes: Vec<u8>) -> Result<OsString, E> {
        Ok(OsString::from_vec(bytes))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<OsString, A::Error> {
        let mut bytes = Vec::new();
        while let Some(number) = items.next_element::<i64>()? {
            let byte = u8::try_from(number).map_err(|_| {
                A::Error::custom(format_args!(
                    "{number} is not a byte: a list of numbers from 0 to 255 is {} that is not UTF-8",
                    self.expecting
                ))
            })?;
            bytes.push(byte);
        }
        Ok(OsString::from_vec(bytes))
    }
}

/// Reads and writes a path that may be left out.
pub mod option {
    use std::path::PathBuf;

    use serde::{Deserializer, Serializer};

    /// Writes a path, or `None` if it is left out.
    ///
    /// # Errors
    ///
    /// Those of the serializer, which may be unable to write `None`.
    pub fn serialize<S: Serializer>(
        path: &Option<PathBuf>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match path {
            Some(path) => super::serialize(path, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// Reads a path that was not left out.
    ///
    /// # Errors
    ///
    /// If there is neither text nor bytes.
    pub fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        super::deserialize(deserializer).map(Some)
    }
}
