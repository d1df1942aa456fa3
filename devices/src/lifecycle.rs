//! The life of a device between the building of a machine and its end.

use std::io;

use bantam_state::{RestoreError, SaveError, SavedState, Section};

/// A device whose work can be stopped and gone on with, and whose state can be taken elsewhere.
///
/// ```text
///              resume                      restore
///   paused  ------------>  at work    new ---------> paused
///     | ^  <------------
///     | |      pause
///     +-+ save, reset
/// ```
///
/// The machine's owner calls these, on a thread that runs neither a vCPU nor an event loop. A device is
/// at work when it is made. While it is paused no vCPU is in the guest, so no register of it is accessed.
/// A reset or a restore also pauses a device that is at work.
pub trait Device: Send {
    /// Stops the work, after the vCPUs have left the guest.
    ///
    /// When it returns, the device touches no guest memory, nothing that the guest has asked for is
    /// under way, and the driver has been notified of all that was done. What the device has taken
    /// from the driver and not done is back in its queues. Its connections on the host stay. A device
    /// that is paused already stays so.
    ///
    /// # Errors
    /// If the host cannot end what is under way. The device is neither at work nor paused then: guest
    /// memory may be touched, so it is not saved. A resume lets it go on, and another pause tries again.
    fn pause(&mut self) -> io::Result<()>;

    /// Goes on with the work, before the vCPUs enter the guest. A device that is at work stays so.
    ///
    /// # Errors
    /// If the host does not give what that takes. The device then asks its driver for a reset.
    fn resume(&mut self) -> io::Result<()>;

    /// Takes a paused device to the state that it has after power-on.
    fn reset(&mut self);

    /// The state of a paused device, from which [`Device::restore`] rebuilds it. It stays paused.
    ///
    /// # Errors
    /// If the device is at work, or has state that cannot leave the process.
    fn save(&self) -> Result<Section, SaveError>;

    /// Gives a device that is new, with the same configuration as the one that was saved, the state
    /// of that one. Guest memory has its saved content by then. The device is paused afterwards.
    ///
    /// # Errors
    /// If the state is not that of such a device. The device is as after power-on then.
    fn restore(&mut self, section: &Section) -> Result<(), RestoreError>;
}

/// A device that works only while one of its registers is accessed. A pause has nothing to stop.
pub(crate) trait PassiveDevice: Send {
    /// What it is rebuilt from.
    type State: SavedState;

    /// Takes it to the state that it has after power-on.
    fn reset(&mut self);

    /// Its state.
    fn state(&self) -> Self::State;

    /// Takes over the state of another.
    ///
    /// # Errors
    /// One line that says why there is no such state. The device may have taken over a part of it.
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

/// The error of state that no device can have.
pub(crate) fn invalid<S: SavedState>(reason: String) -> RestoreError {
    RestoreError::Invalid {
        kind: S::KIND.to_owned(),
        reason,
    }
}

/// The error of a device that is to be saved and is not paused.
pub(crate) fn at_work<S: SavedState>() -> SaveError {
    SaveError::NotSupported {
        part: S::KIND.to_owned(),
        reason: "it is at work".to_owned(),
    }
}
