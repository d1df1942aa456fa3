//! The rules of a network in the host's packet filter, in tables of its own that are called after its bridge. They are
//! replaced as a whole, in one transaction, so that what another program has removed is there again.

use serde_json::{Value, json};

use crate::NetworkError;
use crate::definition::{Addresses, Definition, Mode};
use crate::port::Record;
use crate::program::NFT;

/// Where the rules for frames of machines are hooked in: before all others.
const FRAME_PRIORITY: i32 = -300;
/// Where those for frames to machines are: after all others.
const LAST_FRAME_PRIORITY: i32 = 300;
/// Where address translation of the sender is hooked in (`srcnat`).
const SOURCE_PRIORITY: i32 = 100;

/// Sets the rules of a network whose machines have `ports`.
///
/// # Errors
/// If `nft` is missing, or refuses them.
pub(crate) fn set(definition: &Definition, ports: &[&Record]) -> Result<(), NetworkError> {
    let action = format!("set the packet filter for network '{}'", definition.name);
    apply(&action, &rules(definition, ports))
}

/// Has the rules that are set apply to `ports`, and sets all of them if another program has removed them. It takes
/// less time than [`set`].
///
/// # Errors
/// Those of [`set`].
pub(crate) fn set_ports(definition: &Definition, ports: &[&Record]) -> Result<(), NetworkError> {
    let mut commands = Vec::new();
    Table::of_frames(definition, &mut commands).set_ports(ports);
    match apply("set the ports of a network", &commands) {
        Err(NetworkError::Program { .. }) => set(definition, ports),
        applied => applied,
    }
}

/// Removes the rules of a network, if there are any.
///
/// # Errors
/// If `nft` is missing, or refuses it.
pub(crate) fn clear(definition: &Definition) -> Result<(), NetworkError> {
    let action = format!("clear the packet filter of network '{}'", definition.name);
    apply(&action, &absent_tables(&definition.bridge))
}

/// Returns the chains of the host that drop forwarded packets unless a rule accepts them.
///
/// # Errors
/// If `nft` is missing, or says something else than JSON.
pub(crate) fn chains() -> Result<Vec<Chain>, NetworkError> {
    let action = "list the chains of the packet filter";
    let output = NFT.run(action, &["-j", "list", "chains"], b"")?;
    let output: Value = serde_json::from_slice(&output).map_err(|error| NetworkError::Program {
        action: action.to_owned(),
        program: NFT.name,
        reason: error.to_string(),
    })?;
    let items = output.get("nftables").and_then(Value::as_array);
    let chains = items.into_iter().flatten().filter_map(|item| {
        let chain = item.get("chain")?;
        let text = |key| {
            chain
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        Some(Chain {
            family: text("family"),
            table: text("table"),
            name: text("name"),
            hook: text("hook"),
            drops: text("policy") == "drop",
        })
    });
    Ok(chains.collect())
}

/// A chain of the host's packet filter.
#[derive(Debug)]
pub(crate) struct Chain {
    pub(crate) family: String,
    pub(crate) table: String,
    pub(crate) name: String,
    /// Where packets enter it; empty if other chains lead to it.
    pub(crate) hook: String,
    /// Whether a packet that no rule accepts is dropped.
    pub(crate) drops: bool,
}

fn apply(action: &str, commands: &[Value]) -> Result<(), NetworkError> {
    let input = json!({ "nftables": commands }).to_string();
    NFT.run(action, &["-j", "-f", "-"], input.as_bytes())
        .map(drop)
}

/// Returns the commands after which there are no tables, whether or not there were any.
fn absent_tables(bridge: &str) -> Vec<Value> {
    let tables =
        ["inet", "bridge"].map(|family| json!({ "table": { "family": family, "name": bridge } }));
    let commands = tables
        .into_iter()
        .flat_map(|table| [json!({ "add": table }), json!({ "delete": table })]);
    commands.collect()
}

fn rules(definition: &Definition, ports: &[&Record]) -> Vec<Value> {
    let mut commands = absent_tables(&definition.bridge);
    if let Some(addresses) = &definition.addresses {
        commands.extend(packet_rules(definition, addresses));
        let mut table = Table::of_frames(definition, &mut commands);
        table.add_table();
        table.frame_rules();
        table.set_ports(ports);
    }
    commands
}

/// Returns the rules for what is routed between the network and others.
fn packet_rules(definition: &Definition, addresses: &Addresses) -> Vec<Value> {
    let bridge = &definition.bridge;
    let mut commands = Vec::new();
    let mut table = Table {
        family: "inet",
        name: bridge,
        commands: &mut commands,
    };
    table.add_table();
    let comes_in = || same(meta("iifname"), json!(bridge));
    let comes_from_elsewhere = || other(meta("iifname"), json!(bridge));
    let goes_in = || same(meta("oifname"), json!(bridge));
    let goes_elsewhere = || other(meta("oifname"), json!(bridge));
    let subnet = prefix(
        &addresses.subnet.prefix().address.to_string(),
        addresses.subnet.bits(),
    );
    let subnet6 = addresses
        .subnet6
        .map(|subnet| prefix(&subnet.first().to_string(), crate::Subnet6::BITS));

    table.base_chain("forward", "filter", "forward", 0);
    if definition.isolate_ports {
        // The host would route what the bridge does not pass on.
        table.rule("forward", vec![comes_in(), goes_in(), drop_it()]);
    }
    if definition.mode == Mode::HostOnly {
        table.rule("forward", vec![comes_in(), goes_elsewhere(), reject()]);
        table.rule("forward", vec![goes_in(), comes_from_elsewhere(), reject()]);
        return commands;
    }
    let known = json!({ "match": {
        "op": "in", "left": { "ct": { "key": "state" } }, "right": ["established", "related"],
    } });
    // What an administrator leads to a machine.
    let led_here = json!({ "match": {
        "op": "in", "left": { "ct": { "key": "status" } }, "right": "dnat",
    } });
    for accepted in [known, led_here] {
        table.rule(
            "forward",
            vec![goes_in(), comes_from_elsewhere(), accepted, accept()],
        );
    }
    table.rule("forward", vec![goes_in(), comes_from_elsewhere(), reject()]);
    table.rule(
        "forward",
        vec![
            comes_in(),
            goes_elsewhere(),
            other(payload("ip", "saddr"), subnet.clone()),
            drop_it(),
        ],
    );
    table.base_chain("postrouting", "nat", "postrouting", SOURCE_PRIORITY);
    let families = [Some(("ip", subnet)), subnet6.map(|subnet| ("ip6", subnet))];
    for (family, subnet) in families.into_iter().flatten() {
        table.rule(
            "postrouting",
            vec![
                same(payload(family, "saddr"), subnet.clone()),
                other(payload(family, "daddr"), subnet),
                goes_elsewhere(),
                json!({ "masquerade": null }),
            ],
        );
    }
    commands
}

/// A table that is being made.
struct Table<'a> {
    family: &'static str,
    name: &'a str,
    commands: &'a mut Vec<Value>,
}

impl<'a> Table<'a> {
    /// Returns the table for frames.
    fn of_frames(definition: &'a Definition, commands: &'a mut Vec<Value>) -> Table<'a> {
        Table {
            family: "bridge",
            name: &definition.bridge,
            commands,
        }
    }

    fn add_table(&mut self) {
        let table = json!({ "family": self.family, "name": self.name });
        self.commands.push(json!({ "add": { "table": table } }));
    }

    fn base_chain(&mut self, name: &str, kind: &str, hook: &str, priority: i32) {
        self.commands.push(json!({ "add": { "chain": {
            "family": self.family, "table": self.name, "name": name,
            "type": kind, "hook": hook, "prio": priority, "policy": "accept",
        } } }));
    }

    fn chain(&mut self, name: &str) {
        self.commands.push(json!({ "add": { "chain": {
            "family": self.family, "table": self.name, "name": name,
        } } }));
    }

    fn set(&mut self, name: &str, kinds: Value) {
        self.commands.push(json!({ "add": { "set": {
            "family": self.family, "table": self.name, "name": name, "type": kinds,
        } } }));
    }

    fn element(&mut self, set: &str, element: Value) {
        self.commands.push(json!({ "add": { "element": {
            "family": self.family, "table": self.name, "name": set, "elem": [element],
        } } }));
    }

    fn rule(&mut self, chain: &str, expressions: Vec<Value>) {
        self.commands.push(json!({ "add": { "rule": {
            "family": self.family, "table": self.name, "chain": chain, "expr": expressions,
        } } }));
    }

    /// Adds the rules for frames of machines: each sends under its own addresses only, and none acts as a router or
    /// as a DHCP server.
    fn frame_rules(&mut self) {
        let is = |protocol: &str| same(meta("protocol"), json!(protocol));
        let source = || payload("ether", "saddr");
        let from = |parts: Vec<Value>| {
            let parts: Vec<_> = [meta("iifname")].into_iter().chain(parts).collect();
            json!({ "concat": parts })
        };
        self.set("filtered", json!("ifname"));
        self.set("macs", json!(["ifname", "ether_addr"]));
        self.set("addresses", json!(["ifname", "ether_addr", "ipv4_addr"]));
        self.chain("machine");
        self.base_chain("prerouting", "filter", "prerouting", FRAME_PRIORITY);
        let is_filtered = same(meta("iifname"), json!("@filtered"));
        self.rule(
            "prerouting",
            vec![is_filtered, json!({ "jump": { "target": "machine" } })],
        );

        self.rule(
            "machine",
            vec![other(from(vec![source()]), json!("@macs")), drop_it()],
        );
        // Whether an address is free is asked without one.
        let asks = same(payload("arp", "saddr ip"), json!("0.0.0.0"));
        let mac_of_arp = || payload("arp", "saddr ether");
        self.rule(
            "machine",
            vec![
                is("arp"),
                other(from(vec![mac_of_arp()]), json!("@macs")),
                drop_it(),
            ],
        );
        self.rule("machine", vec![is("arp"), asks, accept()]);
        let sender = from(vec![mac_of_arp(), payload("arp", "saddr ip")]);
        self.rule(
            "machine",
            vec![is("arp"), same(sender, json!("@addresses")), accept()],
        );

        let port = |field, number: u16| same(payload("udp", field), json!(number));
        let no_address = same(payload("ip", "saddr"), json!("0.0.0.0"));
        self.rule(
            "machine",
            vec![
                is("ip"),
                no_address,
                port("sport", 68),
                port("dport", 67),
                accept(),
            ],
        );
        self.rule("machine", vec![is("ip"), port("sport", 67), drop_it()]);
        let sender = from(vec![source(), payload("ip", "saddr")]);
        self.rule(
            "machine",
            vec![is("ip"), same(sender, json!("@addresses")), accept()],
        );

        let advertises = same(payload("icmpv6", "type"), json!("nd-router-advert"));
        self.rule("machine", vec![is("ip6"), advertises, drop_it()]);
        self.rule("machine", vec![is("ip6"), port("sport", 547), drop_it()]);
        self.rule("machine", vec![is("ip6"), accept()]);
        self.rule("machine", vec![drop_it()]);

        // Frames to a machine are addressed to it, or to many. The bridge would also pass on those for an address that
        // the user of a tap has given the host's end of it.
        self.base_chain("postrouting", "filter", "postrouting", LAST_FRAME_PRIORITY);
        let is_to_filtered = same(meta("oifname"), json!("@filtered"));
        let is_to_one = same(
            json!({ "&": [payload("ether", "daddr"), "01:00:00:00:00:00"] }),
            json!("00:00:00:00:00:00"),
        );
        let destination = json!({ "concat": [meta("oifname"), payload("ether", "daddr")] });
        self.rule(
            "postrouting",
            vec![
                is_to_filtered,
                is_to_one,
                other(destination, json!("@macs")),
                drop_it(),
            ],
        );
    }

    /// Has the rules apply to `ports` and to no others.
    fn set_ports(&mut self, ports: &[&Record]) {
        for set in ["filtered", "macs", "addresses"] {
            self.commands.push(json!({ "flush": { "set": {
                "family": self.family, "table": self.name, "name": set,
            } } }));
        }
        for port in ports.iter().filter(|port| port.filter) {
            let (interface, mac) = (&port.interface, port.mac.to_string());
            self.element("macs", json!({ "concat": [interface, mac] }));
            if let Some(address) = port.address {
                self.element("addresses", json!({ "concat": [interface, mac, address] }));
            }
            self.element("filtered", json!(interface));
        }
    }
}

fn meta(key: &str) -> Value {
    json!({ "meta": { "key": key } })
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({ "payload": { "protocol": protocol, "field": field } })
}

fn prefix(address: &str, bits: u8) -> Value {
    json!({ "prefix": { "addr": address, "len": bits } })
}

fn same(left: Value, right: Value) -> Value {
    json!({ "match": { "op": "==", "left": left, "right": right } })
}

fn other(left: Value, right: Value) -> Value {
    json!({ "match": { "op": "!=", "left": left, "right": right } })
}

fn accept() -> Value {
    json!({ "accept": null })
}

fn drop_it() -> Value {
    json!({ "drop": null })
}

fn reject() -> Value {
    json!({ "reject": null })
}
