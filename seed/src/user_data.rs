//! User data and vendor data.

use crate::MAX_FILE_SIZE;
use crate::error::Error;
use crate::yaml;

/// How much of the data cloud-init searches for the header of a MIME message.
const MIME_SEARCHED: usize = 4096;

/// What tells cloud-init which kind of data this is: the beginnings of texts, in lower case.
const BEGINNINGS: &[&str] = &[
    "#cloud-config",
    "#!",
    "#include",
    "#cloud-boothook",
    "#part-handler",
    JINJA,
];

/// Begins data that is a template.
const JINJA: &str = "## template: jinja";

/// Begins data in gzip's format.
const GZIP: &[u8] = &[0x1f, 0x8b];

/// Data in one of the formats that cloud-init takes: what is to be set up in a guest.
///
/// Debug output does not show it, as there may be passwords in it.
#[derive(Clone, PartialEq, Eq)]
pub struct UserData(Vec<u8>);

impl std::fmt::Debug for UserData {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UserData({} bytes)", self.0.len())
    }
}

impl UserData {
    /// Takes data that was written for cloud-init; `what` is what errors call it.
    ///
    /// # Errors
    /// If it is too large, or cloud-init would not know what it is; if it is `#cloud-config`, also if it is not a YAML mapping.
    pub fn new(what: &str, data: Vec<u8>) -> Result<UserData, Error> {
        if data.len() > MAX_FILE_SIZE {
            let what = what.to_owned();
            return Err(Error::TooLarge { what });
        }
        if data.starts_with(GZIP) {
            return Ok(UserData(data));
        }
        let Ok(text) = str::from_utf8(&data) else {
            let what = what.to_owned();
            return Err(Error::NotText { what });
        };
        if let Some(config) = cloud_config(text) {
            yaml::check_mapping(what, config)?;
        } else if !text.trim().is_empty() && !is_known(text) {
            let what = what.to_owned();
            return Err(Error::UnknownKind { what });
        }
        Ok(UserData(data))
    }

    /// Takes what was generated, which is right.
    pub(crate) fn generated(text: String) -> UserData {
        UserData(text.into_bytes())
    }

    /// Returns the data.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Returns the data if it is `#cloud-config`.
    pub fn as_cloud_config(&self) -> Option<&str> {
        let text = str::from_utf8(&self.0).ok()?;
        cloud_config(text)
    }
}

/// Returns `text` if it is `#cloud-config`, and not one of the kinds whose names begin so.
fn cloud_config(text: &str) -> Option<&str> {
    let first = text.trim_start().lines().next().unwrap_or_default();
    let (word, _) = first.split_once(char::is_whitespace).unwrap_or((first, ""));
    word.eq_ignore_ascii_case("#cloud-config").then_some(text)
}

/// Whether cloud-init knows what `text` is. It ignores case and what is blank before it.
fn is_known(text: &str) -> bool {
    let start: String = text
        .trim_start()
        .chars()
        .take(MIME_SEARCHED)
        .collect::<String>()
        .to_ascii_lowercase();
    let is_mime = start.starts_with("content-type:") || start.contains("mime-version:");
    is_mime || BEGINNINGS.iter().any(|it| start.starts_with(it))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn take(data: impl Into<Vec<u8>>) -> Result<UserData, Error> {
        UserData::new("user-data", data.into())
    }

    #[test]
    fn what_cloud_init_takes_is_taken() {
        for data in [
            "",
            "#cloud-config\npackages: [nginx]\n",
            "#Cloud-Config\r\na: 1\r\n",
            "\n#cloud-config\n",
            "#cloud-config # made by hand\na: 1",
            "#cloud-config-archive\n- type: text/cloud-config\n  content: |\n    a: 1\n",
            "#!/bin/sh\nexit 0\n",
            "#include\nhttps://example.org/data\n",
            "#include-once\nhttps://example.org/data\n",
            "#cloud-boothook\ntrue\n",
            "## template: jinja\n#cloud-config\na: {{ v1.region }}\n",
            "Content-Type: multipart/mixed; boundary=\"b\"\nMIME-Version: 1.0\n\n--b--\n",
            "From nobody\nMIME-Version: 1.0\nContent-Type: text/plain\n\n",
        ] {
            take(data).unwrap_or_else(|error| panic!("{data:?}: {error}"));
        }
        take([0x1f, 0x8b, 8, 0xff]).unwrap();
    }

    #[test]
    fn what_cloud_init_would_ignore_is_refused() {
        for (data, part) in [
            ("packages: [nginx]\n", "does not begin"),
            ("# cloud-config\na: 1\n", "does not begin"),
            ("#cloud-config\n- a\n", "not a YAML mapping"),
            ("#cloud-config\na: [\n", "not a YAML mapping"),
        ] {
            let error = take(data).unwrap_err().to_string();
            assert!(error.starts_with("user-data "), "{error}");
            assert!(error.contains(part), "{error}");
        }
        assert!(matches!(
            take(b"#!\xff").unwrap_err(),
            Error::NotText { .. }
        ));
        let large = vec![b'#'; MAX_FILE_SIZE + 1];
        assert!(matches!(take(large).unwrap_err(), Error::TooLarge { .. }));
    }

    #[test]
    fn debug_output_hides_the_data() {
        let data = take("#cloud-config\npassword: secret\n").unwrap();
        assert!(!format!("{data:?}").contains("secret"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(data in proptest::collection::vec(any::<u8>(), 0..200), text in ".*") {
            let _ = take(data);
            let _ = take(format!("#cloud-config\n{text}"));
        }
    }
}
