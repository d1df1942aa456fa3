//! Reads option strings of the command line, such as `disk.img,ro,id=root`, into serde structs.
//!
//! An option string is a list of `key=value` and `flag` items separated by commas. The value of
//! one chosen field may come first without its key. A comma that belongs to a value is doubled:
//! `odd,,name.img,ro` is the path `odd,name.img` and the flag `ro`. Items with the same key are the elements of
//! a list, if the field is one.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// Reads an option string into `T`. With `first_field`, the first item is the value of that field
/// of `T`, even if it contains `=`.
///
/// Only the value of a field that is deserialized from bytes, as [`super::path`] does, may be
/// anything but UTF-8.
pub(super) fn parse<T: DeserializeOwned>(
    text: &OsStr,
    first_field: Option<&'static str>,
) -> Result<T, OptionStringError> {
    let mut items: Vec<(String, ItemValue)> = Vec::new();
    for (index, item) in split_items(text.as_bytes()).into_iter().enumerate() {
        let sign = item.iter().position(|&byte| byte == b'=');
        let (key, value) = match (first_field, sign) {
            (Some(field), _) if index == 0 => (field.to_owned(), Some(item)),
            (_, Some(sign)) => (key_of(&item[..sign])?, Some(item[sign + 1..].to_vec())),
            (_, None) => (key_of(&item)?, None),
        };
        if key.is_empty() {
            return Err(OptionStringError::Message("an item has no name".into()));
        }
        if value.as_ref().is_some_and(Vec::is_empty) {
            return Err(OptionStringError::Message(format!(
                "the value of '{key}' is empty"
            )));
        }
        match items.iter_mut().find(|(known, _)| *known == key) {
            Some((_, item)) => item.further.push(value),
            None => {
                let further = Vec::new();
                items.push((
                    key.clone(),
                    ItemValue {
                        key,
                        value,
                        further,
                    },
                ));
            }
        }
    }
    T::deserialize(MapDeserializer::new(items.into_iter())).map_err(|error| match error {
        OptionStringError::Unknown { field, accepted } => {
            let is_key = |key: &&str| Some(*key) != first_field && *key != TABLE;
            let keys: Vec<_> = accepted.iter().copied().filter(is_key).collect();
            OptionStringError::Message(format!(
                "unknown option '{field}', expected one of '{}'",
                keys.join("', '")
            ))
        }
        message => message,
    })
}

/// The field of devices with limits that only a table of a machine file can describe.
const TABLE: &str = "limits";

/// Writes a value in the form that [`parse`] reads back.
pub(super) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

fn key_of(bytes: &[u8]) -> Result<String, OptionStringError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| {
        let name = String::from_utf8_lossy(bytes);
        OptionStringError::Message(format!("the name of an option, '{name}', is not UTF-8"))
    })
}

/// Splits at single commas and undoes the doubling of the others.
fn split_items(text: &[u8]) -> Vec<Vec<u8>> {
    let mut items = Vec::new();
    let mut item = Vec::new();
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b',' {
            item.push(byte);
        } else if bytes.next_if_eq(&b',').is_some() {
            item.push(b',');
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    items.push(item);
    items
}

/// The value of an item, and its key for messages. A flag has no value.
struct ItemValue {
    key: String,
    value: Option<Vec<u8>>,
    /// The values of further items with the same key, which only a list may have.
    further: Vec<Option<Vec<u8>>>,
}

impl ItemValue {
    fn check_single(&self) -> Result<(), OptionStringError> {
        match self.further.is_empty() {
            true => Ok(()),
            false => Err(OptionStringError::Message(format!(
                "'{}' is given twice",
                self.key
            ))),
        }
    }

    fn bytes(self) -> Result<Vec<u8>, OptionStringError> {
        self.check_single()?;
        let key = self.key;
        self.value.ok_or_else(|| {
            OptionStringError::Message(format!("'{key}' needs a value: {key}=VALUE"))
        })
    }

    fn text(self) -> Result<String, OptionStringError> {
        let key = self.key.clone();
        String::from_utf8(self.bytes()?).map_err(|error| {
            let text = OsString::from_vec(error.into_bytes());
            let text = text.display();
            OptionStringError::Message(format!("the value '{text}' of '{key}' is not UTF-8"))
        })
    }
}

impl IntoDeserializer<'_, OptionStringError> for ItemValue {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for ItemValue {
    type Error = OptionStringError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_string(self.text()?)
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        self.check_single()?;
        match self.value.as_deref() {
            None | Some(b"on") => visitor.visit_bool(true),
            Some(b"off") => visitor.visit_bool(false),
            Some(_) => Err(OptionStringError::Message(format!(
                "'{}' is on or off",
                self.key
            ))),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Self::Error> {
        visitor.visit_enum(self.text()?.into_deserializer())
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        let key = self.key.clone();
        let text = self.text()?;
        let number = text.parse().map_err(|_| {
            OptionStringError::Message(format!(
                "the value '{text}' of '{key}' is not a whole number"
            ))
        })?;
        visitor.visit_i64(number)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_byte_buf(self.bytes()?)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    /// Reads a list: each item is one element.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        let ItemValue {
            key,
            value,
            further,
        } = self;
        let items = std::iter::once(value)
            .chain(further)
            .map(|value| ItemValue {
                key: key.clone(),
                value,
                further: Vec::new(),
            });
        visitor.visit_seq(SeqDeserializer::new(items))
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes unit unit_struct
        newtype_struct tuple tuple_struct map struct identifier ignored_any
    }
}

/// Says what is wrong with an option string.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum OptionStringError {
    /// What is wrong.
    #[error("{0}")]
    Message(String),
    /// The struct has no such field.
    #[error("unknown option '{field}'")]
    Unknown {
        field: String,
        accepted: &'static [&'static str],
    },
}

impl Error for OptionStringError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Message(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::Unknown {
            field: field.to_owned(),
            accepted: expected,
        }
    }

    fn missing_field(field: &'static str) -> Self {
        Self::Message(format!("'{field}' is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::Message(format!("'{field}' is given twice"))
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        file: String,
        #[serde(default)]
        flag: bool,
        size: Option<i64>,
        #[serde(default)]
        tag: Vec<String>,
    }

    fn sample(text: &str) -> Result<Sample, String> {
        parse(text.as_ref(), Some("file")).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_first_value_flags_and_pairs() {
        let expected = Sample {
            file: "a=b".into(),
            flag: true,
            size: Some(-3),
            tag: vec![],
        };
        assert_eq!(sample("a=b,flag,size=-3"), Ok(expected));
        let keyed: Sample = parse("size=1,file=x".as_ref(), None).unwrap();
        assert_eq!(
            keyed,
            Sample {
                file: "x".into(),
                flag: false,
                size: Some(1),
                tag: vec![],
            }
        );
    }

    #[test]
    fn doubled_commas_belong_to_the_value() {
        assert_eq!(sample("a,,b").unwrap().file, "a,b");
        assert_eq!(sample(",,").unwrap().file, ",");
        let odd = sample("a,,,flag").unwrap();
        assert_eq!((odd.file.as_str(), odd.flag), ("a,", true));
    }

    #[test]
    fn a_list_has_an_item_for_each_element() {
        let tags = |text: &str| sample(text).map(|sample| sample.tag);
        assert_eq!(tags("f,tag=a,flag,tag=b,,c").unwrap(), ["a", "b,c"]);
        assert_eq!(
            tags("f,tag=a,tag").unwrap_err(),
            "'tag' needs a value: tag=VALUE"
        );
        assert_eq!(
            tags("f,size=1,size=2").unwrap_err(),
            "'size' is given twice"
        );
    }

    #[test]
    fn errors_name_the_option() {
        // The first item is the file.
        let unknown = "unknown option 'nope', expected one of 'flag', 'size', 'tag'";
        assert_eq!(sample("a,nope").unwrap_err(), unknown);
        assert_eq!(sample("a,nope=1").unwrap_err(), unknown);
        assert_eq!(sample("").unwrap_err(), "the value of 'file' is empty");
        assert_eq!(
            sample("a,size=").unwrap_err(),
            "the value of 'size' is empty"
        );
        assert_eq!(sample("a,flag=1").unwrap_err(), "'flag' is on or off");
        assert_eq!(
            sample("a,size").unwrap_err(),
            "'size' needs a value: size=VALUE"
        );
        assert_eq!(
            sample("a,size=x").unwrap_err(),
            "the value 'x' of 'size' is not a whole number"
        );
        assert_eq!(sample("a,").unwrap_err(), "an item has no name");
        assert_eq!(sample("a,flag,flag").unwrap_err(), "'flag' is given twice");
        let no_file = parse::<Sample>("flag".as_ref(), None).unwrap_err();
        assert_eq!(no_file.to_string(), "'file' is missing");
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Place {
        #[serde(deserialize_with = "crate::config::path::deserialize")]
        path: PathBuf,
        name: Option<String>,
    }

    fn place(text: &[u8]) -> Result<Place, String> {
        parse(OsStr::from_bytes(text), Some("path")).map_err(|error| error.to_string())
    }

    #[test]
    fn only_paths_are_other_than_utf_8() {
        let expected = Place {
            path: OsStr::from_bytes(b"d\xe9,.img").into(),
            name: Some("n\u{e9}".into()),
        };
        assert_eq!(
            place("d\u{e9},name=x".as_bytes()).unwrap().path,
            Path::new("d\u{e9}")
        );
        assert_eq!(place(b"d\xe9,,.img,name=n\xc3\xa9"), Ok(expected));
        assert_eq!(
            place(b"a,name=\xe9").unwrap_err(),
            "the value '\u{fffd}' of 'name' is not UTF-8"
        );
        assert_eq!(
            place(b"a,n\xe9=1").unwrap_err(),
            "the name of an option, 'n\u{fffd}', is not UTF-8"
        );
        assert_eq!(place(b"").unwrap_err(), "the value of 'path' is empty");
    }

    proptest! {
        #[test]
        fn any_path_comes_back(path in prop::collection::vec(1..=u8::MAX, 1..40)) {
            let mut text: Vec<u8> = Vec::new();
            for &byte in &path {
                text.extend(if byte == b',' { &b",,"[..] } else { std::slice::from_ref(&byte) });
            }
            text.extend(b",name=n");
            let expected = Place {
                path: OsString::from_vec(path).into(),
                name: Some("n".into()),
            };
            prop_assert_eq!(place(&text), Ok(expected));
        }

        #[test]
        fn any_bytes_are_parsed_or_refused(text in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = place(&text);
            let _ = parse::<Sample>(OsStr::from_bytes(&text), None);
        }

        #[test]
        fn escaped_values_come_back(value in ".+", size in any::<i64>()) {
            let text = format!("{},flag,size={size}", escape(&value));
            prop_assert_eq!(sample(&text), Ok(Sample { file: value, flag: true, size: Some(size), tag: vec![] }));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*|[,=flagsize]*") {
            let _ = sample(&text);
            let _ = parse::<Sample>(text.as_ref(), None);
        }
    }
}
