//! What devices ask of the machine they are part of.

/// Receives the power requests that a guest makes through a device.
///
/// Called on a vCPU thread: an implementation records the request and returns at once.
pub trait PowerControl: Send + Sync {
    /// The guest switched the machine off.
    fn power_off(&self);
    /// The guest asked for a restart of the machine.
    fn reset(&self);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::PowerControl;

    /// Counts the requests it receives.
    #[derive(Default)]
    pub(crate) struct PowerRecorder {
        power_offs: AtomicUsize,
        resets: AtomicUsize,
    }

    impl PowerRecorder {
        /// How often (power off, reset) was asked for.
        pub(crate) fn requests(&self) -> (usize, usize) {
            (
                self.power_offs.load(Ordering::SeqCst),
                self.resets.load(Ordering::SeqCst),
            )
        }
    }

    impl PowerControl for PowerRecorder {
        fn power_off(&self) {
            self.power_offs.fetch_add(1, Ordering::SeqCst);
        }

        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }
    }
}
