//! Option strings of the command line, such as `disk.img,ro,id=root`, read into serde structs.
//!
//! An option string is a list of `key=value` and `flag` items separated by commas. The value of
//! one chosen field may come first without its key. A comma that belongs to a value is doubled:
//! `odd,,name.img,ro` is the path `odd,name.img` and the flag `ro`.

use std::fmt;

use serde::de::value::MapDeserializer;
use serde::de::{DeserializeOwned, Deserializer, Error, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

/// Reads an option string into `T`. With `first_field`, the first item is the value of that field
/// of `T`, even if it contains `=`.
pub(super) fn parse<T: DeserializeOwned>(
    text: &str,
    first_field: Option<&'static str>,
) -> Result<T, OptionStringError> {
    let mut items = Vec::new();
    for (index, item) in split_items(text).into_iter().enumerate() {
        let (key, value) = match (first_field, item.split_once('=')) {
            (Some(field), _) if index == 0 => (field.to_owned(), Some(item)),
            (_, Some((key, value))) => (key.to_owned(), Some(value.to_owned())),
            (_, None) => (item, None),
        };
        if key.is_empty() {
            return Err(OptionStringError("an item has no name".into()));
        }
        if value.as_ref().is_some_and(String::is_empty) {
            return Err(OptionStringError(format!("the value of '{key}' is empty")));
        }
        items.push((key.clone(), ItemValue { key, value }));
    }
    T::deserialize(MapDeserializer::new(items.into_iter()))
}

/// A value in the form that [`parse`] reads back.
pub(super) fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

/// Splits at single commas and undoes the doubling of the others.
fn split_items(text: &str) -> Vec<String> {
    let mut items = Vec::new();
    let mut item = String::new();
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character != ',' {
            item.push(character);
        } else if characters.next_if_eq(&',').is_some() {
            item.push(',');
        } else {
            items.push(std::mem::take(&mut item));
        }
    }
    items.push(item);
    items
}

/// What follows the key of an item; nothing for a flag.
struct ItemValue {
    key: String,
    value: Option<String>,
}

impl ItemValue {
    fn text(self) -> Result<String, OptionStringError> {
        let key = self.key;
        self.value
            .ok_or_else(|| OptionStringError(format!("'{key}' needs a value: {key}=VALUE")))
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
        match self.value.as_deref() {
            None | Some("on") => visitor.visit_bool(true),
            Some("off") => visitor.visit_bool(false),
            Some(_) => Err(OptionStringError(format!("'{}' is on or off", self.key))),
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
            OptionStringError(format!(
                "the value '{text}' of '{key}' is not a whole number"
            ))
        })?;
        visitor.visit_i64(number)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Self::Error> {
        visitor.visit_some(self)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// What is wrong with an option string.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct OptionStringError(String);

impl Error for OptionStringError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(format!(
            "unknown option '{field}', expected one of '{}'",
            expected.join("', '")
        ))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("'{field}' is missing"))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self(format!("'{field}' is given twice"))
    }
}

#[cfg(test)]
mod tests {
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
    }

    fn sample(text: &str) -> Result<Sample, String> {
        parse(text, Some("file")).map_err(|error| error.to_string())
    }

    #[test]
    fn reads_first_value_flags_and_pairs() {
        let expected = Sample {
            file: "a=b".into(),
            flag: true,
            size: Some(-3),
        };
        assert_eq!(sample("a=b,flag,size=-3"), Ok(expected));
        let keyed: Sample = parse("size=1,file=x", None).unwrap();
        assert_eq!(
            keyed,
            Sample {
                file: "x".into(),
                flag: false,
                size: Some(1)
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
    fn errors_name_the_option() {
        let unknown = "unknown option 'nope', expected one of 'file', 'flag', 'size'";
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
        let no_file = parse::<Sample>("flag", None).unwrap_err();
        assert_eq!(no_file.to_string(), "'file' is missing");
    }

    proptest! {
        #[test]
        fn escaped_values_come_back(value in ".+", size in any::<i64>()) {
            let text = format!("{},flag,size={size}", escape(&value));
            prop_assert_eq!(sample(&text), Ok(Sample { file: value, flag: true, size: Some(size) }));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*|[,=flagsize]*") {
            let _ = sample(&text);
            let _ = parse::<Sample>(&text, None);
        }
    }
}
