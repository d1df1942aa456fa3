//! Signals that stop a command: what it has half made is removed before the program ends.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use anyhow::Context;
use nix::sys::signal::SigSet;

use crate::signals;

static CANCELLED: AtomicBool = AtomicBool::new(false);
static STATUS: AtomicU8 = AtomicU8::new(0);

/// Diverts the signals that ask for the end of the program, and returns the flag that the first of them sets. The second
/// ends it at once. Call this on the only thread.
pub fn cancel_on_signal() -> anyhow::Result<&'static AtomicBool> {
    let signals = signals::block_stop_signals().context("cannot block signals")?;
    thread::Builder::new()
        .name("bantam-signals".to_owned())
        .spawn(move || wait(&signals))
        .context("cannot start the thread that waits for signals")?;
    Ok(&CANCELLED)
}

fn wait(signals: &SigSet) {
    while let Ok(signal) = signals.wait() {
        // As a shell says which signal has ended a program.
        let status = 128 + signal as u8;
        if CANCELLED.swap(true, Ordering::Relaxed) {
            std::process::exit(status.into());
        }
        STATUS.store(status, Ordering::Relaxed);
    }
}

/// Returns the exit status after a signal.
pub fn status() -> Option<u8> {
    match STATUS.load(Ordering::Relaxed) {
        0 => None,
        status => Some(status),
    }
}
