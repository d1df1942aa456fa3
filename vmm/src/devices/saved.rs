//! The state of all devices, saved and restored by their names.

use std::sync::Mutex;

use bantam_devices::lifecycle::Device;
use bantam_state::{RestoreError, SaveError, SavedState, Section};
use serde::{Deserialize, Serialize};

use super::table::DeviceTable;
use crate::lock::lock;

/// The saved state of one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedDevice {
    /// Its name among devices of its bus.
    name: String,
    /// Whether it is a virtio device, and not one at fixed ports or addresses.
    is_virtio: bool,
    state: Section,
}

impl SavedState for SavedDevice {
    const KIND: &'static str = "device";
    const VERSION: u16 = 1;
}

impl DeviceTable {
    /// Returns all devices with their names, and whether each is a virtio device.
    fn named(&self) -> impl Iterator<Item = (String, bool, &Mutex<dyn Device>)> {
        let legacy = self.legacy.iter();
        let legacy = legacy.map(|(name, device)| ((*name).to_owned(), false, &**device));
        let virtio = self.virtio.iter().map(|entry| {
            let device = &*entry.device as &Mutex<dyn Device>;
            (entry.name.to_string(), true, device)
        });
        legacy.chain(virtio)
    }

    /// Returns the state of all devices, which are at rest.
    ///
    /// # Errors
    /// If a device has state that cannot leave the process.
    pub(crate) fn save(&self) -> Result<Vec<SavedDevice>, SaveError> {
        let save = |(name, is_virtio, device): (String, bool, &Mutex<dyn Device>)| {
            Ok(SavedDevice {
                name,
                is_virtio,
                state: lock(device).save()?,
            })
        };
        self.named().map(save).collect()
    }

    /// Gives all devices of a new machine their saved state. Guest memory already has its content. The devices are at
    /// rest afterwards.
    ///
    /// # Errors
    /// If the machine does not have just these devices, or a state is not that of such a device. The machine is then of
    /// no further use.
    pub(crate) fn restore(&self, saved: &[SavedDevice]) -> Result<(), RestoreError> {
        let mut count = 0;
        for (name, is_virtio, device) in self.named() {
            let mut states = saved.iter();
            let state = states.find(|it| it.name == name && it.is_virtio == is_virtio);
            let state = state.ok_or_else(|| invalid(format!("it has none of '{name}'")))?;
            lock(device)
                .restore(&state.state)
                .map_err(|error| match error {
                    RestoreError::Invalid { reason, .. } => {
                        RestoreError::Invalid { kind: name, reason }
                    }
                    error => error,
                })?;
            count += 1;
        }
        match saved.len() == count {
            true => Ok(()),
            false => Err(invalid(format!(
                "it has {} devices, and the machine {count}",
                saved.len()
            ))),
        }
    }
}

fn invalid(reason: String) -> RestoreError {
    RestoreError::Invalid {
        kind: SavedDevice::KIND.to_owned(),
        reason,
    }
}
