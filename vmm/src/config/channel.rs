//! Channels between programs of the guest and of the host.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bantam_devices::virtio::console::MAX_CHANNEL_NAME_SIZE;
use serde::{Deserialize, Serialize};

use super::forms::Listed;
use super::{ConfigError, SerialConfig, is_default, option_string};

/// Describes a named byte stream between the guest and the host: a port of a virtio console device.
///
/// On the command line `name=NAME,WHERE`, where `WHERE` is `socket=PATH`, `file=PATH`, `pty` or `stdio`
/// and a comma in a path is doubled; in a machine file a table `[[channel]]` with the same keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "ChannelOptions", into = "ChannelOptions")]
pub struct ChannelConfig {
    /// Name by which the guest finds it.
    pub name: ChannelName,
    /// Where it leads. [`SerialConfig::None`] is not allowed.
    pub end: SerialConfig,
}

/// The keys of a channel, as they are written.
#[derive(Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a channel: a table with name and socket, file, pty or stdio"
)]
struct ChannelOptions {
    name: ChannelName,
    #[serde(
        default,
        with = "super::path::option",
        skip_serializing_if = "Option::is_none"
    )]
    socket: Option<PathBuf>,
    #[serde(
        default,
        with = "super::path::option",
        skip_serializing_if = "Option::is_none"
    )]
    file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "is_default")]
    pty: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    stdio: bool,
}

impl TryFrom<ChannelOptions> for ChannelConfig {
    type Error = ConfigError;

    fn try_from(options: ChannelOptions) -> Result<Self, ConfigError> {
        let ChannelOptions {
            name,
            socket,
            file,
            pty,
            stdio,
        } = options;
        let mut ends = [
            socket.map(SerialConfig::Socket),
            file.map(SerialConfig::File),
            pty.then_some(SerialConfig::Pty),
            stdio.then_some(SerialConfig::Stdio),
        ]
        .into_iter()
        .flatten();
        match (ends.next(), ends.next()) {
            (Some(end), None) => Ok(Self { name, end }),
            _ => Err(ConfigError::ChannelEnd { name }),
        }
    }
}

impl From<ChannelConfig> for ChannelOptions {
    fn from(channel: ChannelConfig) -> Self {
        let mut options = Self {
            name: channel.name,
            socket: None,
            file: None,
            pty: false,
            stdio: false,
        };
        match channel.end {
            SerialConfig::Socket(path) => options.socket = Some(path),
            SerialConfig::File(path) => options.file = Some(path),
            SerialConfig::Pty => options.pty = true,
            SerialConfig::Stdio => options.stdio = true,
            SerialConfig::None => {}
        }
        options
    }
}

impl Listed for ChannelConfig {
    const NAME: &'static str = "channel";
    const EXAMPLE: &'static str = "name = \"org.example.agent\"";
}

impl FromStr for ChannelConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for ChannelConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        option_string::parse(text, None).map_err(|error| ConfigError::ChannelOption {
            reason: error.to_string(),
        })
    }
}

impl fmt::Display for ChannelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = option_string::escape(&self.end.to_string());
        write!(f, "name={},{end}", self.name)
    }
}

/// Name of a channel: 1 to 128 letters, digits and the characters `.`, `-` and `_`, so that it can be
/// a file name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct ChannelName(String);

impl ChannelName {
    /// Maximum number of characters.
    pub const MAX_SIZE: usize = MAX_CHANNEL_NAME_SIZE;

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ChannelName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if (1..=Self::MAX_SIZE).contains(&text.len()) && text.chars().all(is_allowed) {
            Ok(Self(text))
        } else {
            Err(ConfigError::ChannelName { text })
        }
    }
}

impl FromStr for ChannelName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        text.to_string().try_into()
    }
}

impl fmt::Display for ChannelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refuses_what_is_wrong_and_shows_the_accepted_form() {
        let form = "; a channel is name=NAME and one of socket=PATH, file=PATH, pty and stdio";
        let name =
            "invalid channel name 'a/b': expected 1 to 128 letters, digits and '.', '-', '_'";
        let end = "channel 'a' leads to none or several of socket, file, pty and stdio: name one";
        for (text, reason) in [
            ("socket=s", "'name' is missing"),
            ("name=a/b,pty", name),
            ("name=a", end),
            ("name=a,pty=off", end),
            ("name=a,pty,socket=s", end),
            ("name=a,socket=", "the value of 'socket' is empty"),
            (
                "name=a,none",
                "unknown option 'none', expected one of 'name', 'socket', 'file', 'pty', 'stdio'",
            ),
        ] {
            let error = text.parse::<ChannelConfig>().unwrap_err().to_string();
            assert_eq!(error, format!("{reason}{form}"));
        }
        assert!("x".repeat(129).parse::<ChannelName>().is_err());
    }

    proptest! {
        #[test]
        fn display_parses_back(name in "[a-z0-9._-]{1,128}", kind in 0..4, path in "[^\0]{1,40}") {
            let channel = ChannelConfig {
                name: name.parse().unwrap(),
                end: match kind {
                    0 => SerialConfig::Stdio,
                    1 => SerialConfig::Pty,
                    2 => SerialConfig::File(path.into()),
                    _ => SerialConfig::Socket(path.into()),
                },
            };
            prop_assert_eq!(channel.to_string().parse::<ChannelConfig>().unwrap(), channel);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*") {
            let _ = text.parse::<ChannelConfig>();
        }
    }
}
