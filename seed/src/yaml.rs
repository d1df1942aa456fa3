//! Checks of YAML, which cloud-init reads.

use std::fmt;

use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::error::Error;

/// Makes sure that `text` is a YAML mapping, or empty.
pub(crate) fn check_mapping(what: &str, text: &str) -> Result<(), Error> {
    let parsed: Result<Option<Mapping>, _> = serde_saphyr::from_str(text);
    parsed.map(drop).map_err(|error| wrong(what, &error))
}

/// Reads a YAML mapping, or nothing.
pub(crate) fn parse_mapping(what: &str, text: &str) -> Result<Map<String, Value>, Error> {
    let parsed: Result<Option<Map<String, Value>>, _> = serde_saphyr::from_str(text);
    parsed
        .map(Option::unwrap_or_default)
        .map_err(|error| wrong(what, &error))
}

fn wrong(what: &str, error: &serde_saphyr::Error) -> Error {
    let text = error.to_string();
    // What follows shows the place in the text.
    let reason = text.lines().next().unwrap_or_default().trim();
    Error::Yaml {
        what: what.to_owned(),
        reason: reason.to_owned(),
    }
}

/// A mapping, with whatever in it.
struct Mapping;

impl<'de> Deserialize<'de> for Mapping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Mapping, D::Error> {
        struct AnyMapping;

        impl<'de> Visitor<'de> for AnyMapping {
            type Value = Mapping;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mapping of keys to values")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Mapping, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Mapping)
            }
        }

        deserializer.deserialize_map(AnyMapping)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_accepted_whatever_is_in_it() {
        for text in [
            "",
            "# nothing\n",
            "{}",
            "a: 1",
            "write_files:\n- path: /a\n  content: !!binary |\n    aGVsbG8=\n- path: /b\n  content: |\n    x: [\n",
            "base: &base {a: 1}\nother: *base\n",
            "1: 2\ntrue: no\nlist: [a, b, {c: d}]\n",
            "{\"a\": [1, null, true, \"x\"]}",
            "--- \na: ~\n",
        ] {
            check_mapping("it", text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
        }
    }

    #[test]
    fn what_is_not_a_mapping_is_refused_with_a_line() {
        for text in ["- a", "a", "a: [1", "a: b: c", "a: *unknown"] {
            let error = check_mapping("user-data", text)
                .expect_err(text)
                .to_string();
            assert!(
                error.starts_with("user-data is not a YAML mapping: "),
                "{error}"
            );
            assert!(!error.contains('\n'), "{error}");
        }
        let error = check_mapping("it", "a: 1\nb: [\n").unwrap_err().to_string();
        assert!(error.contains("line"), "{error}");
    }

    #[test]
    fn aliases_do_not_multiply_without_bound() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let list = vec![format!("*a{}", level - 1); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{list}]\n"));
        }
        assert!(check_mapping("it", &text).is_err());
        assert!(parse_mapping("it", &text).is_err());
    }

    #[test]
    fn values_are_read() {
        let map = parse_mapping("it", "instance-id: i-1\nkeys: [a, b]\n").unwrap();
        assert_eq!(map["instance-id"], "i-1");
        assert_eq!(map["keys"][1], "b");
        assert!(parse_mapping("it", "\n").unwrap().is_empty());
    }
}
