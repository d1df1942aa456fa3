//! Places for machines on networks.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use nix::unistd::geteuid;

use crate::broker::Peer;
use crate::definition::Definition;
use crate::folders::names_in;
use crate::netlink::Netlink;
use crate::networks::Networks;
use crate::port::{self, Record, RecordLock};
use crate::started::{Phase, add_port, bridge, ports_of};
use crate::{HostName, Mac, NetworkError, NetworkName, Subnet, leases, rights};

/// Where a machine is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On a network that is defined; the networks for `nat` and `hostonly` are made when they are used first.
    Network(NetworkName),
    /// On a bridge that an administrator has made.
    Bridge(String),
    /// Beside an interface of the host, on the network that it leads to.
    Beside(String),
}

/// Most places that a user has on a network by its broker.
const MAX_PLACES_OF_USER: usize = 32;

/// What a machine needs of a network.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Where it is to be.
    pub place: Place,
    /// Its MAC address.
    pub mac: Mac,
    /// What it is called on the network.
    pub hostname: Option<HostName>,
    /// Whether it can send under its own addresses only; by default what the network says.
    pub filter: Option<bool>,
}

/// A machine's place on a network. Dropping it gives the place up, as the end of the process does; what is left on the
/// host then is removed by the next process that changes networks.
#[derive(Debug)]
pub struct Port {
    networks: Networks,
    record: Record,
    /// The bridge that the machine's tap is to be a port of, and whether its ports are kept from each other.
    bridge: Option<(String, bool)>,
    device: Option<PathBuf>,
    lock: RecordLock,
}

impl Networks {
    /// Gives a machine a place on a network, which is started if it is to be started when it is needed. The tap
    /// [`Port::interface`] is then made by the caller, and connected by [`Port::connect`].
    ///
    /// # Errors
    /// If there is no such network, it has no free address, another machine has the same name or MAC address, or this
    /// user may not do it.
    pub fn attach(&self, attachment: &Attachment) -> Result<Port, NetworkError> {
        let own = Peer {
            uid: geteuid().as_raw(),
            pid: std::process::id(),
        };
        self.attach_for(attachment, own, false)
    }

    /// Gives the machine of `user` a place on a network that is started, by the network's broker.
    ///
    /// # Errors
    /// Those of [`Networks::attach`], and if the network is not complete, or the user has too many places.
    pub(crate) fn attach_for_user(
        &self,
        attachment: &Attachment,
        user: Peer,
    ) -> Result<Port, NetworkError> {
        self.attach_for(attachment, user, true)
    }

    pub(crate) fn attach_for(
        &self,
        attachment: &Attachment,
        user: Peer,
        by_broker: bool,
    ) -> Result<Port, NetworkError> {
        rights::check("give the machine a place on a network")?;
        let lock = self.folders.lock()?;
        let mut netlink =
            Netlink::new().map_err(NetworkError::netlink("ask for the interfaces of the host"))?;
        let mut living = self.prune_ports(&mut netlink, &lock)?;
        let mut definition = None;
        let mut address = None;
        match &attachment.place {
            Place::Network(name) => {
                let network = match by_broker {
                    true => self.started_for_user(name, user, &living, &mut netlink)?,
                    false => self.started_for_machine(name, &living, &mut netlink, &lock)?,
                };
                address = choose_address(self, &network, attachment, &living)?;
                definition = Some(network);
            }
            Place::Bridge(name) => {
                bridge(&mut netlink, name)?;
            }
            Place::Beside(_) => {}
        }
        let record = Record {
            interface: self.free_interface_name(&mut netlink)?,
            network: definition.as_ref().map(|it| it.name.to_string()),
            // A user can have a tap outlive its descriptors.
            is_lasting: by_broker || matches!(attachment.place, Place::Beside(_)),
            mac: attachment.mac,
            address,
            hostname: attachment.hostname.clone(),
            filter: match (&definition, attachment.filter) {
                (Some(definition), filter) => filter.unwrap_or(definition.filter),
                (None, _) => false,
            },
            pid: user.pid,
            uid: user.uid,
        };
        let record_lock = port::record(&self.folders, &record)?;
        living.push(record.clone());
        let mut port = Port {
            networks: self.clone(),
            record,
            bridge: None,
            device: None,
            lock: record_lock,
        };
        if let Err(error) = port.prepare(attachment, definition.as_ref(), &living, &mut netlink) {
            // Dropping the port takes the lock.
            drop(lock);
            return Err(error);
        }
        Ok(port)
    }

    /// Returns the definition of the network `name`, after it was started if it may be.
    fn started_for_machine(
        &self,
        name: &NetworkName,
        living: &[Record],
        netlink: &mut Netlink,
        lock: &crate::folders::Lock,
    ) -> Result<Definition, NetworkError> {
        if let Some(state) = self.state(name.as_str())?
            && self.is_whole(&state, netlink)
        {
            if let Some(warning) = self.broker_warning(&state.definition) {
                tracing::warn!("{warning}");
            }
            return Ok(state.definition);
        }
        self.repair(lock)?;
        let is_started = self.state(name.as_str())?.is_some();
        let definition = self.definition_or_ready_made(name, lock)?;
        if !is_started && !definition.autostart {
            return Err(NetworkError::NotStarted {
                name: name.to_string(),
            });
        }
        let started = self.start_locked(definition, living)?;
        for warning in &started.warnings {
            tracing::warn!("{warning}");
        }
        Ok(started.definition)
    }

    /// Returns the definition of the network `name` for another machine of `user`. It repairs nothing, as that can end the
    /// broker.
    fn started_for_user(
        &self,
        name: &NetworkName,
        user: Peer,
        living: &[Record],
        netlink: &mut Netlink,
    ) -> Result<Definition, NetworkError> {
        let network = || name.to_string();
        let definition = match self.state(name.as_str())? {
            Some(state) if self.is_whole(&state, netlink) => state.definition,
            Some(state) if state.phase == Phase::Started => {
                return Err(NetworkError::Incomplete { network: network() });
            }
            _ => return Err(NetworkError::NotStarted { name: network() }),
        };
        let own = ports_of(name.as_str(), living);
        if own.iter().filter(|port| port.uid == user.uid).count() >= MAX_PLACES_OF_USER {
            return Err(NetworkError::TooManyPlaces {
                network: network(),
                limit: MAX_PLACES_OF_USER,
            });
        }
        Ok(definition)
    }

    /// Returns a name that neither an interface nor the port of a machine has.
    fn free_interface_name(&self, netlink: &mut Netlink) -> Result<String, NetworkError> {
        let recorded = names_in(&self.folders.ports())?;
        let mut number = 0_u32;
        loop {
            let name = format!("bnt{number}");
            if !recorded.contains(&name) {
                let found = netlink.link(&name);
                if found
                    .map_err(NetworkError::netlink("ask for an interface"))?
                    .is_none()
                {
                    return Ok(name);
                }
            }
            number += 1;
        }
    }
}

impl Port {
    /// Returns the name of the interface that leads to the machine: that of a tap which the caller is to make, unless
    /// there is a [`Port::device`].
    pub fn interface(&self) -> &str {
        &self.record.interface
    }

    /// Returns the device by which the machine's frames are read and written, if the interface is made already.
    pub fn device(&self) -> Option<&std::path::Path> {
        self.device.as_deref()
    }

    /// Returns the IPv4 address that is reserved for the machine.
    pub fn address(&self) -> Option<std::net::Ipv4Addr> {
        self.record.address
    }

    /// Returns the lock by which others know that the place is in use. It is held as long as a copy is open.
    pub(crate) fn lock(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }

    /// Makes the tap that the caller has made a port of the network's bridge.
    ///
    /// # Errors
    /// If it or the bridge is gone, or this user may not do it.
    pub fn connect(&self) -> Result<(), NetworkError> {
        let Some((bridge, is_isolated)) = &self.bridge else {
            return Ok(());
        };
        let mut netlink =
            Netlink::new().map_err(NetworkError::netlink("ask for the interfaces of the host"))?;
        add_port(bridge, *is_isolated, &self.record.interface, &mut netlink).map(drop)
    }

    fn prepare(
        &mut self,
        attachment: &Attachment,
        network: Option<&Definition>,
        living: &[Record],
        netlink: &mut Netlink,
    ) -> Result<(), NetworkError> {
        if let Some(network) = network {
            self.bridge = Some((network.bridge.clone(), network.isolate_ports));
            return self.networks.update(network, living);
        }
        match &attachment.place {
            Place::Network(_) => Ok(()),
            Place::Bridge(name) => {
                self.bridge = Some((name.clone(), false));
                Ok(())
            }
            Place::Beside(parent) => {
                let found = netlink
                    .link(parent)
                    .map_err(NetworkError::netlink("ask for an interface"))?;
                let found = found.ok_or_else(|| NetworkError::InterfaceMissing {
                    name: parent.clone(),
                })?;
                let interface = &self.record.interface;
                let action = format!("make an interface beside '{parent}'");
                let added = netlink.add_macvtap(interface, found.index, attachment.mac.0);
                added.map_err(NetworkError::netlink(action))?;
                let link = netlink
                    .link(interface)
                    .map_err(NetworkError::netlink("ask for an interface"))?;
                self.device = link.map(|link| PathBuf::from(format!("/dev/tap{}", link.index)));
                Ok(())
            }
        }
    }

    fn give_up(&self) -> Result<(), NetworkError> {
        let _lock = self.networks.folders.lock()?;
        let mut netlink =
            Netlink::new().map_err(NetworkError::netlink("ask for the interfaces of the host"))?;
        if self.record.is_lasting
            && let Ok(Some(link)) = netlink.link(&self.record.interface)
        {
            let action = format!("remove the interface '{}'", self.record.interface);
            netlink
                .delete_link(link.index)
                .map_err(NetworkError::netlink(action))?;
        }
        if let Some(name) = &self.record.network
            && let Some(state) = self.networks.state(name)?
        {
            let (mut living, _) = port::records(&self.networks.folders)?;
            living.retain(|record| record.interface != self.record.interface);
            self.networks.update(&state.definition, &living)?;
        }
        // The record comes last: if this process is killed before, the next command finds it and does the same.
        port::forget(&self.networks.folders, &self.record.interface)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if let Err(error) = self.give_up() {
            tracing::warn!(
                "the place of '{}' on its network is not given up: {error}",
                self.record.interface
            );
        }
    }
}

/// Chooses an address for a machine: the one that it had last, or else one that depends on its MAC address only, as
/// long as nobody else has it.
fn choose_address(
    networks: &Networks,
    network: &Definition,
    attachment: &Attachment,
    living: &[Record],
) -> Result<Option<std::net::Ipv4Addr>, NetworkError> {
    let name = network.name.to_string();
    let ports = ports_of(&name, living);
    let of_bridge = network.addresses.as_ref().map(|it| it.mac);
    if of_bridge == Some(attachment.mac) || ports.iter().any(|port| port.mac == attachment.mac) {
        return Err(NetworkError::MacInUse {
            network: name,
            mac: attachment.mac.to_string(),
        });
    }
    if let Some(hostname) = &attachment.hostname {
        let has_it = |port: &&Record| {
            port.hostname
                .as_ref()
                .is_some_and(|it| it.is_same(hostname))
        };
        if ports.iter().any(has_it) {
            return Err(NetworkError::HostNameInUse {
                network: name,
                hostname: hostname.to_string(),
            });
        }
    }
    let Some(addresses) = &network.addresses else {
        return Ok(None);
    };
    let subnet = addresses.subnet;
    let leases = leases::read(&networks.folders.leases(&name))?;
    let is_free =
        |address: &std::net::Ipv4Addr| !ports.iter().any(|port| port.address == Some(*address));
    let own = leases
        .iter()
        .find(|lease| lease.mac == attachment.mac)
        .map(|lease| lease.address);
    let own = own.filter(|address| is_free(address) && contains(subnet, *address));
    let is_let =
        |address: &std::net::Ipv4Addr| leases.iter().any(|lease| lease.address == *address);
    let by_mac = || {
        // FNV-1a, 32 bits.
        let hash = attachment.mac.0.iter().fold(0x811c_9dc5_u32, |hash, byte| {
            (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
        });
        let count = subnet.machine_count();
        (0..count).map(move |step| subnet.machine((hash % count + step) % count))
    };
    let chosen = own
        .or_else(|| by_mac().find(|address| is_free(address) && !is_let(address)))
        .or_else(|| by_mac().find(is_free));
    chosen
        .map(Some)
        .ok_or(NetworkError::NoFreeAddress { network: name })
}

fn contains(subnet: Subnet, address: std::net::Ipv4Addr) -> bool {
    let mask = subnet.mask().to_bits();
    let is_of_host = address == subnet.gateway() || address == subnet.broadcast();
    address.to_bits() & mask == subnet.gateway().to_bits() & mask && !is_of_host
}
