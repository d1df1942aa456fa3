//! How the network devices of a guest get their addresses.

use serde_json::{Map, Value, json};

use crate::MAX_FILE_SIZE;
use crate::error::Error;
use crate::yaml;

/// A network configuration, version 1 or 2, as cloud-init reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig(String);

impl NetworkConfig {
    /// Has each network device ask a DHCP server for an IPv4 address. The devices are found by their MAC addresses, and get the
    /// names that Linux gives them by itself: those under which every tool of a distribution writes its own configuration.
    pub fn dhcp(mac_addresses: &[impl AsRef<str>]) -> NetworkConfig {
        let devices = mac_addresses.iter().enumerate().map(|(place, mac)| {
            let name = format!("eth{place}");
            let device = json!({
                "match": { "macaddress": mac.as_ref().to_ascii_lowercase() },
                "set-name": name,
                "dhcp4": true,
            });
            (name, device)
        });
        let devices: Map<String, Value> = devices.collect();
        let config = json!({ "version": 2, "ethernets": devices });
        NetworkConfig(config.to_string() + "\n")
    }

    /// Takes a configuration that was written for cloud-init; `what` is what errors call it.
    ///
    /// # Errors
    /// If it is too large or not a YAML mapping.
    pub fn parse(what: &str, text: String) -> Result<NetworkConfig, Error> {
        if text.len() > MAX_FILE_SIZE {
            let what = what.to_owned();
            return Err(Error::TooLarge { what });
        }
        yaml::check_mapping(what, &text)?;
        Ok(NetworkConfig(text))
    }

    pub(crate) fn as_text(&self) -> &str {
        &self.0
    }

    /// Puts MAC addresses in the place of others.
    pub(crate) fn replace_mac_addresses(&mut self, pairs: &[(String, String)]) {
        for (old, new) in pairs {
            // An address can be written in either case, and both have the same length.
            let lower = self.0.to_ascii_lowercase();
            let mut text = String::new();
            let mut done = 0;
            for (place, found) in lower.match_indices(&old.to_ascii_lowercase()) {
                text.push_str(&self.0[done..place]);
                text.push_str(&new.to_ascii_lowercase());
                done = place + found.len();
            }
            text.push_str(&self.0[done..]);
            self.0 = text;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_is_matched_by_its_mac_address() {
        let config = NetworkConfig::dhcp(&["02:00:00:00:00:0A", "02:00:00:00:00:0b"]);
        let value: Value = serde_json::from_str(config.as_text()).unwrap();
        assert_eq!(value["version"], 2);
        let second = &value["ethernets"]["eth1"];
        assert_eq!(second["match"]["macaddress"], "02:00:00:00:00:0b");
        assert_eq!(second["dhcp4"], true);
        let first = &value["ethernets"]["eth0"]["match"]["macaddress"];
        assert_eq!(first, "02:00:00:00:00:0a");
    }

    #[test]
    fn a_configuration_that_is_given_is_kept_as_it_is() {
        let text = "network:\n  version: 1 # mine\n";
        let config = NetworkConfig::parse("it", text.to_owned()).unwrap();
        assert_eq!(config.as_text(), text);
        assert!(NetworkConfig::parse("it", "- a".to_owned()).is_err());
    }
}
