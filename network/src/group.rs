//! Groups of users, as the host knows them.

use std::fmt;
use std::str::FromStr;

use nix::unistd::Gid;
use serde::{Deserialize, Serialize};

use crate::{NetworkError, accounts};

/// Name of a group of users: 1 to [`GroupName::MAX_SIZE`] letters, digits and the characters `.`, `_`, `-` and `$`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct GroupName(String);

impl GroupName {
    /// Maximum number of bytes.
    pub const MAX_SIZE: usize = 32;

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the number of the group.
    ///
    /// # Errors
    /// If the host has no such group.
    pub(crate) fn id(&self) -> Result<Gid, NetworkError> {
        let group = accounts::group_called(&self.0);
        let group = group.ok_or_else(|| NetworkError::GroupMissing {
            name: self.to_string(),
        });
        Ok(Gid::from_raw(group?.id))
    }
}

impl TryFrom<String> for GroupName {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-$".contains(&byte);
        if !(1..=Self::MAX_SIZE).contains(&text.len()) || !text.bytes().all(is_allowed) {
            return Err(NetworkError::GroupMissing { name: text });
        }
        Ok(GroupName(text))
    }
}

impl FromStr for GroupName {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        text.to_owned().try_into()
    }
}

impl fmt::Display for GroupName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
