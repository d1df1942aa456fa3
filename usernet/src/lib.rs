//! A network for a guest that needs no rights on the host: what the guest sends goes through ordinary sockets
//! of the monitor's process.
//!
//! The guest sees one Ethernet segment with itself, a gateway and a name server. It gets its addresses by DHCP
//! and by advertisements of the gateway. Each of its connections is a socket of the host, so the outside sees the
//! host speak.
//!
//! # Why there is no second TCP
//! A stack such as smoltcp between guest and sockets would take in each byte, acknowledge it, keep it, and
//! send it on by a TCP of its own, with windows, timers and buffers for each connection. There is nothing to
//! gain: the link to the guest loses and reorders nothing, and the host's kernel has a TCP towards the outside
//! already. So segments are mapped to system calls, as passt does: a segment's payload goes from guest memory
//! to `sendmsg`; what the socket has received is peeked at, into guest memory, and leaves the socket's queue
//! when the guest acknowledges it. A large MTU makes each of these calls carry up to 64 KiB.
//!
//! # Bounds
//! The guest is hostile. Flows are bounded in number, what they keep in memory is bounded for all of them
//! together, and each call does a bounded amount of work. What is too much is dropped or refused, so that the
//! guest is slowed and not the host.
//!
//! # Files
//! `network/` says what becomes of each frame, and where frames come from; `tcp.rs`, `udp.rs` and `icmp.rs` have
//! the flows, `batch.rs` datagrams on their way. `dhcp.rs`, `dhcpv6.rs` and `ndp.rs` are what the guest is told,
//! `resolver.rs` and `dns.rs` what it asks. `addresses.rs` has what the guest may reach at all, `rule.rs` and
//! `policy.rs` what its user lets it reach. `reassembly.rs` puts packets together, `wire/` has the headers.

mod addresses;
mod batch;
mod dhcp;
mod dhcpv6;
mod dns;
mod error;
mod frame;
mod icmp;
mod ndp;
mod network;
mod options;
mod output;
mod policy;
mod reassembly;
mod resolver;
mod rule;
mod sys;
mod table;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod wire;

pub use error::{OpenError, OptionError};
pub use frame::{FrameBuffer, GuestFrame, PartialChecksum, WrittenFrame};
pub use network::{ForwardedPort, Refusal, UserNetwork};
pub use options::{DnsName, Forward, Protocol, Subnet, UserNetworkOptions};
pub use rule::Rule;
