//! The sources of the worker's events.

/// A source of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The doorbell of the queue with this index.
    Doorbell(usize),
    /// The listening socket of a port: a client has connected.
    Listener(usize),
    /// The source of a port's input.
    Input(usize),
    /// The sink of a port's output.
    Output(usize),
}

/// A token has the kind of source in its low bits, and the index of a queue or port above.
const KINDS: u32 = 4;

impl Source {
    /// Returns the source's event token.
    pub(super) fn token(self) -> u32 {
        let (kind, index) = match self {
            Source::Doorbell(queue) => (0, queue),
            Source::Listener(port) => (1, port),
            Source::Input(port) => (2, port),
            Source::Output(port) => (3, port),
        };
        index as u32 * KINDS + kind
    }

    pub(super) fn of_token(token: u32) -> Source {
        let index = (token / KINDS) as usize;
        match token % KINDS {
            0 => Source::Doorbell(index),
            1 => Source::Listener(index),
            2 => Source::Input(index),
            _ => Source::Output(index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_gives_its_source_back() {
        for index in [0, 1, 35] {
            for source in [
                Source::Doorbell(index),
                Source::Listener(index),
                Source::Input(index),
                Source::Output(index),
            ] {
                assert_eq!(Source::of_token(source.token()), source);
            }
        }
    }
}
