//! Writes to the first block device in rounds, each ended by a flush, or checks what an earlier run has
//! written, whose monitor may have been killed at any moment.
//!
//! - `mode=write|verify` (`write`), `seed=N` (0): a seed always leads to the same requests
//! - `mode=write` prints `flushed N` when round N, from 1 on, has been flushed, and goes on for ever, or
//!   until `rounds=N`. If a request fails, it prints `stopped in round N` and checks what it has flushed
//!   before that round
//! - `mode=verify` checks the whole disk: `flushed=N` says which round was the last that was flushed for
//!   certain. What later rounds have written may be there or not. `untouched=BYTE` (0) is what blocks have
//!   that no round has written.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec;
use alloc::vec::Vec;

use runtime::random::Random;
use runtime::virtio::block::{
    Block, RequestHeader, RequestType, SECTOR_SIZE, STATUS_OK, SectorRange,
};
use runtime::virtio::{Buffer, Completion, Error, MmioDevice, device_id, wait_for_used};
use runtime::{arguments, payload, println, report};

const QUEUE_SIZE: u16 = 128;
const BLOCK_SIZE: usize = 4096;
const SECTORS_PER_BLOCK: u64 = (BLOCK_SIZE / SECTOR_SIZE) as u64;
/// Most requests of a round.
const ROUND: usize = 32;
/// How many rounds the guest can be ahead of what its console has shown.
const MAX_AHEAD: u64 = 1024;
/// The odd number nearest to 2^64 divided by the golden ratio.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

payload!(durable);

fn durable() {
    if let Err(reason) = run() {
        report::fail("durable", reason);
    }
}

fn run() -> Result<(), String> {
    let seed = arguments::parsed("seed").unwrap_or(0);
    let device = arguments::virtio_mmio_windows()
        .filter_map(|window| MmioDevice::probe(window).ok())
        .find(|device| device.device_id() == device_id::BLOCK)
        .ok_or("there is no block device")?;
    let mut block = Block::open(device, QUEUE_SIZE).map_err(|error| error.to_string())?;
    let schedule = || Schedule::new(seed, block.capacity() / SECTORS_PER_BLOCK);
    let (written, checked) = (schedule(), schedule());
    match arguments::value("mode") {
        None | Some("write") => match write(&mut block, written)? {
            Some(round) => verify(&mut block, checked, round - 1),
            None => Ok(()),
        },
        Some("verify") => {
            let flushed = arguments::parsed("flushed").ok_or("flushed= is missing")?;
            verify(&mut block, checked, flushed)
        }
        Some(other) => Err(format!("mode={other}: expected write or verify")),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Write,
    Zero,
    Discard,
}

/// What the rounds do to the blocks of the disk.
struct Schedule {
    seed: u64,
    random: Random,
    blocks: u64,
}

impl Schedule {
    fn new(seed: u64, blocks: u64) -> Self {
        Self {
            seed,
            random: Random::new(seed),
            blocks,
        }
    }

    /// Returns the changes of the next round, each of another block.
    fn next_round(&mut self) -> Vec<(u64, Change)> {
        let mut changes: Vec<(u64, Change)> = Vec::with_capacity(ROUND);
        for _ in 0..ROUND {
            let block = self.random.below(self.blocks);
            let change = match self.random.below(16) {
                0 => Change::Zero,
                1 => Change::Discard,
                _ => Change::Write,
            };
            if changes.iter().all(|&(other, _)| other != block) {
                changes.push((block, change));
            }
        }
        changes
    }
}

/// Returns a word of a block; the first one of each sector is the round that wrote it.
fn word(seed: u64, block: u64, index: usize, round: u64) -> u64 {
    if index.is_multiple_of(SECTOR_SIZE / 8) {
        return round;
    }
    (seed ^ (block << 20) ^ ((index as u64) << 8))
        .wrapping_add(round << 40)
        .wrapping_mul(FACTOR)
}

/// Returns the round in which a request has failed.
fn write(block: &mut Block, mut schedule: Schedule) -> Result<Option<u64>, String> {
    let rounds = arguments::parsed("rounds").unwrap_or(u64::MAX);
    let mut data = vec![0_u64; ROUND * BLOCK_SIZE / 8];
    let mut ranges = Vec::with_capacity(ROUND);
    for round in 1..=rounds {
        let changes = schedule.next_round();
        ranges.clear();
        let parts = data.chunks_exact_mut(BLOCK_SIZE / 8);
        for (&(place, change), words) in changes.iter().zip(parts) {
            let (kind, buffer) = match change {
                Change::Write => {
                    for (index, target) in words.iter_mut().enumerate() {
                        *target = word(schedule.seed, place, index, round);
                    }
                    (RequestType::Write, Buffer::readable(words))
                }
                Change::Zero | Change::Discard => {
                    // The first bit lets the device give the blocks back.
                    let flags = u32::from(change == Change::Zero && place.is_multiple_of(2));
                    ranges.push([SectorRange {
                        sector: place * SECTORS_PER_BLOCK,
                        count: SECTORS_PER_BLOCK as u32,
                        flags,
                    }]);
                    let kind = match change {
                        Change::Zero => RequestType::WriteZeroes,
                        _ => RequestType::Discard,
                    };
                    // The vector has room for all, so nothing moves.
                    let range = ranges.last().ok_or("there is a range")?;
                    (kind, Buffer::readable(range))
                }
            };
            let header = RequestHeader {
                kind: kind as u32,
                reserved: 0,
                sector: match change {
                    Change::Write => place * SECTORS_PER_BLOCK,
                    _ => 0,
                },
            };
            let submitted = block.submit_header(header, Some(buffer));
            submitted.map_err(|error| error.to_string())?;
        }
        block.kick();
        let mut has_failed = false;
        for _ in &changes {
            let used = wait_for_used(&block.device, &mut block.queue, Completion::Polled);
            let used = used.map_err(|error| format!("round {round}: {error}"))?;
            has_failed |= block.status_of(used) != STATUS_OK;
        }
        match block.flush(Completion::Polled) {
            Ok(()) if !has_failed => println!("flushed {round}"),
            Ok(()) | Err(Error::Status(_)) => {
                println!("stopped in round {round}");
                return Ok(Some(round));
            }
            Err(error) => return Err(format!("round {round}: the flush: {error}")),
        }
    }
    Ok(None)
}

/// What is known of a block.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The last round that wrote it.
    round: u64,
    /// Whether it has zeroes since that round.
    is_zero: bool,
    /// Whether it may be zero because of a round after those that were flushed.
    may_be_zero: bool,
    /// Whether it was discarded, so that it may have anything.
    is_unknown: bool,
}

/// Checks the disk, on which rounds up to `flushed` were flushed.
fn verify(block: &mut Block, mut schedule: Schedule, flushed: u64) -> Result<(), String> {
    let untouched: u8 = arguments::parsed("untouched").unwrap_or(0);
    let mut blocks = vec![Known::default(); schedule.blocks as usize];
    for round in 1..=flushed + MAX_AHEAD {
        for (place, change) in schedule.next_round() {
            let known = &mut blocks[place as usize];
            match change {
                Change::Write if round <= flushed => {
                    *known = Known {
                        round,
                        ..Known::default()
                    };
                }
                Change::Write => {}
                Change::Zero if round <= flushed => {
                    *known = Known {
                        round,
                        is_zero: true,
                        ..Known::default()
                    };
                }
                Change::Zero => known.may_be_zero = true,
                Change::Discard => known.is_unknown = true,
            }
        }
    }
    let mut data = vec![0_u64; BLOCK_SIZE / 8];
    let mut newer = 0_u64;
    let mut faults = 0_u64;
    for (place, known) in blocks.iter().enumerate() {
        let place = place as u64;
        let read = block.request(
            RequestType::Read,
            place * SECTORS_PER_BLOCK,
            Some(Buffer::writable(&mut data)),
            Completion::Polled,
        );
        read.map_err(|error| format!("block {place}: {error}"))?;
        if known.is_unknown {
            continue;
        }
        for words in data.chunks_exact(SECTOR_SIZE / 8).enumerate() {
            match check_sector(schedule.seed, place, words, *known, flushed, untouched) {
                Ok(is_newer) => newer += u64::from(is_newer),
                Err(reason) => {
                    faults += 1;
                    if faults <= 8 {
                        println!("FAIL: block {place}: {reason}");
                    }
                }
            }
        }
    }
    println!("durable: {newer} sectors of later rounds");
    match faults {
        0 => Ok(()),
        _ => Err(format!("{faults} sectors are wrong")),
    }
}

/// Checks a sector of block `place`. Returns whether a round has written it that may not have been flushed.
fn check_sector(
    seed: u64,
    place: u64,
    (sector, words): (usize, &[u64]),
    known: Known,
    flushed: u64,
    untouched: u8,
) -> Result<bool, String> {
    let is_filled = |byte: u8| {
        let value = u64::from_le_bytes([byte; 8]);
        words.iter().all(|&word| word == value)
    };
    let is_as_before = match known {
        Known { round: 0, .. } => is_filled(untouched),
        Known { is_zero: true, .. } => is_filled(0),
        Known { round, .. } => words[0] == round,
    };
    if is_as_before && (known.round == 0 || known.is_zero) {
        return Ok(false);
    }
    if known.may_be_zero && is_filled(0) {
        return Ok(true);
    }
    let round = words[0];
    if !is_as_before && !(flushed + 1..=flushed + MAX_AHEAD).contains(&round) {
        return Err(format!(
            "it has {round:#x} in sector {sector}, and round {} was flushed (zero: {})",
            known.round, known.is_zero
        ));
    }
    let first = sector * SECTOR_SIZE / 8;
    for (index, &found) in words.iter().enumerate() {
        let expected = word(seed, place, first + index, round);
        if found != expected {
            return Err(format!(
                "word {index} of sector {sector} is {found:#x}, not {expected:#x} of round {round}"
            ));
        }
    }
    Ok(!is_as_before)
}
