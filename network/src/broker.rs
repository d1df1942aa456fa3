//! The broker of a network: a process of root that gives machines of ordinary users places on it.
//!
//! It listens on a socket that belongs to the group whose members may use the network. A machine asks for a place by one
//! packet, and is answered by one, with the descriptors of a tap that is a port of the network's bridge already, and
//! whose filters are set. The place is given up when the connection ends, however it ends.
//!
//! The machine also gets the lock on its record, so that the place is still known to be in use when the broker has been
//! killed, or ended with its network: the machine goes on, as one of root does.
//!
//! Users are hostile. A request has a bounded size, and nothing of it reaches a name of an interface, a file or a rule
//! of the packet filter except a MAC address and a host name, both of which are parsed. No call waits for a user.

mod keeper;
mod peer;
mod process;
mod protocol;
mod serve;
mod user;

pub use keeper::{KeptPlace, MakeTap, PlaceKeeper};
pub use serve::OpenTap;
pub use user::UserPlace;

pub(crate) use peer::Peer;
pub(crate) use process::{BROKERS, Broker};
