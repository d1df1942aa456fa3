// SPDX-License-Identifier: Apache-2.0

//! Commands about block devices.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::Instant;

use crate::console::say;
use crate::error::{Context, Error, Result};
use crate::pattern::{self, Crc32};
use crate::sys::{self, BlockRange};
use crate::system::{attribute, number, rate};
use crate::workload::{AREAS, Area, MAX_TRANSFER, Step, Transfer};

const CHUNK: usize = MAX_TRANSFER;

/// The strictest alignment of memory that direct access requires.
const ALIGNMENT: usize = 4096;

pub fn info(disk: &str) -> Result<String> {
    let block = |name: &str| number(&format!("/sys/block/{disk}/{name}"));
    // A disk need not have a serial number.
    let serial = attribute(&format!("/sys/block/{disk}/serial")).unwrap_or_default();
    Ok(format!(
        "size={} ro={} serial={} logical={} physical={} discard-max={} write-zeroes-max={}",
        size(disk)?,
        block("ro")?,
        if serial.is_empty() { "-" } else { &serial },
        block("queue/logical_block_size")?,
        block("queue/physical_block_size")?,
        block("queue/discard_max_bytes")?,
        block("queue/write_zeroes_max_bytes")?,
    ))
}

/// Returns the size of a disk in bytes.
pub fn size(disk: &str) -> Result<u64> {
    // Always in sectors of 512 bytes, whatever the block size of the disk.
    Ok(number(&format!("/sys/block/{disk}/size"))? * 512)
}

pub fn is_read_only(disk: &str) -> Result<bool> {
    Ok(number(&format!("/sys/block/{disk}/ro"))? != 0)
}

pub fn write_verify(disk: &str, offset: u64, length: u64, seed: u64) -> Result<String> {
    let device = Disk::open(disk, offset, length)?;
    let mut buffer = Buffer::new();

    let started = Instant::now();
    device.each_chunk(|position, size| {
        let chunk = buffer.slice(size);
        pattern::fill(seed, position, chunk);
        device
            .file
            .write_all_at(chunk, offset + position)
            .context(format_args!("write {size} bytes at {}", offset + position))
    })?;
    device.file.sync_all().context("flush")?;
    let write_rate = rate(length, started.elapsed());

    if !device.direct {
        sys::forget_cached_blocks(&device.file).context("drop cached blocks")?;
    }
    let started = Instant::now();
    device.each_chunk(|position, size| {
        let chunk = buffer.slice(size);
        device.read(chunk, offset + position)?;
        match pattern::first_difference(seed, position, chunk) {
            None => Ok(()),
            Some(index) => Err(Error::new(format!("byte at {} is wrong", offset + index))),
        }
    })?;
    let read_rate = rate(length, started.elapsed());

    let direct = if device.direct { "yes" } else { "no" };
    Ok(format!(
        "direct={direct} write={write_rate} read={read_rate}"
    ))
}

/// Reads, writes and flushes at random by several threads, each in its own area of every disk, and
/// checks the content of the disks at the end.
pub fn verify_random(names: &[String], seed: u64, operations: u32) -> Result<String> {
    let disks = names
        .iter()
        .zip(seed..)
        .map(|(name, seed)| RandomDisk::open(name, seed))
        .collect::<Result<Vec<_>>>()?;
    // Later changes of their sizes do not matter.
    say(format_args!("bantam: disks are open"));
    let opened = &disks;
    let areas = thread::scope(|scope| {
        // The same threads use all disks, as starting a thread with its memory takes longest.
        let threads: Vec<_> = (0..AREAS)
            .map(|area| scope.spawn(move || work_on(area, opened, operations)))
            .collect();
        let ended = threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(Error::new("a thread has panicked")))
        });
        ended.collect::<Result<Vec<_>>>()
    })?;
    let mut buffer = Buffer::new();
    for disk in &disks {
        disk.buffered.file.sync_all().context("flush")?;
    }
    for (disk, area) in areas.iter().flat_map(|areas| disks.iter().zip(areas)) {
        for position in (0..area.size()).step_by(CHUNK) {
            let size = CHUNK.min(area.size() - position);
            let offset = area.start() + position as u64;
            disk.direct
                .expect(area, buffer.slice(size), offset)
                .context(disk.name)?;
        }
    }
    let block_sizes = disks.iter().map(|disk| disk.block_size.to_string());
    Ok(format!(
        "block-sizes={}",
        block_sizes.collect::<Vec<_>>().join("+")
    ))
}

/// A disk for random work.
struct RandomDisk<'a> {
    name: &'a str,
    direct: Disk,
    buffered: Disk,
    block_size: usize,
    seed: u64,
}

impl<'a> RandomDisk<'a> {
    fn open(name: &'a str, seed: u64) -> Result<Self> {
        let length = size(name)?;
        let block_size = number(&format!("/sys/block/{name}/queue/logical_block_size"))?;
        Ok(Self {
            name,
            direct: Disk::open_with(name, true, true, length)?,
            buffered: Disk::open_with(name, true, false, length)?,
            block_size: block_size as usize,
            seed,
        })
    }
}

fn work_on(number: u64, disks: &[RandomDisk<'_>], operations: u32) -> Result<Vec<Area>> {
    let mut buffer = Buffer::new();
    let work = |disk: &RandomDisk<'_>| {
        let mut area = Area::new(number, disk.direct.length, disk.block_size, disk.seed);
        for step in 0..operations {
            carry_out(&mut area, &mut buffer, disk)
                .context(format_args!("{}, area {number}, step {step}", disk.name))?;
        }
        Ok(area)
    };
    disks.iter().map(work).collect()
}

fn carry_out(area: &mut Area, buffer: &mut Buffer, disk: &RandomDisk<'_>) -> Result<()> {
    let step = area.next_step();
    let transfer = match step {
        Step::Write(transfer) | Step::Read(transfer) => transfer,
        Step::Clear { transfer, discards } => return clear(disk, transfer, discards),
        Step::Flush { data_only } => {
            let flushed = match data_only {
                true => disk.buffered.file.sync_data(),
                false => disk.buffered.file.sync_all(),
            };
            return flushed.context("flush");
        }
    };
    let Transfer { offset, length, .. } = transfer;
    let device = if transfer.direct {
        &disk.direct
    } else {
        &disk.buffered
    };
    let part = transfer.misalignment..transfer.misalignment + length;
    let buffer = &mut buffer.slice(part.end)[part];
    if matches!(step, Step::Read(_)) {
        return device.expect(area, buffer, offset);
    }
    area.fill(offset, buffer);
    device
        .file
        .write_all_at(buffer, offset)
        .context(format_args!("write {length} bytes at {offset}"))
}

fn clear(disk: &RandomDisk<'_>, transfer: Transfer, discards: bool) -> Result<()> {
    let Transfer { offset, length, .. } = transfer;
    let file = &disk.buffered.file;
    let length = length as u64;
    if discards {
        sys::block_range(file, BlockRange::Discard, offset, length)
            .context(format_args!("discard {length} bytes at {offset}"))?;
    }
    sys::block_range(file, BlockRange::ZeroOut, offset, length)
        .context(format_args!("zero {length} bytes at {offset}"))
}

pub fn checksum(disk: &str) -> Result<String> {
    let length = size(disk)?;
    let device = Disk::open_read_only(disk, length)?;
    let mut buffer = Buffer::new();
    let mut crc = Crc32::new();
    device.each_chunk(|position, size| {
        let chunk = buffer.slice(size);
        device.read(chunk, position)?;
        crc.update(chunk);
        Ok(())
    })?;
    Ok(format!("bytes={length} crc32={:08x}", crc.value()))
}

/// The device decides what a discarded block reads as: report it, expect nothing.
pub fn discard(disk: &str, offset: u64, length: u64) -> Result<String> {
    let device = Disk::open(disk, offset, length)?;
    sys::block_range(&device.file, BlockRange::Discard, offset, length).context("discard")?;
    let zeroes = if device.first_nonzero(offset)?.is_none() {
        "yes"
    } else {
        "no"
    };
    Ok(format!("zeroes={zeroes}"))
}

pub fn zeroout(disk: &str, offset: u64, length: u64) -> Result<String> {
    let device = Disk::open(disk, offset, length)?;
    sys::block_range(&device.file, BlockRange::ZeroOut, offset, length).context("zero out")?;
    match device.first_nonzero(offset)? {
        None => Ok(String::new()),
        Some(position) => Err(Error::new(format!("byte at {position} is not zero"))),
    }
}

pub fn write_refused(disk: &str) -> Result<String> {
    let path = format!("/dev/{disk}");
    let block = [0; 512];
    // The device may refuse the open or the write.
    let written = OpenOptions::new().write(true).open(&path).and_then(|file| {
        file.write_all_at(&block, 0)?;
        file.sync_all()
    });
    match written {
        Ok(()) => Err(Error::new("the write was accepted")),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Ok(format!("error={:?}", error.kind()))
        }
        Err(error) => Err(error).context(format_args!("write to {path}")),
    }
}

/// A block device and the length of the part of it that a command uses.
struct Disk {
    file: File,
    direct: bool,
    length: u64,
}

impl Disk {
    fn open(disk: &str, offset: u64, length: u64) -> Result<Self> {
        let block_size = number(&format!("/sys/block/{disk}/queue/logical_block_size"))?;
        let direct = offset.is_multiple_of(block_size) && length.is_multiple_of(block_size);
        Self::open_with(disk, true, direct, length)
    }

    fn open_read_only(disk: &str, length: u64) -> Result<Self> {
        Self::open_with(disk, false, true, length)
    }

    fn open_with(disk: &str, write: bool, direct: bool, length: u64) -> Result<Self> {
        let path = format!("/dev/{disk}");
        let file = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(if direct { libc::O_DIRECT } else { 0 })
            .open(&path)
            .context(format_args!("open {path}"))?;
        Ok(Self {
            file,
            direct,
            length,
        })
    }

    /// Calls `work` with the position, counted from the start of the part, and the size of each chunk.
    fn each_chunk(&self, mut work: impl FnMut(u64, usize) -> Result<()>) -> Result<()> {
        let mut position = 0;
        while position < self.length {
            let size = (self.length - position).min(CHUNK as u64);
            work(position, size as usize)?;
            position += size;
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let size = buffer.len();
        self.file
            .read_exact_at(buffer, offset)
            .context(format_args!("read {size} bytes at {offset}"))
    }

    /// Reads into `buffer`, which is then as `area` has it.
    fn expect(&self, area: &Area, buffer: &mut [u8], offset: u64) -> Result<()> {
        self.read(buffer, offset)?;
        let mut expected = [0; Area::PAGE];
        let mut position = offset;
        for chunk in buffer.chunks(Area::PAGE) {
            let expected = &mut expected[..chunk.len()];
            area.fill(position, expected);
            if let Some(index) = expected.iter().zip(chunk).position(|(a, b)| a != b) {
                let wrong = position + index as u64;
                return Err(Error::new(format!("byte at {wrong} is wrong")));
            }
            position += chunk.len() as u64;
        }
        Ok(())
    }

    fn first_nonzero(&self, offset: u64) -> Result<Option<u64>> {
        let mut buffer = Buffer::new();
        let mut found = None;
        self.each_chunk(|position, size| {
            if found.is_none() {
                let chunk = buffer.slice(size);
                self.read(chunk, offset + position)?;
                let index = chunk.iter().position(|&byte| byte != 0);
                found = index.map(|index| offset + position + index as u64);
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// A chunk of memory aligned for direct access, with room for another page.
struct Buffer(Vec<u8>);

impl Buffer {
    fn new() -> Self {
        Self(vec![0; CHUNK + 2 * ALIGNMENT])
    }

    fn slice(&mut self, size: usize) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(ALIGNMENT);
        &mut self.0[start..start + size]
    }
}
