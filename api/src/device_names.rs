//! The names by which the machine knows devices that clients name.

use std::collections::HashMap;

use bantam_vmm::config::DeviceName;

use crate::bodies::drives::{Drive, in_order};
use crate::bodies::network_interfaces::NetworkInterface;
use crate::fault::Fault;

/// The devices that clients name, for what the machine calls them.
#[derive(Clone, Copy)]
pub(crate) struct DeviceNames<'a> {
    pub(crate) drives: &'a [Drive],
    pub(crate) interfaces: &'a [NetworkInterface],
}

impl DeviceNames<'_> {
    /// What the machine calls a drive: its id, or `drive.N` by its place if no device, or one of another
    /// kind, can have that name. No id has a dot.
    pub(crate) fn drive(&self, id: &str) -> Result<DeviceName, Fault> {
        let place = in_order(self.drives).position(|it| it.drive_id == id);
        let place = place.ok_or_else(|| Fault::NoSuchDevice {
            kind: "drive",
            id: id.to_string(),
        })?;
        let name = own_name(id).map_or_else(|| format!("drive.{place}").parse(), Ok);
        name.map_err(Fault::value("drive_id"))
    }

    /// What the machine calls a network interface: its id, or `interface.N` by its place if no device, or
    /// another one, can have that name. Clients may give a drive and an interface the same id.
    pub(crate) fn interface(&self, id: &str) -> Result<DeviceName, Fault> {
        let place = self.interfaces.iter().position(|it| it.iface_id == id);
        let place = place.ok_or_else(|| Fault::NoSuchDevice {
            kind: "network interface",
            id: id.to_string(),
        })?;
        let is_taken = self.drives.iter().any(|drive| drive.drive_id == id);
        let name = own_name(id).filter(|_| !is_taken);
        let name = name.map_or_else(|| format!("interface.{place}").parse(), Ok);
        name.map_err(Fault::value("iface_id"))
    }

    /// Returns the ids of drives and network interfaces, by their names in the machine.
    pub(crate) fn ids(&self) -> HashMap<DeviceName, String> {
        let drives = self.drives.iter().map(|drive| &drive.drive_id);
        let drives = drives.filter_map(|id| Some((self.drive(id).ok()?, id.clone())));
        let interfaces = self.interfaces.iter().map(|it| &it.iface_id);
        let interfaces = interfaces.filter_map(|id| Some((self.interface(id).ok()?, id.clone())));
        drives.chain(interfaces).collect()
    }
}

/// Returns the id of a drive or network interface as its name, if it can be one.
fn own_name(id: &str) -> Option<DeviceName> {
    let name: DeviceName = id.parse().ok()?;
    (!name.is_fixed()).then_some(name)
}
