//! Clusters of the file that can be taken without any request to the host.

use std::collections::VecDeque;
use std::ops::Range;

/// Free clusters that are counted as used and read as zeroes, both on stable storage.
///
/// Its lock is taken after all others and never held during a call of the host.
#[derive(Debug, Default)]
pub(super) struct Reserve {
    /// They are taken from the first run.
    runs: VecDeque<Range<u64>>,
    /// Number of clusters in all runs.
    len: u64,
    /// With fewer clusters than this, it should be filled again.
    low: u64,
    /// Whether somebody was told that it is low, and it has not been filled since.
    is_reported: bool,
}

impl Reserve {
    /// Whether it should be filled again.
    pub fn is_low(&self) -> bool {
        self.len < self.low
    }

    /// Returns whether it should be filled again, but only once until that is done.
    pub fn report_low(&mut self) -> bool {
        self.is_low() && !std::mem::replace(&mut self.is_reported, true)
    }

    /// Takes between one and `count` clusters that follow each other. `None` if there are none.
    pub fn take(&mut self, count: u64) -> Option<Range<u64>> {
        let run = self.runs.front_mut()?;
        let taken = run.start..run.end.min(run.start + count);
        run.start = taken.end;
        if run.is_empty() {
            self.runs.pop_front();
        }
        self.len -= taken.end - taken.start;
        Some(taken)
    }

    /// Takes back what was taken and not used.
    pub fn put_back(&mut self, clusters: Range<u64>) {
        self.len += clusters.end - clusters.start;
        match self.runs.front_mut() {
            Some(run) if run.start == clusters.end => run.start = clusters.start,
            _ => self.runs.push_front(clusters),
        }
    }

    /// Adds runs of clusters. It is low when half of them are left.
    pub fn fill(&mut self, runs: impl IntoIterator<Item = Range<u64>>) {
        let mut added = 0;
        for run in runs {
            added += run.end - run.start;
            match self.runs.back_mut() {
                Some(last) if last.end == run.start => last.end = run.end,
                _ => self.runs.push_back(run),
            }
        }
        self.len += added;
        self.low = added / 2;
        self.is_reported = false;
    }

    /// Empties it.
    pub fn take_all(&mut self) -> Vec<Range<u64>> {
        std::mem::take(self).runs.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_gives_runs_in_order_and_tells_once_that_it_is_low() {
        let mut reserve = Reserve::default();
        assert_eq!(reserve.take(1), None);
        assert!(!reserve.is_low());
        reserve.fill([3..5, 10..14]);
        reserve.fill([14..20, 30..32]);
        assert_eq!(reserve.take(9), Some(3..5));
        assert_eq!(reserve.take(7), Some(10..17));
        assert!(!reserve.report_low());
        reserve.put_back(16..17);
        assert_eq!(reserve.take(1), Some(16..17));
        assert_eq!(reserve.take(2), Some(17..19));
        assert!(reserve.report_low());
        assert!(reserve.is_low() && !reserve.report_low());
        reserve.fill([40..48, 50..51]);
        assert!(!reserve.report_low());
        assert_eq!(reserve.take_all(), [19..20, 30..32, 40..48, 50..51]);
        assert_eq!(reserve.take(1), None);
        assert!(!reserve.is_low());
    }
}
