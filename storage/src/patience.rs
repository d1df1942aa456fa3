//! Waiting for resources that a killed process has yet to release.

use std::thread;
use std::time::{Duration, Instant};

/// How long to wait for a resource that is in use. A killed process keeps its locks, sockets and interfaces
/// until the kernel has torn it down, which can be some time after `kill` has returned.
const PATIENCE: Duration = Duration::from_millis(250);
/// How long to wait before the next attempt.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Calls `attempt` until it succeeds, fails with an error that is not `is_busy`, or 250 ms have passed.
/// Returns the result of the last attempt.
pub fn patiently<T, E>(
    is_busy: impl Fn(&E) -> bool,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if is_busy(&error) && Instant::now() < deadline => {
                thread::sleep(RETRY_INTERVAL);
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_resource_is_waited_for() {
        let mut busy_for = 3;
        let result = patiently(
            |&error| error == "busy",
            || {
                busy_for -= 1;
                if busy_for == 0 { Ok(()) } else { Err("busy") }
            },
        );
        assert_eq!(result, Ok(()));
    }

    #[test]
    fn other_errors_and_one_that_stays_are_given_back() {
        let mut attempts = 0;
        let mut fail_with = |error| {
            attempts += 1;
            Err::<(), _>(error)
        };
        let is_busy = |&error: &&str| error == "busy";
        assert_eq!(patiently(is_busy, || fail_with("broken")), Err("broken"));
        assert_eq!(patiently(is_busy, || fail_with("busy")), Err("busy"));
        assert!(attempts > 2, "{attempts}");
    }
}
