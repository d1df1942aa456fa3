//! Disks.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;

use super::{ConfigError, option_string};

/// A disk of the guest, kept in a file or block device of the host.
///
/// On the command line `PATH[,ro][,id=NAME]`, where a comma in the path or name is doubled; in a
/// machine file a `[[disk]]` table with the keys `path`, `readonly` and `id`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a disk with path, readonly and id")]
pub struct DiskConfig {
    /// File or block device with the disk's contents.
    pub path: PathBuf,
    /// Whether the guest cannot write to it.
    #[serde(default, alias = "ro")]
    pub readonly: bool,
    /// Serial number by which the guest can tell the disk from others.
    pub id: Option<DiskId>,
}

impl DiskConfig {
    /// A disk that the guest can read and write, without an id.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            readonly: false,
            id: None,
        }
    }
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        option_string::parse(text, Some("path")).map_err(|error| ConfigError::DiskOption {
            reason: error.to_string(),
        })
    }
}

impl fmt::Display for DiskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&option_string::escape(&self.path.to_string_lossy()))?;
        if self.readonly {
            f.write_str(",ro")?;
        }
        match &self.id {
            Some(id) => write!(f, ",id={}", option_string::escape(id.as_str())),
            None => Ok(()),
        }
    }
}

/// Serial number of a disk: 1 to 20 printable ASCII characters, as many as a virtio block device
/// can tell its driver (virtio 1.3, section 5.2.6).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct DiskId(String);

impl DiskId {
    /// Most bytes of an id.
    pub const MAX_SIZE: usize = 20;

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for DiskId {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let printable = |byte| matches!(byte, b' '..=b'~');
        if !(1..=Self::MAX_SIZE).contains(&text.len()) || !text.bytes().all(printable) {
            return Err(ConfigError::DiskId { text });
        }
        Ok(Self(text))
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(text: &str) -> Result<DiskConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn reads_the_option_string() {
        assert_eq!(disk("root.img"), Ok(DiskConfig::new("root.img")));
        let id = DiskId::try_from("root disk".to_owned()).unwrap();
        let expected = DiskConfig {
            path: "/a=b,c.img".into(),
            readonly: true,
            id: Some(id),
        };
        assert_eq!(disk("/a=b,,c.img,id=root disk,ro"), Ok(expected));
    }

    #[test]
    fn errors_show_the_accepted_form() {
        assert_eq!(
            disk("root.img,rw").unwrap_err(),
            "unknown option 'rw', expected one of 'path', 'readonly', 'ro', 'id'; \
             a disk is PATH[,ro][,id=NAME]"
        );
    }

    #[test]
    fn an_id_fits_the_device() {
        assert!(disk("a,id=12345678901234567890").is_ok());
        for id in ["123456789012345678901", "tab\there", "é"] {
            let error = disk(&format!("a,id={id}")).unwrap_err();
            assert!(
                error.contains("1 to 20 printable ASCII characters"),
                "{error}"
            );
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(path in ".+", readonly: bool, id in proptest::option::of("[ -~]{1,20}")) {
            let id = id.map(|id| DiskId::try_from(id).unwrap());
            let disk = DiskConfig { path: path.into(), readonly, id };
            prop_assert_eq!(disk.to_string().parse::<DiskConfig>().unwrap(), disk);
        }
    }
}
