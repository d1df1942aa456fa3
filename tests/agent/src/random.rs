// SPDX-License-Identifier: Apache-2.0

//! Commands about randomness.

use std::fs::File;
use std::io::Read;

use crate::error::{Context, Error, Result};
use crate::pattern::Crc32;
use crate::sys;
use crate::system::{attribute, number};

/// Reads from the machine's random number generator, which has to be the virtio one.
pub fn hardware(length: u64) -> Result<String> {
    let source = attribute("/sys/class/misc/hw_random/rng_current")?;
    if !source.starts_with("virtio_rng") {
        return Err(Error::new(format!("the current source is {source}")));
    }
    let mut device = File::open("/dev/hwrng").context("open /dev/hwrng")?;
    let mut crc = Crc32::new();
    let mut seen = [false; 256];
    let mut buffer = [0; 4096];
    let mut left = length;
    while left > 0 {
        let size = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let chunk = &mut buffer[..size];
        device.read_exact(chunk).context("read /dev/hwrng")?;
        crc.update(chunk);
        chunk
            .iter()
            .for_each(|&byte| seen[usize::from(byte)] = true);
        left -= size as u64;
    }
    // Of 64 random bytes, some 56 differ; a source that is stuck shows one or two values.
    let values = seen.iter().filter(|&&seen| seen).count();
    if length >= 64 && values < 16 {
        return Err(Error::new(format!("only {values} different bytes")));
    }
    Ok(format!(
        "source={source} bytes={length} values={values} crc32={:08x}",
        crc.value()
    ))
}

/// Whether the kernel's own generator is ready.
pub fn entropy() -> Result<String> {
    let available = number("/proc/sys/kernel/random/entropy_avail")?;
    let mut buffer = [0; 32];
    sys::random(&mut buffer).context("getrandom")?;
    Ok(format!("available={available}"))
}
