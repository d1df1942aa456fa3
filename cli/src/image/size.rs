//! Sizes as QEMU writes them.

use std::str::FromStr;

use bantam_storage::parse_size;

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
