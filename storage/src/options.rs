//! Options of a format, as `KEY=VALUE,...`, and sizes as QEMU writes them.

use thiserror::Error;

const SUFFIXES: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];
const TOO_LARGE: &str = "the size is too large";

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

    /// Whether one of the parts of `text`, in the form that [`Self::add`] reads, asks for a list of the options.
    pub fn asks_for_help(text: &str) -> bool {
        text.split(',').any(|part| matches!(part, "help" | "?"))
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

    /// Takes an option whose value is a size.
    ///
    /// # Errors
    /// If the value is not one.
    pub fn take_size(&mut self, key: &str) -> Result<Option<u64>, OptionError> {
        let Some(value) = self.take(key) else {
            return Ok(None);
        };
        match parse_size(&value) {
            Ok(size) => Ok(Some(size)),
            Err(_) => Err(OptionError::Value {
                key: key.to_owned(),
                value,
                expected: "a size such as 4096, 512M or 1.5G".to_owned(),
            }),
        }
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

/// Reads a size: a number of bytes, or with `k`, `M`, `G`, `T`, `P` or `E` of units of 1024 of the one before. A number
/// with a suffix can have a fraction.
///
/// # Errors
/// If the text is not a size, or the size is too large.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "expected a size such as 4096, 512M or 1.5G".to_owned();
    // `b` and `e` are digits here, so there is no suffix.
    if let Some(digits) = text.strip_prefix("0x") {
        return u64::from_str_radix(digits, 16).map_err(|_| wrong());
    }
    let suffix = text.chars().last().map(|last| last.to_ascii_lowercase());
    let power = SUFFIXES.iter().position(|&known| Some(known) == suffix);
    let number = match (power, suffix) {
        (Some(_), _) | (None, Some('b')) => &text[..text.len() - 1],
        _ => text,
    };
    let unit = 1024_u128.pow(power.map_or(0, |power| power as u32 + 1));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !is_number(whole) || !is_number(fraction) || fraction.len() > 18 {
        return Err(wrong());
    }
    if !fraction.is_empty() && power.is_none() {
        return Err("a number of bytes has no fraction".to_owned());
    }
    let whole: u64 = whole.parse().map_err(|_| TOO_LARGE.to_owned())?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let fraction: u128 = match fraction {
        "" => 0,
        digits => digits.parse().map_err(|_| wrong())?,
    };
    let part = fraction * unit / scale;
    u64::try_from(u128::from(whole) * unit + part).map_err(|_| TOO_LARGE.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_qemu_are_read() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("512b", 512),
            ("1k", 1024),
            ("1K", 1024),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("7E", 7 << 60),
            ("0x1000", 4096),
            ("0xbe", 190),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in [
            "",
            "k",
            "1.5",
            "-1",
            "1x",
            "1kk",
            ".",
            "1 k",
            "16E",
            "99999999999999999999",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
