//! Rules that say what a guest may reach.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::OptionError;
use crate::options::{DnsName, ports};

/// Something that a guest may, or may not, reach: `TARGET[:PORT[-LAST]]`.
///
/// The target is an address, a network such as `192.0.2.0/24` or `[2001:db8::]/32`, a name such as `example.org`,
/// all names below another as `*.example.org`, or `*` for everything. The brackets around an address of IPv6
/// can be left out if no port follows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    target: RuleTarget,
    ports: Option<RangeInclusive<u16>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum RuleTarget {
    Everything,
    Network(Network),
    Name(NamePattern),
}

impl Rule {
    /// Most rules of a network, those that allow and those that deny together.
    pub const MAX_COUNT: usize = 1024;

    /// Whether the rule is about `port`; `None` stands for what has no ports, which a rule with ports is never
    /// about.
    pub(crate) fn has_port(&self, port: Option<u16>) -> bool {
        match (&self.ports, port) {
            (None, _) => true,
            (Some(ports), Some(port)) => ports.contains(&port),
            (Some(_), None) => false,
        }
    }

    /// Whether the rule is about `address`; `None` if that depends on the answers of name servers.
    pub(crate) fn has_address(&self, address: IpAddr) -> Option<bool> {
        match &self.target {
            RuleTarget::Everything => Some(true),
            RuleTarget::Network(network) => Some(network.contains(address)),
            RuleTarget::Name(_) => None,
        }
    }

    /// Whether the rule is about the addresses of `name`, which is in lower case.
    pub(crate) fn has_name(&self, name: &str) -> bool {
        match &self.target {
            RuleTarget::Name(pattern) => pattern.matches(name),
            RuleTarget::Everything | RuleTarget::Network(_) => false,
        }
    }

    /// Whether the rule is about names.
    pub(crate) fn is_of_names(&self) -> bool {
        matches!(self.target, RuleTarget::Name(_))
    }
}

/// Addresses with the same first bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// Reads `ADDRESS` or `ADDRESS/PREFIX`.
    fn read(address: &str, prefix: Option<&str>) -> Option<Network> {
        let address: IpAddr = address.parse().ok()?;
        let size = match address {
            IpAddr::V4(_) => 32,
            // Its packets are those of IPv4.
            IpAddr::V6(address) if address.to_ipv4_mapped().is_some() => return None,
            IpAddr::V6(_) => 128,
        };
        let prefix = match prefix {
            Some(prefix) => number(prefix).filter(|&prefix| prefix <= size)?,
            None => size,
        };
        let network = Network {
            address,
            prefix: prefix as u8,
        };
        (network.first() == address).then_some(network)
    }

    fn first(&self) -> IpAddr {
        let prefix = u32::from(self.prefix);
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - prefix).unwrap_or(0);
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        }
    }

    fn contains(&self, address: IpAddr) -> bool {
        let is_same_kind = address.is_ipv4() == self.address.is_ipv4();
        let prefix = self.prefix;
        is_same_kind && Network { address, prefix }.first() == self.address
    }

    fn is_single(&self) -> bool {
        self.prefix == if self.address.is_ipv4() { 32 } else { 128 }
    }
}

/// A name, or all names below it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct NamePattern {
    /// In lower case.
    name: String,
    is_below: bool,
}

impl NamePattern {
    fn read(text: &str) -> Option<NamePattern> {
        let (name, is_below) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let name = name.strip_suffix('.').unwrap_or(name);
        let name: DnsName = name.parse().ok()?;
        let name = name.as_str().to_ascii_lowercase();
        // Such as 10.0.0.256: no domain ends in a number.
        let last = name.rsplit('.').next()?;
        let is_number = last.bytes().all(|byte| byte.is_ascii_digit());
        (!is_number).then_some(NamePattern { name, is_below })
    }

    fn matches(&self, name: &str) -> bool {
        match self.is_below {
            false => name == self.name,
            true => name
                .strip_suffix(self.name.as_str())
                .and_then(|rest| rest.strip_suffix('.'))
                .is_some_and(|below| !below.is_empty()),
        }
    }
}

/// Reads a number without sign, of at most 65535.
fn number(text: &str) -> Option<u16> {
    let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok()).flatten()
}

impl RuleTarget {
    /// Reads a target without the port that may follow it.
    fn read(text: &str) -> Option<RuleTarget> {
        if text == "*" {
            return Some(RuleTarget::Everything);
        }
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        match Network::read(address, prefix) {
            Some(network) => Some(RuleTarget::Network(network)),
            None if prefix.is_some() => None,
            None => NamePattern::read(text).map(RuleTarget::Name),
        }
    }
}

impl FromStr for Rule {
    type Err = OptionError;

    fn from_str(text: &str) -> Result<Self, OptionError> {
        let read = || {
            let (target, rest) = if let Some(inner) = text.strip_prefix('[') {
                // The prefix of a network of IPv6 is inside the brackets or behind them.
                let (inner, rest) = inner.split_once(']')?;
                let end = rest.find(':').unwrap_or(rest.len());
                let prefix = &rest[..end];
                let is_network =
                    inner.contains(':') && (prefix.is_empty() || prefix.starts_with('/'));
                is_network.then(|| (format!("{inner}{prefix}"), &rest[end..]))?
            } else if text.matches(':').count() > 1 {
                (text.to_owned(), "")
            } else {
                let end = text.find(':').unwrap_or(text.len());
                (text[..end].to_owned(), &text[end..])
            };
            let ports = match rest.strip_prefix(':') {
                Some(text) => Some(ports(text)?),
                None => rest.is_empty().then_some(None)?,
            };
            let target = RuleTarget::read(&target)?;
            Some(Rule { target, ports })
        };
        read().ok_or_else(|| OptionError::Rule { text: text.into() })
    }
}

impl TryFrom<String> for Rule {
    type Error = OptionError;

    fn try_from(text: String) -> Result<Self, OptionError> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> String {
        rule.to_string()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.target {
            RuleTarget::Everything => f.write_str("*")?,
            RuleTarget::Network(network) => {
                match network.address {
                    IpAddr::V4(address) => write!(f, "{address}")?,
                    IpAddr::V6(address) => write!(f, "[{address}]")?,
                }
                if !network.is_single() {
                    write!(f, "/{}", network.prefix)?;
                }
            }
            RuleTarget::Name(NamePattern { name, is_below }) => {
                write!(f, "{}{name}", if *is_below { "*." } else { "" })?;
            }
        }
        match &self.ports {
            None => Ok(()),
            Some(ports) if ports.start() == ports.end() => write!(f, ":{}", ports.start()),
            Some(ports) => write!(f, ":{}-{}", ports.start(), ports.end()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rules_have_targets_and_ports() {
        for (text, full) in [
            ("192.0.2.1", "192.0.2.1"),
            ("192.0.2.0/24:443", "192.0.2.0/24:443"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("2001:db8::/32", "[2001:db8::]/32"),
            ("::/0", "[::]/0"),
            ("[2001:db8::1]:80-81", "[2001:db8::1]:80-81"),
            ("[2001:db8::]/32:80", "[2001:db8::]/32:80"),
            ("[2001:db8::/32]:80", "[2001:db8::]/32:80"),
            ("Example.ORG.:443", "example.org:443"),
            ("*.example.org", "*.example.org"),
            ("*:53", "*:53"),
            ("*", "*"),
            ("localhost", "localhost"),
        ] {
            let rule: Rule = text.parse().unwrap();
            assert_eq!(rule.to_string(), full);
            assert_eq!(full.parse::<Rule>().unwrap(), rule);
        }
    }

    #[test]
    fn rules_without_meaning_are_refused() {
        for text in [
            "",
            ":80",
            "192.0.2.1/24",
            "192.0.2.0/33",
            "192.0.2.256",
            "192.0.2.1:",
            "192.0.2.1:0-65536",
            "192.0.2.1:+80",
            "192.0.2.0/+24",
            "2001:db8::1/32",
            "::ffff:192.0.2.1",
            "[192.0.2.1]:80",
            "[2001:db8::1]80",
            "[2001:db8::1",
            "[2001:db8::/32]/32:80",
            "[]",
            "[:]",
            "*.*.example.org",
            "exa*mple.org",
            "example.org/24",
            "*.",
            "**",
            "a b",
        ] {
            let error = text.parse::<Rule>().unwrap_err().to_string();
            assert!(error.starts_with("invalid rule"), "{text}: {error}");
        }
    }

    #[test]
    fn names_below_another_are_not_that_one() {
        let below: Rule = "*.example.org".parse().unwrap();
        for name in ["a.example.org", "a.b.example.org"] {
            assert!(below.has_name(name), "{name}");
        }
        for name in ["example.org", ".example.org", "badexample.org", "org"] {
            assert!(!below.has_name(name), "{name}");
        }
        let one: Rule = "example.org:80".parse().unwrap();
        assert!(one.has_name("example.org") && !one.has_name("a.example.org"));
        assert!(one.has_port(Some(80)) && !one.has_port(Some(81)) && !one.has_port(None));
    }

    fn any_address() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            any::<u32>().prop_map(|bits| Ipv4Addr::from_bits(bits).into()),
            any::<u128>().prop_map(|bits| Ipv6Addr::from_bits(bits).into()),
        ]
    }

    proptest! {
        #[test]
        fn a_network_has_the_addresses_that_begin_as_it_does(
            address in any_address(),
            other in any_address(),
            prefix in 0u8..=128,
        ) {
            let size = if address.is_ipv4() { 32 } else { 128 };
            let prefix = prefix.min(size);
            let network = Network { address, prefix };
            let network = Network { address: network.first(), prefix };
            prop_assume!(address.to_canonical() == address);
            prop_assert!(network.contains(address));
            let bits = |address: IpAddr| match address {
                IpAddr::V4(address) => format!("{:032b}", address.to_bits()),
                IpAddr::V6(address) => format!("{:0128b}", address.to_bits()),
            };
            let start = usize::from(prefix);
            let expected = address.is_ipv4() == other.is_ipv4()
                && bits(address)[..start] == bits(other)[..start];
            prop_assert_eq!(network.contains(other), expected);
        }

        #[test]
        fn what_is_written_is_read_again(
            address in any_address(),
            prefix in 0u8..=128,
            ports in prop::option::of((any::<u16>(), any::<u16>())),
        ) {
            let prefix = prefix.min(if address.is_ipv4() { 32 } else { 128 });
            let address = Network { address, prefix }.first();
            prop_assume!(address.to_canonical() == address);
            let rule = Rule {
                target: RuleTarget::Network(Network { address, prefix }),
                ports: ports.map(|(one, other)| one.min(other)..=one.max(other)),
            };
            prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
        }

        #[test]
        fn any_text_is_read_or_refused(text in r"[\[\]0-9a-f.:/*-]{0,30}|.*") {
            if let Ok(rule) = text.parse::<Rule>() {
                prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
            }
        }
    }
}
