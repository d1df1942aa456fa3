//! Start, stop and repair of networks.
//!
//! What a start makes on the host can be found again by the network's folder, which is there before anything else and
//! is removed last. So whatever step a process was killed at, the next one knows what to take down.

use serde::{Deserialize, Serialize};

use crate::broker::{BROKERS, Broker};
use crate::definition::{Addresses, Definition, Mode};
use crate::dnsmasq::{self, Server};
use crate::folders::{Lock, create_folder, names_in, remove_folder, write_json};
use crate::netlink::{Link, Netlink};
use crate::networks::Networks;
use crate::obstacles::{self, Measures};
use crate::port::{self, Record};
use crate::program::{DNSMASQ, NFT};
use crate::{GroupName, NetworkError, NetworkName, Subnet6, firewall, forwarding, rights};

/// The file with the state of a network, in its folder.
pub(crate) const STATE: &str = "state.json";

/// How far a network has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// Something of it may be there.
    Partial,
    /// All of it is there.
    Started,
}

/// What is on the host of a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct State {
    pub(crate) phase: Phase,
    /// Its definition when it was started.
    pub(crate) definition: Definition,
    pub(crate) measures: Measures,
    pub(crate) warnings: Vec<String>,
}

/// The result of a start.
#[derive(Clone, Debug)]
pub struct Started {
    /// The network.
    pub definition: Definition,
    /// Whether it was started before.
    pub was_started: bool,
    /// What is in its way, one line each.
    pub warnings: Vec<String>,
    /// How many machines that were on it before it was stopped are on it again.
    pub returned: usize,
}

/// A network that was to be started with others, and what came of it.
pub type StartOfOne = (NetworkName, Result<Started, NetworkError>);

impl Networks {
    /// Starts the network `name`. One that is started gets back what other programs have removed, such as its rules in
    /// the packet filter.
    ///
    /// # Errors
    /// If there is no such network, its addresses are in use, a program is missing, or this user may not do it. Then
    /// nothing of it is left.
    pub fn start(&self, name: &NetworkName) -> Result<Started, NetworkError> {
        let lock = self.folders.lock()?;
        self.repair(&lock)?;
        let definition = self.definition_or_ready_made(name, &lock)?;
        let (living, _) = port::records(&self.folders)?;
        self.start_locked(definition, &living)
    }

    /// Starts all networks that are to be started when the host is. Returns the result for each.
    ///
    /// # Errors
    /// If the definitions cannot be read, or this user may not do it.
    pub fn start_all(&self) -> Result<Vec<StartOfOne>, NetworkError> {
        let lock = self.folders.lock()?;
        self.repair(&lock)?;
        let (living, _) = port::records(&self.folders)?;
        let definitions = self.definitions()?.into_iter().filter(|it| it.autostart);
        let start = |definition: Definition| {
            (
                definition.name.clone(),
                self.start_locked(definition, &living),
            )
        };
        Ok(definitions.map(start).collect())
    }

    /// Stops the network `name`, and returns how many machines on it are cut off until it is started again.
    ///
    /// # Errors
    /// If there is no such network, it is not started, or this user may not do it.
    pub fn stop(&self, name: &NetworkName) -> Result<usize, NetworkError> {
        let lock = self.folders.lock()?;
        self.repair(&lock)?;
        let state = self.state(name.as_str())?;
        if state.is_none() {
            self.definition(name)?;
            return Err(NetworkError::NotStarted {
                name: name.to_string(),
            });
        }
        rights::check(&format!("stop network '{name}'"))?;
        self.take_down(name.as_str())?;
        let (living, _) = port::records(&self.folders)?;
        Ok(ports_of(name.as_str(), &living).len())
    }

    pub(crate) fn start_locked(
        &self,
        mut definition: Definition,
        living: &[Record],
    ) -> Result<Started, NetworkError> {
        let name = definition.name.as_str().to_owned();
        rights::check(&format!("start network '{name}'"))?;
        let found = self.state(&name)?;
        let was_started = found.is_some();
        if let Some(state) = found {
            // What has changed since counts from the next start on, except who may use it.
            let group = definition.group;
            definition = state.definition;
            definition.group = group;
        }
        let mut netlink =
            Netlink::new().map_err(NetworkError::netlink("ask for the interfaces of the host"))?;
        if definition.mode == Mode::Bridged {
            bridge(&mut netlink, &definition.bridge)?;
            self.write_state(&definition, Phase::Started, Measures::default(), &[])?;
            let returned = self.bring_back(&definition, living, &mut netlink)?;
            let warnings = self.broker_warning(&definition).into_iter().collect();
            return Ok(Started {
                definition,
                was_started,
                warnings,
                returned,
            });
        }
        NFT.find()?;
        DNSMASQ.find()?;
        if !was_started {
            self.check_place(&mut definition, &mut netlink)?;
        }
        match self.build(&definition, living, &mut netlink) {
            Ok((warnings, returned)) => Ok(Started {
                definition,
                was_started,
                warnings,
                returned,
            }),
            Err(error) => {
                if let Err(second) = self.take_down(&name) {
                    tracing::warn!("something of network '{name}' is left: {second}");
                }
                Err(error)
            }
        }
    }

    /// Checks that the network's bridge and addresses are free, and chooses other addresses if it may.
    fn check_place(
        &self,
        definition: &mut Definition,
        netlink: &mut Netlink,
    ) -> Result<(), NetworkError> {
        let link = netlink.link(&definition.bridge);
        if link
            .map_err(NetworkError::netlink("ask for an interface"))?
            .is_some()
        {
            return Err(NetworkError::InterfaceExists {
                network: definition.name.to_string(),
                bridge: definition.bridge.clone(),
            });
        }
        let name = definition.name.as_str().to_owned();
        if let Some(addresses) = &mut definition.addresses {
            match self.check_free(addresses.subnet, Some(&name)) {
                Err(NetworkError::Overlap { .. }) if addresses.is_chosen => {
                    addresses.subnet = self.free_subnet(Some(&name))?;
                }
                checked => return checked,
            }
            write_json(&self.folders.definition(&name), definition)?;
        }
        Ok(())
    }

    /// Makes what is not there yet of a network. Returns what is in its way, and how many machines it has got back.
    fn build(
        &self,
        definition: &Definition,
        living: &[Record],
        netlink: &mut Netlink,
    ) -> Result<(Vec<String>, usize), NetworkError> {
        let Some(addresses) = &definition.addresses else {
            return Ok((Vec::new(), 0));
        };
        let name = definition.name.as_str();
        let (mut measures, mut warnings) = obstacles::plan(definition, addresses)?;
        if let Some(state) = self.state(name)? {
            // What was done before is to be undone too.
            for rule in state.measures.rules {
                if !measures.rules.contains(&rule) {
                    measures.rules.push(rule);
                }
            }
        }
        self.write_state(definition, Phase::Partial, measures.clone(), &warnings)?;
        make_bridge(definition, addresses, netlink)?;
        if definition.mode == Mode::Nat {
            forwarding::enable()?;
            if addresses.subnet6.is_some() && forwarding::has_ipv6() {
                forwarding::enable_ipv6()?;
            }
        }
        firewall::set(definition, &ports_of(name, living))?;
        warnings.extend(measures.take(&definition.bridge));
        warnings.extend(obstacles::legacy_warning(definition));
        let server = Server::of(&self.folders, name);
        if !server.is_running() {
            server.start(definition, addresses)?;
        }
        let returned = self.bring_back(definition, living, netlink)?;
        warnings.extend(self.broker_warning(definition));
        self.write_state(definition, Phase::Started, measures, &warnings)?;
        Ok((warnings, returned))
    }

    /// Starts the broker like [`Networks::watch_broker`]. Returns why it cannot be, as root can use the network in any case.
    pub(crate) fn broker_warning(&self, definition: &Definition) -> Option<String> {
        let error = self.watch_broker(definition).err()?;
        let name = &definition.name;
        Some(format!(
            "network '{name}' is for root only for now: {error}"
        ))
    }

    /// Starts the broker of a network that is started, if it has ended and the network is to have one.
    pub(crate) fn watch_broker(&self, definition: &Definition) -> Result<(), NetworkError> {
        let broker = Broker::of(&self.folders, definition.name.as_str());
        match &definition.group {
            Some(group) if !broker.is_running() => broker.start(group),
            _ => Ok(()),
        }
    }

    /// Has a network that is started be for members of another group.
    pub(crate) fn change_group(
        &self,
        name: &NetworkName,
        group: Option<GroupName>,
    ) -> Result<(), NetworkError> {
        let state = self.state(name.as_str())?;
        let Some(mut state) = state.filter(|state| state.phase == Phase::Started) else {
            return Ok(());
        };
        state.definition.group = group;
        Broker::of(&self.folders, name.as_str()).stop()?;
        write_json(&self.folders.network(name.as_str()).join(STATE), &state)?;
        self.watch_broker(&state.definition)
    }

    /// Puts the machines that are on a network back on its bridge. Returns how many there are.
    fn bring_back(
        &self,
        definition: &Definition,
        living: &[Record],
        netlink: &mut Netlink,
    ) -> Result<usize, NetworkError> {
        let ports = ports_of(definition.name.as_str(), living);
        self.tell_server(definition, &ports)?;
        let mut returned = 0;
        for port in ports {
            let bridge = &definition.bridge;
            let added = add_port(bridge, definition.isolate_ports, &port.interface, netlink);
            match added {
                Ok(is_new) => returned += usize::from(is_new),
                // The machine has ended meanwhile.
                Err(error) => tracing::warn!("{error}"),
            }
        }
        Ok(returned)
    }

    fn tell_server(&self, definition: &Definition, ports: &[&Record]) -> Result<(), NetworkError> {
        match definition.addresses {
            Some(_) => Server::of(&self.folders, definition.name.as_str()).set_ports(ports),
            None => Ok(()),
        }
    }

    /// Has the server and the packet filter of a network that is started know the machines on it.
    pub(crate) fn update(
        &self,
        definition: &Definition,
        living: &[Record],
    ) -> Result<(), NetworkError> {
        let ports = ports_of(definition.name.as_str(), living);
        self.tell_server(definition, &ports)?;
        match definition.mode {
            Mode::Bridged => Ok(()),
            Mode::Nat | Mode::HostOnly => firewall::set_ports(definition, &ports),
        }
    }

    /// Whether all of a network that is started is there.
    pub(crate) fn is_whole(&self, state: &State, netlink: &mut Netlink) -> bool {
        let definition = &state.definition;
        let has_bridge =
            matches!(netlink.link(&definition.bridge), Ok(Some(link)) if link.is_bridge);
        let server = Server::of(&self.folders, definition.name.as_str());
        state.phase == Phase::Started
            && has_bridge
            && (definition.addresses.is_none() || server.is_running())
    }

    fn write_state(
        &self,
        definition: &Definition,
        phase: Phase,
        measures: Measures,
        warnings: &[String],
    ) -> Result<(), NetworkError> {
        let folder = self.folders.network(definition.name.as_str());
        create_folder(&folder)?;
        let state = State {
            phase,
            definition: definition.clone(),
            measures,
            warnings: warnings.to_vec(),
        };
        write_json(&folder.join(STATE), &state)
    }

    /// Removes everything of a network from the host except its definition and leases.
    fn take_down(&self, name: &str) -> Result<(), NetworkError> {
        let folder = self.folders.network(name);
        let state = match self.state(name) {
            Ok(Some(state)) => state,
            // The folder is made before all else.
            Ok(None) | Err(NetworkError::Broken { .. }) => return remove_folder(&folder),
            Err(error) => return Err(error),
        };
        let State {
            definition,
            measures,
            ..
        } = state;
        Broker::of(&self.folders, name).stop()?;
        if definition.mode != Mode::Bridged {
            self.write_state(&definition, Phase::Partial, measures.clone(), &[])?;
            Server::of(&self.folders, name).stop()?;
            measures.undo(&definition.bridge);
            firewall::clear(&definition)?;
            let removed =
                Netlink::new().and_then(|mut netlink| match netlink.link(&definition.bridge)? {
                    Some(link) if link.is_bridge => netlink.delete_link(link.index),
                    _ => Ok(()),
                });
            let action = format!("remove the bridge '{}'", definition.bridge);
            removed.map_err(NetworkError::netlink(action))?;
        }
        remove_folder(&folder)
    }

    /// Forgets the ports of machines that were killed, and returns those of others. Networks that had some know it.
    pub(crate) fn prune_ports(
        &self,
        netlink: &mut Netlink,
        _lock: &Lock,
    ) -> Result<Vec<Record>, NetworkError> {
        let (living, dead) = port::records(&self.folders)?;
        for record in &dead {
            if record.is_lasting
                && let Ok(Some(link)) = netlink.link(&record.interface)
            {
                let action = format!("remove the interface '{}'", record.interface);
                netlink
                    .delete_link(link.index)
                    .map_err(NetworkError::netlink(action))?;
            }
            port::forget(&self.folders, &record.interface)?;
        }
        let mut names: Vec<_> = dead
            .iter()
            .filter_map(|record| record.network.as_deref())
            .collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            if let Some(state) = self.state(name)?
                && state.phase == Phase::Started
            {
                self.update(&state.definition, &living)?;
            }
        }
        Ok(living)
    }

    /// Takes down what a process that was killed has left, and brings back what has ended by itself.
    pub(crate) fn repair(&self, lock: &Lock) -> Result<(), NetworkError> {
        let mut netlink =
            Netlink::new().map_err(NetworkError::netlink("ask for the interfaces of the host"))?;
        let living = self.prune_ports(&mut netlink, lock)?;
        for name in names_in(&self.folders.started())? {
            match self.state(&name) {
                Ok(Some(state)) if self.is_whole(&state, &mut netlink) => {
                    if let Some(warning) = self.broker_warning(&state.definition) {
                        tracing::warn!("{warning}");
                    }
                }
                Ok(Some(state)) if state.phase == Phase::Started => {
                    self.take_down(&name)?;
                    if let Err(error) = self.start_locked(state.definition, &living) {
                        tracing::warn!("network '{name}' is not complete any more: {error}");
                    }
                }
                Ok(_) | Err(NetworkError::Broken { .. }) => self.take_down(&name)?,
                Err(error) => return Err(error),
            }
        }
        let started = names_in(&self.folders.started())?;
        for servers in [dnsmasq::SERVERS, BROKERS] {
            servers.end_orphans(&self.folders, |name| started.iter().any(|it| it == name))?;
        }
        Ok(())
    }
}

/// Returns the ports of the network `name`.
pub(crate) fn ports_of<'a>(name: &str, records: &'a [Record]) -> Vec<&'a Record> {
    records
        .iter()
        .filter(|record| record.network.as_deref() == Some(name))
        .collect()
}

/// Returns the bridge `name` of the host.
///
/// # Errors
/// If there is no such interface, or it is something else.
pub(crate) fn bridge(netlink: &mut Netlink, name: &str) -> Result<Link, NetworkError> {
    let link = netlink.link(name);
    match link.map_err(NetworkError::netlink("ask for an interface"))? {
        Some(link) if link.is_bridge => Ok(link),
        Some(_) => Err(NetworkError::NotBridge {
            name: name.to_owned(),
        }),
        None => Err(NetworkError::BridgeMissing {
            bridge: name.to_owned(),
        }),
    }
}

/// Makes an interface a port of a network's bridge. Returns whether it was none.
///
/// # Errors
/// If one of them is missing, or this user may not do it.
pub(crate) fn add_port(
    bridge_name: &str,
    is_isolated: bool,
    interface: &str,
    netlink: &mut Netlink,
) -> Result<bool, NetworkError> {
    let bridge = bridge(netlink, bridge_name)?;
    let link = netlink
        .link(interface)
        .map_err(NetworkError::netlink("ask for an interface"))?;
    let link = link.ok_or_else(|| NetworkError::InterfaceMissing {
        name: interface.to_owned(),
    })?;
    let added = netlink.add_port(link.index, bridge.index, is_isolated);
    let action = format!("make '{interface}' a port of the bridge '{bridge_name}'");
    added.map_err(NetworkError::netlink(action))?;
    Ok(link.controller != Some(bridge.index))
}

fn make_bridge(
    definition: &Definition,
    addresses: &Addresses,
    netlink: &mut Netlink,
) -> Result<(), NetworkError> {
    let name = &definition.bridge;
    let error = || NetworkError::netlink(format!("make the bridge '{name}'"));
    let link = match netlink.link(name).map_err(error())? {
        Some(link) => link,
        None => {
            netlink.add_bridge(name, addresses.mac.0).map_err(error())?;
            bridge(netlink, name)?
        }
    };
    let ignore_present = |added: std::io::Result<()>| match added {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        added => added,
    };
    let error = || NetworkError::netlink(format!("give the bridge '{name}' addresses"));
    let subnet = addresses.subnet;
    let added = netlink.add_address(link.index, subnet.gateway().into(), subnet.bits());
    ignore_present(added).map_err(error())?;
    if let Some(subnet6) = addresses.subnet6
        && forwarding::has_ipv6()
    {
        forwarding::ignore_routers(name)?;
        let added = netlink.add_address(link.index, subnet6.gateway().into(), Subnet6::BITS);
        ignore_present(added).map_err(error())?;
    }
    let action = format!("bring up the bridge '{name}'");
    netlink
        .set_up(link.index)
        .map_err(NetworkError::netlink(action))
}
