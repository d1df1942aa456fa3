//! Requests from devices to the machine that they are part of.

/// Receives the power requests that a guest makes through a device.
///
/// Its methods are called on a vCPU thread: an implementation records the request and returns at once.
pub trait PowerControl: Send + Sync {
    /// The guest switched the machine off.
    fn power_off(&self);
    /// The guest asked for a restart of the machine.
    fn reset(&self);
    /// The guest ended the machine with a number of its choice.
    fn exit(&self, number: u8);
    /// The guest's kernel has panicked. With `handled_by_guest` the guest goes on by itself, with a kernel
    /// that saves a crash dump.
    fn panicked(&self, handled_by_guest: bool);
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::PowerControl;

    /// Counts the requests it receives.
    #[derive(Default)]
    pub(crate) struct PowerRecorder {
        power_offs: AtomicUsize,
        resets: AtomicUsize,
        numbers: Mutex<Vec<u8>>,
        panics: Mutex<Vec<bool>>,
    }

    impl PowerRecorder {
        /// How often each of (power off, reset) was requested.
        pub(crate) fn requests(&self) -> (usize, usize) {
            (
                self.power_offs.load(Ordering::SeqCst),
                self.resets.load(Ordering::SeqCst),
            )
        }

        /// The numbers that the machine was ended with.
        pub(crate) fn numbers(&self) -> Vec<u8> {
            self.numbers.lock().unwrap().clone()
        }

        /// The panics, and whether the guest goes on by itself.
        pub(crate) fn panics(&self) -> Vec<bool> {
            self.panics.lock().unwrap().clone()
        }
    }

    impl PowerControl for PowerRecorder {
        fn power_off(&self) {
            self.power_offs.fetch_add(1, Ordering::SeqCst);
        }

        fn reset(&self) {
            self.resets.fetch_add(1, Ordering::SeqCst);
        }

        fn exit(&self, number: u8) {
            self.numbers.lock().unwrap().push(number);
        }

        fn panicked(&self, handled_by_guest: bool) {
            self.panics.lock().unwrap().push(handled_by_guest);
        }
    }
}
