//! The saved state of a console device.

use bantam_state::SavedState;
use serde::{Deserialize, Serialize};

use super::control_queue::ControlState;
use super::port::PortState;

/// The state of a device apart from its configuration space, with or without a driver.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ConsoleState {
    /// Emergency writes that the host has not taken.
    pub(super) emergency: Vec<u8>,
}

impl SavedState for ConsoleState {
    const KIND: &'static str = "console";
    const VERSION: u16 = 1;
}

/// The state of a worker apart from its queues.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkerState {
    /// State of each port that the driver knows of.
    pub(super) ports: Vec<PortState>,
    /// `None` for a driver that supports only one port.
    pub(super) control: Option<ControlState>,
}

impl SavedState for WorkerState {
    const KIND: &'static str = "console worker";
    const VERSION: u16 = 1;
}
