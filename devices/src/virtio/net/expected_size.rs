//! Prediction of packet sizes from those of earlier packets.

/// After this many packets without a large one, the next are expected not to be large either.
const SIGN: u32 = 64;

/// A guess at the size in bytes of the packets to come.
///
/// A call that reads a packet takes longer the more buffers it is given, and most packets need only one or
/// two. But a packet for which there were too few must be copied.
pub(super) struct ExpectedSize {
    usual: usize,
    largest: usize,
    guess: usize,
    /// The packets since the guess was made: their number, and the size of the largest.
    seen: u32,
    largest_seen: usize,
}

impl ExpectedSize {
    /// Makes a guess for packets that usually have up to `usual` bytes, and never more than `largest`.
    pub(super) fn new(usual: usize, largest: usize) -> ExpectedSize {
        ExpectedSize {
            usual,
            largest,
            guess: usual,
            seen: 0,
            largest_seen: 0,
        }
    }

    /// Returns the size for which to have buffers ready.
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
        // Occasional large packets keep the guess at least at their size.
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
