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
    let outlet = Outlet::start("bantam-stderr", io::stderr());
    let outlet = outlet.context("cannot start the thread that writes to standard error")?;
    if OUTLET.set(outlet).is_ok() {
        panic::set_hook(Box::new(report_panic));
    }
    Ok(())
}

/// Writes a line to standard error. If that is closed, there is nobody to tell.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = writeln!(Stderr, "{line}");
}

/// Writes the last line of all to standard error. It is not dropped even if there are too many
/// before it.
pub fn say_last(line: fmt::Arguments<'_>) {
    match OUTLET.get() {
        Some(outlet) => outlet.push_last(format!("{line}\n").as_bytes()),
        None => say(line),
    }
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
