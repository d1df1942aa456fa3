//! Standard error: messages to the user, and the log.
//!
//! While a machine runs, a separate thread writes there: standard error may be a pipe that nobody
//! reads, or a stopped terminal.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fmt;
use std::io::{self, Write};
use std::panic;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use anyhow::Context;

use crate::outlet::Outlet;
use crate::stopping;

/// How long the end of the process may wait for a reader of its last lines.
const FLUSH_TIME: Duration = Duration::from_secs(1);

static OUTLET: OnceLock<Outlet> = OnceLock::new();

/// Starts the thread that writes from now on. No later message blocks, not even the report of a
/// panic.
pub fn start() -> anyhow::Result<()> {
    let outlet = Outlet::start("bantam-stderr", io::stderr(), |_| ());
    let outlet = outlet.context("cannot start the thread that writes to standard error")?;
    if OUTLET.set(outlet).is_ok() {
        panic::set_hook(Box::new(report_panic));
    }
    Ok(())
}

/// Writes a line, or several, to standard error, with control characters escaped. If that is closed, there is
/// nobody to tell.
pub fn say(line: fmt::Arguments<'_>) {
    let line = printable(&line.to_string());
    let _ = writeln!(Stderr, "{line}");
}

/// Writes the last line of all to standard error. It is not dropped even if there are too many
/// before it.
pub fn say_last(line: fmt::Arguments<'_>) {
    match OUTLET.get() {
        Some(outlet) => outlet.push_last((printable(&line.to_string()) + "\n").as_bytes()),
        None => say(line),
    }
}

/// Escapes the characters of `text` that a terminal would obey, except for line feeds: text may have names of
/// files or of keys in it, which anyone may have chosen.
fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        match character.is_control() && character != '\n' {
            true => printable.extend(character.escape_debug()),
            false => printable.push(character),
        }
    }
    printable
}

/// Waits until everything is written, for a short time at most.
pub fn flush() {
    if let Some(outlet) = OUTLET.get() {
        outlet.flush(stopping::time_left(FLUSH_TIME));
    }
}

/// Standard error, through the thread once it has been started.
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match OUTLET.get() {
            Some(outlet) => outlet.push(bytes),
            None => io::stderr().write_all(bytes)?,
        }
        Ok(bytes.len())
    }

    fn write_fmt(&mut self, text: fmt::Arguments<'_>) -> io::Result<()> {
        self.write_all(text.to_string().as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reports a panic like the standard library. The process may end right after it, so this waits
/// until it is written.
fn report_panic(info: &panic::PanicHookInfo<'_>) {
    let thread = thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let backtrace = Backtrace::capture();
    match backtrace.status() {
        BacktraceStatus::Captured => say(format_args!("thread '{name}' {info}\n{backtrace}")),
        _ => say(format_args!("thread '{name}' {info}")),
    }
    flush();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_obeys_nothing_in_a_message() {
        assert_eq!(
            printable("caf\u{e9} '\x1b[2Jx'\n"),
            "caf\u{e9} '\\u{1b}[2Jx'\n"
        );
        assert_eq!(printable("\u{9b}2J\r\x07"), "\\u{9b}2J\\r\\u{7}");
    }
}
