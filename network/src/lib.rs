//! Networks of the host for machines: bridges with addresses, names and a way out, and places for machines on them.
//!
//! [`Networks`] defines, starts and stops networks, and gives machines places on them ([`Port`]). There is no daemon:
//! each process that changes something takes a lock, and first repairs what one that was killed has left. Interfaces,
//! addresses and routes are read and set by rtnetlink, the packet filter by the JSON of `nft`, and addresses and names
//! are served by `dnsmasq`.
//!
//! Ordinary users use networks of which an administrator says so: a process of root gives their machines places
//! (`broker/`).

pub mod accounts;
mod attach;
mod broker;
mod definition;
mod dnsmasq;
mod error;
mod firewall;
mod folders;
mod forwarding;
mod group;
mod leases;
mod mac;
mod name;
mod netlink;
mod networks;
mod obstacles;
mod port;
mod program;
mod rights;
mod servers;
mod started;
mod subnet;

pub use attach::{Attachment, Place, Port};
pub use broker::{KeptPlace, MakeTap, OpenTap, PlaceKeeper, UserPlace};
pub use definition::{Addresses, Definition, Mode, NewNetwork};
pub use error::NetworkError;
pub use group::GroupName;
pub use leases::Lease;
pub use mac::Mac;
pub use name::{HostName, NetworkName};
pub use networks::{NetworkInfo, Networks};
pub use port::Record;
pub use rights::can_administer_network;
pub use started::{StartOfOne, Started};
pub use subnet::{Subnet, Subnet6};
