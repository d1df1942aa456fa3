//! The memory balloon.

use std::fmt;
use std::str::FromStr;

use bantam_devices::virtio::owner::DeviceCommand;
use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::forms::Single;
use super::memory_size::{MIB, parse_bytes};
use super::{ConfigError, HugePages, MemorySize, is_default, option_string, whole_number};

/// Describes a memory balloon, by which the guest gives memory back to the host.
///
/// On the command line `size=SIZE[,deflate-on-oom=on][,reporting=on][,hinting=on][,statistics=SECONDS]`;
/// in a machine file a table `[balloon]` with the same keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a balloon with size, deflate-on-oom, reporting, hinting and statistics"
)]
pub struct BalloonConfig {
    /// How much memory the guest is to give up at the start.
    pub size: BalloonSize,
    /// Whether the guest may take memory back when it would otherwise have to end processes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub deflate_on_oom: bool,
    /// Whether the guest reports by itself which memory it does not use.
    #[serde(default, skip_serializing_if = "is_default")]
    pub reporting: bool,
    /// Whether the guest can be asked which memory it does not use.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hinting: bool,
    /// Interval, in seconds, at which the guest is asked for statistics of its memory; zero for never.
    #[serde(
        default,
        skip_serializing_if = "is_default",
        deserialize_with = "seconds"
    )]
    pub statistics: u32,
}

impl BalloonConfig {
    /// Describes a balloon of `size` that does nothing else.
    pub fn new(size: BalloonSize) -> Self {
        Self {
            size,
            deflate_on_oom: false,
            reporting: false,
            hinting: false,
            statistics: 0,
        }
    }

    /// Checks that the balloon fits into `memory`, which consists of `pages`.
    pub(super) fn validate(&self, memory: MemorySize, pages: HugePages) -> Result<(), ConfigError> {
        if pages == HugePages::TwoMib {
            return Err(ConfigError::BalloonOfHugePages);
        }
        if self.size.bytes() > memory.bytes() {
            return Err(ConfigError::BalloonTooLarge {
                size: self.size,
                memory,
            });
        }
        Ok(())
    }
}

impl Single for BalloonConfig {
    const NAME: &'static str = "balloon";
}

impl BalloonConfig {
    /// Applies the change that `command` has made to the device.
    pub(super) fn apply(&mut self, command: &DeviceCommand) {
        match command {
            DeviceCommand::SetBalloonTarget { mib } => self.size = BalloonSize::from_mib(*mib),
            DeviceCommand::SetStatisticsInterval { seconds } => self.statistics = seconds.get(),
            _ => {}
        }
    }
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    whole_number::deserialize(deserializer, |seconds| {
        u32::try_from(seconds).map_err(|_| ConfigError::StatisticsInterval { seconds })
    })
}

impl FromStr for BalloonConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        option_string::parse(text.as_ref(), None).map_err(|error| ConfigError::BalloonOption {
            reason: error.to_string(),
        })
    }
}

impl fmt::Display for BalloonConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "size={}", self.size)?;
        if self.deflate_on_oom {
            f.write_str(",deflate-on-oom=on")?;
        }
        if self.reporting {
            f.write_str(",reporting=on")?;
        }
        if self.hinting {
            f.write_str(",hinting=on")?;
        }
        match self.statistics {
            0 => Ok(()),
            seconds => write!(f, ",statistics={seconds}"),
        }
    }
}

/// Size of a balloon in whole MiB; it may be zero. As text, a memory size such as `64M` or `1G`; a number
/// alone counts MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct BalloonSize(u32);

impl BalloonSize {
    /// Creates a size from MiB.
    pub fn from_mib(mib: u32) -> Self {
        Self(mib)
    }

    /// Returns the size in MiB.
    pub fn mib(self) -> u32 {
        self.0
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        u64::from(self.0) * MIB
    }
}

impl FromStr for BalloonSize {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        parse_bytes(text)
            .filter(|bytes| bytes.is_multiple_of(MIB))
            .and_then(|bytes| u32::try_from(bytes / MIB).ok())
            .map(Self)
            .ok_or_else(|| ConfigError::BalloonSize { text: text.into() })
    }
}

impl fmt::Display for BalloonSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.0)
    }
}

impl Serialize for BalloonSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BalloonSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(BalloonSizeVisitor)
    }
}

struct BalloonSizeVisitor;

impl Visitor<'_> for BalloonSizeVisitor {
    type Value = BalloonSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size such as \"64M\"")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<BalloonSize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<BalloonSize, E> {
        whole_number::visit_unsigned(self, number)
    }

    fn visit_i64<E: Error>(self, mib: i64) -> Result<BalloonSize, E> {
        self.visit_str(&mib.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn balloon(text: &str) -> Result<BalloonConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn reads_the_option_string() {
        let expected = BalloonConfig {
            size: BalloonSize::from_mib(1024),
            deflate_on_oom: true,
            reporting: true,
            hinting: true,
            statistics: 5,
        };
        let text = "statistics=5,size=1G,hinting=on,deflate-on-oom=on,reporting";
        assert_eq!(balloon(text), Ok(expected));
        let plain = BalloonConfig::new(BalloonSize::from_mib(64));
        assert_eq!(balloon("size=64"), Ok(plain));
        assert_eq!(
            balloon("size=64M,deflate-on-oom=off,statistics=0"),
            Ok(plain)
        );
        assert_eq!(balloon("size=0").unwrap().size.bytes(), 0);
    }

    #[test]
    fn refuses_what_is_wrong_and_shows_the_accepted_form() {
        let form = "; a balloon is \
                    size=SIZE[,deflate-on-oom=on][,reporting=on][,hinting=on][,statistics=SECONDS]";
        for (text, reason) in [
            ("", "an item has no name"),
            ("reporting=on", "'size' is missing"),
            (
                "64M",
                "unknown option '64M', expected one of 'size', 'deflate-on-oom', 'reporting', \
                 'hinting', 'statistics'",
            ),
            (
                "size=1536K",
                "invalid balloon size '1536K': expected whole MiB, such as 64M or 0",
            ),
            (
                "size=-1",
                "invalid balloon size '-1': expected whole MiB, such as 64M or 0",
            ),
            (
                "size=4096T",
                "invalid balloon size '4096T': expected whole MiB, such as 64M or 0",
            ),
            ("size=1,reporting=yes", "'reporting' is on or off"),
            (
                "size=1,statistics=-1",
                "invalid interval of statistics -1: expected seconds, or 0 for none",
            ),
            (
                "size=1,statistics=1s",
                "the value '1s' of 'statistics' is not a whole number",
            ),
        ] {
            assert_eq!(balloon(text).unwrap_err(), format!("{reason}{form}"));
        }
    }

    proptest! {
        #[test]
        fn display_parses_back(
            mib in any::<u32>(),
            deflate_on_oom in any::<bool>(),
            reporting in any::<bool>(),
            hinting in any::<bool>(),
            statistics in any::<u32>(),
        ) {
            let size = BalloonSize::from_mib(mib);
            let balloon = BalloonConfig { size, deflate_on_oom, reporting, hinting, statistics };
            prop_assert_eq!(balloon.to_string().parse::<BalloonConfig>().unwrap(), balloon);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*|size=[0-9]{0,30}[a-zA-Z]{0,4}") {
            let _ = balloon(&text);
        }
    }
}
