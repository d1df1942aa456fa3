// SPDX-License-Identifier: Apache-2.0

//! The console: output of the agent, and commands about its input.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;

use crate::error::{Context, Error, Result};
use crate::pattern::Crc32;
use crate::sys::{self, RawTerminal};

/// Prints a line. It ignores errors, as nobody can be told if the console is gone.
pub fn say(line: fmt::Arguments<'_>) {
    let mut output = io::stdout().lock();
    let _ = writeln!(output, "{line}").and_then(|()| output.flush());
}

/// Reads a line and returns it. Calls `waiting` when it is ready to read.
pub fn echo_line(waiting: impl FnOnce()) -> Result<String> {
    waiting();
    let mut line = String::new();
    let size = io::stdin()
        .read_line(&mut line)
        .context("read from the console")?;
    if size == 0 {
        return Err(Error::new("end of input"));
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// Reads raw bytes and returns their checksum.
pub fn echo_bytes(length: u64, waiting: impl FnOnce()) -> Result<String> {
    let mut input = sys::standard_input().context("standard input")?;
    let stdin = io::stdin();
    let raw = RawTerminal::new(stdin.as_fd()).context("put the terminal into raw mode")?;
    waiting();
    let mut crc = Crc32::new();
    let mut buffer = [0; 4096];
    let mut left = length;
    while left > 0 {
        let size = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        let chunk = &mut buffer[..size];
        let size = input.read(chunk).context("read from the console")?;
        if size == 0 {
            return Err(Error::new(format!("end of input, {left} bytes early")));
        }
        crc.update(&buffer[..size]);
        left -= size as u64;
    }
    drop(raw);
    Ok(format!("bytes={length} crc32={:08x}", crc.value()))
}
