//! The contents: one JSON value, and how a guest reads a part of it.

use serde_json::{Map, Value};

use crate::error::MetadataError;

/// The format that a guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// As JSON.
    Json,
    /// As text, like the EC2 instance metadata service: a string as it is, and an object as the
    /// list of its keys, one a line, with a slash after those of objects.
    Text,
}

/// Why a value cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// There is no value at the path.
    #[error("there is no metadata at this path")]
    NotFound,
    /// Of the types of JSON, only strings and objects have a form as text.
    #[error("this metadata has no form as text; ask for JSON")]
    NoText,
}

/// The contents of the metadata: a JSON value of limited size, usually an object.
#[derive(Debug)]
pub struct MetadataStore {
    contents: Option<Value>,
    size_limit: usize,
}

impl MetadataStore {
    /// Makes an empty store of at most `size_limit` bytes, counted in JSON without spaces.
    pub fn new(size_limit: usize) -> MetadataStore {
        MetadataStore {
            contents: None,
            size_limit,
        }
    }

    /// Returns the limit of the contents' size in bytes.
    pub fn size_limit(&self) -> usize {
        self.size_limit
    }

    /// Replaces all contents.
    ///
    /// # Errors
    /// [`MetadataError::TooLarge`]; the contents then stay as they were.
    pub fn put(&mut self, contents: Value) -> Result<(), MetadataError> {
        self.replace(contents)
    }

    /// Changes the contents by a JSON merge patch (RFC 7396): members of `patch` are set, and those
    /// that are null are removed.
    ///
    /// # Errors
    /// [`MetadataError::NotInitialized`] before the first [`MetadataStore::put`], and those of
    /// `put`.
    pub fn patch(&mut self, patch: Value) -> Result<(), MetadataError> {
        let mut contents = self.contents.clone().ok_or(MetadataError::NotInitialized)?;
        merge(&mut contents, patch);
        self.replace(contents)
    }

    /// Returns the contents, if there are any yet.
    pub fn get(&self) -> Option<&Value> {
        self.contents.as_ref()
    }

    /// Reads the value at `path`, which consists of keys, or indices of arrays, each after a slash.
    /// As in a JSON pointer (RFC 6901), `~1` in a key stands for a slash and `~0` for a tilde.
    /// Several slashes count as one, and one at the end is ignored.
    ///
    /// # Errors
    /// If there is no value, or it has no form in this format.
    pub fn look_up(&self, path: &str, format: Format) -> Result<String, LookupError> {
        let mut pointer = String::with_capacity(path.len());
        for segment in path.split('/').filter(|segment| !segment.is_empty()) {
            pointer.push('/');
            pointer.push_str(segment);
        }
        let value = self
            .contents
            .as_ref()
            .and_then(|contents| contents.pointer(&pointer))
            .ok_or(LookupError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Text, Value::String(text)) => Ok(text.clone()),
            (Format::Text, Value::Object(object)) => Ok(list(object)),
            (Format::Text, _) => Err(LookupError::NoText),
        }
    }

    fn replace(&mut self, contents: Value) -> Result<(), MetadataError> {
        let size = contents.to_string().len();
        if size > self.size_limit {
            return Err(MetadataError::TooLarge {
                size,
                limit: self.size_limit,
            });
        }
        self.contents = Some(contents);
        Ok(())
    }
}

fn list(object: &Map<String, Value>) -> String {
    let mut lines = Vec::with_capacity(object.len());
    for (key, value) in object {
        let slash = if value.is_object() { "/" } else { "" };
        lines.push(format!("{key}{slash}"));
    }
    lines.join("\n")
}

/// Applies `patch` to `target` by the rules of RFC 7396, section 2.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(target) = target else {
        return;
    };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn store(contents: Value) -> MetadataStore {
        let mut store = MetadataStore::new(51_200);
        store.put(contents).unwrap();
        store
    }

    /// The examples of RFC 7396, appendix A.
    #[test]
    fn patches_merge_as_the_standard_says() {
        for (target, patch, merged) in [
            (json!({"a": "b"}), json!({"a": "c"}), json!({"a": "c"})),
            (
                json!({"a": "b"}),
                json!({"b": "c"}),
                json!({"a": "b", "b": "c"}),
            ),
            (json!({"a": "b"}), json!({"a": null}), json!({})),
            (
                json!({"a": "b", "b": "c"}),
                json!({"a": null}),
                json!({"b": "c"}),
            ),
            (json!({"a": ["b"]}), json!({"a": "c"}), json!({"a": "c"})),
            (json!({"a": "c"}), json!({"a": ["b"]}), json!({"a": ["b"]})),
            (
                json!({"a": {"b": "c"}}),
                json!({"a": {"b": "d", "c": null}}),
                json!({"a": {"b": "d"}}),
            ),
            (
                json!({"a": [{"b": "c"}]}),
                json!({"a": [1]}),
                json!({"a": [1]}),
            ),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a": "b"}), json!(["c"]), json!(["c"])),
            (json!({"a": "foo"}), json!(null), json!(null)),
            (json!({"a": "foo"}), json!("bar"), json!("bar")),
            (
                json!({"e": null}),
                json!({"a": 1}),
                json!({"e": null, "a": 1}),
            ),
            (
                json!([1, 2]),
                json!({"a": "b", "c": null}),
                json!({"a": "b"}),
            ),
            (
                json!({}),
                json!({"a": {"bb": {"ccc": null}}}),
                json!({"a": {"bb": {}}}),
            ),
        ] {
            let mut result = target.clone();
            merge(&mut result, patch.clone());
            assert_eq!(result, merged, "{target} patched by {patch}");
        }
    }

    #[test]
    fn there_is_nothing_before_the_first_put() {
        let mut store = MetadataStore::new(100);
        assert_eq!(store.get(), None);
        assert_eq!(store.look_up("/", Format::Json), Err(LookupError::NotFound));
        let error = store.patch(json!({"a": 1})).unwrap_err();
        assert!(matches!(error, MetadataError::NotInitialized), "{error}");
        store.put(json!({})).unwrap();
        store.patch(json!({"a": 1})).unwrap();
        assert_eq!(store.get(), Some(&json!({"a": 1})));
    }

    #[test]
    fn contents_that_are_too_large_change_nothing() {
        // {"a":"..."} with 12 letters.
        let mut store = MetadataStore::new(20);
        let contents = json!({"a": "123456789012"});
        store.put(contents.clone()).unwrap();
        for patch in [json!({"a": "1234567890123"}), json!({"b": 1})] {
            let error = store.patch(patch).unwrap_err();
            assert!(
                matches!(error, MetadataError::TooLarge { limit: 20, .. }),
                "{error}"
            );
        }
        let error = store.put(json!({"a": "1234567890123"})).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot keep metadata of 21 bytes: the limit is 20; shorten it, or raise the limit"
        );
        assert_eq!(store.get(), Some(&contents));
        store.patch(json!({"a": null, "b": 1})).unwrap();
    }

    #[test]
    fn a_path_leads_to_a_part() {
        let store = store(json!({
            "latest": {
                "meta-data": {"ami-id": "ami-1", "count": 3, "list": ["x", {"y": "z"}]},
                "user-data": "1 < 2\n",
            },
            "a/b": {"~": "tilde"},
            "": "unnamed",
        }));
        let text = |path| store.look_up(path, Format::Text);
        let json = |path| store.look_up(path, Format::Json);
        assert_eq!(text("/latest").unwrap(), "meta-data/\nuser-data");
        assert_eq!(text("latest/meta-data").unwrap(), "ami-id\ncount\nlist");
        assert_eq!(text("//latest///meta-data/ami-id//").unwrap(), "ami-1");
        assert_eq!(text("/latest/user-data").unwrap(), "1 < 2\n");
        assert_eq!(text("/latest/meta-data/list/0").unwrap(), "x");
        assert_eq!(text("/latest/meta-data/list/1/y").unwrap(), "z");
        assert_eq!(text("/a~1b/~0").unwrap(), "tilde");
        assert_eq!(text("/").unwrap(), "\na/b/\nlatest/");
        assert_eq!(json("/latest/meta-data/count").unwrap(), "3");
        assert_eq!(json("/latest/meta-data/ami-id").unwrap(), r#""ami-1""#);
        assert_eq!(
            json("/latest/meta-data/list/").unwrap(),
            r#"["x",{"y":"z"}]"#
        );
        for path in ["/latest/meta-data/count", "/latest/meta-data/list"] {
            assert_eq!(text(path), Err(LookupError::NoText), "{path}");
        }
        for path in [
            "/late",
            "/latest/meta-data/ami-id/x",
            "/latest/meta-data/list/2",
            "/latest/meta-data/list/01",
            "/latest/meta-data/list/-",
            "/a/b",
            "/latest/meta-data/list/99999999999999999999",
        ] {
            assert_eq!(text(path), Err(LookupError::NotFound), "{path}");
            assert_eq!(json(path), Err(LookupError::NotFound), "{path}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[a-c/~]{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c/~]{1,2}", inner, 0..4)
                    .prop_map(|entries| entries.into_iter().collect::<Map<_, _>>().into()),
            ]
        })
    }

    /// Computes the effect of a patch on one key in another way.
    fn key_after(target: Option<&Value>, patch: &Value) -> Option<Value> {
        match patch {
            Value::Null => None,
            Value::Object(patch) => {
                let empty = Map::new();
                let before = target.and_then(Value::as_object).unwrap_or(&empty);
                let keys = before.keys().chain(patch.keys());
                let after = keys.filter_map(|key| {
                    let value = match patch.get(key) {
                        Some(change) => key_after(before.get(key), change),
                        None => before.get(key).cloned(),
                    };
                    Some((key.clone(), value?))
                });
                Some(Value::Object(after.collect()))
            }
            other => Some(other.clone()),
        }
    }

    proptest! {
        #[test]
        fn any_patch_merges(target in any_json(), patch in any_json()) {
            let mut merged = target.clone();
            merge(&mut merged, patch.clone());
            let expected = key_after(Some(&target), &patch).unwrap_or(Value::Null);
            prop_assert_eq!(merged, expected);
        }

        #[test]
        fn any_path_is_looked_up(contents in any_json(), path in "[a-c0-9/~\\PC]{0,12}") {
            let store = store(json!({"a": contents, "b": [contents]}));
            let json = store.look_up(&path, Format::Json);
            match store.look_up(&path, Format::Text) {
                Err(LookupError::NotFound) => prop_assert_eq!(json, Err(LookupError::NotFound)),
                _ => {
                    let found: Value = serde_json::from_str(&json.unwrap()).unwrap();
                    let whole = store.get().unwrap().clone();
                    prop_assert!(contains(&whole, &found));
                }
            }
        }
    }

    fn contains(whole: &Value, part: &Value) -> bool {
        whole == part
            || match whole {
                Value::Array(values) => values.iter().any(|value| contains(value, part)),
                Value::Object(object) => object.values().any(|value| contains(value, part)),
                _ => false,
            }
    }
}
