//! Free page hinting (section 5.5.6.5): on the owner's request, the driver names pages that are free at
//! present, and does not let them be used until the device says that it is done with them.

use serde::{Deserialize, Serialize};

use super::{Shared, config, lock};
use crate::virtio::DriverLink;

/// `VIRTIO_BALLOON_CMD_ID_STOP`: from the device, it asks for no hints; from the driver, there are no more
/// hints.
const STOP: u32 = 0;
/// `VIRTIO_BALLOON_CMD_ID_DONE`: the driver can use the pages again.
const DONE: u32 = 1;
/// The first command ID that asks for hints.
const FIRST_REQUEST: u32 = 2;

/// A command of the machine's owner about free page hinting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum HintingCommand {
    /// Asks the driver for hints from now on.
    Start {
        /// Whether the driver can use the pages again as soon as it has named all of them. Otherwise it
        /// keeps them until [`HintingCommand::Stop`].
        acknowledge_on_stop: bool,
    },
    /// Lets the driver use all pages again.
    Stop,
}

/// The progress of free page hinting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintingStatus {
    /// The command ID that the driver reads: 0 before the first request, 1 when the device is done, and
    /// otherwise that of the request.
    pub host_command: u32,
    /// The command ID that the driver sent last: that of the request that it is answering, or 0 when its
    /// answer has ended.
    pub guest_command: Option<u32>,
}

impl HintingStatus {
    const AT_START: HintingStatus = HintingStatus {
        host_command: STOP,
        guest_command: None,
    };
}

/// The state of hinting, as set by the owner, the worker and the driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Hinting {
    status: HintingStatus,
    last_request: u32,
    acknowledge_on_stop: bool,
}

impl Hinting {
    pub(super) fn new() -> Hinting {
        Hinting {
            status: HintingStatus::AT_START,
            last_request: DONE,
            acknowledge_on_stop: false,
        }
    }

    pub(super) fn status(&self) -> HintingStatus {
        self.status
    }

    /// Carries out the owner's command, and returns the new command ID.
    pub(super) fn command(&mut self, command: HintingCommand) -> u32 {
        self.status.host_command = match command {
            HintingCommand::Start {
                acknowledge_on_stop,
            } => {
                self.acknowledge_on_stop = acknowledge_on_stop;
                self.last_request = self.last_request.wrapping_add(1).max(FIRST_REQUEST);
                self.last_request
            }
            HintingCommand::Stop => DONE,
        };
        self.status.host_command
    }

    /// Takes a command ID of the driver. If this completes an answer, returns the device's new command ID.
    pub(super) fn take_guest_command(&mut self, command: u32) -> Option<u32> {
        let answered = self.answers_request();
        self.status.guest_command = Some(command);
        (command == STOP && answered && self.acknowledge_on_stop)
            .then(|| self.command(HintingCommand::Stop))
    }

    /// Whether pages that the driver names now may be discarded: it is answering the current request, and
    /// keeps the pages until the device is done.
    pub(super) fn answers_request(&self) -> bool {
        self.status.host_command >= FIRST_REQUEST
            && self.status.guest_command == Some(self.status.host_command)
    }

    /// Starts over with a driver that has sent nothing yet and is asked for nothing.
    fn reset(&mut self) {
        self.status = HintingStatus::AT_START;
    }
}

impl Shared {
    /// Starts over with a driver that has just accepted the device.
    pub(super) fn reset_hinting(&self) {
        let mut hinting = lock(&self.hinting);
        hinting.reset();
        self.config
            .write(config::HINTING_COMMAND, &STOP.to_le_bytes());
    }

    /// Continues with the saved state of hinting. The configuration space agrees with it already.
    pub(super) fn restore_hinting(&self, hinting: Hinting) {
        *lock(&self.hinting) = hinting;
    }

    /// Changes the state of hinting. If this yields a new command ID, the driver is told.
    pub(super) fn change_hinting(
        &self,
        link: &DriverLink,
        change: impl FnOnce(&mut Hinting) -> Option<u32>,
    ) {
        // Held until the driver can read the new ID, so that IDs are published in order.
        let mut hinting = lock(&self.hinting);
        if let Some(command) = change(&mut hinting) {
            let bytes = command.to_le_bytes();
            self.config.write(config::HINTING_COMMAND, &bytes);
            link.notify_configuration_change();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: HintingCommand = HintingCommand::Start {
        acknowledge_on_stop: true,
    };

    #[test]
    fn only_answers_to_the_request_under_way_count() {
        let mut hinting = Hinting::new();
        hinting.take_guest_command(STOP);
        assert!(!hinting.answers_request());
        let first = hinting.command(START);
        assert!(!hinting.answers_request());
        hinting.take_guest_command(first);
        assert!(hinting.answers_request());
        let second = hinting.command(START);
        assert_ne!(first, second);
        assert!(!hinting.answers_request());
        hinting.take_guest_command(first);
        assert!(!hinting.answers_request());
        hinting.take_guest_command(second);
        assert!(hinting.answers_request());
        hinting.command(HintingCommand::Stop);
        assert!(!hinting.answers_request());
        // The driver claims to answer a request that was not made.
        hinting.take_guest_command(DONE);
        assert!(!hinting.answers_request());
    }

    #[test]
    fn the_end_is_acknowledged_if_the_owner_wants_it() {
        let mut hinting = Hinting::new();
        let request = hinting.command(START);
        // This ends the answer to another request.
        assert_eq!(hinting.take_guest_command(STOP), None);
        hinting.take_guest_command(request);
        assert_eq!(hinting.take_guest_command(STOP), Some(DONE));
        assert_eq!(hinting.status().guest_command, Some(STOP));

        let request = hinting.command(HintingCommand::Start {
            acknowledge_on_stop: false,
        });
        hinting.take_guest_command(request);
        assert_eq!(hinting.take_guest_command(STOP), None);
        assert_eq!(hinting.status().host_command, request);
    }

    #[test]
    fn requests_have_other_ids_than_commands() {
        let mut hinting = Hinting::new();
        hinting.last_request = u32::MAX;
        assert_eq!(hinting.command(START), FIRST_REQUEST);
        hinting.reset();
        assert_eq!(hinting.status(), HintingStatus::AT_START);
        assert_eq!(hinting.command(START), FIRST_REQUEST + 1);
    }
}
