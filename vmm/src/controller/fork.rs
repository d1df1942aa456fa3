//! Forks: machines that go on from where another is, and share its memory.

use std::time::Duration;

use bantam_memory::Sharing;
use bantam_snapshot::Facts;

use super::Controller;
use super::snapshot::Parts;
use super::write_log::WriteLog;
use crate::error::Error;
use crate::lock::lock;
use crate::snapshot::{Changes, Snapshot, SnapshotDisks};
use crate::state::State;

/// Most times that pages are copied while the machine runs, because it has written to them meanwhile.
const MAX_ROUNDS: usize = 8;
/// So few pages are copied while the machine is paused.
const FEW_PAGES: usize = 64;

impl Controller {
    /// Takes a snapshot of the machine that is kept in memory, for other machines of this process: forks of this one. They
    /// share its memory until they write to it, and so does this machine. A machine that runs is paused meanwhile; returned
    /// is also for how long the guest did not run. A call waits for an earlier one, and for a snapshot, to be done.
    ///
    /// What the machine has written since the last fork is copied while it runs. While it is paused, only the pages are
    /// copied again that it has written during the last moments.
    ///
    /// # Errors
    /// Those of [`Controller::snapshot`], and if the host has too little memory.
    pub fn fork(&self, disks: &SnapshotDisks) -> Result<(Snapshot, Duration), Error> {
        const ACTION: &str = "fork the machine";
        // A snapshot that is being written would take the pages for its own that this takes from the logs.
        let _one_at_a_time = lock(&self.0.snapshots);
        let parts = self.0.of_machine(ACTION, Parts::of)?;
        let is_tracking = self.configuration()?.track_dirty_pages;
        let mut changes = lock(&parts.changes);
        let (mut sharing, log) = match self.state() {
            State::Running => Some(copy_of_running(&parts, &mut changes, is_tracking)?),
            _ => None,
        }
        .unzip();
        let (forked, paused_for) = self.while_at_rest(false, || {
            self.while_paused(ACTION, |parts| {
                let machine = self.read_state(parts)?;
                let regions = parts.memory.regions();
                let regions = regions.map(|region| (region.start.0, region.len));
                let facts = Facts::now(None, regions).map_err(Error::RandomSeed)?;
                let sharing = match (sharing.take(), &log) {
                    (Some(mut sharing), Some(log)) => {
                        sharing.copy(&log.take(&mut changes)?).map_err(failed)?;
                        sharing
                    }
                    _ => Sharing::begin(&parts.memory).map_err(failed)?,
                };
                let layers = sharing.finish().map_err(failed)?;
                self.require_memory(&parts.memory)?;
                changes.forget_mapping();
                let overlays = self.freeze(&machine.config, disks, facts.id)?;
                Ok((machine, facts, layers, overlays))
            })
        })?;
        drop(log);
        let (machine, facts, layers, overlays) = forked;
        let frozen = match disks {
            SnapshotDisks::Unprotected => Vec::new(),
            _ => machine.frozen_disks(&overlays, false)?,
        };
        let config = machine.config.clone();
        let sections = machine.into_sections(None, frozen);
        let snapshot = Snapshot::shared(facts, layers, sections, config);
        Ok((snapshot, paused_for))
    }
}

fn failed(source: std::io::Error) -> Error {
    Error::resource("memory that forks share")(source)
}

/// Copies the memory of a machine that runs, all but a few pages, and returns the log in which these are.
fn copy_of_running<'a>(
    parts: &'a Parts,
    changes: &mut Changes,
    is_tracking: bool,
) -> Result<(Sharing, WriteLog<'a>), Error> {
    let log = WriteLog::start(parts, changes, is_tracking)?;
    let mut sharing = Sharing::begin(&parts.memory).map_err(failed)?;
    for _ in 0..MAX_ROUNDS {
        let written = log.take(changes)?;
        sharing.copy(&written).map_err(failed)?;
        if written.len() <= FEW_PAGES {
            break;
        }
    }
    Ok((sharing, log))
}
