//! The settings on the command line.

use alloc::format;
use alloc::string::String;
use core::net::{Ipv4Addr, SocketAddrV4};
use core::ops::RangeInclusive;
use core::str::FromStr;

use runtime::arguments;
use runtime::virtio::Completion;

use crate::frame::MAX_UNCUT_SIZE;

/// The smallest frame that Ethernet has, without its check sequence.
const MIN_FRAME_SIZE: u64 = 60;
/// The largest frame that a card cuts into segments.
const MAX_CUT_SIZE: u64 = 65_536;
/// The addresses that user networks give by default.
const DEFAULT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const DEFAULT_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);

/// A whole load.
pub struct Settings {
    /// What is loaded.
    pub test: Test,
    /// Operations under way at a time in each queue.
    pub depth: u16,
    /// When it ends.
    pub limit: Limit,
    /// How the end of an operation is noticed.
    pub completion: Completion,
}

/// What is loaded.
pub enum Test {
    /// A block device.
    Block(BlockSettings),
    /// A network card.
    Net(NetSettings),
    /// Connections of TCP.
    Tcp(InternetSettings, TcpMode),
    /// Datagrams in frames of this many bytes.
    Udp(InternetSettings, u32),
}

/// Who speaks to whom in loads of TCP and UDP.
pub struct InternetSettings {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// The address of the router on the way to the peer, or the peer's own if there is none.
    pub gateway: Ipv4Addr,
    /// The other end.
    pub peer: SocketAddrV4,
}

/// What connections of TCP are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TcpMode {
    /// One sends to the peer.
    Send,
    /// One receives from the peer.
    Receive,
    /// Many are opened, and the peer ends them.
    Connect,
    /// On one, a byte goes to the peer and back.
    RoundTrip,
}

/// When a load ends.
#[derive(Clone, Copy)]
pub enum Limit {
    /// After this time.
    Seconds(u64),
    /// After this many operations.
    Operations(u64),
}

/// The load of a block device.
pub struct BlockSettings {
    /// The kind of requests.
    pub mode: BlockMode,
    /// Their places.
    pub pattern: Pattern,
    /// Bytes of a request.
    pub block_size: u32,
    /// Bytes from the start of the disk that are used; `None` is all.
    pub span: Option<u64>,
    /// How many queues are used.
    pub queues: u16,
    /// Whether data is stamped and checked.
    pub verify: bool,
    /// The seed of the stamps.
    pub seed: u64,
}

/// The kinds of requests to a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockMode {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both, half and half.
    Mixed,
}

/// The places of requests to a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// One after the other, and from the start again.
    Sequential,
    /// At random.
    Random,
}

/// The load of a network card.
pub struct NetSettings {
    /// Which way frames go.
    pub mode: NetMode,
    /// Bytes of a frame, with its Ethernet header.
    pub packet_size: u32,
}

/// Which way frames go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetMode {
    /// To the host.
    Transmit,
    /// From the host.
    Receive,
    /// To the host and back.
    RoundTrip,
}

impl Settings {
    /// Reads and checks the arguments; an error is a line for the user.
    pub fn from_command_line() -> Result<Self, String> {
        let test = match arguments::value("test") {
            Some("block") => Test::Block(BlockSettings::from_command_line()?),
            Some("net") => Test::Net(NetSettings::from_command_line()?),
            Some("tcp") => Test::Tcp(
                InternetSettings::from_command_line()?,
                choice(
                    "mode",
                    &[
                        ("send", TcpMode::Send),
                        ("receive", TcpMode::Receive),
                        ("connect", TcpMode::Connect),
                        ("round-trip", TcpMode::RoundTrip),
                    ],
                )?,
            ),
            Some("udp") => Test::Udp(
                InternetSettings::from_command_line()?,
                number("packet-size", MIN_FRAME_SIZE..=MAX_UNCUT_SIZE as u64)?.unwrap_or(64) as u32,
            ),
            other => {
                let given = other.map_or_else(String::new, |name| format!(", not '{name}'"));
                return Err(format!(
                    "expected test=block, test=net, test=tcp or test=udp{given}"
                ));
            }
        };
        let limit = match (
            number("seconds", 1..=3600)?,
            number("operations", 1..=u64::MAX)?,
        ) {
            (Some(_), Some(_)) => {
                return Err("expected seconds=N or operations=N, not both".into());
            }
            (_, Some(count)) => Limit::Operations(count),
            (seconds, None) => Limit::Seconds(seconds.unwrap_or(1)),
        };
        Ok(Self {
            test,
            depth: number("depth", 1..=256)?.unwrap_or(32) as u16,
            limit,
            completion: choice(
                "completion",
                &[
                    ("polled", Completion::Polled),
                    ("interrupt", Completion::Interrupt),
                ],
            )?,
        })
    }
}

impl BlockSettings {
    fn from_command_line() -> Result<Self, String> {
        let block_size = number("block-size", 512..=1 << 20)?.unwrap_or(4096) as u32;
        if !block_size.is_power_of_two() {
            return Err(format!("block-size={block_size}: expected a power of two"));
        }
        Ok(Self {
            mode: choice(
                "mode",
                &[
                    ("read", BlockMode::Read),
                    ("write", BlockMode::Write),
                    ("mixed", BlockMode::Mixed),
                ],
            )?,
            pattern: choice(
                "pattern",
                &[("random", Pattern::Random), ("seq", Pattern::Sequential)],
            )?,
            block_size,
            span: number("span", u64::from(block_size)..=1 << 50)?,
            queues: number("queues", 1..=4)?.unwrap_or(1) as u16,
            verify: arguments::flag("verify"),
            seed: number("seed", 0..=u64::MAX)?.unwrap_or(0),
        })
    }
}

impl NetSettings {
    fn from_command_line() -> Result<Self, String> {
        let mode = choice(
            "mode",
            &[
                ("transmit", NetMode::Transmit),
                ("receive", NetMode::Receive),
                ("round-trip", NetMode::RoundTrip),
            ],
        )?;
        let max = match mode {
            NetMode::Transmit => MAX_CUT_SIZE,
            NetMode::Receive | NetMode::RoundTrip => MAX_UNCUT_SIZE as u64,
        };
        Ok(Self {
            mode,
            packet_size: number("packet-size", MIN_FRAME_SIZE..=max)?.unwrap_or(64) as u32,
        })
    }
}

impl InternetSettings {
    fn from_command_line() -> Result<Self, String> {
        let peer: Option<SocketAddrV4> = parsed("peer", "an address and a port")?;
        Ok(Self {
            address: parsed("address", "an IPv4 address")?.unwrap_or(DEFAULT_ADDRESS),
            gateway: parsed("gateway", "an IPv4 address")?.unwrap_or(DEFAULT_GATEWAY),
            peer: peer.ok_or("expected peer=ADDRESS:PORT")?,
        })
    }
}

/// Returns the value of `name=VALUE`, which has to be `what`, if it is given.
fn parsed<T: FromStr>(name: &str, what: &str) -> Result<Option<T>, String> {
    let Some(text) = arguments::value(name) else {
        return Ok(None);
    };
    let value = text.parse();
    value
        .map(Some)
        .map_err(|_| format!("{name}={text}: expected {what}"))
}

/// Returns the number `name=N` in `range`, if it is given.
fn number(name: &str, range: RangeInclusive<u64>) -> Result<Option<u64>, String> {
    let Some(text) = arguments::value(name) else {
        return Ok(None);
    };
    match arguments::parse_number(text) {
        Some(number) if range.contains(&number) => Ok(Some(number)),
        _ => Err(format!(
            "{name}={text}: expected a number from {} to {}",
            range.start(),
            range.end()
        )),
    }
}

/// Returns the meaning of `name=WORD` among `choices`; the first is the default.
fn choice<T: Copy>(name: &str, choices: &[(&str, T)]) -> Result<T, String> {
    let Some(text) = arguments::value(name) else {
        return Ok(choices[0].1);
    };
    match choices.iter().find(|(word, _)| *word == text) {
        Some(&(_, value)) => Ok(value),
        None => {
            let words: alloc::vec::Vec<&str> = choices.iter().map(|&(word, _)| word).collect();
            Err(format!("{name}={text}: expected {}", words.join(" or ")))
        }
    }
}
