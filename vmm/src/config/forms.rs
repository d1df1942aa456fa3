//! Reads values of a machine file that have several forms, with errors that say how to write them.

use std::fmt;
use std::marker::PhantomData;

use bantam_boot::CommandLine;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// A device of which a machine can have several, each a `[[NAME]]` table.
pub(super) trait Listed: DeserializeOwned {
    /// Name of the table.
    const NAME: &'static str;
    /// A key that every table needs, with a value.
    const EXAMPLE: &'static str;
}

/// A device of which a machine has at most one, a `[NAME]` table.
pub(super) trait Single: DeserializeOwned {
    /// Name of the table.
    const NAME: &'static str;
}

/// Reads a text to append to the kernel command line, or a list of texts, which are joined.
pub(super) fn appended<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    deserializer.deserialize_any(Appended).map(Some)
}

struct Appended;

impl<'de> Visitor<'de> for Appended {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<String, E> {
        let mut line = CommandLine::default();
        line.append(text).map_err(E::custom)?;
        Ok(text.to_owned())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<String, A::Error> {
        // Kernel parameters of all texts come before a `--`, and arguments for init after it.
        let mut line = CommandLine::default();
        for text in Vec::<String>::deserialize(SeqAccessDeserializer::new(items))? {
            line.append(&text).map_err(A::Error::custom)?;
        }
        Ok(line.to_string())
    }
}

/// Reads the tables of devices of which a machine can have several.
pub(super) fn tables<'de, D: Deserializer<'de>, T: Listed>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    deserializer.deserialize_any(Tables(PhantomData))
}

struct Tables<T>(PhantomData<T>);

impl<'de, T: Listed> Visitor<'de> for Tables<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, example) = (T::NAME, T::EXAMPLE);
        write!(f, "a table for each: [[{name}]] and below it {example}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Vec<T>, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Vec<T>, A::Error> {
        let name = T::NAME;
        Err(A::Error::custom(format!(
            "there can be several of these tables: write [[{name}]] in place of [{name}]"
        )))
    }
}

/// Reads the table of a device of which a machine has at most one.
pub(super) fn table<'de, D: Deserializer<'de>, T: Single>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    deserializer.deserialize_any(Table(PhantomData)).map(Some)
}

struct Table<T>(PhantomData<T>);

impl<'de, T: Single> Visitor<'de> for Table<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a table: [{}] and below it its keys", T::NAME)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<T, A::Error> {
        let name = T::NAME;
        Err(A::Error::custom(format!(
            "there can be one of these tables: write [{name}] in place of [[{name}]]"
        )))
    }
}
