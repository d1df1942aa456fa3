//! The server of addresses and names of a network: dnsmasq, one process each.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};

use crate::definition::{Addresses, Definition, Mode};
use crate::folders::{Folders, create_folder, write_file};
use crate::port::Record;
use crate::program::DNSMASQ;
use crate::servers::Kind;
use crate::{NetworkError, Subnet6};

/// The processes that serve addresses and names.
pub(crate) const SERVERS: Kind = Kind {
    name: "dnsmasq",
    folder: folder_of,
};

/// The file of a server's options, and that of its process, in the folder of its network.
const CONFIGURATION: &str = "dnsmasq.conf";
const PROCESS: &str = "dnsmasq.pid";

/// How long a machine may keep an address without asking again. The address of a machine that runs is reserved for it, so
/// this says how soon that of one that has ended is free for others.
const LEASE_TIME: &str = "5m";
/// How long a machine may use an IPv6 prefix without hearing of it again.
const PREFIX_TIME: &str = "1h";

/// The server of a network that is started.
pub(crate) struct Server<'a> {
    folders: &'a Folders,
    network: &'a str,
}

impl<'a> Server<'a> {
    /// Returns the server of the network called `network`.
    pub(crate) fn of(folders: &'a Folders, network: &'a str) -> Server<'a> {
        Server { folders, network }
    }

    fn folder(&self) -> PathBuf {
        self.folders.network(self.network)
    }

    fn configuration(&self) -> PathBuf {
        self.folder().join(CONFIGURATION)
    }

    /// The folder in which each machine has a file with its reservation of an address.
    fn hosts(&self) -> PathBuf {
        self.folder().join("hosts")
    }

    /// The folder in which each machine has a file with its name.
    fn names(&self) -> PathBuf {
        self.folder().join("names")
    }

    /// Starts the server.
    ///
    /// # Errors
    /// If it is missing, or something else has its ports.
    pub(crate) fn start(
        &self,
        definition: &Definition,
        addresses: &Addresses,
    ) -> Result<(), NetworkError> {
        self.stop()?;
        for folder in [self.hosts(), self.names()] {
            create_folder(&folder)?;
        }
        let path = self.configuration();
        write_file(&path, self.text(definition, addresses).as_bytes())?;
        let action = format!("serve addresses on network '{}'", self.network);
        // It has bound its sockets when the command returns.
        let argument = format!("--conf-file={}", path.display());
        DNSMASQ.run(&action, &[&argument], b"").map(drop)
    }

    fn text(&self, definition: &Definition, addresses: &Addresses) -> String {
        let Addresses {
            subnet,
            subnet6,
            domain,
            ..
        } = addresses;
        let bridge = &definition.bridge;
        let mut lines = vec![
            format!(
                "# Made by Bantam for network '{}'; changes are lost.",
                self.network
            ),
            format!("interface={bridge}"),
            "except-interface=lo".to_owned(),
            "bind-dynamic".to_owned(),
            "no-hosts".to_owned(),
            format!("pid-file={}", self.folder().join(PROCESS).display()),
            format!(
                "dhcp-leasefile={}",
                self.folders.leases(self.network).display()
            ),
            format!("dhcp-hostsdir={}", self.hosts().display()),
            format!("hostsdir={}", self.names().display()),
            format!("domain={domain}"),
            format!("local=/{domain}/"),
            "expand-hosts".to_owned(),
            "domain-needed".to_owned(),
            "bogus-priv".to_owned(),
            "dhcp-authoritative".to_owned(),
            format!(
                "dhcp-range={},{},{},{LEASE_TIME}",
                subnet.machine(0),
                subnet.machine(subnet.machine_count() - 1),
                subnet.mask()
            ),
            format!("dhcp-lease-max={}", subnet.machine_count()),
            // Browsers take their proxy from a machine of this name.
            "dhcp-name-match=set:no-name,wpad".to_owned(),
            "dhcp-ignore-names=tag:no-name".to_owned(),
        ];
        if let Some(subnet6) = subnet6 {
            let (first, bits) = (subnet6.first(), Subnet6::BITS);
            lines.push("enable-ra".to_owned());
            lines.push(format!(
                "dhcp-range={first},ra-stateless,ra-names,{bits},{PREFIX_TIME}"
            ));
        }
        if definition.mode == Mode::HostOnly {
            lines.push("no-resolv".to_owned());
            // No router.
            lines.push("dhcp-option=3".to_owned());
            lines.push(format!("ra-param={bridge},0,0"));
        }
        lines.push(String::new());
        lines.join("\n")
    }

    /// Whether the server runs.
    pub(crate) fn is_running(&self) -> bool {
        SERVERS.running(&self.folder(), PROCESS).is_some()
    }

    /// Reserves the addresses and names of `ports`, and no others.
    ///
    /// # Errors
    /// If a file cannot be changed.
    pub(crate) fn set_ports(&self, ports: &[&Record]) -> Result<(), NetworkError> {
        let mut is_less = false;
        for folder in [self.hosts(), self.names()] {
            create_folder(&folder)?;
            for name in crate::folders::names_in(&folder)? {
                if !ports.iter().any(|port| port.interface == name) {
                    crate::folders::remove_file(&folder.join(&name))?;
                    is_less = true;
                }
            }
        }
        for port in ports {
            let Some(address) = port.address else {
                continue;
            };
            let mut host = format!("{},{address}", port.mac);
            if let Some(name) = &port.hostname {
                let _ = write!(host, ",{name}");
                is_less |= write_if_other(
                    &self.names().join(&port.interface),
                    &format!("{address} {name}\n"),
                )?;
            }
            host.push('\n');
            is_less |= write_if_other(&self.hosts().join(&port.interface), &host)?;
        }
        // The server notices new files by itself, but not that one is gone or says something else.
        if is_less && let Some(pid) = SERVERS.running(&self.folder(), PROCESS) {
            let _ = kill(pid, Signal::SIGHUP);
        }
        Ok(())
    }

    /// Ends the server, if it runs, even if it has not written yet which process it is.
    ///
    /// # Errors
    /// If it does not end.
    pub(crate) fn stop(&self) -> Result<(), NetworkError> {
        SERVERS.stop(self.folders, &self.folder())
    }
}

/// Writes a file if it does not say this yet, and returns whether it said something else.
fn write_if_other(path: &Path, text: &str) -> Result<bool, NetworkError> {
    let found = fs::read_to_string(path).ok();
    if found.as_deref() == Some(text) {
        return Ok(false);
    }
    write_file(path, text.as_bytes())?;
    Ok(found.is_some())
}

/// Returns the folder of the network that a dnsmasq with these arguments serves: that of its configuration file.
fn folder_of(arguments: &[&OsStr]) -> Option<PathBuf> {
    let (program, arguments) = arguments.split_first()?;
    if Path::new(program).file_name()? != DNSMASQ.name {
        return None;
    }
    let mut arguments = arguments.iter().map(|argument| argument.as_bytes());
    let path = arguments.find_map(|argument| argument.strip_prefix(b"--conf-file="))?;
    let path = Path::new(OsStr::from_bytes(path));
    (path.file_name()? == CONFIGURATION).then(|| path.parent().map(Path::to_owned))?
}
