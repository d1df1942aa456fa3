//! `/vsock`: sockets between the guest and programs of the host.

use std::path::PathBuf;

use bantam_vmm::config::{GuestCid, VsockConfig};
use serde::{Deserialize, Serialize};

use super::Configuration;
use super::{Part, Resource, put_all};
use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::request::{Method, Request};

pub(crate) const RESOURCE: Resource = Resource {
    path: "vsock",
    parse: |call| match (call.method, call.rest) {
        (Method::Put, []) => Ok(Request::put("vsock", call.json::<Vsock>()?)),
        _ => Err(call.unknown()),
    },
    check: |given, checked| put_all(given.vsock.take(), checked),
    configure: |configuration, machine| {
        machine.vsock = configuration.vsock.as_ref().map(Vsock::config);
        Ok(())
    },
    groups: &[Group::new(
        "vsock",
        "activate_fails cfg_fails rx_queue_event_fails tx_queue_event_fails \
         ev_queue_event_fails muxer_event_fails conn_event_fails rx_queue_event_count \
         tx_queue_event_count rx_bytes_count tx_bytes_count rx_packets_count tx_packets_count \
         conns_added conns_killed conns_removed killq_resync tx_flush_fails tx_write_fails \
         rx_read_fails",
    )],
};

/// Body of `PUT /vsock`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's address.
    pub guest_cid: u32,
    /// The socket on which programs of the host reach the guest.
    pub uds_path: PathBuf,
    /// A name, which has no effect any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
}

impl Vsock {
    fn config(&self) -> VsockConfig {
        VsockConfig {
            // Firecracker takes any.
            cid: GuestCid::unchecked(self.guest_cid),
            socket: self.uds_path.clone(),
        }
    }
}

impl Part for Vsock {
    fn put(self, configuration: &mut Configuration) -> Result<(), Fault> {
        configuration.vsock = Some(self);
        Ok(())
    }
}
