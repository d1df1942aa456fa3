//! The sources of the worker's events.

/// A source of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    ReceiveDoorbell,
    TransmitDoorbell,
    EventDoorbell,
    Listener,
    Timer,
    /// The stream of the connection at this place.
    Connection(usize),
}

/// Token of the connection at the first place; those of the others follow.
const FIRST_CONNECTION_TOKEN: u32 = 5;

impl Source {
    /// Returns the source's event token.
    pub(super) fn token(self) -> u32 {
        match self {
            Source::ReceiveDoorbell => 0,
            Source::TransmitDoorbell => 1,
            Source::EventDoorbell => 2,
            Source::Listener => 3,
            Source::Timer => 4,
            Source::Connection(place) => FIRST_CONNECTION_TOKEN + place as u32,
        }
    }

    pub(super) fn of_token(token: u32) -> Source {
        match token {
            0 => Source::ReceiveDoorbell,
            1 => Source::TransmitDoorbell,
            2 => Source::EventDoorbell,
            3 => Source::Listener,
            4 => Source::Timer,
            token => Source::Connection((token - FIRST_CONNECTION_TOKEN) as usize),
        }
    }
}
