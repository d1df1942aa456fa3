//! What is reset, and how it is chosen.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// One thing that is reset. Where virt-sysprep has the same, the names are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Operation {
    /// The host name, and its lines in the hosts file.
    Hostname,
    /// The machine ids of systemd and D-Bus.
    MachineId,
    /// The SSH host keys.
    SshHostkeys,
    /// UUIDs of file systems and swap areas.
    FsUuids,
    /// GUIDs and signatures of partition tables and partitions.
    PartitionUuids,
    /// Saved seeds of random number generators.
    RandomSeed,
    /// Leases and identifiers of DHCP clients.
    DhcpClientState,
    /// Names of network devices that udev has kept for MAC addresses.
    UdevPersistentNet,
    /// What cloud-init has noted of the instance.
    CloudInit,
    /// Logs.
    Logfiles,
    /// Histories of shells.
    ShellHistory,
}

impl Operation {
    /// All operations, in the order in which they are listed.
    pub const ALL: [Operation; 11] = [
        Operation::Hostname,
        Operation::MachineId,
        Operation::SshHostkeys,
        Operation::FsUuids,
        Operation::PartitionUuids,
        Operation::RandomSeed,
        Operation::DhcpClientState,
        Operation::UdevPersistentNet,
        Operation::CloudInit,
        Operation::Logfiles,
        Operation::ShellHistory,
    ];

    /// Returns the name.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Hostname => "hostname",
            Operation::MachineId => "machine-id",
            Operation::SshHostkeys => "ssh-hostkeys",
            Operation::FsUuids => "fs-uuids",
            Operation::PartitionUuids => "partition-uuids",
            Operation::RandomSeed => "random-seed",
            Operation::DhcpClientState => "dhcp-client-state",
            Operation::UdevPersistentNet => "udev-persistent-net",
            Operation::CloudInit => "cloud-init",
            Operation::Logfiles => "logfiles",
            Operation::ShellHistory => "shell-history",
        }
    }

    /// Returns a line that says what it does.
    pub fn description(self) -> &'static str {
        match self {
            Operation::Hostname => "set the host name, also in /etc/hosts",
            Operation::MachineId => "clear the machine id, so that the next boot makes another",
            Operation::SshHostkeys => {
                "remove the SSH host keys, and have the next boot make others"
            }
            Operation::FsUuids => {
                "give file systems and swap areas other UUIDs, and follow in fstab and boot loaders"
            }
            Operation::PartitionUuids => {
                "give partition tables and partitions other GUIDs, and follow in fstab and boot loaders"
            }
            Operation::RandomSeed => "remove saved seeds of random number generators",
            Operation::DhcpClientState => "remove leases and identifiers of DHCP clients",
            Operation::UdevPersistentNet => {
                "remove udev's rules that tie names of network devices to MAC addresses"
            }
            Operation::CloudInit => {
                "remove cloud-init's notes of the instance, so that it sets the system up anew"
            }
            Operation::Logfiles => "empty the log files in /var/log, and remove the journal",
            Operation::ShellHistory => "remove the histories of shells",
        }
    }

    /// Returns whether it is done if nothing is chosen.
    pub fn is_default(self) -> bool {
        !matches!(self, Operation::Logfiles | Operation::ShellHistory)
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text is not a list of operations.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperationError {
    /// There is no such operation.
    #[error("there is no operation '{0}'; `bantam sysprep --list` shows those that there are")]
    Unknown(String),
    /// Nothing is left to do.
    #[error("no operation is left of '{0}'")]
    Empty(String),
}

/// A choice of operations.
///
/// Its text is a list as virt-sysprep takes it: names separated by commas, with `defaults` and `all` for several, and a minus
/// before what is taken out again. A list that begins with a minus begins with the defaults.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationSet(BTreeSet<Operation>);

impl OperationSet {
    /// Returns whether `operation` is one of them.
    pub fn contains(&self, operation: Operation) -> bool {
        self.0.contains(&operation)
    }
}

impl Default for OperationSet {
    fn default() -> OperationSet {
        let defaults = Operation::ALL.into_iter().filter(|it| it.is_default());
        OperationSet(defaults.collect())
    }
}

impl FromStr for OperationSet {
    type Err = OperationError;

    fn from_str(text: &str) -> Result<OperationSet, OperationError> {
        let mut chosen = match text.starts_with('-') {
            true => OperationSet::default().0,
            false => BTreeSet::new(),
        };
        for word in text.split(',') {
            let (name, is_removed) = match word.strip_prefix('-') {
                Some(name) => (name, true),
                None => (word, false),
            };
            let named: BTreeSet<Operation> = match name {
                "all" => Operation::ALL.into(),
                "defaults" => OperationSet::default().0,
                _ => {
                    let mut all = Operation::ALL.into_iter();
                    let found = all.find(|operation| operation.name() == name);
                    [found.ok_or_else(|| OperationError::Unknown(name.to_owned()))?].into()
                }
            };
            match is_removed {
                true => chosen.retain(|operation| !named.contains(operation)),
                false => chosen.extend(named),
            }
        }
        match chosen.is_empty() {
            true => Err(OperationError::Empty(text.to_owned())),
            false => Ok(OperationSet(chosen)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(text: &str) -> Vec<Operation> {
        text.parse::<OperationSet>()
            .unwrap()
            .0
            .into_iter()
            .collect()
    }

    #[test]
    fn operations_are_chosen_as_virt_sysprep_takes_them() {
        assert_eq!(chosen("hostname"), [Operation::Hostname]);
        assert_eq!(chosen("all"), Operation::ALL);
        assert_eq!(
            chosen("all,-defaults"),
            [Operation::Logfiles, Operation::ShellHistory]
        );
        assert_eq!(chosen("-fs-uuids").len(), 8);
        assert!(!chosen("-fs-uuids").contains(&Operation::FsUuids));
        assert_eq!(chosen("defaults,logfiles").len(), 10);
    }

    #[test]
    fn a_wrong_list_is_refused_by_name() {
        let error = |text: &str| text.parse::<OperationSet>().unwrap_err().to_string();
        assert!(error("hostnames").contains("'hostnames'"));
        assert!(error("").contains("''"));
        assert!(error("hostname,-all").contains("no operation is left"));
    }

    #[test]
    fn names_are_those_of_the_report() {
        for operation in Operation::ALL {
            let json = serde_json::to_string(&operation).unwrap();
            assert_eq!(json, format!("\"{operation}\""));
        }
    }
}
