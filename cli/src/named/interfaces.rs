//! `bantam domiflist`, `domifaddr` and `ssh`: the network devices of a machine, and where it can be reached.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, bail};
use bantam_manager::MachineName;
use bantam_network::Networks;
use bantam_vmm::Protocol;
use bantam_vmm::config::{DeviceName, Forward, HostNetwork, MacAddress, NetConfig};
use serde_json::{Value, json};

use super::args::{Output, OutputArgs, SshArgs};
use super::info::present_config;
use super::{machine, print, print_json, table};

/// The port on which a guest takes logins.
const SSH_PORT: u16 = 22;
/// The kernel's table of neighbours (proc(5)).
const NEIGHBOURS: &str = "/proc/net/arp";

/// A network device of a machine.
struct Interface {
    name: DeviceName,
    net: NetConfig,
    mac: MacAddress,
}

fn interfaces(name: &MachineName) -> anyhow::Result<Vec<Interface>> {
    let config = present_config(&machine(name)?)?;
    let named = config.net_names().zip(&config.nets).enumerate();
    let interfaces = named.map(|(place, (name, net))| Interface {
        name,
        net: net.clone(),
        mac: net.mac_address(place),
    });
    Ok(interfaces.collect())
}

/// Returns what a device is connected to, as virsh calls it, and the name of that.
pub fn connection(net: &NetConfig) -> (&'static str, Option<String>) {
    match net.host_network() {
        Some(HostNetwork::Network(name)) => ("network", Some(name.to_string())),
        Some(HostNetwork::Bridge(name)) => ("bridge", Some(name)),
        Some(HostNetwork::Beside(name)) => ("direct", Some(name)),
        None if net.user => ("user", None),
        None => match (&net.tap, &net.passt) {
            (Some(tap), _) => ("ethernet", Some(tap.to_string())),
            (None, Some(socket)) => ("passt", Some(socket.display().to_string())),
            (None, None) => ("ethernet", None),
        },
    }
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}

pub fn list(args: &OutputArgs) -> anyhow::Result<()> {
    let interfaces = interfaces(&args.name)?;
    if args.output == Output::Json {
        let interfaces = interfaces.iter().map(|it| {
            let (kind, source) = connection(&it.net);
            json!({
                "name": it.name,
                "type": kind,
                "source": source,
                "mac": it.mac.to_string(),
            })
        });
        return print_json(&interfaces.collect::<Vec<Value>>());
    }
    let heading = ["Interface", "Type", "Source", "Model", "MAC"].map(str::to_owned);
    let mut rows = vec![heading.to_vec()];
    rows.extend(interfaces.iter().map(|it| {
        let (kind, source) = connection(&it.net);
        vec![
            it.name.to_string(),
            kind.to_owned(),
            or_dash(source),
            "virtio".to_owned(),
            it.mac.to_string(),
        ]
    }));
    print(&table(&rows))
}

pub fn addresses(args: &OutputArgs) -> anyhow::Result<()> {
    let interfaces = interfaces(&args.name)?;
    let mut found = Vec::new();
    for interface in &interfaces {
        found.extend(
            addresses_of(interface)?
                .into_iter()
                .map(|it| (interface, it)),
        );
    }
    if args.output == Output::Json {
        let found = found.iter().map(|(interface, (address, source))| {
            json!({
                "name": interface.name,
                "mac": interface.mac.to_string(),
                "address": address,
                "source": source,
            })
        });
        return print_json(&found.collect::<Vec<Value>>());
    }
    let heading = ["Name", "MAC address", "Protocol", "Address"].map(str::to_owned);
    let mut rows = vec![heading.to_vec()];
    rows.extend(found.iter().map(|(interface, (address, _))| {
        vec![
            interface.name.to_string(),
            interface.mac.to_string(),
            if address.is_ipv4() { "ipv4" } else { "ipv6" }.to_owned(),
            address.to_string(),
        ]
    }));
    print(&table(&rows))
}

/// Returns the addresses of the guest on a network, and who says so.
fn addresses_of(interface: &Interface) -> anyhow::Result<Vec<(IpAddr, &'static str)>> {
    let net = &interface.net;
    if net.user {
        let subnet = net.subnet.unwrap_or_default();
        return Ok(vec![(subnet.guest().into(), "user")]);
    }
    if let Some(HostNetwork::Network(name)) = net.host_network() {
        let networks = Networks::of_host();
        if networks.definition(&name)?.addresses.is_some() {
            let leases = networks.leases(&name)?.into_iter();
            let own = leases.filter(|lease| lease.mac.to_string() == interface.mac.to_string());
            return Ok(own.map(|lease| (lease.address.into(), "lease")).collect());
        }
    }
    let text = fs::read_to_string(NEIGHBOURS);
    let text = text.with_context(|| format!("cannot read '{NEIGHBOURS}'"))?;
    let neighbours = neighbours(&text, &interface.mac.to_string());
    Ok(neighbours
        .into_iter()
        .map(|it| (it.into(), "arp"))
        .collect())
}

/// Returns the addresses that the host has found out to be those of `mac`.
fn neighbours(table: &str, mac: &str) -> Vec<Ipv4Addr> {
    let lines = table.lines().skip(1);
    let found = lines.filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next()?.parse().ok()?;
        let found = words.nth(2)?;
        found.eq_ignore_ascii_case(mac).then_some(address)
    });
    found.collect()
}

/// Returns where the guest takes logins: an address and a port.
fn login(interfaces: &[Interface]) -> anyhow::Result<Option<SocketAddr>> {
    for interface in interfaces {
        if interface.net.user {
            let forwards = interface.net.forward.iter();
            let ports = forwards
                .filter(|forward| forward.protocol() == Protocol::Tcp)
                .flat_map(Forward::ports);
            if let Some((mut host, _)) = ports.into_iter().find(|(_, guest)| *guest == SSH_PORT) {
                if host.ip().is_unspecified() {
                    host.set_ip(Ipv4Addr::LOCALHOST.into());
                }
                return Ok(Some(host));
            }
        } else if let Some((address, _)) = addresses_of(interface)?.first() {
            return Ok(Some(SocketAddr::new(*address, SSH_PORT)));
        }
    }
    Ok(None)
}

pub fn ssh(args: &SshArgs) -> anyhow::Result<()> {
    let (user, name) = match args.target.rsplit_once('@') {
        Some((user, name)) => (Some(user), name),
        None => (None, args.target.as_str()),
    };
    let name = name.parse()?;
    let interfaces = interfaces(&name)?;
    let Some(login) = login(&interfaces)? else {
        if interfaces.iter().any(|it| it.net.user) {
            bail!(
                "nothing leads to port {SSH_PORT} of machine '{name}'; give its network a forward, as in \
                 user,forward=tcp:2222:22"
            );
        }
        bail!(
            "machine '{name}' has no address that the host knows of; `bantam domifaddr {name}` shows those that it has"
        );
    };
    let mut command = Command::new("ssh");
    command.arg("-p").arg(login.port().to_string());
    if let Some(user) = user {
        command.arg("-l").arg(user);
    }
    // Host keys belong to the machine: its address or port can be another's tomorrow.
    command.arg("-o").arg(format!("HostKeyAlias=bantam-{name}"));
    command.arg(login.ip().to_string()).args(&args.arguments);
    let error = command.exec();
    Err(error).context("cannot start ssh; install it (the package openssh-client)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_found_by_their_mac_address() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            192.168.1.7      0x1         0x2         02:aa:bb:CC:dd:ee     *        br0\n\
            192.168.1.8      0x1         0x0         00:00:00:00:00:00     *        br0\n\
            damaged\n";
        assert_eq!(
            neighbours(table, "02:AA:bb:cc:dd:ee"),
            [Ipv4Addr::new(192, 168, 1, 7)]
        );
        assert!(neighbours(table, "02:00:00:00:00:01").is_empty());
        assert!(neighbours("", "02:00:00:00:00:01").is_empty());
    }
}
