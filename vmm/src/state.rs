//! The states of a machine.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The state of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has no configuration yet.
    NotConfigured,
    /// It can be started.
    Configured,
    /// It is being built.
    Starting,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are being taken out of the guest and its devices brought to rest, or the state of its vCPUs
    /// is being saved.
    Pausing,
    /// Its vCPUs are out of the guest, and its devices are at rest: input from outside waits.
    Paused,
    /// Its devices go on, and then its vCPUs.
    Resuming,
    /// It has ended, and does not start again.
    Stopped,
}

impl State {
    /// Says what can be done in a state that does not allow an action.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            State::NotConfigured => "configure it first",
            State::Configured => "start it first",
            State::Starting | State::Pausing | State::Resuming => "try again in a moment",
            State::Running => "that is for a machine that is paused or has not been started",
            State::Paused => "resume it first",
            State::Stopped => "a machine runs once: start another",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::NotConfigured => "not configured",
            State::Configured => "configured, but not started",
            State::Starting => "starting",
            State::Running => "running",
            State::Pausing => "pausing",
            State::Paused => "paused",
            State::Resuming => "resuming",
            State::Stopped => "stopped",
        })
    }
}
