//! The socket device.

use std::ffi::OsStr;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use bantam_devices::virtio::vsock::{MAX_GUEST_CID, MAX_PORT_SUFFIX_SIZE, MIN_GUEST_CID};
use serde::de::value::MapAccessDeserializer;
use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::forms::Single;
use super::{ConfigError, option_string, whole_number};

/// Describes a socket device, by which programs of the host and the guest connect to one another.
///
/// On the command line `cid=N,socket=PATH`, where a comma in the path is doubled; in a machine file a
/// `[vsock]` table with the same keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "a socket device: a table with cid and socket"
)]
pub struct VsockConfig {
    /// The guest's context identifier.
    pub cid: GuestCid,
    /// The Unix domain socket to which programs of the host connect to reach the guest.
    #[serde(with = "super::path")]
    pub socket: PathBuf,
}

impl VsockConfig {
    /// Maximum length of the socket's path in bytes: the room in a socket's address, with a NUL at its end,
    /// less the suffix that the path of a port adds.
    pub const MAX_PATH_SIZE: usize = 107 - MAX_PORT_SUFFIX_SIZE;

    /// Checks that the path, which must be complete, is not too long.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.socket.as_os_str().len() > Self::MAX_PATH_SIZE {
            return Err(ConfigError::VsockPath {
                path: self.socket.clone(),
            });
        }
        Ok(())
    }
}

impl Single for VsockConfig {
    const NAME: &'static str = "vsock";
}

impl FromStr for VsockConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for VsockConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        option_string::parse(text, None).map_err(|error| ConfigError::VsockOption {
            reason: error.to_string(),
        })
    }
}

impl fmt::Display for VsockConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let socket = self.socket.display().to_string();
        write!(
            f,
            "cid={},socket={}",
            self.cid,
            option_string::escape(&socket)
        )
    }
}

/// Context identifier of a guest: [`MIN_GUEST_CID`] to [`MAX_GUEST_CID`], unless made by
/// [`GuestCid::unchecked`].
///
/// In a machine file it is a number, and outside that range a table `{ unchecked = N }`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestCid(u32);

impl GuestCid {
    /// Creates an identifier from any number, even one that the specification reserves. A guest with a
    /// reserved number may be unreachable.
    pub fn unchecked(cid: u32) -> Self {
        Self(cid)
    }

    /// Returns the number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<i64> for GuestCid {
    type Error = ConfigError;

    fn try_from(cid: i64) -> Result<Self, ConfigError> {
        match u32::try_from(cid) {
            Ok(cid @ MIN_GUEST_CID..=MAX_GUEST_CID) => Ok(Self(cid)),
            _ => Err(ConfigError::GuestCid { cid }),
        }
    }
}

impl<'de> Deserialize<'de> for GuestCid {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_i64(CidVisitor)
    }
}

struct CidVisitor;

impl<'de> Visitor<'de> for CidVisitor {
    type Value = GuestCid;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<GuestCid, E> {
        whole_number::visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, cid: i64) -> Result<GuestCid, E> {
        GuestCid::try_from(cid).map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<GuestCid, A::Error> {
        let cid = UncheckedCid::deserialize(MapAccessDeserializer::new(map))?;
        Ok(GuestCid(cid.unchecked))
    }
}

/// The form in which an unchecked context identifier is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct UncheckedCid {
    unchecked: u32,
}

impl Serialize for GuestCid {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let unchecked = self.0;
        match Self::try_from(i64::from(unchecked)) {
            Ok(_) => serializer.serialize_u32(unchecked),
            Err(_) => UncheckedCid { unchecked }.serialize(serializer),
        }
    }
}

impl fmt::Display for GuestCid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn vsock(text: &str) -> Result<VsockConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn reads_the_option_string() {
        let vsock = vsock("socket=a,,b.sock,cid=3").unwrap();
        assert_eq!(vsock.cid.get(), 3);
        assert_eq!(vsock.socket, PathBuf::from("a,b.sock"));
    }

    #[test]
    fn refuses_what_is_wrong_and_shows_the_accepted_form() {
        let form = "; a socket device is cid=N,socket=PATH";
        for (text, reason) in [
            ("cid=3", "'socket' is missing"),
            ("socket=v", "'cid' is missing"),
            ("cid=2,socket=v", "cid 2 is out of range: 3 to 4294967294"),
            (
                "cid=4294967295,socket=v",
                "cid 4294967295 is out of range: 3 to 4294967294",
            ),
            (
                "cid=x,socket=v",
                "the value 'x' of 'cid' is not a whole number",
            ),
            ("cid=3,socket=", "the value of 'socket' is empty"),
            (
                "cid=3,socket=v,port=5",
                "unknown option 'port', expected one of 'cid', 'socket'",
            ),
        ] {
            assert_eq!(vsock(text).unwrap_err(), format!("{reason}{form}"));
        }
    }

    #[test]
    fn a_path_leaves_room_for_the_ports() {
        let with_path = |size| VsockConfig {
            cid: GuestCid(3),
            socket: "x".repeat(size).into(),
        };
        let longest = VsockConfig::MAX_PATH_SIZE;
        assert!(with_path(longest).validate().is_ok());
        let error = with_path(longest + 1).validate().unwrap_err();
        assert!(error.to_string().contains("at most 96 bytes"), "{error}");
    }

    proptest! {
        #[test]
        fn display_parses_back(cid in 3..u32::MAX, path in "[^\0]{1,90}") {
            let vsock = VsockConfig {
                cid: GuestCid::try_from(i64::from(cid)).unwrap(),
                socket: path.into(),
            };
            prop_assert_eq!(vsock.to_string().parse::<VsockConfig>().unwrap(), vsock);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*") {
            let _ = text.parse::<VsockConfig>();
        }
    }
}
