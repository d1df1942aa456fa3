//! The terminal on standard input: raw while its keys go to the guest, and restored however the
//! process ends.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

/// The terminal's settings from before it was first made raw, for a signal handler.
static ORIGINAL: OnceLock<libc::termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that kill a process because of its own fault.
const FATAL_SIGNALS: [Signal; 6] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGFPE,
    Signal::SIGTRAP,
    Signal::SIGABRT,
];

/// The terminal on standard input, raw until this is dropped.
///
/// At most one exists, as there is one standard input.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let original = tcgetattr(io::stdin())?;
        if ORIGINAL.set(original.into()).is_ok() {
            restore_on_panic();
            restore_on_fatal_signals()?;
        }
        let terminal = Self(());
        terminal.resume()?;
        Ok(Some(terminal))
    }

    /// Restores the terminal for a while, before the process is stopped.
    pub fn suspend(&self) {
        restore();
    }

    /// Makes the terminal raw again after the process was stopped, unless the process is now in the
    /// background: then the terminal belongs to another process.
    pub fn resume(&self) -> io::Result<()> {
        if !self.in_foreground() {
            RAW.store(false, Ordering::SeqCst);
            return Ok(());
        }
        let Some(&original) = ORIGINAL.get() else {
            return Ok(());
        };
        // Before the change, so that no signal can arrive between the change and the mark.
        RAW.store(true, Ordering::SeqCst);
        let settings = raw_settings(original.into());
        Ok(tcsetattr(io::stdin(), SetArg::TCSANOW, &settings)?)
    }

    /// Returns whether the process may read the terminal. Job control stops a process that does so
    /// in the background; a terminal that does not control this process has no job control.
    pub fn in_foreground(&self) -> bool {
        tcgetpgrp(io::stdin()).map_or(true, |foreground| foreground == getpgrp())
    }
}

/// Returns the columns and rows of the terminal on standard output, or on standard input if the
/// former is not a terminal.
pub fn size() -> Option<(u16, u16)> {
    [libc::STDOUT_FILENO, libc::STDIN_FILENO]
        .into_iter()
        .find_map(|descriptor| {
            let mut size = MaybeUninit::<libc::winsize>::uninit();
            // SAFETY: the kernel fills in `size`, which lives until the call returns.
            let result = unsafe { libc::ioctl(descriptor, libc::TIOCGWINSZ, size.as_mut_ptr()) };
            if result != 0 {
                return None;
            }
            // SAFETY: the call has succeeded and filled it in.
            let size = unsafe { size.assume_init() };
            Some((size.ws_col, size.ws_row))
        })
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Returns raw settings, except that a newline on output still returns to the start of the line:
/// guests send both characters anyway, and log messages between their lines need it.
fn raw_settings(mut settings: Termios) -> Termios {
    cfmakeraw(&mut settings);
    settings.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
    settings
}

/// Restores the terminal's original settings. Async-signal-safe.
fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    let Some(original) = ORIGINAL.get() else {
        return;
    };
    // SAFETY: `original` is a valid `termios` that nothing changes once it is set.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, original) };
}

fn restore_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        report(info);
    }));
}

fn restore_on_fatal_signals() -> nix::Result<()> {
    let action = SigAction::new(
        SigHandler::Handler(restore_and_die),
        // On the alternate stack that Rust gives every thread, in case the fault is a stack
        // overflow.
        SaFlags::SA_RESETHAND | SaFlags::SA_ONSTACK,
        SigSet::empty(),
    );
    for signal in FATAL_SIGNALS {
        // SAFETY: the handler calls only async-signal-safe functions.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

extern "C" fn restore_and_die(signal: libc::c_int) {
    restore();
    // The default action is restored; it takes place when this handler returns.
    if let Ok(signal) = Signal::try_from(signal) {
        let _ = raise(signal);
    }
}
