//! Values of elements and attributes.

use std::path::PathBuf;

use crate::error::Error;

/// Reads a whole number that is not negative.
pub(crate) fn number(text: &str, what: &str) -> Result<i64, Error> {
    let number = text.trim().parse::<i64>().ok().filter(|it| *it >= 0);
    number.ok_or_else(|| Error::value(what, format!("is '{text}', and not a number")))
}

/// Reads the path of a file of the host.
pub(crate) fn absolute(text: &str, what: &str) -> Result<PathBuf, Error> {
    match text.starts_with('/') {
        true => Ok(PathBuf::from(text)),
        false => Err(Error::value(
            what,
            format!("is '{text}', and not a path that begins with '/'"),
        )),
    }
}

/// Whether an attribute says yes, in either of the ways of libvirt.
pub(crate) fn yes(value: Option<&str>) -> bool {
    matches!(value, Some("yes" | "on"))
}

/// Reads a size with a unit of libvirt (`virScaleInteger`), and returns bytes; without a unit it is in KiB.
pub(crate) fn size(text: &str, unit: Option<&str>, what: &str) -> Result<u64, Error> {
    let wrong = |reason: String| Error::value(what, reason);
    let count = number(text, what)?.unsigned_abs();
    let unit = unit.unwrap_or("KiB");
    let factor =
        unit_factor(unit).ok_or_else(|| wrong(format!("has the unknown unit '{unit}'")))?;
    count
        .checked_mul(factor)
        .ok_or_else(|| wrong(format!("is too large: '{text}' {unit}")))
}

/// Returns how many bytes a unit of libvirt (`virScaleInteger`) stands for: `k` and `KiB` are 1024, `KB` is 1000, and so on.
pub fn unit_factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if matches!(unit.as_str(), "b" | "bytes" | "byte") {
        return Some(1);
    }
    let (letter, rest) = unit.split_at_checked(1)?;
    let exponent = "kmgtpe".find(letter)? as u32 + 1;
    match rest {
        "" | "ib" => Some(1024_u64.pow(exponent)),
        "b" => Some(1000_u64.pow(exponent)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_libvirts_units() {
        let bytes = |text, unit| size(text, unit, "<memory>").ok();
        assert_eq!(bytes(" 2 ", None), Some(2048));
        assert_eq!(bytes("2", Some("b")), Some(2));
        assert_eq!(bytes("2", Some("KB")), Some(2000));
        assert_eq!(bytes("2", Some("MiB")), Some(2 << 20));
        assert_eq!(bytes("2", Some("G")), Some(2 << 30));
        assert_eq!(bytes("17", Some("E")), None);
        for (text, unit) in [
            ("-1", None),
            ("x", None),
            ("", None),
            ("1", Some("é")),
            ("1", Some("")),
        ] {
            assert_eq!(bytes(text, unit), None, "{text} {unit:?}");
        }
    }
}
