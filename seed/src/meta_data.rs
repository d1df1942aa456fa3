//! Meta-data: which instance a guest is.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::error::Error;
use crate::yaml;

const INSTANCE_ID: &str = "instance-id";
const LOCAL_HOSTNAME: &str = "local-hostname";

/// The longest host name in bytes.
const MAX_HOST_NAME: usize = 253;
/// The longest part of a host name in bytes.
const MAX_LABEL: usize = 63;

/// The name of a guest in networks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName(String);

impl HostName {
    /// Makes a host name of the name of something else, by replacing what host names do not have. `None` if nothing is left.
    pub fn from_name(name: &str) -> Option<HostName> {
        let dashes = name.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let label = dashes.get(..MAX_LABEL).unwrap_or(&dashes);
        label.trim_matches('-').parse().ok()
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = Error;

    fn from_str(name: &str) -> Result<HostName, Error> {
        let is_label = |label: &str| {
            let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-';
            (1..=MAX_LABEL).contains(&label.len())
                && label.chars().all(is_allowed)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        if name.len() > MAX_HOST_NAME || !name.split('.').all(is_label) {
            return Err(Error::HostName {
                name: name.chars().take(MAX_HOST_NAME).collect(),
            });
        }
        Ok(HostName(name.to_owned()))
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which instance a guest is. When the instance id is another one than at its last boot, cloud-init sets the guest up anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaData(Map<String, Value>);

impl MetaData {
    /// Returns meta-data with an instance id, and perhaps a host name.
    pub fn new(instance_id: &str, host_name: Option<&str>) -> MetaData {
        let mut meta_data = MetaData(Map::new());
        meta_data.complete(instance_id, host_name);
        meta_data
    }

    /// Reads meta-data in YAML; `what` is what errors call it.
    ///
    /// # Errors
    /// If it is not a mapping, or its instance id is not text.
    pub fn parse(what: &str, text: &str) -> Result<MetaData, Error> {
        let map = yaml::parse_mapping(what, text)?;
        if map.get(INSTANCE_ID).is_some_and(|id| !id.is_string()) {
            return Err(Error::Yaml {
                what: what.to_owned(),
                reason: format!("its {INSTANCE_ID} is not text; put it in quotes"),
            });
        }
        Ok(MetaData(map))
    }

    /// Returns the instance id, if there is one.
    pub fn instance_id(&self) -> Option<&str> {
        self.0.get(INSTANCE_ID)?.as_str()
    }

    /// Adds an instance id and a host name where there are none.
    pub fn complete(&mut self, instance_id: &str, host_name: Option<&str>) {
        let mut add = |key: &str, value: &str| {
            self.0.entry(key).or_insert_with(|| value.into());
        };
        add(INSTANCE_ID, instance_id);
        if let Some(host_name) = host_name {
            add(LOCAL_HOSTNAME, host_name);
        }
    }

    /// Sets the instance id.
    pub(crate) fn set_instance_id(&mut self, instance_id: &str) {
        self.0.insert(INSTANCE_ID.to_owned(), instance_id.into());
    }

    /// Sets the instance id, and the host name or none.
    pub(crate) fn replace(&mut self, instance_id: &str, host_name: Option<&HostName>) {
        self.set_instance_id(instance_id);
        self.0.remove(LOCAL_HOSTNAME);
        self.complete(instance_id, host_name.map(HostName::as_str));
    }

    /// Writes it for cloud-init. JSON is YAML.
    pub(crate) fn to_text(&self) -> String {
        Value::from(self.0.clone()).to_string() + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_is_kept_and_the_rest_is_added() {
        let mut data = MetaData::parse("it", "instance-id: mine\ndsmode: local\n").unwrap();
        data.complete("other", Some("web"));
        assert_eq!(data.instance_id(), Some("mine"));
        assert_eq!(
            data.to_text(),
            "{\"dsmode\":\"local\",\"instance-id\":\"mine\",\"local-hostname\":\"web\"}\n"
        );
        let mut data = MetaData::parse("it", "").unwrap();
        data.complete("i-1", None);
        assert_eq!(data, MetaData::new("i-1", None));
        let error = MetaData::parse("it", "instance-id: 7").unwrap_err();
        assert!(error.to_string().contains("quotes"), "{error}");
    }

    #[test]
    fn names_of_machines_become_host_names() {
        for (name, host_name) in [
            ("web", Some("web")),
            ("Web_1.test", Some("Web-1-test")),
            ("_x", Some("x")),
            ("___", None),
        ] {
            let found = HostName::from_name(name);
            assert_eq!(found.as_ref().map(HostName::as_str), host_name);
        }
        let long = HostName::from_name(&"a".repeat(200)).unwrap();
        assert_eq!(long.as_str().len(), MAX_LABEL);
        assert_eq!(HostName::from_name("é"), None);
    }

    #[test]
    fn host_names_are_checked() {
        for name in ["a", "a-1.example.org", "1a"] {
            assert_eq!(name.parse::<HostName>().unwrap().as_str(), name);
        }
        for name in [
            "",
            "-a",
            "a-",
            "a..b",
            "a b",
            "ä",
            &"a".repeat(64),
            &"a.".repeat(200),
        ] {
            assert!(name.parse::<HostName>().is_err(), "{name}");
        }
    }
}
