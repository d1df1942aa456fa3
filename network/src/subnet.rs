//! Subnets: what addresses a network has, and which are free on a host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::NetworkError;

/// The IPv4 addresses of a network: the first is the host's, the others are for machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    first: Ipv4Addr,
    bits: u8,
}

impl Subnet {
    /// Length in bits of the shortest prefix, that of 65,536 addresses.
    const MIN_BITS: u8 = 16;
    /// Length in bits of the longest prefix, that of one machine.
    const MAX_BITS: u8 = 30;

    /// Makes the subnet of the addresses that begin with the first `bits` bits of `address`.
    ///
    /// # Errors
    /// [`NetworkError::Subnet`] if it is too large or too small for a network, or its addresses are not those of
    /// hosts.
    pub fn new(address: Ipv4Addr, bits: u8) -> Result<Subnet, NetworkError> {
        let wrong = |reason| {
            let text = format!("{address}/{bits}");
            Err(NetworkError::Subnet { text, reason })
        };
        if !(Self::MIN_BITS..=Self::MAX_BITS).contains(&bits) {
            return wrong("the prefix has 16 to 30 bits");
        }
        let first = Ipv4Addr::from_bits(address.to_bits() & !(u32::MAX >> bits));
        if first.is_loopback()
            || first.is_link_local()
            || first.octets()[0] == 0
            || first.octets()[0] >= 224
        {
            return wrong("these are not addresses that hosts can have");
        }
        Ok(Subnet { first, bits })
    }

    /// Returns the host's address, which is also that of the DHCP and name server.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() + 1)
    }

    /// Returns the number of bits of the prefix.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Returns the mask of the prefix.
    pub fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(!(u32::MAX >> self.bits))
    }

    /// Returns the broadcast address.
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() | u32::MAX >> self.bits)
    }

    /// Returns how many addresses are for machines.
    pub fn machine_count(self) -> u32 {
        (1 << (32 - self.bits)) - 3
    }

    /// Returns an address for a machine, by its number from 0 to [`Subnet::machine_count`].
    pub fn machine(self, number: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.first.to_bits() + 2 + number % self.machine_count())
    }

    /// Returns the prefix that these addresses have in common.
    pub(crate) fn prefix(self) -> Prefix {
        Prefix {
            address: self.first.into(),
            bits: self.bits,
        }
    }

    /// Returns the subnets that are tried in turn for a network whose definition names none. They are away from
    /// those that home routers, Docker, libvirt and podman take.
    pub(crate) fn candidates() -> impl Iterator<Item = Subnet> {
        let of_192 = (130..=250).map(|third| Ipv4Addr::new(192, 168, third, 0));
        let of_10 = (0..=255).map(|third| Ipv4Addr::new(10, 213, third, 0));
        let of_172 = (0..=255).map(|third| Ipv4Addr::new(172, 30, third, 0));
        let all = of_192.chain(of_10).chain(of_172);
        all.map(|first| Subnet { first, bits: 24 })
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.bits)
    }
}

impl FromStr for Subnet {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let parts = text.split_once('/');
        let parts =
            parts.and_then(|(address, bits)| Some((address.parse().ok()?, bits.parse().ok()?)));
        let Some((address, bits)) = parts else {
            return Err(NetworkError::Subnet {
                text: text.to_owned(),
                reason: "expected one such as 192.168.130.0/24",
            });
        };
        Subnet::new(address, bits)
    }
}

impl TryFrom<String> for Subnet {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

/// The IPv6 addresses of a network: a unique local prefix of 64 bits (RFC 4193), so that machines can make their own
/// addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet6(Ipv6Addr);

impl Subnet6 {
    /// Length of the prefix in bits.
    pub const BITS: u8 = 64;

    /// Chooses a prefix at random, as RFC 4193 demands.
    ///
    /// # Errors
    /// [`NetworkError::Random`] if the host has no random numbers.
    pub fn random() -> Result<Subnet6, NetworkError> {
        let mut bytes = [0; 16];
        let (prefix, _) = bytes.split_at_mut(8);
        getrandom::fill(prefix)?;
        bytes[0] = 0xfd;
        Ok(Subnet6(bytes.into()))
    }

    /// Returns the host's address.
    pub fn gateway(self) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.0.to_bits() | 1)
    }

    /// Returns the first address, whose last 64 bits are zero.
    pub fn first(self) -> Ipv6Addr {
        self.0
    }
}

impl fmt::Display for Subnet6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, Self::BITS)
    }
}

impl FromStr for Subnet6 {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let wrong = |reason| NetworkError::Subnet {
            text: text.to_owned(),
            reason,
        };
        let address = text.strip_suffix("/64");
        let address = address.and_then(|address| address.parse::<Ipv6Addr>().ok());
        let address = address.ok_or_else(|| wrong("expected one such as fd12:3456:789a:1::/64"))?;
        let first = Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX));
        if first.octets()[0] & 0xfe != 0xfc {
            return Err(wrong("it must be a unique local one, in fc00::/7"));
        }
        Ok(Subnet6(first))
    }
}

impl TryFrom<String> for Subnet6 {
    type Error = NetworkError;

    fn try_from(text: String) -> Result<Self, NetworkError> {
        text.parse()
    }
}

impl From<Subnet6> for String {
    fn from(subnet: Subnet6) -> String {
        subnet.to_string()
    }
}

/// A prefix of addresses of either family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    /// Any address with this prefix.
    pub(crate) address: IpAddr,
    /// Length in bits.
    pub(crate) bits: u8,
}

impl Prefix {
    /// Whether an address has both prefixes.
    pub(crate) fn overlaps(self, other: Prefix) -> bool {
        let bits = self.bits.min(other.bits);
        let differ =
            |difference: u128, size: u8| bits > 0 && difference >> (size - bits.min(size)) != 0;
        match (self.address, other.address) {
            (IpAddr::V4(a), IpAddr::V4(b)) => !differ((a.to_bits() ^ b.to_bits()).into(), 32),
            (IpAddr::V6(a), IpAddr::V6(b)) => !differ(a.to_bits() ^ b.to_bits(), 128),
            _ => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix(text: &str) -> Prefix {
        let (address, bits) = text.split_once('/').unwrap();
        Prefix {
            address: address.parse().unwrap(),
            bits: bits.parse().unwrap(),
        }
    }

    #[test]
    fn a_subnet_has_a_gateway_and_addresses_of_machines() {
        let subnet: Subnet = "192.168.130.77/24".parse().unwrap();
        assert_eq!(subnet.to_string(), "192.168.130.0/24");
        assert_eq!(subnet.gateway().to_string(), "192.168.130.1");
        assert_eq!(subnet.machine(0).to_string(), "192.168.130.2");
        assert_eq!(subnet.machine(252).to_string(), "192.168.130.254");
        assert_eq!(subnet.machine(253).to_string(), "192.168.130.2");
        assert_eq!(subnet.broadcast().to_string(), "192.168.130.255");
        let one: Subnet = "10.0.0.0/30".parse().unwrap();
        assert_eq!(one.machine_count(), 1);
        assert_eq!(one.machine(7).to_string(), "10.0.0.2");
    }

    #[test]
    fn what_is_no_subnet_is_refused() {
        for text in [
            "",
            "10.0.0.0",
            "10.0.0.0/15",
            "10.0.0.0/31",
            "10.0.0/24",
            "127.0.0.0/24",
            "0.1.0.0/16",
            "224.0.0.0/24",
            "169.254.0.0/16",
            "fd00::/64",
            "10.0.0.0/256",
            "10.0.0.0/-1",
        ] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
        for text in ["", "fd00::", "fd00::/48", "2001:db8::/64", "10.0.0.0/24"] {
            assert!(text.parse::<Subnet6>().is_err(), "{text}");
        }
        let subnet: Subnet6 = "fd12:3456:789a:1::7/64".parse().unwrap();
        assert_eq!(subnet.to_string(), "fd12:3456:789a:1::/64");
        assert_eq!(subnet.gateway().to_string(), "fd12:3456:789a:1::1");
    }

    #[test]
    fn prefixes_overlap_if_one_contains_the_other() {
        for (a, b, overlap) in [
            ("10.0.0.0/8", "10.213.0.0/24", true),
            ("10.213.0.0/24", "10.213.0.128/25", true),
            ("10.213.0.0/24", "10.213.1.0/24", false),
            ("0.0.0.0/0", "10.213.1.0/24", true),
            ("10.0.0.1/32", "10.0.0.1/32", true),
            ("10.0.0.1/32", "10.0.0.2/32", false),
            ("fd00::/8", "fd12::/64", true),
            ("fd11::/64", "fd12::/64", false),
            ("::/0", "10.0.0.0/8", false),
        ] {
            assert_eq!(prefix(a).overlaps(prefix(b)), overlap, "{a} {b}");
            assert_eq!(prefix(b).overlaps(prefix(a)), overlap, "{b} {a}");
        }
    }

    #[test]
    fn candidates_are_distinct_subnets() {
        let all: Vec<Subnet> = Subnet::candidates().collect();
        for (place, subnet) in all.iter().enumerate() {
            assert_eq!(Subnet::new(subnet.gateway(), 24).unwrap(), *subnet);
            assert!(!all[..place].contains(subnet), "{subnet}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in "[0-9a-f:./-]{0,30}|.*") {
            if let Ok(subnet) = text.parse::<Subnet>() {
                prop_assert_eq!(subnet.to_string().parse::<Subnet>().unwrap(), subnet);
                prop_assert!(subnet.machine_count() >= 1);
            }
            let _ = text.parse::<Subnet6>();
        }

        #[test]
        fn any_prefixes_are_compared(a: [u8; 16], b: [u8; 16], a_bits: u8, b_bits: u8) {
            let prefix = |address: [u8; 16], bits| Prefix { address: IpAddr::from(address), bits };
            let _ = prefix(a, a_bits).overlaps(prefix(b, b_bits));
        }
    }
}
