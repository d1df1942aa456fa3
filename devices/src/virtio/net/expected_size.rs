//! How large the packets to come will be, judged by those that came.

/// So many packets, none of them large, are taken for a sign that the next are not either.
const SIGN: u32 = 64;

/// A guess at the size of the packets to come, in bytes.
///
/// A call that reads a packet takes longer the more buffers it is given, and most packets need only
/// one or two. But one for which there were too few is copied once more.
pub(super) struct ExpectedSize {
    usual: usize,
    largest: usize,
    guess: usize,
    /// The packets since the guess was made: how many, and the size of the largest.
    seen: u32,
    largest_seen: usize,
}

impl ExpectedSize {
    /// Of packets that usually have up to `usual` bytes, and never more than `largest`.
    pub(super) fn new(usual: usize, largest: usize) -> ExpectedSize {
        ExpectedSize {
            usual,
            largest,
            guess: usual,
            seen: 0,
            largest_seen: 0,
        }
    }

    /// The size for which to have buffers ready.
    pub(super) fn guess(&self) -> usize {
        self.guess
    }

    /// Learns from a packet of `size` bytes.
    pub(super) fn learn(&mut self, size: usize) {
        self.seen += 1;
        self.largest_seen = self.largest_seen.max(size);
        let guess = if size > self.guess {
            self.largest
        } else if self.seen == SIGN {
            self.largest_seen.max(self.usual)
        } else {
            return;
        };
        *self = ExpectedSize {
            guess,
            ..ExpectedSize::new(self.usual, self.largest)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_packet_announces_others_until_many_are_small() {
        let mut size = ExpectedSize::new(1500, 65_000);
        assert_eq!(size.guess(), 1500);
        for _ in 0..1000 {
            size.learn(60);
        }
        assert_eq!(size.guess(), 1500);
        size.learn(1501);
        assert_eq!(size.guess(), 65_000);
        // Large ones among the small keep it so, as far as they are.
        for number in 0..1000 {
            size.learn(if number % SIGN == 0 { 40_000 } else { 60 });
            assert!(size.guess() >= 40_000);
        }
        for _ in 0..2 * SIGN {
            size.learn(60);
        }
        assert_eq!(size.guess(), 1500);
    }
}
