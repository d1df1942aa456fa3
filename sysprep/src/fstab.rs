//! The table of file systems, fstab(5).

/// A line of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// What is mounted: a path, or a tag such as `UUID=`.
    pub(crate) what: String,
    /// Where.
    pub(crate) place: String,
    /// Its options.
    pub(crate) options: Vec<String>,
}

impl Entry {
    /// Returns whether it has an option.
    pub(crate) fn has(&self, option: &str) -> bool {
        self.options.iter().any(|it| it == option)
    }
}

/// Reads the lines that have what they need.
pub(crate) fn parse(text: &[u8]) -> Vec<Entry> {
    let text = String::from_utf8_lossy(text);
    let lines = text.lines().map(str::trim_start);
    let lines = lines.filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let what = unescape(fields.next()?);
            let place = unescape(fields.next()?);
            let options = fields.nth(1).unwrap_or("defaults");
            Some(Entry {
                what: what.trim_matches('"').replace("=\"", "="),
                place,
                options: options.split(',').map(str::to_owned).collect(),
            })
        })
        .collect()
}

/// Replaces `\040` and its like, by which a field has blanks.
fn unescape(field: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = field.as_bytes();
    while let [first, after @ ..] = rest {
        let digits = after.get(..3).filter(|_| *first == b'\\');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let number = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(number.unwrap_or(*first));
        rest = &after[if number.is_some() { 3 } else { 0 }..];
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_read_as_mount_reads_them() {
        let text = "# a comment\n\nUUID=\"ab\" / ext4 errors=remount-ro,noauto 0 1\n/dev/vda2\t/my\\040files vfat\nnothing\n";
        let entries = parse(text.as_bytes());
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].what, "UUID=ab");
        assert_eq!(entries[0].place, "/");
        assert!(entries[0].has("noauto") && !entries[0].has("auto"));
        assert_eq!(entries[1].place, "/my files");
        assert_eq!(entries[1].options, ["defaults"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: Vec<u8>) {
            parse(&text);
        }
    }
}
