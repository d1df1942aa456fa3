//! The name servers of the host.

use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Where the host says what its name servers are (resolv.conf(5)).
pub(crate) const RESOLV_CONF: &str = "/etc/resolv.conf";

/// Most name servers that are used, as in the host's C library.
const MAX_SERVERS: usize = 3;
/// Most bytes of the file that are read.
const MAX_FILE_SIZE: u64 = 64 << 10;

/// The name servers that the guest's queries go to, of which one is used until it does not answer.
pub(crate) struct Resolver {
    /// `None` if the servers are given.
    file: Option<PathBuf>,
    changed: Option<SystemTime>,
    servers: Vec<IpAddr>,
    domain: Option<String>,
    current: usize,
}

impl Resolver {
    /// Uses `servers`, or those that `file` names if there are none.
    pub(crate) fn new(servers: &[IpAddr], file: &Path) -> Resolver {
        let mut resolver = Resolver {
            file: servers.is_empty().then(|| file.to_owned()),
            changed: None,
            servers: servers.to_vec(),
            domain: None,
            current: 0,
        };
        resolver.read_changed();
        resolver
    }

    /// Returns the server for the next query.
    pub(crate) fn server(&mut self) -> IpAddr {
        self.read_changed();
        let index = self.current % self.servers.len().max(1);
        // Without any, a server on the host itself is meant.
        let default = Ipv4Addr::LOCALHOST.into();
        self.servers.get(index).copied().unwrap_or(default)
    }

    /// Takes note that `server` has not answered: the next query goes to another.
    pub(crate) fn give_up(&mut self, server: IpAddr) {
        if self.servers.get(self.current % self.servers.len().max(1)) == Some(&server) {
            self.current = self.current.wrapping_add(1);
        }
    }

    /// Returns the domain in which the host looks names up first.
    pub(crate) fn domain(&mut self) -> Option<&str> {
        self.read_changed();
        self.domain.as_deref()
    }

    /// Reads the file if it has changed. One that cannot be read leaves all as it is.
    fn read_changed(&mut self) {
        let Some(path) = &self.file else {
            return;
        };
        let Ok(changed) = fs::metadata(path).and_then(|metadata| metadata.modified()) else {
            return;
        };
        if self.changed == Some(changed) {
            return;
        }
        let mut text = Vec::new();
        let read = fs::File::open(path).map(|file| file.take(MAX_FILE_SIZE).read_to_end(&mut text));
        if matches!(read, Ok(Ok(_))) {
            let (servers, domain) = parse(&String::from_utf8_lossy(&text));
            self.changed = Some(changed);
            self.servers = servers;
            self.domain = domain;
        }
    }
}

/// Reads the name servers and the first domain of a `resolv.conf`.
fn parse(text: &str) -> (Vec<IpAddr>, Option<String>) {
    let (mut servers, mut domain) = (Vec::new(), None);
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        match (words.next(), words.next()) {
            // An address with a scope, such as fe80::1%eth0, is not understood.
            (Some("nameserver"), Some(address)) => servers.extend(address.parse::<IpAddr>().ok()),
            (Some("domain" | "search"), Some(name)) if name != "." => {
                domain = Some(name.trim_end_matches('.').to_owned());
            }
            _ => {}
        }
    }
    servers.truncate(MAX_SERVERS);
    (servers, domain.filter(|name| name.len() < 254))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use super::*;

    #[test]
    fn servers_and_domain_are_found() {
        let text = "# comment\nnameserver 127.0.0.53\n nameserver\tfd00::1\nnameserver nonsense\n\
                    search example.org other\noptions edns0\nnameserver fe80::1%eth0\n";
        let servers = ["127.0.0.53", "fd00::1"].map(|text| text.parse::<IpAddr>().unwrap());
        assert_eq!(
            parse(text),
            (servers.to_vec(), Some("example.org".to_owned()))
        );
        assert_eq!(parse("search .\n\u{fffd}"), (vec![], None));
    }

    #[test]
    fn a_changed_file_is_read_again() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"nameserver 192.0.2.1\nnameserver 192.0.2.2\n")
            .unwrap();
        let mut resolver = Resolver::new(&[], file.path());
        let address = |last| IpAddr::from([192, 0, 2, last]);
        assert_eq!(resolver.server(), address(1));
        resolver.give_up(address(1));
        // What is said of a server that is not in use does not matter.
        resolver.give_up(address(1));
        assert_eq!(resolver.server(), address(2));
        file.write_all(b"nameserver 192.0.2.3\ndomain a.test\n")
            .unwrap();
        let later = SystemTime::now() + Duration::from_secs(5);
        file.as_file().set_modified(later).unwrap();
        resolver.give_up(address(2));
        assert_eq!(resolver.server(), address(3));
        assert_eq!(resolver.domain(), Some("a.test"));
        file.as_file().set_len(0).unwrap();
        file.as_file()
            .set_modified(later + Duration::from_secs(5))
            .unwrap();
        assert_eq!(resolver.server(), IpAddr::V4(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn given_servers_are_used_in_place_of_the_file() {
        let given = [IpAddr::from([192, 0, 2, 9])];
        let mut resolver = Resolver::new(&given, Path::new(RESOLV_CONF));
        assert_eq!(resolver.server(), given[0]);
        assert_eq!(resolver.domain(), None);
    }
}
