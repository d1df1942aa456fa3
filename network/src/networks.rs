//! The networks of a host: definitions, and what is known about each.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

use crate::definition::{Addresses, Definition, Mode, NewNetwork};
use crate::folders::{Folders, Lock, names_in, read_json, remove_file, write_json};
use crate::leases::{self, Lease};
use crate::netlink::Netlink;
use crate::port::{self, Record};
use crate::started::{Phase, STATE, State};
use crate::{GroupName, Mac, NetworkError, NetworkName, Subnet, Subnet6};

/// The networks of a host.
///
/// Each method that changes something waits until no other process does so, and first repairs what a process that was
/// killed has left.
#[derive(Clone, Debug)]
pub struct Networks {
    pub(crate) folders: Folders,
}

/// What is known about a network.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct NetworkInfo {
    /// Its definition.
    #[serde(flatten)]
    pub definition: Definition,
    /// Whether it is started.
    pub is_started: bool,
    /// The machines on it.
    pub ports: Vec<Record>,
    /// What is in its way, one line each.
    pub warnings: Vec<String>,
}

impl Networks {
    /// Returns the networks of this host. Definitions are in `/var/lib/bantam/networks` and the state of networks that
    /// are started in `/run/bantam/networks`; both in the folder that the environment variable `BANTAM_NETWORK_ROOT`
    /// names, if it is set.
    pub fn of_host() -> Networks {
        Networks {
            folders: Folders::of_host(),
        }
    }

    /// Returns the folders with the files that say which networks there are, and who may use them.
    pub fn folders(&self) -> [&Path; 2] {
        self.folders.all()
    }

    /// Defines a network, and chooses what `new` leaves out.
    ///
    /// # Errors
    /// If the options exclude each other, there is such a network, its addresses are in use, or this user may not do it.
    pub fn define(&self, new: &NewNetwork) -> Result<Definition, NetworkError> {
        new.check()?;
        if let Some(group) = &new.group {
            group.id()?;
        }
        let _lock = self.folders.lock()?;
        self.define_locked(new)
    }

    pub(crate) fn define_locked(&self, new: &NewNetwork) -> Result<Definition, NetworkError> {
        let name = new.name.as_str();
        if read_json::<Definition>(&self.folders.definition(name))?.is_some() {
            return Err(NetworkError::Exists {
                name: name.to_owned(),
            });
        }
        let bridge = match &new.bridge {
            Some(bridge) => bridge.clone(),
            None => self.free_bridge_name()?,
        };
        let addresses = match new.mode {
            Mode::Bridged => None,
            Mode::Nat | Mode::HostOnly => Some(self.choose_addresses(new)?),
        };
        let definition = Definition {
            name: new.name.clone(),
            mode: new.mode,
            bridge,
            addresses,
            isolate_ports: new.isolate_ports,
            filter: new.filter && new.mode != Mode::Bridged,
            autostart: new.autostart,
            group: new.group.clone(),
        };
        write_json(&self.folders.definition(name), &definition)?;
        Ok(definition)
    }

    fn choose_addresses(&self, new: &NewNetwork) -> Result<Addresses, NetworkError> {
        let subnet = match new.subnet {
            Some(subnet) => {
                self.check_free(subnet, None)?;
                subnet
            }
            None => self.free_subnet(None)?,
        };
        let subnet6 = match (new.ipv6, new.subnet6) {
            (false, _) => None,
            (true, Some(subnet)) => Some(subnet),
            (true, None) => Some(Subnet6::random()?),
        };
        Ok(Addresses {
            subnet,
            is_chosen: new.subnet.is_none(),
            subnet6,
            mac: Mac::random()?,
            domain: new.domain.clone().unwrap_or_else(|| new.name.domain()),
        })
    }

    /// Returns the definition of the network `name`.
    ///
    /// # Errors
    /// If there is no such network.
    pub fn definition(&self, name: &NetworkName) -> Result<Definition, NetworkError> {
        let found = read_json(&self.folders.definition(name.as_str()))?;
        found.ok_or_else(|| {
            let names: Vec<_> = self.definitions().unwrap_or_default();
            let names: Vec<_> = names.iter().map(|it| it.name.as_str()).collect();
            NetworkError::Unknown {
                name: name.to_string(),
                remedy: match names.is_empty() {
                    _ if Self::ready_made(name).is_some() => {
                        format!("'bantam network start {name}' makes it, as the first machine on it does")
                    }
                    true => format!("'bantam network define {name}' defines it"),
                    false => format!("there are {}", names.join(", ")),
                },
            }
        })
    }

    /// Returns all definitions by name.
    ///
    /// # Errors
    /// If one cannot be read.
    pub fn definitions(&self) -> Result<Vec<Definition>, NetworkError> {
        let mut definitions = Vec::new();
        for name in names_in(self.folders.definitions())? {
            if let Some(name) = name.strip_suffix(".json") {
                definitions.extend(read_json::<Definition>(&self.folders.definition(name))?);
            }
        }
        Ok(definitions)
    }

    /// Returns what is known about all networks.
    ///
    /// # Errors
    /// If something cannot be read.
    pub fn list(&self) -> Result<Vec<NetworkInfo>, NetworkError> {
        self.repair_if_permitted()?;
        let definitions = self.definitions()?;
        definitions
            .into_iter()
            .map(|definition| self.info_of(definition))
            .collect()
    }

    /// Returns what is known about the network `name`.
    ///
    /// # Errors
    /// If there is no such network, or something cannot be read.
    pub fn info(&self, name: &NetworkName) -> Result<NetworkInfo, NetworkError> {
        self.repair_if_permitted()?;
        self.info_of(self.definition(name)?)
    }

    fn info_of(&self, definition: Definition) -> Result<NetworkInfo, NetworkError> {
        let name = definition.name.as_str();
        let state = self
            .state(name)?
            .filter(|state| state.phase == Phase::Started);
        let (living, _) = port::records(&self.folders).or_else(|error| match error {
            // Only root can tell whether a machine runs.
            NetworkError::NotPermitted { .. } => Ok((Vec::new(), Vec::new())),
            error => Err(error),
        })?;
        let ports = living
            .into_iter()
            .filter(|port| port.network.as_deref() == Some(name));
        Ok(NetworkInfo {
            is_started: state.is_some(),
            ports: ports.collect(),
            warnings: state.map(|state| state.warnings).unwrap_or_default(),
            definition,
        })
    }

    /// Returns the addresses that the DHCP server of the network `name` has given away.
    ///
    /// # Errors
    /// If there is no such network, or its leases cannot be read.
    pub fn leases(&self, name: &NetworkName) -> Result<Vec<Lease>, NetworkError> {
        let definition = self.definition(name)?;
        if definition.addresses.is_none() {
            return Err(NetworkError::Options(format!(
                "network '{name}' is bridged: what is on the bridge '{}' gives its machines addresses",
                definition.bridge
            )));
        }
        leases::read(&self.folders.leases(name.as_str()))
    }

    /// Says whether the network `name` is started when the host is, and when a machine needs it.
    ///
    /// # Errors
    /// If there is no such network, or this user may not do it.
    pub fn set_autostart(&self, name: &NetworkName, autostart: bool) -> Result<(), NetworkError> {
        let _lock = self.folders.lock()?;
        let mut definition = self.definition(name)?;
        definition.autostart = autostart;
        write_json(&self.folders.definition(name.as_str()), &definition)
    }

    /// Says which group's members may use the network `name` without root, if any, from now on. Machines that are on it
    /// already stay.
    ///
    /// # Errors
    /// If there is no such network or no such group, or this user may not do it.
    pub fn set_group(
        &self,
        name: &NetworkName,
        group: Option<GroupName>,
    ) -> Result<(), NetworkError> {
        if let Some(group) = &group {
            group.id()?;
        }
        let lock = self.folders.lock()?;
        let mut definition = self.definition_or_ready_made(name, &lock)?;
        definition.group.clone_from(&group);
        write_json(&self.folders.definition(name.as_str()), &definition)?;
        self.change_group(name, group)
    }

    /// Removes the definition of the network `name`, and its leases.
    ///
    /// # Errors
    /// If there is no such network, it is started, or this user may not do it.
    pub fn undefine(&self, name: &NetworkName) -> Result<(), NetworkError> {
        let lock = self.folders.lock()?;
        self.repair(&lock)?;
        let definition = self.folders.definition(name.as_str());
        // A broken definition can be removed too.
        match fs::metadata(&definition) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return self.definition(name).map(drop);
            }
            _ => {}
        }
        if self.state(name.as_str())?.is_some() {
            return Err(NetworkError::Started {
                name: name.to_string(),
            });
        }
        remove_file(&self.folders.leases(name.as_str()))?;
        remove_file(&definition)
    }

    /// Returns the state of the network `name`, if it is started or something is left of it.
    pub(crate) fn state(&self, name: &str) -> Result<Option<State>, NetworkError> {
        read_json(&self.folders.network(name).join(STATE))
    }

    fn repair_if_permitted(&self) -> Result<(), NetworkError> {
        match self.folders.lock() {
            Ok(lock) => self.repair(&lock),
            Err(NetworkError::NotPermitted { .. }) => Ok(()),
            // The file system of a container or rescue system can be read-only.
            Err(NetworkError::File { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Returns a name that neither an interface nor the bridge of a network has.
    fn free_bridge_name(&self) -> Result<String, NetworkError> {
        let action = "list the interfaces of the host";
        let links = Netlink::new().and_then(|mut netlink| netlink.links());
        let links = links.map_err(NetworkError::netlink(action))?;
        let definitions = self.definitions()?;
        let is_free = |name: &String| {
            !links.iter().any(|link| link.name == *name)
                && !definitions.iter().any(|it| it.bridge == *name)
        };
        let mut names = (0_u32..).map(|number| format!("bantam{number}"));
        Ok(names.find(is_free).unwrap_or_default())
    }

    /// Returns a subnet that overlaps no route of the host and no other network. The network `name`, if there is one,
    /// does not count.
    pub(crate) fn free_subnet(&self, name: Option<&str>) -> Result<Subnet, NetworkError> {
        let occupied = self.occupied(name)?;
        let is_free = |subnet: &Subnet| {
            !occupied
                .iter()
                .any(|(prefix, _)| prefix.overlaps(subnet.prefix()))
        };
        Subnet::candidates()
            .find(is_free)
            .ok_or(NetworkError::NoFreeSubnet)
    }

    /// Checks that `subnet` is one that [`Networks::free_subnet`] could return.
    pub(crate) fn check_free(
        &self,
        subnet: Subnet,
        name: Option<&str>,
    ) -> Result<(), NetworkError> {
        let occupied = self.occupied(name)?;
        match occupied
            .into_iter()
            .find(|(prefix, _)| prefix.overlaps(subnet.prefix()))
        {
            None => Ok(()),
            Some((_, other)) => Err(NetworkError::Overlap {
                subnet: subnet.to_string(),
                other,
            }),
        }
    }

    /// Returns prefixes of addresses that are in use, and by what.
    fn occupied(
        &self,
        name: Option<&str>,
    ) -> Result<Vec<(crate::subnet::Prefix, String)>, NetworkError> {
        let routes = Netlink::new().and_then(|mut netlink| netlink.routes());
        let routes = routes.map_err(NetworkError::netlink("list the routes of the host"))?;
        let mut occupied: Vec<_> = Vec::new();
        // The reason that names a network is the more useful one.
        for other in self.definitions()? {
            if let Some(addresses) = &other.addresses
                && name != Some(other.name.as_str())
            {
                occupied.push((
                    addresses.subnet.prefix(),
                    format!("network '{}'", other.name),
                ));
            }
        }
        occupied.extend(routes.into_iter().map(|destination| {
            (
                destination,
                format!("the route of the host to {destination}"),
            )
        }));
        Ok(occupied)
    }

    /// Returns what a machine's network is that need not have been defined.
    pub(crate) fn ready_made(name: &NetworkName) -> Option<NewNetwork> {
        let mode = match name {
            name if *name == NetworkName::nat() => Mode::Nat,
            name if *name == NetworkName::host_only() => Mode::HostOnly,
            _ => return None,
        };
        let mut network = NewNetwork::new(name.clone(), mode);
        network.autostart = true;
        Some(network)
    }

    /// Returns the definition of the network `name`, which is made if it is one that need not have been defined.
    pub(crate) fn definition_or_ready_made(
        &self,
        name: &NetworkName,
        _lock: &Lock,
    ) -> Result<Definition, NetworkError> {
        match (self.definition(name), Self::ready_made(name)) {
            (Err(NetworkError::Unknown { .. }), Some(network)) => self.define_locked(&network),
            (found, _) => found,
        }
    }
}
