//! Options of a format, as `KEY=VALUE,...`.

use thiserror::Error;

/// Why options are not right.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OptionError {
    /// The format has no such option.
    #[error("the format {format} has no option '{key}'")]
    Unknown {
        /// The format.
        format: String,
        /// The option.
        key: String,
    },

    /// The value is not possible.
    #[error("the option '{key}' cannot be '{value}': expected {expected}")]
    Value {
        /// The option.
        key: String,
        /// Its value.
        value: String,
        /// What it could be.
        expected: String,
    },

    /// There is no value.
    #[error("'{0}' is not KEY=VALUE")]
    NoValue(String),
}

/// Options of a format. Each is taken by what uses it; what is left is not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options(Vec<(String, String)>);

impl Options {
    /// Adds options from `KEY=VALUE,...`. A later one replaces an earlier one; a doubled comma is one in a value.
    ///
    /// # Errors
    /// If a part is not `KEY=VALUE`.
    pub fn add(&mut self, text: &str) -> Result<(), OptionError> {
        let text = text.replace(",,", "\0");
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let part = part.replace('\0', ",");
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| OptionError::NoValue(part.clone()))?;
            self.set(key, value);
        }
        Ok(())
    }

    /// Sets one option.
    pub fn set(&mut self, key: &str, value: &str) {
        self.0.retain(|(other, _)| other != key);
        self.0.push((key.to_owned(), value.to_owned()));
    }

    /// Returns the value of an option, if it is given.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(other, _)| other == key);
        found.map(|(_, value)| value.as_str())
    }

    /// Takes the value of an option, if it is given.
    pub fn take(&mut self, key: &str) -> Option<String> {
        let index = self.0.iter().position(|(other, _)| other == key)?;
        Some(self.0.remove(index).1)
    }

    /// Takes an option whose value is one of a list, the first of which it has if it is not given.
    ///
    /// # Errors
    /// If the value is another.
    pub fn take_choice<T: Copy>(
        &mut self,
        key: &str,
        choices: &[(&str, T)],
    ) -> Result<T, OptionError> {
        let wrong = |value: &str| {
            let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
            OptionError::Value {
                key: key.to_owned(),
                value: value.to_owned(),
                expected: names.join(", "),
            }
        };
        let value = self.take(key);
        let found = match &value {
            None => choices.first(),
            Some(value) => choices.iter().find(|(name, _)| name == value),
        };
        found
            .map(|&(_, choice)| choice)
            .ok_or_else(|| wrong(value.as_deref().unwrap_or_default()))
    }

    /// Makes sure that all options were taken.
    ///
    /// # Errors
    /// If one is left.
    pub fn finish(self, format: &str) -> Result<(), OptionError> {
        match self.0.into_iter().next() {
            None => Ok(()),
            Some((key, _)) => Err(OptionError::Unknown {
                format: format.to_owned(),
                key,
            }),
        }
    }
}
