//! The settings on the command line.

use alloc::format;
use alloc::string::String;
use core::ops::RangeInclusive;

use runtime::arguments;
use runtime::virtio::Completion;

use crate::frame::MAX_UNCUT_SIZE;

/// The smallest frame that Ethernet has, without its check sequence.
const MIN_FRAME_SIZE: u64 = 60;
/// The largest frame that a card cuts into segments.
const MAX_CUT_SIZE: u64 = 65_536;

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
            other => {
                let given = other.map_or_else(String::new, |name| format!(", not '{name}'"));
                return Err(format!("expected test=block or test=net{given}"));
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
