//! Lines that wait to be written.

use std::mem;

/// Lines, each with its line feed, in a bounded number of bytes.
#[derive(Debug)]
pub struct LineQueue {
    bytes: Vec<u8>,
    /// Most bytes.
    capacity: usize,
    /// Lines that were lost since the last report.
    dropped: u64,
}

impl LineQueue {
    /// Makes an empty queue of up to `capacity` bytes.
    pub fn new(capacity: usize) -> LineQueue {
        LineQueue {
            bytes: Vec::new(),
            capacity,
            dropped: 0,
        }
    }

    /// Appends `lines`, or drops and counts them if there is no room. Once lines were dropped, all
    /// further ones are, until the loss has been reported: so a gap is in one place.
    pub fn push(&mut self, lines: &[u8]) {
        if self.dropped == 0 && self.bytes.len() + lines.len() <= self.capacity {
            self.bytes.extend_from_slice(lines);
        } else {
            self.count_dropped(count_lines(lines));
        }
    }

    /// Appends lines for which there is always room, such as the one that says how many were
    /// dropped.
    pub fn push_notice(&mut self, lines: &[u8]) {
        self.bytes.extend_from_slice(lines);
    }

    /// Removes all lines, and returns them.
    pub fn take(&mut self) -> Vec<u8> {
        mem::take(&mut self.bytes)
    }

    /// Returns whether no line waits.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Counts lines that were lost.
    pub fn count_dropped(&mut self, lines: u64) {
        self.dropped = self.dropped.saturating_add(lines);
    }

    /// Returns how many lines were lost and not reported yet.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Notes that the loss of this many lines was reported.
    pub fn forget_dropped(&mut self, lines: u64) {
        self.dropped = self.dropped.saturating_sub(lines);
    }
}

/// Returns how many lines end in `bytes`.
pub fn count_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|&&byte| byte == b'\n').count() as u64
}

/// Returns the whole lines from the start of `lines` that fit into `most` bytes, but at least one.
pub fn whole_lines(lines: &[u8], most: usize) -> &[u8] {
    let is_end = |byte: &u8| *byte == b'\n';
    let fitting = lines.get(..most).unwrap_or(lines);
    let end = match fitting.iter().rposition(is_end) {
        Some(end) => end + 1,
        None => lines
            .iter()
            .position(is_end)
            .map_or(lines.len(), |end| end + 1),
    };
    lines.get(..end).unwrap_or(lines)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_beyond_the_capacity_are_dropped_and_counted() {
        let mut queue = LineQueue::new(8);
        queue.push(b"1234\n");
        queue.push(b"5678\n");
        // It would fit, but the gap is at the first dropped line.
        queue.push(b"9\n\n");
        assert_eq!(queue.dropped(), 3);
        assert_eq!(queue.take(), b"1234\n");
        assert!(queue.is_empty());

        queue.push(b"x\n");
        assert_eq!(queue.dropped(), 4);
        queue.push_notice(b"4 lines were lost\n");
        queue.forget_dropped(4);
        queue.push(b"y\n");
        assert_eq!(queue.dropped(), 1, "the notice has taken the room");
        assert_eq!(queue.take(), b"4 lines were lost\n");
        queue.forget_dropped(1);
        queue.push(b"y\n");
        assert_eq!(queue.take(), b"y\n");
    }

    proptest! {
        #[test]
        fn nothing_is_kept_beyond_the_capacity_and_nothing_lost_uncounted(
            lines in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..60),
            capacity in 0..400_usize,
        ) {
            let mut queue = LineQueue::new(capacity);
            let mut total = 0;
            for mut line in lines {
                line.push(b'\n');
                total += count_lines(&line);
                queue.push(&line);
                prop_assert!(queue.bytes.len() <= capacity);
            }
            let dropped = queue.dropped();
            prop_assert_eq!(count_lines(&queue.take()) + dropped, total);
        }

        #[test]
        fn pieces_are_whole_lines_and_lose_nothing(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            most in 0..50_usize,
        ) {
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let piece = whole_lines(rest, most);
                prop_assert!(!piece.is_empty());
                prop_assert!(piece.ends_with(b"\n") || piece.len() == rest.len());
                prop_assert!(piece.len() <= most || count_lines(piece) <= 1);
                rest = &rest[piece.len()..];
            }
        }
    }
}
