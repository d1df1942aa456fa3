//! Sizes as QEMU writes them.

use std::str::FromStr;

const SUFFIXES: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];
const TOO_LARGE: &str = "the size is too large";

/// Reads a size: a number of bytes, or with `k`, `M`, `G`, `T`, `P` or `E` of units of 1024 of the one before. A number
/// with a suffix can have a fraction.
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

/// A new size, by itself or relative to the old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeChange {
    /// This size.
    To(u64),
    /// Larger by this.
    Grow(u64),
    /// Smaller by this.
    Shrink(u64),
}

impl FromStr for SizeChange {
    type Err = String;

    fn from_str(text: &str) -> Result<SizeChange, String> {
        if let Some(text) = text.strip_prefix('+') {
            return Ok(SizeChange::Grow(parse_size(text)?));
        }
        match text.strip_prefix('-') {
            Some(text) => Ok(SizeChange::Shrink(parse_size(text)?)),
            None => Ok(SizeChange::To(parse_size(text)?)),
        }
    }
}

impl SizeChange {
    /// Returns the new size.
    pub fn apply(self, size: u64) -> anyhow::Result<u64> {
        let new = match self {
            SizeChange::To(new) => Some(new),
            SizeChange::Grow(by) => size.checked_add(by),
            SizeChange::Shrink(by) => size.checked_sub(by),
        };
        new.filter(|&new| new > 0)
            .ok_or_else(|| anyhow::anyhow!("the new size must be larger than 0, and possible"))
    }
}

/// Formats a size with three digits and a unit.
pub fn human(size: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut value = size as f64;
    let mut unit = 0;
    // At 1000 the next unit is used: three digits must be enough.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let decimals = match value {
        _ if value < 0.9995 => 3,
        _ if value < 9.995 => 2,
        _ if value < 99.95 => 1,
        _ => 0,
    };
    let text = format!("{value:.decimals$}");
    let text = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false if text == "1000" => "1e+03",
        false => &text,
    };
    format!("{text} {}B", UNITS[unit])
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

    #[test]
    fn a_change_is_relative_with_a_sign() {
        let change = |text: &str| text.parse::<SizeChange>().unwrap();
        assert_eq!(change("1M").apply(5).unwrap(), 1 << 20);
        assert_eq!(change("+1k").apply(5).unwrap(), 1029);
        assert_eq!(change("-5").apply(6).unwrap(), 1);
        assert!(change("-5").apply(5).is_err());
        assert!(change("+1").apply(u64::MAX).is_err());
    }

    #[test]
    fn three_digits_are_shown() {
        for (size, text) in [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (73_479_168, "70.1 MiB"),
            (1_023_000_000, "976 MiB"),
            (1 << 40, "1 TiB"),
            (1023 << 20, "0.999 GiB"),
        ] {
            assert_eq!(human(size), text);
        }
    }
}
