//! Forms that a value of a machine file can have, with errors that say how to write it.

use std::fmt;
use std::marker::PhantomData;

use bantam_boot::CommandLine;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::{BalloonConfig, ChannelConfig, DiskConfig, MetadataConfig, NetConfig, VsockConfig};

/// Reads `[[disk]]` tables.
pub(super) fn disks<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<DiskConfig>, D::Error> {
    tables(deserializer, "disk", "path = \"disk.img\"")
}

/// Reads `[[net]]` tables.
pub(super) fn nets<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<NetConfig>, D::Error> {
    tables(deserializer, "net", "tap = \"tap0\"")
}

/// Reads `[[channel]]` tables.
pub(super) fn channels<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Vec<ChannelConfig>, D::Error> {
    tables(deserializer, "channel", "name = \"org.example.agent\"")
}

/// Reads the `[vsock]` table.
pub(super) fn vsock<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<VsockConfig>, D::Error> {
    table(deserializer, "vsock")
}

/// Reads the `[balloon]` table.
pub(super) fn balloon<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<BalloonConfig>, D::Error> {
    table(deserializer, "balloon")
}

/// Reads the `[metadata]` table.
pub(super) fn metadata<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<MetadataConfig>, D::Error> {
    table(deserializer, "metadata")
}

/// Reads a text to append to the kernel command line, or a list of texts, which become one.
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

/// Reads tables called `[[name]]`, each with at least the key in `example`.
fn tables<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    name: &'static str,
    example: &'static str,
) -> Result<Vec<T>, D::Error> {
    let visitor = Tables {
        name,
        example,
        item: PhantomData,
    };
    deserializer.deserialize_any(visitor)
}

struct Tables<T> {
    name: &'static str,
    example: &'static str,
    item: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Tables<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, example, .. } = self;
        write!(f, "a table for each: [[{name}]] and below it {example}")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Vec<T>, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Vec<T>, A::Error> {
        let name = self.name;
        Err(A::Error::custom(format!(
            "there can be several of these tables: write [[{name}]] in place of [{name}]"
        )))
    }
}

/// Reads the table called `[name]`.
fn table<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    name: &'static str,
) -> Result<Option<T>, D::Error> {
    let visitor = Table {
        name,
        item: PhantomData,
    };
    deserializer.deserialize_any(visitor).map(Some)
}

struct Table<T> {
    name: &'static str,
    item: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Table<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a table: [{}] and below it its keys", self.name)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<T, A::Error> {
        let name = self.name;
        Err(A::Error::custom(format!(
            "there can be one of these tables: write [{name}] in place of [[{name}]]"
        )))
    }
}
