//! The order in which the commands to one device are executed.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::lock::lock;

/// Has commands to a device executed one after another. Unlike a mutex, it is not waited for without end: a
/// command may hang in the host.
#[derive(Default)]
pub(crate) struct Turn {
    is_taken: Mutex<bool>,
    freed: Condvar,
}

impl Turn {
    /// Waits for the turn until `deadline`. It ends when the guard is dropped, on whatever thread.
    pub(crate) fn take(self: &Arc<Turn>, deadline: Instant) -> Option<TurnGuard> {
        let mut is_taken = lock(&self.is_taken);
        while *is_taken {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let waited = self.freed.wait_timeout(is_taken, left);
            is_taken = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        *is_taken = true;
        Some(TurnGuard(self.clone()))
    }
}

/// The turn of a command that is being executed.
pub(crate) struct TurnGuard(Arc<Turn>);

impl Drop for TurnGuard {
    fn drop(&mut self) {
        *lock(&self.0.is_taken) = false;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_turn_that_does_not_end_is_not_waited_for_without_end() {
        let turn = Arc::new(Turn::default());
        let deadline = || Instant::now() + Duration::from_millis(1);
        let first = turn.take(deadline());
        assert!(first.is_some());
        assert!(turn.take(deadline()).is_none());
        drop(first);
        assert!(turn.take(deadline()).is_some());
    }
}
