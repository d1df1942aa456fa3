//! How the last run of a machine began and ended.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bantam_vmm::ExitReason;
use serde::{Deserialize, Serialize};

use crate::files;

/// The last run of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// When it began, in seconds since 1970.
    pub started: u64,
    /// What it began from.
    pub origin: RunOrigin,
    /// How often the guest was started again meanwhile.
    #[serde(default)]
    pub restarts: u32,
    /// How it ended. A machine that does not run, and whose run has no end, was killed.
    #[serde(default)]
    pub end: Option<RunEnd>,
}

/// What a run begins from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunOrigin {
    /// The kernel.
    Booted,
    /// A saved state.
    Restored,
    /// A snapshot.
    Reverted,
    /// Another process or host, from which it has moved.
    Migrated,
}

/// The end of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RunEnd {
    /// When, in seconds since 1970; `None` if nobody was there to tell.
    pub time: Option<u64>,
    /// Why.
    pub reason: EndReason,
    /// More about it, such as the error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// Why a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndReason {
    /// The guest has switched the machine off, or was asked to and has done so.
    PoweredOff,
    /// The guest has rebooted, and the machine is not started again after that.
    Rebooted,
    /// The guest's kernel has panicked.
    Crashed,
    /// The guest has ended it with this number.
    Number(u8),
    /// The guest has halted.
    Halted,
    /// The power was cut.
    Destroyed,
    /// It has moved to another process or host, and goes on there.
    Moved,
    /// Its state was saved.
    Saved,
    /// A snapshot has taken the place of the run.
    Reverted,
    /// Something has failed on the host.
    HostError,
    /// The process was killed, or the host has ended.
    Killed,
}

impl EndReason {
    /// Returns why a machine has ended.
    pub fn of(reason: ExitReason) -> EndReason {
        match reason {
            ExitReason::PowerOff => EndReason::PoweredOff,
            ExitReason::Reboot => EndReason::Rebooted,
            ExitReason::Panic => EndReason::Crashed,
            ExitReason::Number(number) => EndReason::Number(number),
            ExitReason::Halted => EndReason::Halted,
            ExitReason::Stopped => EndReason::Destroyed,
            ExitReason::Moved => EndReason::Moved,
            // One that this version does not know.
            _ => EndReason::HostError,
        }
    }

    /// Whether something has gone wrong, so that a machine with the policy to start again after that is started again.
    pub fn is_failure(self) -> bool {
        match self {
            EndReason::Crashed | EndReason::HostError | EndReason::Killed | EndReason::Halted => {
                true
            }
            EndReason::Number(number) => number != 0,
            _ => false,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            EndReason::PoweredOff => "powered off",
            EndReason::Rebooted => "rebooted",
            EndReason::Crashed => "crashed",
            EndReason::Number(number) => return write!(f, "ended with the number {number}"),
            EndReason::Halted => "halted",
            EndReason::Destroyed => "destroyed",
            EndReason::Moved => "migrated",
            EndReason::Saved => "saved",
            EndReason::Reverted => "reverted",
            EndReason::HostError => "host error",
            EndReason::Killed => "killed",
        })
    }
}

impl Run {
    /// Begins a run now.
    pub fn new(origin: RunOrigin) -> Run {
        Run {
            started: now(),
            origin,
            restarts: 0,
            end: None,
        }
    }

    /// Reads the last run from a file. What is not one counts as none: it is history, on which nothing depends.
    pub(crate) fn read(path: &Path) -> Option<Run> {
        let text = files::read(path).ok()??;
        serde_json::from_str(&text).ok()
    }

    /// Writes it to a file.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        files::replace_quickly(path, &serde_json::to_string(self)?)
    }
}

impl RunEnd {
    /// Returns an end now.
    pub fn now(reason: EndReason, detail: Option<String>) -> RunEnd {
        RunEnd {
            time: Some(now()),
            reason,
            detail,
        }
    }
}

/// Returns the time in seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_read_as_it_was_written_and_anything_else_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        assert_eq!(Run::read(&path), None);
        let mut run = Run::new(RunOrigin::Booted);
        run.end = Some(RunEnd::now(EndReason::Number(3), Some("why".to_owned())));
        run.write(&path).unwrap();
        assert_eq!(Run::read(&path), Some(run));
        files::replace(&path, "{").unwrap();
        assert_eq!(Run::read(&path), None);
    }

    #[test]
    fn only_what_nobody_wanted_is_a_failure() {
        for (reason, is_failure) in [
            (EndReason::PoweredOff, false),
            (EndReason::Destroyed, false),
            (EndReason::Moved, false),
            (EndReason::Saved, false),
            (EndReason::Number(0), false),
            (EndReason::Number(1), true),
            (EndReason::Crashed, true),
            (EndReason::HostError, true),
        ] {
            assert_eq!(reason.is_failure(), is_failure, "{reason}");
        }
    }
}
