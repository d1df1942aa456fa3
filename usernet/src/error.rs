//! What can be wrong with a network.

use std::io;
use std::net::SocketAddr;

use crate::options::{Forward, Protocol};
use crate::rule::Rule;

/// Why an option has no meaning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Not a forward.
    #[error(
        "invalid forward '{}': expected [tcp:|udp:][ADDRESS:]PORT:GUESTPORT, such as 8080:80 or \
         udp:0.0.0.0:5000-5009:6000-6009",
        text.escape_debug()
    )]
    Forward {
        /// What was given.
        text: String,
    },
    /// Not a rule.
    #[error(
        "invalid rule '{}': expected TARGET[:PORT[-LAST]], where TARGET is an address, a network such as \
         192.0.2.0/24 or [2001:db8::]/32, a name such as example.org or *.example.org, or *",
        text.escape_debug()
    )]
    Rule {
        /// What was given.
        text: String,
    },
    /// Not a subnet.
    #[error(
        "invalid subnet '{}': expected the first address of a network of unicast IPv4 addresses and 8 to 29 \
         bits, such as 10.0.2.0/24",
        text.escape_debug()
    )]
    Subnet {
        /// What was given.
        text: String,
    },
    /// Not a name of DNS.
    #[error(
        "invalid name '{}': expected letters, digits and hyphens, in parts of up to 63 separated by dots",
        text.escape_debug()
    )]
    DnsName {
        /// What was given.
        text: String,
    },
}

/// Why a network cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A port of the host cannot be opened.
    #[error(
        "cannot forward {protocol} port {address} of the host: {}",
        remedy(address, source)
    )]
    Forward {
        /// The protocol.
        protocol: Protocol,
        /// The address and port of the host.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// There are too many forwards.
    #[error(
        "{count} ports are to be forwarded, but a network forwards at most {}",
        Forward::MAX_PORTS
    )]
    TooManyForwards {
        /// How many ports there are.
        count: usize,
    },
    /// There are too many rules.
    #[error(
        "{count} rules are given, but a network has at most {}",
        Rule::MAX_COUNT
    )]
    TooManyRules {
        /// How many rules there are.
        count: usize,
    },
    /// The host lacks something else.
    #[error("cannot open a network for the guest: {0}")]
    Host(#[from] io::Error),
}

/// Says why a port cannot be opened, and what helps.
fn remedy(address: &SocketAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "another program has it; choose another port, or 0 for any free one".to_owned()
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("{} is not an address of this host", address.ip())
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not open it; choose a port above 1023, or as \
             root lower 'sysctl net.ipv4.ip_unprivileged_port_start'"
                .to_owned()
        }
        _ if error.raw_os_error() == Some(libc::EMFILE) => {
            "too many files are open; 'ulimit -n' raises the limit".to_owned()
        }
        _ => error.to_string(),
    }
}
