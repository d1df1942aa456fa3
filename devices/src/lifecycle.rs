//! The life cycle of a device: it is paused, resumed, reset, saved and restored.

use std::io;
use std::time::Duration;

use bantam_state::{RestoreError, SaveError, SavedState, Section};

/// How long a pause waits for the thread of a device, and for the requests that the device has under way. A
/// host that takes longer is taken to hang.
pub const PAUSE_TIME: Duration = Duration::from_secs(10);

/// A device whose work can be stopped and continued, and whose state can be moved to another process.
///
/// ```text
///              resume                      restore
///   paused  ------------>  at work    new ---------> paused
///     | ^  <------------
///     | |      pause
///     +-+ save, reset
/// ```
///
/// The machine's owner calls these, on a thread that runs neither a vCPU nor an event loop. A new device is
/// at work. While a device is paused no vCPU is in the guest, so none of its registers is accessed. A reset
/// or a restore also pauses a device that is at work.
pub trait Device: Send {
    /// Stops the work, after the vCPUs have left the guest.
    ///
    /// On return the device touches no guest memory, no request of the guest is in progress, and the driver
    /// has been notified of everything that was completed. Requests that the device had taken but not done
    /// are back in its queues. Its connections on the host stay open. A device that is already paused stays
    /// paused.
    ///
    /// # Errors
    /// If the host does not end what is in progress within [`PAUSE_TIME`]. The device is then neither at work
    /// nor paused: guest memory may still be touched, so it is not saved. A resume lets it go on, and another
    /// pause tries again.
    fn pause(&mut self) -> io::Result<()>;

    /// Continues the work, before the vCPUs enter the guest. A device that is at work stays at work.
    ///
    /// # Errors
    /// If the host lacks a resource that this needs. The device then asks its driver for a reset.
    fn resume(&mut self) -> io::Result<()>;

    /// Puts the device into the state that it has after power-on, and leaves it paused.
    fn reset(&mut self);

    /// Returns the state of a paused device, from which [`Device::restore`] rebuilds it. The device stays
    /// paused.
    ///
    /// # Errors
    /// If the device is at work, or has state that cannot leave the process.
    fn save(&self) -> Result<Section, SaveError>;

    /// Gives a saved state to a new device with the same configuration as the device that was saved. Guest
    /// memory already has its saved content. The device is paused afterwards.
    ///
    /// # Errors
    /// If the state is not that of such a device. The device is then as after power-on.
    fn restore(&mut self, section: &Section) -> Result<(), RestoreError>;
}

/// A device that works only while one of its registers is accessed, so that a pause has nothing to stop.
pub(crate) trait PassiveDevice: Send {
    /// The state from which it is rebuilt.
    type State: SavedState;

    /// Puts it into the state that it has after power-on.
    fn reset(&mut self);

    /// Returns its state.
    fn state(&self) -> Self::State;

    /// Takes over the state of another device.
    ///
    /// # Errors
    /// One line that says why the state is impossible. The device may have taken over a part of it.
    fn set_state(&mut self, state: Self::State) -> Result<(), String>;
}

impl<T: PassiveDevice> Device for T {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        PassiveDevice::reset(self);
    }

    fn save(&self) -> Result<Section, SaveError> {
        Section::of(&self.state())
    }

    fn restore(&mut self, section: &Section) -> Result<(), RestoreError> {
        let restored = section
            .decode()
            .and_then(|state| self.set_state(state).map_err(invalid::<T::State>));
        if restored.is_err() {
            PassiveDevice::reset(self);
        }
        restored
    }
}

/// Makes the error for a state that no device can have.
pub(crate) fn invalid<S: SavedState>(reason: String) -> RestoreError {
    RestoreError::Invalid {
        kind: S::KIND.to_owned(),
        reason,
    }
}

/// Makes the error for a device that is to be saved but is not paused.
pub(crate) fn at_work<S: SavedState>() -> SaveError {
    SaveError::NotSupported {
        part: S::KIND.to_owned(),
        reason: "it is at work".to_owned(),
    }
}
