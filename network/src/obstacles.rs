//! Firewalls of the host that are in the way of a network.
//!
//! A packet has to be accepted by every chain that it passes, so what another program's chain drops cannot be accepted
//! in tables of our own: the rule has to be in that chain. Docker leaves one to administrators, and the chains that
//! `iptables` makes take rules of others: ufw has its own behind these, and leaves the others alone when it loads its rules
//! again. firewalld, whose table is its own, has to be told.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::NetworkError;
use crate::definition::{Addresses, Definition, Mode};
use crate::firewall::{self, Chain};
use crate::program::Program;

const IPTABLES: Program = Program {
    name: "iptables",
    package: "iptables",
};
const IP6TABLES: Program = Program {
    name: "ip6tables",
    package: "iptables",
};
const FIREWALL_CMD: Program = Program {
    name: "firewall-cmd",
    package: "firewalld",
};

/// The table that firewalld makes.
const FIREWALLD_TABLE: &str = "firewalld";
/// Its zone whose interfaces may do everything; rules of our own keep machines in their place.
const FIREWALLD_ZONE: &str = "trusted";

/// What was done to the host's firewalls for a network, so that it can be undone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Measures {
    /// Rules in chains that others have made.
    pub(crate) rules: Vec<Rule>,
    /// Whether the bridge is in a zone of firewalld.
    pub(crate) zone: bool,
}

/// A rule in a chain of `iptables` or `ip6tables`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Rule {
    is_ipv6: bool,
    chain: String,
    matches: Vec<String>,
}

/// Says what has to be done for a network, and what is in the way that the administrator has to see to: one line each.
///
/// # Errors
/// If the host's packet filter cannot be examined.
pub(crate) fn plan(
    definition: &Definition,
    addresses: &Addresses,
) -> Result<(Measures, Vec<String>), NetworkError> {
    Ok(plan_for(definition, addresses, &firewall::chains()?))
}

fn plan_for(
    definition: &Definition,
    addresses: &Addresses,
    chains: &[Chain],
) -> (Measures, Vec<String>) {
    let mut measures = Measures::default();
    let mut warnings = Vec::new();
    measures.zone = chains.iter().any(|chain| chain.table == FIREWALLD_TABLE);
    let families = [("ip", false), ("ip6", true)];
    for (family, is_ipv6) in families {
        if is_ipv6 && addresses.subnet6.is_none() {
            continue;
        }
        let ours: Vec<_> = chains
            .iter()
            .filter(|chain| chain.family == family && chain.table == "filter")
            .collect();
        let has = |name: &str| ours.iter().any(|chain| chain.name == name);
        let drops = |name: &str| ours.iter().any(|chain| chain.name == name && chain.drops);
        let mut add = |chain: &str, rules: Vec<Vec<String>>| {
            measures.rules.extend(rules.into_iter().map(|matches| Rule {
                is_ipv6,
                chain: chain.to_owned(),
                matches,
            }));
        };
        if has("DOCKER-USER") {
            add("DOCKER-USER", forward_rules(definition));
        } else if drops("FORWARD") {
            add("FORWARD", forward_rules(definition));
        }
        if drops("INPUT") {
            add("INPUT", input_rules(definition, is_ipv6));
        }
    }
    for chain in chains {
        let is_iptables = ["ip", "ip6"].contains(&chain.family.as_str()) && chain.table == "filter";
        let is_concerned = match chain.hook.as_str() {
            "forward" => definition.mode == Mode::Nat,
            "input" => true,
            _ => false,
        };
        if !chain.drops
            || !is_concerned
            || is_iptables
            || chain.table == FIREWALLD_TABLE
            || chain.family == "bridge"
        {
            continue;
        }
        let bridge = &definition.bridge;
        let (what, rule) = match chain.hook.as_str() {
            "forward" => (
                "what machines send beyond the host",
                format!(
                    "'iifname {bridge} accept' and 'oifname {bridge} ct state established,related accept'"
                ),
            ),
            _ => (
                "what machines ask DHCP and DNS",
                format!("'iifname {bridge} udp dport {{ 53, 67, 547 }} accept'"),
            ),
        };
        let Chain {
            family,
            table,
            name,
            ..
        } = chain;
        warnings.push(format!(
            "chain '{name}' of table '{family} {table}' drops {what} on network '{}': add {rule} there",
            definition.name
        ));
    }
    (measures, warnings)
}

/// What an administrator would write after the name of the chain.
fn forward_rules(definition: &Definition) -> Vec<Vec<String>> {
    let bridge = definition.bridge.as_str();
    let accept = |words: &[&str]| {
        words
            .iter()
            .chain(&["-j", "ACCEPT"])
            .map(ToString::to_string)
            .collect()
    };
    // Bridged frames pass these chains too, if the host is set so.
    match definition.mode {
        Mode::Nat => vec![
            accept(&["-i", bridge]),
            accept(&[
                "-o",
                bridge,
                "-m",
                "conntrack",
                "--ctstate",
                "RELATED,ESTABLISHED,DNAT",
            ]),
        ],
        Mode::HostOnly | Mode::Bridged => vec![accept(&["-i", bridge, "-o", bridge])],
    }
}

fn input_rules(definition: &Definition, is_ipv6: bool) -> Vec<Vec<String>> {
    let services: &[(&str, &[&str])] = match is_ipv6 {
        false => &[("udp", &["53", "67"]), ("tcp", &["53"])],
        true => &[("udp", &["53", "547"]), ("tcp", &["53"])],
    };
    let mut rules = Vec::new();
    let mut accept = |matches: &[&str]| {
        let words = ["-i", definition.bridge.as_str()]
            .into_iter()
            .chain(matches.iter().copied());
        rules.push(
            words
                .chain(["-j", "ACCEPT"])
                .map(ToOwned::to_owned)
                .collect(),
        );
    };
    for (protocol, ports) in services {
        for port in *ports {
            accept(&["-p", protocol, "--dport", port]);
        }
    }
    if is_ipv6 {
        accept(&["-p", "ipv6-icmp"]);
    }
    rules
}

impl Measures {
    /// Does what is not done yet. Returns what could not be done, one line each.
    pub(crate) fn take(&self, bridge: &str) -> Vec<String> {
        let mut failures = Vec::new();
        if self.zone {
            let zone = format!("--zone={FIREWALLD_ZONE}");
            let interface = format!("--change-interface={bridge}");
            let action = format!("put '{bridge}' into the zone '{FIREWALLD_ZONE}' of firewalld");
            failures.extend(
                FIREWALL_CMD
                    .run(&action, &["--quiet", &zone, &interface], b"")
                    .err(),
            );
        }
        for rule in &self.rules {
            let is_there = rule.change("-C");
            if !matches!(is_there, Ok(true)) {
                failures.extend(rule.insert().err());
            }
        }
        failures.iter().map(ToString::to_string).collect()
    }

    /// Undoes what has been done.
    pub(crate) fn undo(&self, bridge: &str) {
        if self.zone {
            let zone = format!("--zone={FIREWALLD_ZONE}");
            let interface = format!("--remove-interface={bridge}");
            // It fails if firewalld has been ended, and then there is nothing to undo.
            let _ = FIREWALL_CMD.try_run(
                "leave a zone of firewalld",
                &["--quiet", &zone, &interface],
                b"",
            );
        }
        for rule in &self.rules {
            // It fails if somebody has removed the rule or its chain.
            let _ = rule.change("-D");
        }
    }
}

impl Rule {
    fn program(&self) -> Program {
        match self.is_ipv6 {
            true => IP6TABLES,
            false => IPTABLES,
        }
    }

    fn arguments<'a>(&'a self, command: &'a str) -> Vec<&'a str> {
        let fixed = ["-w", "5", command, &self.chain];
        fixed
            .into_iter()
            .chain(self.matches.iter().map(String::as_str))
            .collect()
    }

    fn insert(&self) -> Result<(), NetworkError> {
        let action = format!("add a rule to the chain {}", self.chain);
        self.program()
            .run(&action, &self.arguments("-I"), b"")
            .map(drop)
    }

    /// Executes `command` for the rule, and returns whether it succeeds.
    fn change(&self, command: &str) -> Result<bool, NetworkError> {
        let output = self
            .program()
            .try_run("change a chain", &self.arguments(command), b"")?;
        Ok(output.status.success())
    }
}

/// Returns what can be said about firewalls that `nft` does not show.
pub(crate) fn legacy_warning(definition: &Definition) -> Option<String> {
    let tables = fs::read_to_string("/proc/thread-self/net/ip_tables_names").ok()?;
    let has_filter = tables.lines().any(|table| table == "filter");
    (has_filter && definition.mode == Mode::Nat).then(|| {
        format!(
            "the host has rules of iptables-legacy; if machines on network '{}' reach nothing beyond the host, \
             'iptables-legacy -S FORWARD' shows whether these are in the way",
            definition.name
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::NetworkName;

    fn definition(mode: Mode) -> (Definition, Addresses) {
        let addresses = Addresses {
            subnet: "192.168.130.0/24".parse().unwrap(),
            is_chosen: true,
            subnet6: None,
            mac: crate::Mac([2, 0, 0, 0, 0, 1]),
            domain: "default.internal".to_owned(),
        };
        let definition = Definition {
            name: NetworkName::nat(),
            mode,
            bridge: "bantam0".to_owned(),
            addresses: Some(addresses.clone()),
            isolate_ports: false,
            filter: true,
            autostart: true,
            group: None,
        };
        (definition, addresses)
    }

    fn chain(family: &str, table: &str, name: &str, hook: &str, drops: bool) -> Chain {
        Chain {
            family: family.to_owned(),
            table: table.to_owned(),
            name: name.to_owned(),
            hook: hook.to_owned(),
            drops,
        }
    }

    fn plan(mode: Mode, chains: &[Chain]) -> (Vec<String>, Vec<String>, bool) {
        let (definition, addresses) = definition(mode);
        let (measures, warnings) = plan_for(&definition, &addresses, chains);
        let rules = measures.rules.iter();
        let rules = rules
            .map(|rule| rule.arguments("-I")[3..].join(" "))
            .collect();
        (rules, warnings, measures.zone)
    }

    #[test]
    fn an_open_host_needs_nothing() {
        let chains = [chain("ip", "filter", "FORWARD", "forward", false)];
        assert_eq!(plan(Mode::Nat, &chains), (vec![], vec![], false));
    }

    #[test]
    fn docker_has_a_chain_for_others() {
        let chains = [
            chain("ip", "filter", "FORWARD", "forward", true),
            chain("ip", "filter", "DOCKER-USER", "", false),
        ];
        let (rules, warnings, _) = plan(Mode::Nat, &chains);
        assert_eq!(
            rules,
            [
                "DOCKER-USER -i bantam0 -j ACCEPT",
                "DOCKER-USER -o bantam0 -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT"
            ]
        );
        assert!(warnings.is_empty());
        let (rules, _, _) = plan(Mode::HostOnly, &chains);
        assert_eq!(rules, ["DOCKER-USER -i bantam0 -o bantam0 -j ACCEPT"]);
    }

    #[test]
    fn chains_of_iptables_take_rules() {
        let chains = [
            chain("ip", "filter", "FORWARD", "forward", true),
            chain("ip", "filter", "INPUT", "input", true),
        ];
        let (rules, _, _) = plan(Mode::Nat, &chains);
        assert_eq!(rules.len(), 5, "{rules:?}");
        assert!(rules.contains(&"INPUT -i bantam0 -p udp --dport 67 -j ACCEPT".to_owned()));
    }

    #[test]
    fn others_are_told_to_the_administrator() {
        let chains = [chain("inet", "mine", "forward", "forward", true)];
        let (rules, warnings, _) = plan(Mode::Nat, &chains);
        assert!(rules.is_empty());
        assert!(
            warnings[0].contains("chain 'forward' of table 'inet mine'"),
            "{warnings:?}"
        );
        assert!(plan(Mode::HostOnly, &chains).1.is_empty());
        let firewalld = [chain(
            "inet",
            "firewalld",
            "filter_FORWARD",
            "forward",
            false,
        )];
        assert!(plan(Mode::Nat, &firewalld).2);
    }
}
