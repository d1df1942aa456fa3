//! Where a machine moves, and where it is received, as the command line says it.

use std::ffi::OsStr;
use std::fmt;

use bantam_vmm::MigrationAddress;

/// Where a machine moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Someone receives it there.
    Address(MigrationAddress),
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
    /// Standard input and output are the connection.
    Stdio,
}

impl Destination {
    /// Reads a destination.
    ///
    /// # Errors
    /// If it is none.
    pub fn parse(text: &OsStr) -> Result<Destination, String> {
        let host = text.to_str().and_then(|text| text.strip_prefix("ssh://"));
        match host {
            Some(host) => SshHost::parse(host).map(Destination::Ssh),
            None => match MigrationAddress::parse(text) {
                Ok(address) => Ok(Destination::Address(address)),
                Err(reason) => Err(format!("{reason}, or ssh://[USER@]HOST[:PORT]")),
            },
        }
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
        match text == "stdio" {
            true => Ok(ReceivingEnd::Stdio),
            false => match MigrationAddress::parse(text) {
                Ok(address) => Ok(ReceivingEnd::Address(address)),
                Err(reason) => Err(format!("{reason}, or stdio")),
            },
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

    proptest! {
        #[test]
        fn any_text_is_a_host_or_refused(text in "\\PC{0,20}") {
            if let Ok(host) = SshHost::parse(&text) {
                prop_assert!(!host.host.starts_with('-') && !host.host.contains(' '));
            }
        }
    }
}
