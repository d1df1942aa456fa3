//! The addresses that a network's DHCP server has given away.

use std::net::Ipv4Addr;
use std::path::Path;

use serde::Serialize;

use crate::{Mac, NetworkError};

/// An address that a machine has for a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Lease {
    /// When it ends, in seconds since 1970.
    pub expires: u64,
    /// The machine's MAC address.
    pub mac: Mac,
    /// The address.
    pub address: Ipv4Addr,
    /// What the machine is called, if it has a name.
    pub hostname: Option<String>,
}

/// Reads the leases in dnsmasq's file at `path`; none if there is no such file.
///
/// # Errors
/// If it cannot be read.
pub(crate) fn read(path: &Path) -> Result<Vec<Lease>, NetworkError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().filter_map(lease).collect()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(NetworkError::file("read", path)(error)),
    }
}

/// Reads a line: end, MAC address, address, name or `*`, client identifier. Lines of DHCPv6 are others.
fn lease(line: &str) -> Option<Lease> {
    let mut fields = line.split(' ');
    let mut field = || fields.next();
    let expires = field()?.parse().ok()?;
    let mac = field()?.parse().ok()?;
    let address = field()?.parse().ok()?;
    let hostname = Some(field()?.to_owned()).filter(|name| name != "*");
    Some(Lease {
        expires,
        mac,
        address,
        hostname,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_of_dhcp_are_leases() {
        let read = |line| lease(line).map(|lease| (lease.address.to_string(), lease.hostname));
        let line = "1796022000 02:11:22:33:44:55 192.168.130.7 web 01:02:11:22:33:44:55";
        assert_eq!(
            read(line),
            Some(("192.168.130.7".to_owned(), Some("web".to_owned())))
        );
        let line = "1796022000 02:11:22:33:44:55 192.168.130.7 * *";
        assert_eq!(read(line), Some(("192.168.130.7".to_owned(), None)));
        for line in [
            "",
            "duid 00:01:00:01:31:0a",
            "1796022000 1122867 fd00::7 web 00:01",
            "x 02:11:22:33:44:55 192.168.130.7 *",
        ] {
            assert_eq!(read(line), None, "{line}");
        }
    }

    proptest! {
        #[test]
        fn any_line_is_read_or_skipped(line in "[0-9a-f:. *]{0,80}|.*") {
            let _ = lease(&line);
        }
    }
}
