//! The speed of the host itself with a disk image: an upper bound for any monitor.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

const BLOCK_SIZE: usize = 4096;
/// Duration of a measurement.
const TIME: Duration = Duration::from_secs(1);
/// Reads between two readings of the clock.
const READS: u32 = 1024;

/// Block numbers like those of the payload: SplitMix64.
struct Blocks {
    state: u64,
    count: u64,
}

impl Blocks {
    fn of(file: &File) -> io::Result<Self> {
        Ok(Self {
            state: 0,
            count: file.metadata()?.len() / BLOCK_SIZE as u64,
        })
    }

    /// Returns the offset of the next block in bytes.
    fn next_offset(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let block = (u128::from(mixed) * u128::from(self.count)) >> 64;
        block as u64 * BLOCK_SIZE as u64
    }
}

/// Measures random reads of 4 KiB a second through the page cache, by one thread, one after the
/// other.
///
/// # Errors
///
/// If the file cannot be read.
pub fn pread_loop(path: &Path) -> io::Result<f64> {
    let file = File::open(path)?;
    let mut blocks = Blocks::of(&file)?;
    let mut buffer = vec![0; BLOCK_SIZE];
    let start = Instant::now();
    let mut done = 0_u64;
    while start.elapsed() < TIME {
        for _ in 0..READS {
            file.read_exact_at(&mut buffer, blocks.next_offset())?;
        }
        done += u64::from(READS);
    }
    Ok(done as f64 / start.elapsed().as_secs_f64())
}

/// Opens a file past the page cache.
///
/// # Errors
///
/// If it cannot be opened that way, as on a tmpfs.
fn open_direct(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
}

/// Memory to which a disk can read directly.
#[repr(align(4096))]
#[derive(Clone)]
struct Block([u8; BLOCK_SIZE]);

/// Measures random reads of 4 KiB a second past the page cache by io_uring, with `depth` in flight.
///
/// # Errors
///
/// If the file cannot be opened that way or read, or there is no io_uring.
pub fn direct_io_uring_loop(path: &Path, depth: u32) -> io::Result<f64> {
    let file = open_direct(path)?;
    let mut blocks = Blocks::of(&file)?;
    // Never freed: an error may leave reads under way.
    let buffers = Vec::leak(vec![Block([0; BLOCK_SIZE]); depth as usize]);
    let mut ring = IoUring::new(depth)?;
    let start = Instant::now();
    let mut free: Vec<usize> = (0..buffers.len()).collect();
    let mut done = 0_u64;
    loop {
        let over = start.elapsed() >= TIME;
        if over && free.len() == buffers.len() {
            return Ok(done as f64 / start.elapsed().as_secs_f64());
        }
        while !over && let Some(index) = free.pop() {
            let buffer = buffers[index].0.as_mut_ptr();
            let read = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer, BLOCK_SIZE as u32)
                .offset(blocks.next_offset())
                .build()
                .user_data(index as u64);
            // SAFETY: the buffer is never freed, and only this read uses it until its completion
            // has been seen; the kernel keeps the file open as long as it needs it.
            unsafe { ring.submission().push(&read) }.map_err(io::Error::other)?;
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            if completion.result() != BLOCK_SIZE as i32 {
                return Err(io::Error::other(format!(
                    "a read ended with {}",
                    completion.result()
                )));
            }
            free.push(completion.user_data() as usize);
            done += 1;
        }
    }
}
