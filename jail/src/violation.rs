//! The report of a system call that a filter refuses.

use std::ffi::{c_int, c_long, c_void};
use std::io;
use std::ptr;

use nix::errno::Errno;
use syscalls::Sysno;

use crate::FilterError;

/// Where `siginfo_t` has the number of the refused call: after signal, error, code, padding and the address of the
/// call (`_sigsys` in `asm-generic/siginfo.h`).
const CALL_OFFSET: usize = 24;
/// Not the number of a call, so every filter refuses it.
const NO_CALL: c_long = 0x3fff;

/// Has calls that filters refuse reported on standard error, in one line with the names of call and thread. The
/// process then ends by SIGSYS.
///
/// # Errors
/// If the kernel does not take the handler.
pub fn report_violations() -> Result<(), FilterError> {
    // SAFETY: zeroes are a valid `sigaction`: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction =
        report as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for, and calls only what a handler may call.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) };
    Errno::result(result)
        .map(drop)
        .map_err(|errno| FilterError::Handler(io::Error::from(errno)))
}

extern "C" fn report(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a whole `siginfo_t`, which has the number of the call there if a filter has sent the
    // signal. Of another sender's signal it is some number.
    let call = unsafe { info.cast::<u8>().add(CALL_OFFSET).cast::<c_int>().read() };
    let mut line = Line::new();
    line.add(b"error: the thread '");
    let mut name = [0_u8; 16];
    // SAFETY: the kernel writes 16 bytes, with a zero at the end.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    line.add(name.split(|&byte| byte == 0).next().unwrap_or_default());
    line.add(b"' made the system call ");
    match usize::try_from(call).ok().and_then(Sysno::new) {
        Some(known) => line.add(known.name().as_bytes()),
        None => line.add_number(call.unsigned_abs()),
    }
    line.add(
        b", which it never makes: the guest may have broken into the monitor, or this is a bug; \
          the process is killed (--seccomp)\n",
    );
    line.write();
    // The signal is blocked while it is handled, so the next refusal ends the process by it, whatever other signals
    // and threads do.
    // SAFETY: there is no such call.
    unsafe { libc::syscall(NO_CALL) };
    // SAFETY: it does not return.
    unsafe { libc::_exit(128 + libc::SIGSYS) };
}

/// A line that is put together without memory from the heap.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Line {
    fn new() -> Line {
        Line {
            bytes: [0; 256],
            length: 0,
        }
    }

    fn add(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
    }

    fn add_number(&mut self, number: u32) {
        let mut divisor = 1_000_000_000;
        while divisor > 0 {
            let digit = number / divisor % 10;
            if number >= divisor || divisor == 1 {
                self.add(&[b'0' + digit as u8]);
            }
            divisor /= 10;
        }
    }

    /// Writes the line to standard error, unless that takes nothing now: the process must not wait.
    fn write(&self) {
        let mut error = libc::pollfd {
            fd: libc::STDERR_FILENO,
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: there is one descriptor to look at.
        let ready = unsafe { libc::poll(&raw mut error, 1, 0) };
        if ready == 1 && error.revents & libc::POLLOUT != 0 {
            // SAFETY: so many bytes of the line are initialized.
            unsafe { libc::write(libc::STDERR_FILENO, self.bytes.as_ptr().cast(), self.length) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_zeroes_before_them() {
        for number in [0, 7, 10, 548, 1_000_000_001, u32::MAX] {
            let mut line = Line::new();
            line.add_number(number);
            assert_eq!(&line.bytes[..line.length], number.to_string().as_bytes());
        }
    }

    #[test]
    fn a_line_has_an_end() {
        let mut line = Line::new();
        line.add(&[b'x'; 1000]);
        assert_eq!(line.length, line.bytes.len());
    }
}
