//! Where a machine moves, and where it is received, as the command line says it.

use std::ffi::OsStr;
use std::fmt;

use bantam_vmm::MigrationAddress;

/// Where a machine moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Someone receives it there.
    Address(MigrationAddress),
    /// Someone receives it there, behind TLS.
    Tls(TlsPlace),
    /// A command on another host that this one starts by ssh.
    Ssh(SshHost),
}

/// A host that ssh reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshHost {
    /// Its name, after the name of the user and an `@` if there is one.
    pub host: String,
    /// Another port than the usual one.
    pub port: Option<u16>,
}

/// Where a machine is received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReceivingEnd {
    /// Connections are waited for there.
    Address(MigrationAddress),
    /// Connections are waited for there, behind TLS.
    Tls(TlsPlace),
    /// Standard input and output are the connection.
    Stdio,
}

/// A port at which TLS is spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPlace {
    /// The name or the address of the host.
    pub host: String,
    /// The port.
    pub port: u16,
}

impl Destination {
    /// Reads a destination.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &OsStr) -> Result<Destination, String> {
        if let Some(place) = TlsPlace::of(text) {
            return place.map(Destination::Tls);
        }
        let host = text.to_str().and_then(|text| text.strip_prefix("ssh://"));
        match host {
            Some(host) => SshHost::parse(host).map(Destination::Ssh),
            None => match MigrationAddress::parse(text) {
                Ok(address) => Ok(Destination::Address(address)),
                Err(reason) => Err(format!(
                    "{reason}, tls://HOST:PORT or ssh://[USER@]HOST[:PORT]"
                )),
            },
        }
    }
}

impl TlsPlace {
    /// Reads `tls://HOST:PORT`; `None` if it does not begin like that.
    fn of(text: &OsStr) -> Option<Result<TlsPlace, String>> {
        let place = text.to_str()?.strip_prefix("tls://")?;
        let read = place.rsplit_once(':').and_then(|(host, port)| {
            // An IPv6 address is in brackets.
            let host = host
                .strip_prefix('[')
                .map_or(Some(host), |it| it.strip_suffix(']'))?;
            let port = port.parse().ok()?;
            (!host.is_empty()).then(|| TlsPlace {
                host: host.to_owned(),
                port,
            })
        });
        Some(read.ok_or_else(|| "it must be tls://HOST:PORT".to_owned()))
    }
}

impl SshHost {
    /// Reads `[USER@]HOST[:PORT]`.
    ///
    /// # Errors
    /// If it is no host.
    pub fn parse(text: &str) -> Result<SshHost, String> {
        let text = text.strip_suffix('/').unwrap_or(text);
        // An IPv6 address is in brackets, which ssh does not take.
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => {
                let number = port.parse::<u16>().ok().filter(|&number| number > 0);
                let number = number.ok_or_else(|| format!("'{port}' is not a port"))?;
                (host, Some(number))
            }
            _ => (text, None),
        };
        let host = host.replace(['[', ']'], "");
        let is_name = |it: char| !it.is_whitespace() && !it.is_control() && it != '/';
        // ssh would take it for an option.
        let name = host.rsplit('@').next().unwrap_or_default();
        match !name.is_empty() && !host.starts_with('-') && host.chars().all(is_name) {
            true => Ok(SshHost { host, port }),
            false => Err(format!("'{text}' is not [USER@]HOST[:PORT]")),
        }
    }
}

impl ReceivingEnd {
    /// Reads where a machine is received.
    ///
    /// # Errors
    /// If it is no such place.
    pub fn parse(text: &OsStr) -> Result<ReceivingEnd, String> {
        if let Some(place) = TlsPlace::of(text) {
            return place.map(ReceivingEnd::Tls);
        }
        match text == "stdio" {
            true => Ok(ReceivingEnd::Stdio),
            false => match MigrationAddress::parse(text) {
                Ok(address) => Ok(ReceivingEnd::Address(address)),
                Err(reason) => Err(format!("{reason}, tls://HOST:PORT or stdio")),
            },
        }
    }
}

impl fmt::Display for TlsPlace {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(formatter, "tls://[{}]:{}", self.host, self.port),
            false => write!(formatter, "tls://{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Display for SshHost {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.host)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_host_of_ssh_is_no_option_of_ssh() {
        let parse = |text: &str| Destination::parse(text.as_ref());
        for (text, host, port) in [
            ("ssh://host", "host", None),
            ("ssh://root@host:2222", "root@host", Some(2222)),
            ("ssh://host/", "host", None),
            ("ssh://u@[::1]:22", "u@::1", Some(22)),
            ("ssh://[::1]", "::1", None),
        ] {
            let host = host.to_owned();
            assert_eq!(parse(text), Ok(Destination::Ssh(SshHost { host, port })));
        }
        for text in [
            "ssh://",
            "ssh://-oProxyCommand=x",
            "ssh://u@",
            "ssh://h:0",
            "ssh://h:x",
            "ssh://a b",
            "ssh://h/path",
            "host",
        ] {
            parse(text).unwrap_err();
        }
        assert!(matches!(parse("unix:x"), Ok(Destination::Address(_))));
        assert!(parse("x").unwrap_err().contains("ssh://"));
        assert_eq!(
            ReceivingEnd::parse("stdio".as_ref()),
            Ok(ReceivingEnd::Stdio)
        );
        ReceivingEnd::parse("ssh://h".as_ref()).unwrap_err();
    }

    #[test]
    fn a_place_behind_tls_is_a_host_and_a_port() {
        let parse = |text: &str| Destination::parse(text.as_ref());
        for (text, host) in [("tls://h:1", "h"), ("tls://[::1]:1", "::1")] {
            let place = TlsPlace {
                host: host.to_owned(),
                port: 1,
            };
            assert_eq!(place.to_string(), text);
            assert_eq!(parse(text), Ok(Destination::Tls(place.clone())));
            let end = ReceivingEnd::parse(text.as_ref());
            assert_eq!(end, Ok(ReceivingEnd::Tls(place)));
        }
        for text in ["tls://", "tls://h", "tls://:1", "tls://h:x", "tls://[::1:1"] {
            assert!(parse(text).unwrap_err().contains("tls://HOST:PORT"));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_place_behind_tls_or_refused(text in "\\PC{0,20}") {
            let text = format!("tls://{text}");
            if let Ok(Destination::Tls(place)) = Destination::parse(text.as_ref()) {
                prop_assert!(!place.host.is_empty());
            }
        }

        #[test]
        fn any_text_is_a_host_or_refused(text in "\\PC{0,20}") {
            if let Ok(host) = SshHost::parse(&text) {
                prop_assert!(!host.host.starts_with('-') && !host.host.contains(' '));
            }
        }
    }
}
