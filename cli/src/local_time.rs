//! Times for people.

use nix::libc;

/// Formats a time, in seconds since 1970, by the host's time zone.
pub fn local_time(seconds: u64) -> String {
    text(&parts(seconds))
}

/// Formats a time, in seconds since 1970, by the host's time zone, and says which zone that is: `+0100`.
pub fn local_time_with_zone(seconds: u64) -> String {
    let parts = parts(seconds);
    let minutes = parts.tm_gmtoff / 60;
    let sign = if minutes < 0 { '-' } else { '+' };
    let (hours, minutes) = (minutes.abs() / 60, minutes.abs() % 60);
    format!("{} {sign}{hours:02}{minutes:02}", text(&parts))
}

fn parts(seconds: u64) -> libc::tm {
    let seconds = libc::time_t::try_from(seconds).unwrap_or(libc::time_t::MAX);
    let mut parts = std::mem::MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are valid for the call, and a `tm` of zeroes, as it is if the call fails, is one.
    unsafe {
        libc::localtime_r(&raw const seconds, parts.as_mut_ptr());
        parts.assume_init()
    }
}

fn text(parts: &libc::tm) -> String {
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        parts.tm_year + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec
    )
}
