//! `bantam network`: networks of the host for machines.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use bantam_network::{
    Definition, GroupName, Lease, Mode, NetworkInfo, NetworkName, Networks, NewNetwork, Started,
    Subnet, Subnet6,
};
use clap::{Subcommand, ValueEnum};
use nix::unistd::setsid;
use serde::Serialize;
use tracing::level_filters::LevelFilter;

use crate::local_time::local_time;
use crate::message::say;
use crate::raise_descriptor_limit;

// The options of `bantam network`.
#[derive(Debug, clap::Args)]
pub struct NetworkArgs {
    #[command(subcommand)]
    command: NetworkCommand,
}

impl NetworkArgs {
    /// Returns up to which level lines are logged. Those of a broker would fill a file if its users wanted that.
    pub fn log_level(&self) -> LevelFilter {
        match self.command {
            NetworkCommand::Broker { .. } => LevelFilter::OFF,
            _ => LevelFilter::WARN,
        }
    }
}

#[derive(Debug, Subcommand)]
enum NetworkCommand {
    /// Defines a network, which is then started by `start`
    Define(DefineArgs),
    /// Starts a network, or all that are to be started with the host
    ///
    /// One that is started gets back what other programs have removed: its rules in the packet filter, its
    /// server of addresses and names.
    Start {
        /// The network
        #[arg(required_unless_present = "autostart")]
        name: Option<NetworkName>,
        /// Start all networks that are to be started with the host
        #[arg(long, conflicts_with = "name")]
        autostart: bool,
    },
    /// Stops a network; machines on it are cut off until it is started again
    Stop {
        /// The network
        name: NetworkName,
    },
    /// Lists all networks
    List {
        /// Form of the output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Shows a network, the machines on it, and what is in its way
    Info {
        /// The network
        name: NetworkName,
        /// Form of the output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
    /// Removes the definition of a network that is stopped
    Undefine {
        /// The network
        name: NetworkName,
    },
    /// Has a network started with the host, and when a machine needs it
    Autostart {
        /// The network
        name: NetworkName,
        /// Have it started by `start` only
        #[arg(long)]
        disable: bool,
    },
    /// Lets the members of a group use a network without root
    ///
    /// It takes effect at once. Machines that are on the network already stay.
    Group {
        /// The network
        name: NetworkName,
        /// The group of users
        #[arg(required_unless_present = "none")]
        group: Option<GroupName>,
        /// Keep the network for root
        #[arg(long, conflicts_with = "group")]
        none: bool,
    },
    /// Gives users places on a network; 'start' runs it
    #[command(hide = true)]
    Broker {
        /// The folder of the network that is started
        folder: PathBuf,
    },
    /// Lists the addresses that the DHCP server of a network has given away
    Leases {
        /// The network
        name: NetworkName,
        /// Form of the output
        #[arg(long, value_enum, default_value_t)]
        output: Output,
    },
}

#[derive(Debug, clap::Args)]
struct DefineArgs {
    /// Its name
    name: NetworkName,

    /// How its machines reach others
    ///
    /// - nat: each other, the host, and what the host reaches.
    /// - hostonly: each other and the host.
    /// - bridged: what is on a bridge that the host has already.
    #[arg(long, value_enum, default_value = "nat", verbatim_doc_comment)]
    mode: ModeOption,

    /// Name of the bridge; by default bantam0, bantam1, ...
    #[arg(long, value_name = "NAME")]
    bridge: Option<String>,

    /// Its IPv4 addresses, such as 192.168.130.0/24; by default free ones
    #[arg(long, value_name = "ADDRESS/BITS")]
    subnet: Option<Subnet>,

    /// Its IPv6 addresses, such as fd12:3456:789a:1::/64; by default random ones
    #[arg(long, value_name = "ADDRESS/64")]
    subnet6: Option<Subnet6>,

    /// Leave out IPv6
    #[arg(long, conflicts_with = "subnet6")]
    no_ipv6: bool,

    /// Domain of its machines; by default NAME.internal
    #[arg(long)]
    domain: Option<String>,

    /// Keep its machines from each other: they reach the host, and what it leads to
    #[arg(long)]
    isolate_ports: bool,

    /// Let machines send under any address
    #[arg(long)]
    no_filter: bool,

    /// Have it started with the host, and when a machine needs it
    #[arg(long)]
    autostart: bool,

    /// Let the members of a group use it without root
    #[arg(long)]
    group: Option<GroupName>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ModeOption {
    Nat,
    Hostonly,
    Bridged,
}

/// How something is printed.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum Output {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// Executes `bantam network`.
pub fn run(args: NetworkArgs) -> anyhow::Result<()> {
    let networks = Networks::of_host();
    match args.command {
        NetworkCommand::Define(args) => define(&networks, args),
        NetworkCommand::Start { name, .. } => match name {
            Some(name) => {
                say_started(&networks.start(&name)?);
                Ok(())
            }
            None => start_all(&networks),
        },
        NetworkCommand::Stop { name } => {
            let machines = networks.stop(&name)?;
            if machines > 0 {
                let are = if machines == 1 {
                    "machine is"
                } else {
                    "machines are"
                };
                say(format_args!(
                    "network '{name}': {machines} {are} cut off until it is started again"
                ));
            }
            Ok(())
        }
        NetworkCommand::List { output } => {
            let list = networks.list()?;
            print(&list, output, || list_text(&list))
        }
        NetworkCommand::Info { name, output } => {
            let info = networks.info(&name)?;
            print(&info, output, || info_text(&info))
        }
        NetworkCommand::Undefine { name } => Ok(networks.undefine(&name)?),
        NetworkCommand::Autostart { name, disable } => Ok(networks.set_autostart(&name, !disable)?),
        NetworkCommand::Group { name, group, .. } => Ok(networks.set_group(&name, group)?),
        NetworkCommand::Broker { folder } => broker(&folder),
        NetworkCommand::Leases { name, output } => {
            let leases = networks.leases(&name)?;
            print(&leases, output, || leases_text(&leases))
        }
    }
}

fn define(networks: &Networks, args: DefineArgs) -> anyhow::Result<()> {
    let mode = match args.mode {
        ModeOption::Nat => Mode::Nat,
        ModeOption::Hostonly => Mode::HostOnly,
        ModeOption::Bridged => Mode::Bridged,
    };
    let definition = networks.define(&NewNetwork {
        bridge: args.bridge,
        subnet: args.subnet,
        subnet6: args.subnet6,
        ipv6: !args.no_ipv6,
        domain: args.domain,
        isolate_ports: args.isolate_ports,
        filter: !args.no_filter,
        autostart: args.autostart,
        group: args.group,
        ..NewNetwork::new(args.name, mode)
    })?;
    say(format_args!(
        "network '{}': {}",
        definition.name,
        place(&definition)
    ));
    Ok(())
}

/// Gives users places on a network, until this process is ended. Standard input is the socket that they connect to, and
/// standard output is told when it is served.
fn broker(folder: &Path) -> anyhow::Result<()> {
    // It goes on when the session of the command that has started it ends.
    let _ = setsid();
    raise_descriptor_limit();
    let listener = io::stdin().as_fd().try_clone_to_owned()?;
    io::stdout().write_all(b"\n")?;
    io::stdout().flush()?;
    match bantam_vmm::serve_network_places(folder, listener)? {}
}

/// Starts the networks that are to be started with the host, all of them even if one fails.
fn start_all(networks: &Networks) -> anyhow::Result<()> {
    let mut failures = Vec::new();
    for (name, started) in networks.start_all()? {
        match started {
            Ok(started) => say_started(&started),
            Err(error) => failures.push(format!("network '{name}': {error}")),
        }
    }
    match failures.is_empty() {
        true => Ok(()),
        false => bail!("{}", failures.join("; ")),
    }
}

fn say_started(started: &Started) {
    let name = &started.definition.name;
    for warning in &started.warnings {
        say(format_args!("warning: {warning}"));
    }
    if started.returned > 0 {
        let are = if started.returned == 1 {
            "machine is"
        } else {
            "machines are"
        };
        say(format_args!(
            "network '{name}': {} {are} on it again",
            started.returned
        ));
    }
}

fn print(
    value: &impl Serialize,
    output: Output,
    text: impl FnOnce() -> String,
) -> anyhow::Result<()> {
    let text = match output {
        Output::Text => text(),
        Output::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
    };
    let mut stdout = io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    written.context("cannot write to standard output")
}

/// Returns where a network is: its bridge and its addresses.
fn place(definition: &Definition) -> String {
    let addresses = definition.addresses.as_ref();
    let addresses = addresses.map(|it| format!(", {}", it.subnet));
    format!(
        "{} on bridge {}{}",
        definition.mode,
        definition.bridge,
        addresses.unwrap_or_default()
    )
}

fn yes_or_no(is_so: bool) -> &'static str {
    if is_so { "yes" } else { "no" }
}

fn list_text(list: &[NetworkInfo]) -> String {
    let mut rows = vec![
        [
            "NAME",
            "STATE",
            "MODE",
            "BRIDGE",
            "SUBNET",
            "AUTOSTART",
            "MACHINES",
        ]
        .map(str::to_owned),
    ];
    rows.extend(list.iter().map(|info| {
        let definition = &info.definition;
        let subnet = definition
            .addresses
            .as_ref()
            .map(|it| it.subnet.to_string());
        [
            definition.name.to_string(),
            if info.is_started {
                "started"
            } else {
                "stopped"
            }
            .to_owned(),
            definition.mode.to_string(),
            definition.bridge.clone(),
            subnet.unwrap_or_else(|| "-".to_owned()),
            yes_or_no(definition.autostart).to_owned(),
            info.ports.len().to_string(),
        ]
    }));
    table(&rows)
}

fn leases_text(leases: &[Lease]) -> String {
    let mut rows = vec![["EXPIRES", "MAC", "ADDRESS", "NAME"].map(str::to_owned)];
    rows.extend(leases.iter().map(|lease| {
        [
            local_time(lease.expires),
            lease.mac.to_string(),
            lease.address.to_string(),
            lease.hostname.clone().unwrap_or_else(|| "-".to_owned()),
        ]
    }));
    table(&rows)
}

fn info_text(info: &NetworkInfo) -> String {
    let definition = &info.definition;
    let mut lines = vec![
        format!("name: {}", definition.name),
        format!(
            "state: {}",
            if info.is_started {
                "started"
            } else {
                "stopped"
            }
        ),
        format!("mode: {}", definition.mode),
        format!("bridge: {}", definition.bridge),
    ];
    if let Some(addresses) = &definition.addresses {
        lines.push(format!("subnet: {}", addresses.subnet));
        lines.push(format!("gateway: {}", addresses.subnet.gateway()));
        if let Some(subnet6) = addresses.subnet6 {
            lines.push(format!("IPv6 subnet: {subnet6}"));
        }
        lines.push(format!("domain: {}", addresses.domain));
    }
    for (key, value) in [
        ("autostart", definition.autostart),
        ("filter", definition.filter),
        ("isolate ports", definition.isolate_ports),
    ] {
        lines.push(format!("{key}: {}", yes_or_no(value)));
    }
    if let Some(group) = &definition.group {
        lines.push(format!("group: {group}"));
    }
    for port in &info.ports {
        let address = port.address.map(|address| format!(", {address}"));
        let hostname = port.hostname.as_ref().map(|name| format!(", {name}"));
        lines.push(format!(
            "machine: process {} of {} on {}, {}{}{}",
            port.pid,
            user_name(port.uid),
            port.interface,
            port.mac,
            address.unwrap_or_default(),
            hostname.unwrap_or_default()
        ));
    }
    lines.extend(
        info.warnings
            .iter()
            .map(|warning| format!("warning: {warning}")),
    );
    lines.push(String::new());
    lines.join("\n")
}

fn user_name(uid: u32) -> String {
    match bantam_network::accounts::user(uid) {
        Some(user) => user.name,
        None => format!("user {uid}"),
    }
}

/// Formats rows with columns of equal width.
fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = cells.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let rows = [["A", "LONG"], ["wide", "b"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A     LONG\nwide  b\n");
    }
}
