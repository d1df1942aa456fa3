//! Network devices.

use std::ffi::OsStr;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bantam_devices::virtio::owner::DeviceCommand;
use bantam_usernet::{DnsName, Forward, Rule, Subnet, UserNetworkOptions};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use bantam_network::{HostName, NetworkName};

use super::forms::Listed;
use super::host_network::{HostNetwork, Namespace, random_seed};
use super::limits::ShortKeys;
use super::short_keys::serde_with_short_keys;
use super::{ConfigError, DeviceName, NetLimitsConfig, is_default, option_string, whole_number};

/// Describes a network device of the guest, which is connected to a tap interface of the host, to a network
/// of the host, to a network that the monitor provides by ordinary sockets, or to a program that is the network.
///
/// On the command line `tap=NAME[,KEY=VALUE]...`, `user[,KEY=VALUE]...`, or one of `nat`, `hostonly`, `network=NAME`,
/// `bridge=NAME`, `macvtap=NAME`, `passt=SOCKET` and `fd=N` in the same way; in a machine file a `[[net]]` table with
/// the same keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    remote = "Self",
    deny_unknown_fields,
    expecting = "a network device: a table with a tap or a network, or with user = true or nat = true"
)]
pub struct NetConfig {
    /// Tap interface of the host, for a device that is connected to one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tap: Option<InterfaceName>,
    /// Whether the device is connected to a network that the monitor provides.
    #[serde(default, skip_serializing_if = "is_default")]
    pub user: bool,
    /// Whether the device is on the network `default` of the host, which has a way out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub nat: bool,
    /// Whether the device is on the network `hostonly` of the host, which has no way out.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hostonly: bool,
    /// The network of the host that the device is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkName>,
    /// The bridge of the host that the device is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<InterfaceName>,
    /// The interface of the host whose network the device is on, as a station of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub macvtap: Option<InterfaceName>,
    /// Unix stream socket of a program that is the network, in the protocol of passt and gvproxy.
    #[serde(
        default,
        with = "super::path::option",
        skip_serializing_if = "Option::is_none"
    )]
    pub passt: Option<PathBuf>,
    /// Descriptor of a tap that another program has opened, and passed on to this process.
    #[serde(
        default,
        deserialize_with = "descriptor",
        skip_serializing_if = "Option::is_none"
    )]
    pub fd: Option<RawFd>,
    /// The guest's MAC address.
    pub mac: Option<MacAddress>,
    /// Largest packet that the guest is told to send.
    pub mtu: Option<Mtu>,
    /// Number of pairs of queues. By default the number of vCPUs, up to [`QueuePairs::MAX`], or one if the
    /// tap was created with a single queue.
    pub queues: Option<QueuePairs>,
    /// Whether a thread of its own serves the device.
    #[serde(default, skip_serializing_if = "is_default")]
    pub iothread: bool,
    /// Name of the device on the host; by default it is named after its place, such as `net0`.
    pub name: Option<DeviceName>,
    /// Of a network that the monitor provides: ports of the host that lead to the guest.
    #[serde(default, skip_serializing_if = "is_default")]
    pub forward: Vec<Forward>,
    /// Of a network that the monitor provides: whether the guest reaches nothing by itself.
    #[serde(default, skip_serializing_if = "is_default")]
    pub restrict: bool,
    /// Of a network that the monitor provides: what the guest may reach; if there are none, all that `deny` does
    /// not forbid.
    #[serde(default, skip_serializing_if = "is_default")]
    pub allow: Vec<Rule>,
    /// Of a network that the monitor provides: what the guest may not reach, even if `allow` has it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub deny: Vec<Rule>,
    /// Of a network that the monitor provides: whether the gateway's address leads to the host's loopback
    /// address.
    #[serde(default, rename = "host-loopback", skip_serializing_if = "is_default")]
    pub host_loopback: bool,
    /// Of a network that the monitor provides: its IPv4 addresses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subnet: Option<Subnet>,
    /// Of a network that the monitor provides: name servers in place of the host's.
    #[serde(default, skip_serializing_if = "is_default")]
    pub dns: Vec<IpAddr>,
    /// Of a network that the monitor provides: the domain that the guest is told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<DnsName>,
    /// Of a network that the monitor or the host provides: what the guest is called there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hostname: Option<DnsName>,
    /// Of a network of the host: whether the guest can send under its own addresses only; by default what the network
    /// says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub filter: Option<bool>,
    /// Of a tap: the network namespace that it is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub netns: Option<Namespace>,
    /// Limits of what the guest receives and transmits.
    #[serde(
        default,
        skip_serializing_if = "is_default",
        alias = "rx-bytes-per-second",
        alias = "rx-burst-bytes",
        alias = "rx-packets-per-second",
        alias = "rx-burst-packets",
        alias = "tx-bytes-per-second",
        alias = "tx-burst-bytes",
        alias = "tx-packets-per-second",
        alias = "tx-burst-packets"
    )]
    pub limits: NetLimitsConfig,
}

serde_with_short_keys!(NetConfig);

impl NetConfig {
    /// Describes a network device on `tap`, with defaults for all else.
    pub fn new(tap: InterfaceName) -> Self {
        Self {
            tap: Some(tap),
            user: false,
            ..Self::user()
        }
    }

    /// Describes a network device on a network that the monitor provides, with defaults for all else.
    pub fn user() -> Self {
        Self {
            tap: None,
            user: true,
            nat: false,
            hostonly: false,
            network: None,
            bridge: None,
            macvtap: None,
            filter: None,
            netns: None,
            passt: None,
            fd: None,
            forward: Vec::new(),
            restrict: false,
            allow: Vec::new(),
            deny: Vec::new(),
            host_loopback: false,
            subnet: None,
            dns: Vec::new(),
            domain: None,
            hostname: None,
            mac: None,
            mtu: None,
            queues: None,
            iothread: false,
            name: None,
            limits: NetLimitsConfig::default(),
        }
    }

    /// Returns the name of the device at `place`, counted from zero.
    pub fn device_name(&self, place: usize) -> DeviceName {
        let name = self.name.clone();
        name.unwrap_or_else(|| DeviceName::by_place("net", place))
    }

    /// Applies the change that `command` has made to the device.
    pub(super) fn apply(&mut self, command: &DeviceCommand) {
        if let DeviceCommand::SetNetLimits(limits) = command {
            self.limits = (*limits).into();
        }
    }

    /// Returns what messages call the device at `place`, by what it is connected to.
    pub(crate) fn label(&self, place: usize) -> String {
        match self.end() {
            NetEnd::Tap(tap) => format!("tap '{tap}'"),
            NetEnd::Host(network) => network.to_string(),
            NetEnd::User => format!("the user network of '{}'", self.device_name(place)),
            NetEnd::Passt(path) => format!("the network at '{}'", path.display()),
            NetEnd::Descriptor(fd) => format!("the tap of descriptor {fd}"),
        }
    }

    /// Returns what the device is connected to.
    pub fn end(&self) -> NetEnd<'_> {
        match (&self.tap, &self.passt, self.fd) {
            (Some(tap), _, _) => NetEnd::Tap(tap),
            (_, Some(path), _) => NetEnd::Passt(path),
            (_, _, Some(fd)) => NetEnd::Descriptor(fd),
            (None, None, None) => self.host_network().map_or(NetEnd::User, NetEnd::Host),
        }
    }

    /// Returns the network of the host that the device is on, if it is on one.
    pub fn host_network(&self) -> Option<HostNetwork> {
        let interface = |name: &InterfaceName| name.as_str().to_owned();
        match (&self.network, &self.bridge, &self.macvtap) {
            (Some(name), _, _) => Some(HostNetwork::Network(name.clone())),
            (_, Some(name), _) => Some(HostNetwork::Bridge(interface(name))),
            (_, _, Some(name)) => Some(HostNetwork::Beside(interface(name))),
            _ if self.nat => Some(HostNetwork::Network(NetworkName::nat())),
            _ if self.hostonly => Some(HostNetwork::Network(NetworkName::host_only())),
            _ => None,
        }
    }

    /// Writes the word of a network of the host.
    fn fmt_host_network(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escape = |name: &InterfaceName| option_string::escape(name.as_str());
        match (&self.network, &self.bridge, &self.macvtap) {
            (Some(network), _, _) => write!(f, "network={network}"),
            (_, Some(bridge), _) => write!(f, "bridge={}", escape(bridge)),
            (_, _, Some(interface)) => write!(f, "macvtap={}", escape(interface)),
            _ if self.nat => f.write_str("nat"),
            _ => f.write_str("hostonly"),
        }
    }

    /// Has a network that gives its guests names call this one `name`, unless it is called something already, or
    /// `name` is not a name for a host.
    pub fn name_guest(&mut self, name: &str) {
        let has_names = self.user || self.is_on_managed_network();
        if has_names && self.hostname.is_none() && name.parse::<HostName>().is_ok() {
            self.hostname = name.parse().ok();
        }
    }

    /// Returns what the guest is called on a network of the host.
    pub(crate) fn host_name(&self) -> Option<HostName> {
        self.hostname
            .as_ref()
            .and_then(|name| name.to_string().parse().ok())
    }

    /// Gives a device on a network of the host its MAC address, so that it has the same one when its machine goes on
    /// in another process.
    pub(crate) fn fix_mac_address(&mut self, place: usize) {
        if self.host_network().is_some() {
            self.mac = Some(self.mac_address(place));
        }
    }

    /// Returns the MAC address that is given, or else one derived from the tap's name, or from `place`, counted
    /// from zero, if there is no tap: it is locally administered, and the same at each start. On a network of the host
    /// it is derived from the guest's name there; without a name it is another one in each process.
    pub fn mac_address(&self, place: usize) -> MacAddress {
        self.mac.unwrap_or_else(|| {
            let name = match (&self.tap, self.host_network(), &self.hostname) {
                (Some(tap), _, _) => tap.to_string(),
                (None, Some(network), Some(hostname)) => format!("{network} {hostname}"),
                (None, Some(network), None) => format!("{network} {} {place}", random_seed()),
                (None, None, _) => format!("user {place}"),
            };
            // FNV-1a, 64 bits.
            let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
            });
            let [a, b, c, d, e, ..] = hash.to_le_bytes();
            MacAddress([0x02, a, b, c, d, e])
        })
    }

    /// Returns the options of the network that the monitor provides.
    pub(crate) fn user_options(&self) -> UserNetworkOptions {
        UserNetworkOptions {
            subnet: self.subnet.unwrap_or_default(),
            forwards: self.forward.clone(),
            restrict: self.restrict,
            allow: self.allow.clone(),
            deny: self.deny.clone(),
            host_loopback: self.host_loopback,
            dns: self.dns.clone(),
            domain: self.domain.clone(),
            hostname: self.hostname.clone(),
        }
    }

    /// Checks the network device at `place`: each burst has its limit, and the options are those of what it is
    /// connected to.
    pub(super) fn validate(&self, place: usize) -> Result<(), ConfigError> {
        self.check_backend()?;
        let device = || format!("the network device on {}", self.label(place));
        self.limits.check_bursts(device)
    }

    fn check_backend(&self) -> Result<(), ConfigError> {
        let ends = [
            self.tap.is_some(),
            self.user,
            self.nat,
            self.hostonly,
            self.network.is_some(),
            self.bridge.is_some(),
            self.macvtap.is_some(),
            self.passt.is_some(),
            self.fd.is_some(),
        ];
        match ends.into_iter().filter(|is_given| *is_given).count() {
            0 => return Err(ConfigError::NetBackendMissing),
            1 => {}
            _ => return Err(ConfigError::NetBackends),
        }
        if self.netns.is_some() && self.tap.is_none() {
            return Err(ConfigError::NetTapOption { key: "netns" });
        }
        if self.filter.is_some() && !self.is_on_managed_network() {
            return Err(ConfigError::HostNetOption { key: "filter" });
        }
        let has_tap = self.tap.is_some() || self.host_network().is_some();
        if !has_tap && self.queues.is_some() {
            return Err(ConfigError::UserNetQueues);
        }
        if self.user {
            return Ok(());
        }
        if let Some(hostname) = &self.hostname
            && self.is_on_managed_network()
            && self.host_name().is_none()
        {
            return Err(ConfigError::NetHostName {
                name: hostname.to_string(),
            });
        }
        let given = [
            ("forward", !self.forward.is_empty()),
            ("restrict", self.restrict),
            ("allow", !self.allow.is_empty()),
            ("deny", !self.deny.is_empty()),
            ("host-loopback", self.host_loopback),
            ("subnet", self.subnet.is_some()),
            ("dns", !self.dns.is_empty()),
            ("domain", self.domain.is_some()),
            (
                "hostname",
                self.hostname.is_some() && !self.is_on_managed_network(),
            ),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given) {
            Some((key, _)) => Err(ConfigError::UserNetOption { key }),
            None => Ok(()),
        }
    }
}

impl NetConfig {
    /// Whether the device is on a network that has a definition on the host.
    fn is_on_managed_network(&self) -> bool {
        matches!(self.host_network(), Some(HostNetwork::Network(_)))
    }
}

/// What a network device is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetEnd<'a> {
    /// A tap interface of the host.
    Tap(&'a InterfaceName),
    /// A network of the host.
    Host(HostNetwork),
    /// A network that the monitor provides.
    User,
    /// A program that listens on this socket.
    Passt(&'a Path),
    /// A tap that another program has opened, by its descriptor.
    Descriptor(RawFd),
}

/// Reads the number of a descriptor.
fn descriptor<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<RawFd>, D::Error> {
    let read = |number: i64| match RawFd::try_from(number) {
        Ok(fd @ 0..) => Ok(Some(fd)),
        _ => Err(ConfigError::Descriptor { number }),
    };
    whole_number::deserialize(deserializer, read)
}

impl Listed for NetConfig {
    const NAME: &'static str = "net";
    const EXAMPLE: &'static str = "tap = \"tap0\" or user = true";
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::try_from(OsStr::new(text))
    }
}

impl TryFrom<&OsStr> for NetConfig {
    type Error = ConfigError;

    fn try_from(text: &OsStr) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::NetOption { reason };
        let net: NetConfig =
            option_string::parse(text, None).map_err(|error| wrong(error.to_string()))?;
        net.check_backend()
            .map_err(|error| wrong(error.to_string()))?;
        Ok(net)
    }
}

/// Writes the option string, which cannot express limits that are buckets.
impl fmt::Display for NetConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.end() {
            NetEnd::Tap(tap) => write!(f, "tap={}", option_string::escape(tap.as_str()))?,
            NetEnd::Host(_) => self.fmt_host_network(f)?,
            NetEnd::User => f.write_str("user")?,
            NetEnd::Passt(path) => {
                let path = path.display().to_string();
                write!(f, "passt={}", option_string::escape(&path))?;
            }
            NetEnd::Descriptor(fd) => write!(f, "fd={fd}")?,
        }
        if let Some(namespace) = &self.netns {
            write!(
                f,
                ",netns={}",
                option_string::escape(&namespace.to_string())
            )?;
        }
        if let Some(filter) = self.filter {
            let value = if filter { "on" } else { "off" };
            write!(f, ",filter={value}")?;
        }
        if let Some(mac) = self.mac {
            write!(f, ",mac={mac}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, ",mtu={mtu}")?;
        }
        if let Some(queues) = self.queues {
            write!(f, ",queues={queues}")?;
        }
        if self.iothread {
            f.write_str(",iothread=on")?;
        }
        if let Some(name) = &self.name {
            write!(f, ",name={name}")?;
        }
        for forward in &self.forward {
            write!(f, ",forward={forward}")?;
        }
        for (key, is_on) in [
            ("restrict", self.restrict),
            ("host-loopback", self.host_loopback),
        ] {
            if is_on {
                write!(f, ",{key}=on")?;
            }
        }
        for (key, rules) in [("allow", &self.allow), ("deny", &self.deny)] {
            for rule in rules {
                write!(f, ",{key}={rule}")?;
            }
        }
        if let Some(subnet) = &self.subnet {
            write!(f, ",subnet={subnet}")?;
        }
        for server in &self.dns {
            write!(f, ",dns={server}")?;
        }
        for (key, name) in [("domain", &self.domain), ("hostname", &self.hostname)] {
            if let Some(name) = name {
                write!(f, ",{key}={name}")?;
            }
        }
        for (key, quantity) in self.limits.rates() {
            write!(f, ",{key}={}", quantity.get())?;
        }
        Ok(())
    }
}

/// Name of a network interface of the host: 1 to 15 printable ASCII characters that Linux allows in such a
/// name (no space, `/` or `:`, and no `%`, which would make it a pattern).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct InterfaceName(String);

impl InterfaceName {
    /// Maximum number of bytes: `IFNAMSIZ` less the terminating NUL.
    pub const MAX_SIZE: usize = 15;

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        if !(1..=Self::MAX_SIZE).contains(&text.len())
            || !text.bytes().all(allowed)
            || text == "."
            || text == ".."
        {
            return Err(ConfigError::InterfaceName { text });
        }
        Ok(Self(text))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// MAC address of an interface: neither a multicast address nor all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Returns the bytes in the order in which they are written and sent.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for MacAddress {
    type Error = ConfigError;

    fn try_from(bytes: [u8; 6]) -> Result<Self, ConfigError> {
        let address = Self(bytes);
        if bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(ConfigError::MacAddressKind {
                text: address.to_string(),
            });
        }
        Ok(address)
    }
}

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let invalid = || ConfigError::MacAddressFormat { text: text.into() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let digits = parts.next().ok_or_else(invalid)?;
            if digits.len() != 2 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *byte = u8::from_str_radix(digits, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() {
            return Err(invalid());
        }
        Self::try_from(bytes)
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl Serialize for MacAddress {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Maximum transmission unit in bytes: [`Mtu::MIN`] to [`Mtu::MAX`] (virtio 1.3, section 5.1.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Mtu(u16);

impl Mtu {
    /// Smallest value: what every IPv4 link must carry.
    pub const MIN: u16 = 68;

    /// Largest value that a tap can be set to: Linux counts the Ethernet header of 14 bytes as part of the
    /// 65535 bytes of a packet.
    pub const MAX: u16 = 65_521;

    /// Returns the number of bytes.
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<i64> for Mtu {
    type Error = ConfigError;

    fn try_from(size: i64) -> Result<Self, ConfigError> {
        match u16::try_from(size) {
            Ok(size @ Self::MIN..=Self::MAX) => Ok(Self(size)),
            _ => Err(ConfigError::Mtu { size }),
        }
    }
}

impl<'de> Deserialize<'de> for Mtu {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_number::deserialize(deserializer, Self::try_from)
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Number of pairs of queues, each with one to receive and one to transmit: [`QueuePairs::MIN`] to
/// [`QueuePairs::MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct QueuePairs(u8);

impl QueuePairs {
    /// Smallest number.
    pub const MIN: u8 = 1;

    /// Largest number.
    pub const MAX: u8 = 8;

    /// Returns the number of pairs.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<i64> for QueuePairs {
    type Error = ConfigError;

    fn try_from(count: i64) -> Result<Self, ConfigError> {
        match u8::try_from(count) {
            Ok(count @ Self::MIN..=Self::MAX) => Ok(Self(count)),
            _ => Err(ConfigError::QueuePairs { count }),
        }
    }
}

impl<'de> Deserialize<'de> for QueuePairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        whole_number::deserialize(deserializer, Self::try_from)
    }
}

impl fmt::Display for QueuePairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{LimitConfig, LimitsConfig, Quantity};
    use super::*;

    fn net(text: &str) -> Result<NetConfig, String> {
        text.parse().map_err(|error: ConfigError| error.to_string())
    }

    #[test]
    fn reads_the_option_string() {
        let net = net(
            "mtu=9000,tap=vm-tap0,queues=4,mac=52:54:00:AB:cd:01,iothread=on,\
             rx-bytes-per-second=1M,tx-burst-packets=7",
        )
        .unwrap();
        assert_eq!(net.tap.unwrap().as_str(), "vm-tap0");
        assert_eq!(net.mac.unwrap().bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 1]);
        assert_eq!(net.mtu.unwrap().get(), 9000);
        assert_eq!(net.queues.unwrap().get(), 4);
        assert!(net.iothread);
        let rates = net.limits.rates().into_iter();
        let rates: Vec<_> = rates.map(|(key, rate)| (key, rate.get())).collect();
        assert_eq!(
            rates,
            [("rx-bytes-per-second", 1 << 20), ("tx-burst-packets", 7)]
        );
    }

    #[test]
    fn refuses_what_is_wrong_and_shows_the_accepted_form() {
        let form = "; a network device is one of user, nat, hostonly, network=NAME, tap=NAME, bridge=NAME, \
                    macvtap=NAME, passt=SOCKET and fd=N, with [,KEY=VALUE]...";
        for (text, reason) in [
            ("", "an item has no name"),
            (
                "tap0",
                "unknown option 'tap0', expected one of 'tap', 'user', 'nat', 'hostonly', 'network', \
                 'bridge', 'macvtap', 'passt', 'fd', 'mac', 'mtu', 'queues', \
                 'iothread', 'name', 'forward', 'restrict', 'allow', 'deny', 'host-loopback', 'subnet', 'dns', \
                 'domain', 'hostname', 'filter', 'netns', 'rx-burst-bytes', 'rx-burst-packets', 'rx-bytes-per-second', \
                 'rx-packets-per-second', 'tx-burst-bytes', 'tx-burst-packets', \
                 'tx-bytes-per-second', 'tx-packets-per-second'",
            ),
            (
                "mac=52:54:00:12:34:56",
                "neither a tap nor a network nor 'user' says what the device is connected to",
            ),
            ("tap=t,user", "a device is on one tap or network only"),
            ("nat,hostonly", "a device is on one tap or network only"),
            ("user,nat", "a device is on one tap or network only"),
            ("tap=t,bridge=b", "a device is on one tap or network only"),
            ("nat,netns=blue", "'netns' is for devices on a tap"),
            (
                "tap=t,netns=a/b",
                "invalid network namespace 'a/b': expected the name of one that 'ip netns' lists, or a path",
            ),
            (
                "bridge=b,filter=off",
                "'filter' is for devices on a network of the host: nat, hostonly or network=NAME",
            ),
            (
                "nat,forward=80:80",
                "'forward' is for devices on a user network",
            ),
            (
                "nat,hostname=a.b",
                "invalid hostname 'a.b': on a network of the host it is 1 to 63 letters, digits and '-'",
            ),
            (
                "network=-x",
                "invalid network name '-x': 1 to 40 letters, digits and the characters '.', '_' and '-', of which the \
                 first is a letter or digit",
            ),
            ("passt=a,fd=3", "a device is on one tap or network only"),
            (
                "passt=a,allow=192.0.2.1",
                "'allow' is for devices on a user network",
            ),
            ("fd=-1", "-1 is not the number of a descriptor"),
            (
                "user,deny=a b",
                "invalid rule 'a b': expected TARGET[:PORT[-LAST]], where TARGET is an address, a network \
                 such as 192.0.2.0/24 or [2001:db8::]/32, a name such as example.org or *.example.org, or *",
            ),
            ("user,queues=2", "'queues' is for devices on a tap"),
            (
                "tap=t,restrict",
                "'restrict' is for devices on a user network",
            ),
            (
                "user,forward=80",
                "invalid forward '80': expected [tcp:|udp:][ADDRESS:]PORT:GUESTPORT, such as 8080:80 \
                 or udp:0.0.0.0:5000-5009:6000-6009",
            ),
            ("tap=t,mtu=67", "mtu 67 is out of range: 68 to 65521"),
            ("tap=t,mtu=65522", "mtu 65522 is out of range: 68 to 65521"),
            ("tap=t,queues=0", "queues 0 is out of range: 1 to 8"),
            ("tap=t,queues=9", "queues 9 is out of range: 1 to 8"),
            (
                "tap=t,mtu=big",
                "the value 'big' of 'mtu' is not a whole number",
            ),
            (
                "tap=t,mac=01:00:5e:00:00:01",
                "MAC address '01:00:5e:00:00:01' is not that of one interface: \
                 its first byte must be even, and it must not be all zeros",
            ),
            (
                "tap=t,mac=52:54:00:12:34",
                "invalid MAC address '52:54:00:12:34': expected one such as 52:54:00:12:34:56",
            ),
        ] {
            assert_eq!(net(text).unwrap_err(), format!("{reason}{form}"));
        }
    }

    #[test]
    fn an_address_of_ones_own_is_stable_and_local() {
        let address = |text: &str| net(text).unwrap().mac_address(0).to_string();
        assert_eq!(address("tap=vm-tap0"), address("tap=vm-tap0,mtu=9000"));
        assert_ne!(address("tap=vm-tap0"), address("tap=vm-tap1"));
        assert!(address("tap=vm-tap0").starts_with("02:"));
        assert_eq!(address("tap=t,mac=52:54:00:ab:cd:01"), "52:54:00:ab:cd:01");
    }

    #[test]
    fn reads_the_options_of_a_user_network() {
        let text = "user,forward=8080:80,forward=udp:0.0.0.0:53:53,host-loopback,dns=192.0.2.1,\
                    allow=*.example.org:443,allow=[2001:db8::]/32,deny=192.0.2.0/24,\
                    subnet=172.20.0.0/16,domain=a.test,hostname=b,restrict=off";
        let net = net(text).unwrap();
        assert_eq!(net.forward.len(), 2);
        assert_eq!((net.allow.len(), net.deny.len()), (2, 1));
        assert!(net.host_loopback && !net.restrict);
        assert_eq!(net.subnet.unwrap().guest().octets(), [172, 20, 0, 15]);
        assert_eq!(net.dns[0].to_string(), "192.0.2.1");
        let written = net.to_string();
        assert_eq!(written.parse::<NetConfig>().unwrap(), net, "{written}");
        let second = NetConfig::user().mac_address(1);
        assert_ne!(NetConfig::user().mac_address(0), second);
    }

    #[test]
    fn a_device_on_a_network_of_the_host_has_the_address_of_its_name() {
        let address = |text: &str| net(text).unwrap().mac_address(0).to_string();
        assert_eq!(
            address("nat,hostname=web"),
            address("network=default,hostname=web")
        );
        assert_ne!(address("nat,hostname=web"), address("nat,hostname=db"));
        assert_ne!(
            address("nat,hostname=web"),
            address("hostonly,hostname=web")
        );
        assert_eq!(address("nat"), address("nat"));
        let mut fixed = net("nat").unwrap();
        fixed.fix_mac_address(0);
        assert_eq!(fixed.mac.unwrap().to_string(), address("nat"));
        for text in [
            "nat",
            "hostonly,filter=off",
            "network=lab,hostname=a",
            "bridge=br0",
            "macvtap=eth0",
            "tap=t,netns=n",
        ] {
            assert_eq!(net(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn reads_ends_that_others_have_made() {
        let passt = net("passt=a,,b.sock,mtu=1500").unwrap();
        assert_eq!(passt.end(), NetEnd::Passt(Path::new("a,b.sock")));
        let tap = net("fd=7").unwrap();
        assert_eq!(tap.end(), NetEnd::Descriptor(7));
        for net in [passt, tap] {
            assert_eq!(net.to_string().parse::<NetConfig>().unwrap(), net);
        }
    }

    #[test]
    fn interface_names_follow_linux() {
        for name in ["tap0", "a", "vm.12_3-x@if4", "123456789012345"] {
            assert!(InterfaceName::try_from(name.to_owned()).is_ok(), "{name}");
        }
        for name in [
            "",
            ".",
            "..",
            "a b",
            "a/b",
            "a:b",
            "tap%d",
            "é",
            "1234567890123456",
        ] {
            assert!(InterfaceName::try_from(name.to_owned()).is_err(), "{name}");
        }
    }

    #[test]
    fn a_guest_is_named_where_networks_have_names() {
        let named = |text: &str, name: &str| {
            let mut net = net(text).unwrap();
            net.name_guest(name);
            assert!(net.validate(0).is_ok(), "{text}");
            net.hostname.map(|name| name.to_string())
        };
        for text in ["user", "nat", "network=lab"] {
            assert_eq!(named(text, "web").as_deref(), Some("web"));
            assert_eq!(named(text, "my_web"), None);
        }
        assert_eq!(named("nat,hostname=db", "web").as_deref(), Some("db"));
        assert_eq!(named("tap=t", "web"), None);
        assert_eq!(named("bridge=br0", "web"), None);
    }

    #[test]
    fn mac_addresses_need_twelve_digits_in_pairs() {
        for text in [
            "",
            "525400123456",
            "52-54-00-12-34-56",
            "52:54:00:12:34:+6",
            "5:4:0:1:3:5",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        assert!("52:54:00:12:34:56:78".parse::<MacAddress>().is_err());
        assert!("00:00:00:00:00:00".parse::<MacAddress>().is_err());
    }

    proptest! {
        #[test]
        fn display_parses_back(
            tap in "[a-z,=@][a-z0-9,.=-]{0,14}",
            mac in proptest::option::of(any::<[u8; 6]>()),
            mtu in proptest::option::of(68..=65521i64),
            queues in proptest::option::of(1..=8i64),
            iothread in any::<bool>(),
            limits in proptest::collection::vec(proptest::option::of(1..=i64::MAX), 8),
            name in proptest::option::of("[a-z0-9._-]{1,64}"),
        ) {
            let mut limits = limits.into_iter();
            let mut rate = || {
                let quantity = |number| Quantity::try_from(number).unwrap();
                LimitConfig::Rate {
                    per_second: limits.next().flatten().map(quantity),
                    burst: limits.next().flatten().map(quantity),
                }
            };
            let mut both = || LimitsConfig { bytes: rate(), operations: rate() };
            let limits = NetLimitsConfig { receive: both(), transmit: both() };
            let net = NetConfig {
                mac: mac.and_then(|bytes| MacAddress::try_from(bytes).ok()),
                mtu: mtu.map(|size| Mtu::try_from(size).unwrap()),
                queues: queues.map(|count| QueuePairs::try_from(count).unwrap()),
                iothread,
                name: name.map(|name| name.parse().unwrap()),
                limits,
                ..NetConfig::new(InterfaceName::try_from(tap).unwrap())
            };
            prop_assert_eq!(net.to_string().parse::<NetConfig>().unwrap(), net);
        }

        #[test]
        fn any_text_is_parsed_or_refused(text in ".*", mac in "[0-9a-f:é]{0,20}") {
            let _ = text.parse::<NetConfig>();
            let _ = text.parse::<MacAddress>();
            let _ = mac.parse::<MacAddress>();
        }
    }
}
