//! Files that were written for cloud-init.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::MAX_FILE_SIZE;
use crate::error::Error;
use crate::meta_data::MetaData;
use crate::network_config::NetworkConfig;
use crate::user_data::UserData;

/// What a user has written for cloud-init.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    /// User data.
    pub user_data: UserData,
    /// Meta-data, without which it is made.
    pub meta_data: Option<MetaData>,
    /// Vendor data.
    pub vendor_data: Option<UserData>,
    /// The network configuration, without which it is made.
    pub network_config: Option<NetworkConfig>,
}

impl Given {
    /// Reads a file with user data, or a directory with `user-data` and perhaps `meta-data`, `vendor-data` and
    /// `network-config`.
    ///
    /// # Errors
    /// If a file cannot be read, or is not what cloud-init takes.
    pub fn read(path: &Path) -> Result<Given, Error> {
        let what = |path: &Path| format!("'{}'", path.display());
        if !path.is_dir() {
            return Ok(Given {
                user_data: UserData::new(&what(path), read_file(path)?)?,
                meta_data: None,
                vendor_data: None,
                network_config: None,
            });
        }
        let data = |name: &str| {
            let path = path.join(name);
            let bytes = read_if_there(&path)?;
            bytes
                .map(|bytes| UserData::new(&what(&path), bytes))
                .transpose()
        };
        let text = |name: &str| {
            let path = path.join(name);
            let bytes = read_if_there(&path)?;
            let what = what(&path);
            let text = bytes.map(|bytes| match String::from_utf8(bytes) {
                Ok(text) => Ok((what.clone(), text)),
                Err(_) => Err(Error::NotText { what: what.clone() }),
            });
            text.transpose()
        };
        let user_data = data("user-data")?.ok_or_else(|| Error::NoUserData {
            path: path.to_owned(),
        })?;
        let meta_data = text("meta-data")?.map(|(what, text)| MetaData::parse(&what, &text));
        let network = text("network-config")?.map(|(what, text)| NetworkConfig::parse(&what, text));
        Ok(Given {
            user_data,
            meta_data: meta_data.transpose()?,
            vendor_data: data("vendor-data")?,
            network_config: network.transpose()?,
        })
    }
}

/// Reads a file of at most [`MAX_FILE_SIZE`] bytes.
///
/// # Errors
/// If it cannot be read, or is larger.
pub fn read_file(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_SIZE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match bytes.len() > MAX_FILE_SIZE {
        true => Err(Error::TooLarge {
            what: format!("'{}'", path.display()),
        }),
        false => Ok(bytes),
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match read_file(path) {
        Err(Error::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_is_user_data() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("mine.yaml");
        fs::write(&path, "#cloud-config\na: 1\n").unwrap();
        let given = Given::read(&path).unwrap();
        assert_eq!(given.user_data.as_bytes(), b"#cloud-config\na: 1\n");
        assert_eq!(given.meta_data, None);
        fs::write(&path, "a: 1\n").unwrap();
        let error = Given::read(&path).unwrap_err().to_string();
        assert!(error.contains("mine.yaml' does not begin"), "{error}");
    }

    #[test]
    fn a_directory_has_user_data_and_perhaps_more() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        let error = Given::read(folder.path()).unwrap_err();
        assert!(matches!(error, Error::NoUserData { .. }), "{error}");
        write("user-data", "");
        assert_eq!(Given::read(folder.path()).unwrap().network_config, None);
        write("meta-data", "instance-id: i-1");
        write("vendor-data", "#!/bin/sh\n");
        write("network-config", "version: 2\n");
        let given = Given::read(folder.path()).unwrap();
        assert_eq!(given.meta_data.unwrap().instance_id(), Some("i-1"));
        assert!(given.vendor_data.is_some());
        assert!(given.network_config.is_some());
        write("network-config", "- a");
        assert!(Given::read(folder.path()).is_err());
    }

    #[test]
    fn what_does_not_end_is_read_up_to_a_limit() {
        let error = read_file(Path::new("/dev/zero")).unwrap_err();
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
        let error = read_file(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read '/nowhere': "), "{error}");
    }
}
