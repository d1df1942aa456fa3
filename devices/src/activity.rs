//! Shows for which device a thread is at work, and so which device holds it up.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bantam_state::{SaveError, Section};
use event_manager::{EventOps, Events, MutEventSubscriber};

use crate::worker::{QueueProgress, VirtioWorker};

/// Counts how often a thread has begun and ended to work on a device, so that a device whose work does not
/// end can be named. Clones count for the same device.
///
/// Threads work on a device one at a time.
#[derive(Debug, Clone, Default)]
pub struct Activity(Arc<AtomicU64>);

impl Activity {
    /// Does `work` for the device.
    pub fn during<T>(&self, work: impl FnOnce() -> T) -> T {
        let _end = Step::of(self);
        work()
    }

    /// Returns a number that is the same again later only if the same work is still being done; `None` if
    /// nothing is being done.
    pub fn work_under_way(&self) -> Option<u64> {
        let steps = self.0.load(Ordering::Relaxed);
        (steps % 2 == 1).then_some(steps)
    }

    /// Counts the beginning or the end of work. Threads take turns, so nothing is lost between the two
    /// accesses, which cost less than one that is atomic as a whole.
    fn step(&self) {
        let steps = self.0.load(Ordering::Relaxed);
        self.0.store(steps.wrapping_add(1), Ordering::Relaxed);
    }
}

/// Counts the end of work even if the work panics.
struct Step<'a>(&'a Activity);

impl Step<'_> {
    fn of(activity: &Activity) -> Step<'_> {
        activity.step();
        Step(activity)
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.0.step();
    }
}

/// A part of a device whose work counts as the device's activity, including its end, which may wait for the
/// host as well.
pub struct Watched<P> {
    /// None while it ends.
    part: Option<P>,
    activity: Activity,
}

impl<P> Watched<P> {
    /// Counts the work of `part` in `activity`.
    pub fn new(part: P, activity: Activity) -> Watched<P> {
        Watched {
            part: Some(part),
            activity,
        }
    }
}

impl<P: MutEventSubscriber> MutEventSubscriber for Watched<P> {
    fn init(&mut self, operations: &mut EventOps<'_>) {
        if let Some(part) = &mut self.part {
            self.activity.during(|| part.init(operations));
        }
    }

    fn process(&mut self, events: Events, operations: &mut EventOps<'_>) {
        if let Some(part) = &mut self.part {
            self.activity.during(|| part.process(events, operations));
        }
    }
}

impl VirtioWorker for Watched<Box<dyn VirtioWorker>> {
    fn pause(&mut self) -> io::Result<()> {
        match &mut self.part {
            Some(worker) => self.activity.during(|| worker.pause()),
            None => Ok(()),
        }
    }

    fn progress(&self) -> Vec<QueueProgress> {
        self.part
            .as_ref()
            .map_or_else(Vec::new, |worker| worker.progress())
    }

    fn save(&self) -> Result<Option<Section>, SaveError> {
        self.part.as_ref().map_or(Ok(None), |worker| worker.save())
    }
}

impl<P> Drop for Watched<P> {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            self.activity.during(|| drop(part));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_under_way_until_it_ends() {
        let activity = Activity::default();
        assert_eq!(activity.work_under_way(), None);
        let first = activity.during(|| activity.work_under_way());
        assert_eq!(activity.work_under_way(), None);
        let second = activity.during(|| activity.work_under_way());
        assert!(first.is_some() && second.is_some() && first != second);
    }
}
