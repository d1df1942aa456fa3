//! What the helper machine is told, and what it tells.

use serde::{Deserialize, Serialize};

use crate::identifiers::Replacement;
use crate::operation::{Operation, OperationSet};

/// What is to be done to the disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// What is reset.
    pub operations: OperationSet,
    /// The host name that the system gets, if the caller knows one.
    pub host_name: Option<String>,
    /// The disks, in the order of the machine. The serial number of each is that of [`TaskDisk::serial`].
    pub disks: Vec<TaskDisk>,
}

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskDisk {
    /// What it is called in reports.
    pub name: String,
    /// Its place among all disks of the machine, by which its guest names it: `vda` for 0.
    pub place: usize,
}

impl TaskDisk {
    /// Returns the serial number that the disk has in the helper machine.
    pub fn serial(&self) -> String {
        format!("bantam-disk-{}", self.place)
    }
}

/// Something that was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// The operation.
    pub operation: Operation,
    /// A path in the system, or a disk with the number of a partition.
    pub object: String,
    /// What was done to it.
    pub detail: String,
}

/// Something that was left as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The operation; `None` if it concerns all of them.
    pub operation: Option<Operation>,
    /// A path in the system, or a disk with the number of a partition.
    pub object: String,
    /// Why.
    pub reason: String,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The system that was found, by its os-release file, and its place.
    pub system: String,
    /// What was changed.
    pub changes: Vec<Change>,
    /// What was left as it was.
    pub left: Vec<Left>,
    /// The identifiers that were replaced.
    pub identifiers: Vec<Replacement>,
}

/// What the helper machine tells: what was done, or why nothing can be done.
pub type Outcome = Result<Report, String>;

/// The largest number of entries in each list of a report.
const MAX_ENTRIES: usize = 1024;
/// The longest text in a report, in characters.
const MAX_TEXT: usize = 200;

impl Report {
    pub(crate) fn changed(
        &mut self,
        operation: Operation,
        object: impl Into<String>,
        detail: impl Into<String>,
    ) {
        self.changes.push(Change {
            operation,
            object: object.into(),
            detail: detail.into(),
        });
    }

    pub(crate) fn left(
        &mut self,
        operation: impl Into<Option<Operation>>,
        object: impl Into<String>,
        reason: impl Into<String>,
    ) {
        self.left.push(Left {
            operation: operation.into(),
            object: object.into(),
            reason: reason.into(),
        });
    }

    /// Bounds the report, and makes its texts harmless to a terminal. Identifiers that cannot be ones are left out.
    pub(crate) fn tame(mut self) -> Report {
        self.system = tame(&self.system);
        self.changes.truncate(MAX_ENTRIES);
        self.left.truncate(MAX_ENTRIES);
        self.identifiers.truncate(MAX_ENTRIES);
        for change in &mut self.changes {
            change.object = tame(&change.object);
            change.detail = tame(&change.detail);
        }
        for left in &mut self.left {
            left.object = tame(&left.object);
            left.reason = tame(&left.reason);
        }
        self.identifiers.retain(Replacement::is_well_formed);
        self
    }
}

/// Returns text without control characters, and of bounded length.
pub(crate) fn tame(text: &str) -> String {
    let mut characters = text.chars().map(|c| match c {
        // What turns the direction of text round is as bad as an escape sequence.
        '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    });
    let mut tamed: String = characters.by_ref().take(MAX_TEXT).collect();
    if characters.next().is_some() {
        tamed.push('…');
    }
    tamed
}
