//! A set of a device's queues.

/// Most queues of a device.
pub const MAX_QUEUES: usize = u64::BITS as usize;

/// Some of a device's queues, whose indices are below [`MAX_QUEUES`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueSet(u64);

impl QueueSet {
    /// Makes the set that contains only the queue with this index.
    pub fn of(queue: u16) -> QueueSet {
        let mut set = QueueSet::default();
        set.insert(queue);
        set
    }

    /// Makes the set of the first `count` queues.
    pub fn first(count: usize) -> QueueSet {
        (0..count.min(MAX_QUEUES) as u16).collect()
    }

    /// Adds the queue with this index. An index of [`MAX_QUEUES`] or more, which no device has, is ignored.
    pub fn insert(&mut self, queue: u16) {
        self.0 |= 1_u64.checked_shl(queue.into()).unwrap_or_default();
    }

    /// Whether it contains no queue.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether it contains the queue with this index.
    pub fn contains(self, queue: u16) -> bool {
        1_u64
            .checked_shl(queue.into())
            .is_some_and(|bit| self.0 & bit != 0)
    }

    /// Returns the indices of its queues in ascending order.
    pub fn iter(self) -> impl Iterator<Item = u16> {
        (0..MAX_QUEUES as u16).filter(move |&queue| self.contains(queue))
    }
}

impl Extend<u16> for QueueSet {
    fn extend<T: IntoIterator<Item = u16>>(&mut self, queues: T) {
        for queue in queues {
            self.insert(queue);
        }
    }
}

impl FromIterator<u16> for QueueSet {
    fn from_iter<T: IntoIterator<Item = u16>>(queues: T) -> QueueSet {
        let mut set = QueueSet::default();
        set.extend(queues);
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_has_the_queues_that_are_put_in() {
        assert!(QueueSet::default().is_empty());
        assert!(QueueSet::of(64).is_empty());
        let set: QueueSet = [63, 0, 5, 0, 64, u16::MAX].into_iter().collect();
        assert!(set.iter().eq([0, 5, 63]));
        assert!(set.contains(5) && !set.contains(64));
        assert!(QueueSet::first(3).iter().eq(0..3));
        assert!(QueueSet::first(100).iter().eq(0..64));
    }
}
