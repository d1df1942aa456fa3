//! The latest output of a serial port.

use std::collections::VecDeque;

/// Most bytes that are kept.
pub(super) const CAPACITY: usize = 256 << 10;

/// Keeps the last [`CAPACITY`] bytes that the guest has sent. A byte's position is the number of bytes sent
/// before it since the start of the machine.
#[derive(Default)]
pub(super) struct History {
    /// Grows up to the capacity as the guest sends.
    bytes: VecDeque<u8>,
    end: u64,
}

impl History {
    /// Returns the position of the oldest byte.
    pub(super) fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }

    /// Returns the position of the next byte that the guest sends.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Returns how many bytes can be appended before one at or after `position` is lost.
    pub(super) fn room_before(&self, position: u64) -> usize {
        CAPACITY.saturating_sub(self.end.saturating_sub(position) as usize)
    }

    /// Appends output of the guest, in place of the oldest bytes if necessary.
    pub(super) fn append(&mut self, bytes: &VecDeque<u8>) {
        let (first, second) = bytes.as_slices();
        for part in [first, second] {
            self.end += part.len() as u64;
            let part = &part[part.len().saturating_sub(CAPACITY)..];
            let excess = (self.bytes.len() + part.len()).saturating_sub(CAPACITY);
            self.bytes.drain(..excess);
            self.reserve(part.len());
            self.bytes.extend(part);
        }
    }

    /// Makes room for `count` bytes. If the deque grew by itself, it could exceed the capacity.
    fn reserve(&mut self, count: usize) {
        let needed = self.bytes.len() + count;
        if needed > self.bytes.capacity() {
            let wanted = (2 * needed).min(CAPACITY);
            self.bytes.reserve_exact(wanted - self.bytes.len());
        }
    }

    /// Returns bytes from `position` on, which must not be before the start. There may be more after them;
    /// the slice is empty only at the end.
    pub(super) fn from(&self, position: u64) -> &[u8] {
        let offset = position.saturating_sub(self.start()) as usize;
        let (first, second) = self.bytes.as_slices();
        match first.get(offset..) {
            Some(bytes) if !bytes.is_empty() => bytes,
            _ => second.get(offset - first.len()..).unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read_from(history: &History, mut position: u64) -> Vec<u8> {
        let mut read = Vec::new();
        loop {
            let bytes = history.from(position);
            if bytes.is_empty() {
                assert_eq!(position, history.end());
                return read;
            }
            read.extend_from_slice(bytes);
            position += bytes.len() as u64;
        }
    }

    #[test]
    fn nothing_is_allocated_before_there_is_output() {
        let history = History::default();
        assert_eq!(history.bytes.capacity(), 0);
        assert_eq!(history.from(0), b"");
        assert_eq!(history.room_before(0), CAPACITY);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn the_last_bytes_are_kept_in_order(sizes in prop::collection::vec(0..100_000usize, 1..20)) {
            let mut history = History::default();
            let mut sent = Vec::new();
            for size in sizes {
                let part: VecDeque<u8> = (sent.len()..sent.len() + size)
                    .map(|index| (index * 7 + index / 251) as u8)
                    .collect();
                history.append(&part);
                sent.extend(part);
                prop_assert_eq!(history.end(), sent.len() as u64);
                let kept = sent.len().min(CAPACITY);
                let start = sent.len() - kept;
                prop_assert_eq!(history.start(), start as u64);
                prop_assert!(read_from(&history, history.start()) == sent[start..]);
                let middle = start + kept / 2;
                prop_assert!(read_from(&history, middle as u64) == sent[middle..]);
                prop_assert_eq!(history.room_before(history.start()), CAPACITY - kept);
                prop_assert!(history.bytes.capacity() <= CAPACITY);
            }
        }
    }
}
