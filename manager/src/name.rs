//! Names of machines, of snapshots and of images.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name in bytes.
pub(crate) const MAX_LEN: usize = 64;

/// The name of a machine, of one of its snapshots, or of an image that machines are made of: 1 to 64 letters, digits, dots,
/// underscores and dashes. The first is neither a dot nor a dash, so it is a file name that no program takes for an option.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineName(String);

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is empty.
    #[error("a name must not be empty")]
    Empty,
    /// It is longer than 64 bytes.
    #[error("'{start}...' is too long for a name: {len} bytes, and {MAX_LEN} are allowed")]
    TooLong {
        /// The first characters of the text.
        start: String,
        /// Its length in bytes.
        len: usize,
    },
    /// It has a character that names do not have.
    #[error("'{text}' is not a name: {found:?} is not a letter, digit, '.', '_' or '-'")]
    Character {
        /// The text.
        text: String,
        /// The first such character.
        found: char,
    },
    /// It begins with a dot or a dash.
    #[error("'{text}' is not a name: a name begins with a letter, a digit or '_'")]
    Start {
        /// The text.
        text: String,
    },
}

impl MachineName {
    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name in lower case. No two machines have names that are the same in lower case.
    pub fn folded(&self) -> String {
        self.0.to_ascii_lowercase()
    }
}

impl FromStr for MachineName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<MachineName, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > MAX_LEN {
            return Err(NameError::TooLong {
                start: text.chars().take(16).collect(),
                len: text.len(),
            });
        }
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if let Some(found) = text.chars().find(|&c| !is_allowed(c)) {
            let text = text.to_owned();
            return Err(NameError::Character { text, found });
        }
        if text.starts_with(['.', '-']) {
            let text = text.to_owned();
            return Err(NameError::Start { text });
        }
        Ok(MachineName(text.to_owned()))
    }
}

impl TryFrom<String> for MachineName {
    type Error = NameError;

    fn try_from(text: String) -> Result<MachineName, NameError> {
        text.parse()
    }
}

impl From<MachineName> for String {
    fn from(name: MachineName) -> String {
        name.0
    }
}

impl fmt::Display for MachineName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_people_and_programs_are_accepted() {
        for name in ["web", "Web-1", "a", "_x", "9.example.org", &"n".repeat(64)] {
            assert_eq!(name.parse::<MachineName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn what_is_not_a_name_is_refused_in_one_line() {
        let long = "x".repeat(200);
        for (text, reason) in [
            ("", "must not be empty"),
            ("a/b", "'/'"),
            ("..", "begins with a letter"),
            (".hidden", "begins with a letter"),
            ("-rf", "begins with a letter"),
            ("two words", "' '"),
            ("caf\u{e9}", "'\u{e9}'"),
            ("a\nb", "'\\n'"),
            ("a\0", "'\\0'"),
            (&long, "200 bytes"),
        ] {
            let error = text.parse::<MachineName>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_one_part_of_a_path_and_not_an_option(text in "\\PC{0,70}") {
            if let Ok(name) = text.parse::<MachineName>() {
                let parts: Vec<_> = Path::new(name.as_str()).components().collect();
                prop_assert!(matches!(parts[..], [Component::Normal(_)]));
                prop_assert!(!name.as_str().starts_with('-'));
                prop_assert!(name.as_str().len() <= MAX_LEN);
            }
        }
    }
}
