//! Records the working set of a snapshot: the pages that a machine needs first after it.

use std::path::Path;
use std::time::{Duration, Instant};

use bantam_snapshot::{Facts, write_working_set};

use super::Link;

/// For how long the guest runs before its working set is taken, unless the machine ends before.
const TIME: Duration = Duration::from_secs(10);
/// How often it is looked at whether the guest runs.
const TICK: Duration = Duration::from_millis(100);

/// Waits until the guest has run for [`TIME`], or the machine ends, and writes the pages that were touched by then to `path`.
pub(super) fn record(link: &Link, path: &Path, facts: &Facts) {
    let mut run = Duration::ZERO;
    let mut ends = false;
    while !ends && run < TIME {
        let begin = Instant::now();
        ends = link.wait(&[], Some(TICK)).ends;
        // A pause does not count.
        if !link.control.is_pausing() {
            run += begin.elapsed();
        }
    }
    if run.is_zero() {
        return;
    }
    let pages = match link.memory.present_pages() {
        Ok(pages) => pages,
        Err(error) => {
            tracing::warn!("the working set is not recorded: {error}");
            return;
        }
    };
    match write_working_set(path, facts, &pages) {
        Ok(()) => tracing::info!("the working set has {} pages", pages.len()),
        Err(error) => tracing::warn!("the working set is not recorded: {error}"),
    }
}
