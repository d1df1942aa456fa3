//! Copies and comparisons of disks in memory, whose runs have any borders.

use std::io;
use std::ops::Range;
use std::sync::Mutex;

use super::*;
use crate::{BlockStatus, Content, Direction, Extent, Image, Options, Target};

/// Numbers that are the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        // xorshift64
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A disk whose runs are data, which may be zeroes, known zeroes, or held by a backing file.
#[derive(Debug)]
struct Disk {
    bytes: Vec<u8>,
    /// Where each run ends, and its status.
    runs: Vec<(u64, Content, Option<usize>)>,
}

impl Disk {
    fn random(size: u64, seed: u64) -> Disk {
        let mut random = Random(seed);
        let mut disk = Disk {
            bytes: vec![0; size as usize],
            runs: Vec::new(),
        };
        let mut start = 0;
        while start < size {
            let longest = [1, 700, 5000, 900_000][random.below(4) as usize];
            let end = size.min(start + 1 + random.below(longest));
            let data = Content::Data { file: 0, offset: 0 };
            let (content, depth) = match random.below(4) {
                0 => (Content::Zeroes, None),
                1 => (Content::Zeroes, Some(0)),
                2 => (data, Some(random.below(2) as usize)),
                // Data that are zeroes.
                _ => (data, Some(0)),
            };
            if content == data && random.below(3) > 0 {
                let run = &mut disk.bytes[start as usize..end as usize];
                run.fill_with(|| random.below(255) as u8);
            }
            disk.runs.push((end, content, depth));
            start = end;
        }
        disk
    }
}

impl Image for Disk {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn map(&self, range: Range<u64>, _: Direction) -> Extent {
        Extent::Slow {
            len: range.end - range.start,
        }
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let start = offset as usize;
        bytes.copy_from_slice(&self.bytes[start..start + bytes.len()]);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("a source is not written")
    }

    fn write_zeroes(&self, _: Range<u64>, _: bool) -> io::Result<()> {
        unreachable!("a source is not written")
    }

    fn discard(&self, _: Range<u64>) -> io::Result<()> {
        unreachable!("a source is not written")
    }

    fn flush(&self) -> io::Result<()> {
        unreachable!("a source is not written")
    }

    fn status(&self, range: Range<u64>) -> io::Result<BlockStatus> {
        let run = self.runs.iter().find(|run| run.0 > range.start).unwrap();
        Ok(BlockStatus {
            len: run.0.min(range.end) - range.start,
            content: run.1,
            depth: run.2,
        })
    }
}

/// A target that checks what the trait promises it.
struct Memory {
    bytes: Mutex<(Vec<u8>, u64)>,
    unit: u64,
    is_sequential: bool,
}

impl Memory {
    fn new(size: u64, fill: u8, unit: u64, is_sequential: bool) -> Memory {
        Memory {
            bytes: Mutex::new((vec![fill; size as usize], 0)),
            unit,
            is_sequential,
        }
    }

    fn fill(&self, range: Range<u64>, bytes: &[u8]) {
        let mut memory = self.bytes.lock().unwrap();
        let size = memory.0.len() as u64;
        if self.is_sequential {
            assert!(range.start >= memory.1, "{range:?} comes late");
            assert!(range.start.is_multiple_of(self.unit));
            assert!(range.end.is_multiple_of(self.unit) || range.end == size);
        }
        memory.1 = range.end;
        memory.0[range.start as usize..range.end as usize].copy_from_slice(bytes);
    }
}

impl Target for Memory {
    fn unit(&self) -> u64 {
        self.unit
    }

    fn is_sequential(&self) -> bool {
        self.is_sequential
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.fill(offset..offset + bytes.len() as u64, bytes);
        Ok(())
    }

    fn write_zeroes(&self, range: Range<u64>) -> io::Result<()> {
        let zeroes = vec![0; (range.end - range.start) as usize];
        self.fill(range, &zeroes);
        Ok(())
    }

    fn finish(&self, _: bool) -> io::Result<()> {
        Ok(())
    }
}

static RUN: AtomicBool = AtomicBool::new(false);

#[test]
fn a_copy_is_the_same_with_any_options() {
    let mut random = Random(99);
    for seed in 1..60 {
        let disk = Disk::random(3_000_000 + random.below(999), seed);
        let size = disk.size();
        for (unit, is_sequential) in [(512, false), (1 << 16, true), (2 << 20, true)] {
            for sparse in [Some(4096), Some(512), Some(1 << 17), None] {
                for target_is_zero in [true, false] {
                    let options = CopyOptions {
                        sparse,
                        target_is_zero,
                        layers: None,
                    };
                    let fill = if target_is_zero { 0 } else { 0xee };
                    let target = Memory::new(size, fill, unit, is_sequential);
                    let job = Job {
                        progress: &|share| assert!((0.0..=1.0).contains(&share)),
                        cancelled: &RUN,
                    };
                    copy(&disk, 0..size, &target, 0, options, job).unwrap();
                    let copied = target.bytes.into_inner().unwrap().0;
                    assert!(copied == disk.bytes, "{seed} {unit} {options:?}");
                }
            }
        }
    }
}

#[test]
fn a_part_is_copied_to_another_place() {
    let mut random = Random(5);
    let job = Job {
        progress: &|_| {},
        cancelled: &RUN,
    };
    for seed in 1..40 {
        let disk = Disk::random(2_000_000, seed);
        let start = random.below(1_000_000);
        let end = start + random.below(1_000_000);
        let to = random.below(500_000);
        let options = CopyOptions {
            sparse: Some(4096),
            target_is_zero: false,
            layers: None,
        };
        let target = Memory::new(2_000_000, 0xee, 512, false);
        copy(&disk, start..end, &target, to, options, job).unwrap();
        let mut expected = vec![0xee; 2_000_000];
        let part = &disk.bytes[start as usize..end as usize];
        expected[to as usize..to as usize + part.len()].copy_from_slice(part);
        assert!(target.bytes.into_inner().unwrap().0 == expected);
    }
}

#[test]
fn what_the_backing_file_of_the_target_has_is_left_out() {
    let job = Job {
        progress: &|_| {},
        cancelled: &RUN,
    };
    for seed in 1..40 {
        let disk = Disk::random(2_000_000, seed);
        let options = CopyOptions {
            sparse: Some(4096),
            target_is_zero: false,
            layers: Some(1),
        };
        let target = Memory::new(2_000_000, 0xee, 512, false);
        copy(&disk, 0..2_000_000, &target, 0, options, job).unwrap();
        let copied = target.bytes.into_inner().unwrap().0;
        let mut start = 0_u64;
        for &(end, _, depth) in &disk.runs {
            let run = start as usize..end as usize;
            if depth == Some(0) {
                assert!(copied[run.clone()] == disk.bytes[run]);
            } else {
                // Only a sector that also has something else can be copied.
                let inner = start.next_multiple_of(4096)..end / 4096 * 4096;
                let inner = inner.start as usize..inner.end.max(inner.start) as usize;
                assert!(copied[inner].iter().all(|&byte| byte == 0xee));
            }
            start = end;
        }
    }
}

#[test]
fn a_cancelled_copy_ends() {
    let disk = Disk::random(2_000_000, 3);
    let target = Memory::new(2_000_000, 0, 512, false);
    let options = CopyOptions {
        sparse: Some(4096),
        target_is_zero: true,
        layers: None,
    };
    let cancelled = AtomicBool::new(true);
    let job = Job {
        progress: &|_| {},
        cancelled: &cancelled,
    };
    let result = copy(&disk, 0..2_000_000, &target, 0, options, job);
    assert!(matches!(result, Err(ToolError::Cancelled)));
}

#[test]
fn the_first_difference_is_found() {
    let mut random = Random(8);
    let job = Job {
        progress: &|_| {},
        cancelled: &RUN,
    };
    for seed in 1..40 {
        let disk = Disk::random(2_000_000, seed);
        let size = 1_800_000 + random.below(400_000);
        let mut other = Disk::random(size, seed + 1000);
        other.bytes = disk.bytes.clone();
        other.bytes.resize(size as usize, 0);
        for run in &mut other.runs {
            run.1 = Content::Data { file: 0, offset: 0 };
        }
        let is_zero_beyond = disk.bytes[size.min(2_000_000) as usize..]
            .iter()
            .all(|&byte| byte == 0);
        if is_zero_beyond {
            assert_eq!(compare(&disk, &other, false, job).unwrap(), None);
        }
        let at = random.below(size.min(2_000_000));
        other.bytes[at as usize] ^= 1;
        // Known zeroes of the first disk are not read.
        let difference = compare(&disk, &other, false, job).unwrap();
        assert!(difference.is_some());
        if let Some(Difference::Content(offset)) = difference {
            assert!((offset..offset + 512).contains(&at), "{offset} {at}");
        }
    }
}

#[test]
fn a_map_joins_what_is_kept_in_one_way() {
    let data = |offset| Content::Data { file: 0, offset };
    let disk = Disk {
        bytes: vec![0; 600],
        runs: vec![
            (100, Content::Zeroes, None),
            (200, Content::Zeroes, None),
            (300, Content::Zeroes, Some(0)),
            (400, data(1000), Some(0)),
            (500, data(1100), Some(0)),
            (600, data(7000), Some(0)),
        ],
    };
    let job = Job {
        progress: &|_| {},
        cancelled: &RUN,
    };
    let mut entries = Vec::new();
    map::<ToolError>(&disk, 50..600, false, job, |entry| {
        entries.push((entry.start, entry.len, entry.present, entry.offset));
        Ok(())
    })
    .unwrap();
    assert_eq!(
        entries,
        [
            (50, 150, false, None),
            (200, 100, true, None),
            (300, 200, true, Some((0, 1000))),
            (500, 100, true, Some((0, 7000))),
        ]
    );
}

#[test]
fn options_are_taken_once_and_the_rest_is_named() {
    let mut options = Options::default();
    options.add("a=1,b=x,,y,a=2").unwrap();
    assert_eq!(options.take("a").as_deref(), Some("2"));
    assert_eq!(options.take("a"), None);
    assert_eq!(options.take_choice("c", &[("off", 1), ("on", 2)]), Ok(1));
    let error = options.clone().finish("raw").unwrap_err().to_string();
    assert_eq!(error, "the format raw has no option 'b'");
    assert_eq!(options.take("b").as_deref(), Some("x,y"));
    options.finish("raw").unwrap();
    assert!(Options::default().add("a").is_err());
}
