//! Addresses at which a machine is received.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Connection, MigrationError};

/// How long a host may take to answer a connection.
const CONNECT_TIME: Duration = Duration::from_secs(10);

/// Where a machine is received: `unix:PATH` or `tcp://HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Address {
    /// A Unix socket at this path.
    Unix(PathBuf),
    /// A TCP port: the name or address of its host, a colon and its number.
    Tcp(String),
}

impl Address {
    /// Reads an address.
    ///
    /// # Errors
    /// If it has neither of the forms.
    pub fn parse(text: &OsStr) -> Result<Address, String> {
        const FORMS: &str = "it must be unix:PATH or tcp://HOST:PORT";
        let bytes = text.as_bytes();
        if let Some(path) = bytes.strip_prefix(b"unix:") {
            // As a URI it would be unix:///PATH.
            let path = path.strip_prefix(b"//").unwrap_or(path);
            if path.is_empty() {
                return Err("the path of the socket is missing".to_owned());
            }
            return Ok(Address::Unix(OsString::from_vec(path.to_vec()).into()));
        }
        let text = text.to_str().ok_or(FORMS)?;
        let place = text.strip_prefix("tcp://").ok_or(FORMS)?;
        let (host, port) = place.rsplit_once(':').ok_or(FORMS)?;
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(FORMS.to_owned());
        }
        Ok(Address::Tcp(place.to_owned()))
    }

    /// Returns whether the name of a host is to be looked up before there can be a connection.
    pub fn names_a_host(&self) -> bool {
        match self {
            Address::Unix(_) => false,
            Address::Tcp(place) => place.parse::<SocketAddr>().is_err(),
        }
    }

    /// Returns the same place without the name of a host: the first address of that host takes its place.
    ///
    /// # Errors
    /// If the host is not known.
    pub fn looked_up(&self) -> Result<Address, MigrationError> {
        let Address::Tcp(place) = self else {
            return Ok(self.clone());
        };
        let first = place
            .to_socket_addrs()
            .and_then(|mut addresses| addresses.next().ok_or_else(no_address));
        match first {
            Ok(address) => Ok(Address::Tcp(address.to_string())),
            Err(source) => Err(MigrationError::Connect {
                address: self.clone(),
                source,
            }),
        }
    }

    /// Returns whether nobody on a network can read what is sent there, or receive there: it is a Unix socket, or
    /// all addresses of the host are loopback addresses.
    pub fn is_local(&self) -> bool {
        match self {
            Address::Unix(_) => true,
            Address::Tcp(place) => place.to_socket_addrs().is_ok_and(|addresses| {
                let mut addresses = addresses.peekable();
                addresses.peek().is_some() && addresses.all(|it| it.ip().is_loopback())
            }),
        }
    }

    /// Connects to whoever receives there.
    ///
    /// # Errors
    /// If nobody does.
    pub fn connect(&self) -> Result<Connection, MigrationError> {
        let connected = match self {
            Address::Unix(path) => UnixStream::connect(path).map(Connection::new),
            Address::Tcp(place) => connect_tcp(place).map(Connection::new),
        };
        connected
            .and_then(|it| it)
            .map_err(|source| MigrationError::Connect {
                address: self.clone(),
                source,
            })
    }
}

fn connect_tcp(place: &str) -> io::Result<TcpStream> {
    let mut failed = no_address();
    for address in place.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_TIME) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

fn no_address() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the host has no address")
}

impl fmt::Display for Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(formatter, "unix:{}", path.display()),
            Address::Tcp(place) => write!(formatter, "tcp://{place}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_of_two_forms() {
        let parse = |text: &str| Address::parse(text.as_ref());
        assert_eq!(parse("unix:a b"), Ok(Address::Unix("a b".into())));
        assert_eq!(parse("unix:///run/x"), Ok(Address::Unix("/run/x".into())));
        let tcp = parse("tcp://[::1]:4000").unwrap();
        assert_eq!(tcp, Address::Tcp("[::1]:4000".to_owned()));
        assert_eq!(tcp.to_string(), "tcp://[::1]:4000");
        for text in [
            "",
            "unix:",
            "tcp://",
            "tcp://host",
            "tcp://:1",
            "tcp://h:99999",
            "host:1",
        ] {
            parse(text).unwrap_err();
        }
        let bytes = OsStr::from_bytes(b"unix:\xe9");
        assert!(matches!(Address::parse(bytes), Ok(Address::Unix(_))));
    }

    #[test]
    fn a_name_of_a_host_is_looked_up() {
        let address = |text: &str| Address::parse(text.as_ref()).unwrap();
        for text in ["unix:localhost", "tcp://127.0.0.1:1", "tcp://[::1]:1"] {
            let address = address(text);
            assert!(!address.names_a_host(), "{text}");
            assert_eq!(address.looked_up().unwrap(), address);
        }
        let named = address("tcp://localhost:4000");
        assert!(named.names_a_host());
        let found = named.looked_up().unwrap();
        assert!(!found.names_a_host());
        assert!(found.is_local(), "{found}");
    }

    #[test]
    fn only_loopback_addresses_are_local() {
        for (text, expected) in [
            ("unix:x", true),
            ("tcp://127.0.0.1:1", true),
            ("tcp://[::1]:1", true),
            ("tcp://0.0.0.0:1", false),
            ("tcp://192.0.2.1:1", false),
        ] {
            assert_eq!(
                Address::parse(text.as_ref()).unwrap().is_local(),
                expected,
                "{text}"
            );
        }
    }
}
