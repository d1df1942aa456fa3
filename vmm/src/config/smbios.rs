//! Who the guest is told that its machine is.

use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

use bantam_arch::smbios::{MAX_TEXT_SIZE, MachineIdentity};
use serde::{Deserialize, Serialize};

use super::forms::Single;
use super::{ConfigError, option_string};

const MANUFACTURER: &str = "Bantam";
const PRODUCT: &str = "Bantam virtual machine";

/// Has the guest find SMBIOS tables (DMI), by which programs know the machine: `dmidecode`, cloud-init, systemd, and
/// `/sys/class/dmi/id` of Linux.
///
/// On the command line `KEY=VALUE,...`, where a comma in a value is doubled; in a machine file a `[smbios]` table with the
/// same keys. What is left out is Bantam's name, or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    default,
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "the machine's identity: a table with keys such as uuid and serial"
)]
pub struct SmbiosConfig {
    /// Who has made the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<SmbiosText>,
    /// What it is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<SmbiosText>,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<SmbiosText>,
    /// Its serial number. Cloud-init reads options here, as in `ds=nocloud`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<SmbiosText>,
    /// Its UUID.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// Stock keeping unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sku: Option<SmbiosText>,
    /// The family that it belongs to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<SmbiosText>,
    /// What its owner has written on it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub asset_tag: Option<SmbiosText>,
}

impl SmbiosConfig {
    /// Returns what the tables say.
    pub(crate) fn identity(&self) -> MachineIdentity<'_> {
        MachineIdentity {
            manufacturer: text(&self.manufacturer, MANUFACTURER),
            product: text(&self.product, PRODUCT),
            version: text(&self.version, ""),
            serial: text(&self.serial, ""),
            uuid: self.uuid.unwrap_or_default().0,
            sku: text(&self.sku, ""),
            family: text(&self.family, ""),
            asset_tag: text(&self.asset_tag, ""),
        }
    }

    fn texts(&self) -> [(&'static str, Option<&SmbiosText>); 7] {
        [
            ("manufacturer", self.manufacturer.as_ref()),
            ("product", self.product.as_ref()),
            ("version", self.version.as_ref()),
            ("serial", self.serial.as_ref()),
            ("sku", self.sku.as_ref()),
            ("family", self.family.as_ref()),
            ("asset-tag", self.asset_tag.as_ref()),
        ]
    }
}

fn text<'a>(text: &'a Option<SmbiosText>, default: &'a str) -> &'a str {
    text.as_ref().map_or(default, |text| &text.0)
}

impl Single for SmbiosConfig {
    const NAME: &'static str = "smbios";
}

impl FromStr for SmbiosConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for SmbiosConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        option_string::parse(text, None).map_err(|error| ConfigError::SmbiosOption {
            reason: error.to_string(),
        })
    }
}

impl fmt::Display for SmbiosConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = self.texts().into_iter();
        let texts = texts
            .filter_map(|(key, text)| Some((key, option_string::escape(&text?.0).to_string())));
        let uuid = self.uuid.map(|uuid| ("uuid", uuid.to_string()));
        for (index, (key, value)) in texts.chain(uuid).enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{key}={value}")?;
        }
        Ok(())
    }
}

/// A text of the tables: 1 to 64 printable ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SmbiosText(String);

impl TryFrom<String> for SmbiosText {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let is_printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
        match is_printable && (1..=MAX_TEXT_SIZE).contains(&text.len()) {
            true => Ok(SmbiosText(text)),
            false => Err(ConfigError::SmbiosText { text }),
        }
    }
}

impl FromStr for SmbiosText {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        SmbiosText::try_from(text.to_owned())
    }
}

impl From<SmbiosText> for String {
    fn from(text: SmbiosText) -> String {
        text.0
    }
}

/// A UUID, written as in `123e4567-e89b-12d3-a456-426614174000`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Uuid([u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let refused = || ConfigError::Uuid {
            text: text.to_owned(),
        };
        let groups: Vec<_> = text.split('-').collect();
        let is_shaped = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]);
        if !is_shaped
            || !text
                .bytes()
                .all(|byte| byte == b'-' || byte.is_ascii_hexdigit())
        {
            return Err(refused());
        }
        let digits = u128::from_str_radix(&groups.concat(), 16).map_err(|_| refused())?;
        Ok(Uuid(digits.to_be_bytes()))
    }
}

impl TryFrom<String> for Uuid {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> String {
        uuid.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_option_string_is_read_as_it_was_written() {
        let text =
            "serial=ds=nocloud;h=web,asset-tag=shelf,, 4,uuid=123e4567-e89b-12d3-a456-426614174000";
        let config: SmbiosConfig = text.parse().unwrap();
        assert_eq!(
            String::from(config.serial.clone().unwrap()),
            "ds=nocloud;h=web"
        );
        assert_eq!(config.identity().asset_tag, "shelf, 4");
        assert_eq!(config.identity().manufacturer, MANUFACTURER);
        assert_eq!(config.identity().uuid[..4], [0x12, 0x3e, 0x45, 0x67]);
        assert_eq!(config.to_string().parse::<SmbiosConfig>().unwrap(), config);
    }

    #[test]
    fn what_a_table_cannot_say_is_refused() {
        let long = format!("serial={}", "x".repeat(MAX_TEXT_SIZE + 1));
        for (text, expected) in [
            ("serial=caf\u{e9}", "printable"),
            (&long, "64"),
            ("uuid=123e4567e89b12d3a456426614174000", "123e4567-"),
            ("uuid=+23e4567-e89b-12d3-a456-426614174000", "123e4567-"),
            ("name=x", "unknown option 'name'"),
            ("serial=", "empty"),
        ] {
            let error = text.parse::<SmbiosConfig>().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_uuid_is_read_as_it_was_written(bytes: [u8; 16]) {
            prop_assert_eq!(Uuid(bytes).to_string().parse::<Uuid>().unwrap(), Uuid(bytes));
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*") {
            if let Ok(config) = text.parse::<SmbiosConfig>() {
                prop_assert_eq!(config.to_string().parse::<SmbiosConfig>().unwrap_or_default(), config);
            }
        }
    }
}
