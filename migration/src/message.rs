//! Messages of both ends.

use bantam_snapshot::StateFile;

use crate::{Connection, MigrationError};

const MAGIC: [u8; 8] = *b"BANTAMMG";
const VERSION: u32 = 3;
/// Length in bytes of what an alert or a handshake of TLS begins with (RFC 8446, section 5.1).
const TLS_START: usize = 2;
/// What errors call the state of a machine.
const NAME: &str = "migration";
/// Largest state in bytes. Most machines have some hundred KiB.
const MAX_STATE: u32 = 64 << 20;
/// Longest reason of a failure in bytes.
const MAX_REASON: usize = 4096;
/// Most bytes of pages in one message.
pub(crate) const MAX_PAGES: usize = 1 << 20;
/// Length of an address in bytes.
pub(crate) const ADDRESS: usize = size_of::<u64>();
/// Length in bytes of the key by which the receiver knows the other connections of a source.
pub(crate) const KEY: usize = 16;

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Offer,
    Accepted,
    Pages,
    Zeroes,
    RoundEnd,
    RoundTaken,
    State,
    Ready,
    TakeOver,
    TakenOver,
    Failed,
    Trial,
    Others,
    Join,
    PagesEnd,
    Compressed,
}

const KINDS: [Kind; 16] = [
    Kind::Offer,
    Kind::Accepted,
    Kind::Pages,
    Kind::Zeroes,
    Kind::RoundEnd,
    Kind::RoundTaken,
    Kind::State,
    Kind::Ready,
    Kind::TakeOver,
    Kind::TakenOver,
    Kind::Failed,
    Kind::Trial,
    Kind::Others,
    Kind::Join,
    Kind::PagesEnd,
    Kind::Compressed,
];

impl Kind {
    fn number(self) -> u32 {
        self as u32 + 1
    }

    fn of_number(number: u32) -> Option<Kind> {
        KINDS.into_iter().find(|kind| kind.number() == number)
    }

    /// Whether a message of this kind can have a body of this length.
    fn takes(self, len: usize) -> bool {
        match self {
            Kind::Offer | Kind::Trial | Kind::State => len <= MAX_STATE as usize,
            Kind::Pages => {
                let pages = len.saturating_sub(ADDRESS);
                (1..=MAX_PAGES).contains(&pages)
            }
            Kind::Compressed => {
                let data = len.saturating_sub(2 * ADDRESS);
                (1..=MAX_PAGES).contains(&data)
            }
            Kind::Zeroes => len == 2 * ADDRESS,
            Kind::Others => len == 1 + KEY,
            Kind::Join => len == KEY,
            Kind::TakeOver => len == 1,
            Kind::Failed => len <= MAX_REASON,
            _ => len == 0,
        }
    }
}

/// The beginning of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) kind: Kind,
    /// Length of the body in bytes.
    pub(crate) len: usize,
}

impl Head {
    pub(crate) fn bytes(kind: Kind, len: usize) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&kind.number().to_le_bytes());
        // No body is longer than 64 MiB.
        bytes[4..].copy_from_slice(&(len as u32).to_le_bytes());
        bytes
    }

    pub(crate) fn parse([k0, k1, k2, k3, l0, l1, l2, l3]: [u8; 8]) -> Result<Head, MigrationError> {
        let number = u32::from_le_bytes([k0, k1, k2, k3]);
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let kind = Kind::of_number(number)
            .ok_or_else(|| MigrationError::Protocol(format!("a message has kind {number}")))?;
        match kind.takes(len) {
            true => Ok(Head { kind, len }),
            false => Err(MigrationError::Protocol(format!(
                "a message of kind {number} has {len} bytes"
            ))),
        }
    }
}

impl Connection {
    /// Tells the other end which protocol this is, and checks that it is the same there.
    pub(crate) fn greet(&self) -> Result<(), MigrationError> {
        self.send_greeting()?;
        self.receive_greeting()
    }

    pub(crate) fn send_greeting(&self) -> Result<(), MigrationError> {
        let mut bytes = [0; MAGIC.len() + size_of::<u32>()];
        let (magic, version) = bytes.split_at_mut(MAGIC.len());
        magic.copy_from_slice(&MAGIC);
        version.copy_from_slice(&VERSION.to_le_bytes());
        self.send(&bytes)
    }

    pub(crate) fn receive_greeting(&self) -> Result<(), MigrationError> {
        let mut magic = [0; MAGIC.len()];
        let (start, rest) = magic.split_at_mut(TLS_START);
        // An alert of TLS can be shorter than the rest.
        self.receive(start)?;
        if let [0x15 | 0x16, 0x03] = start {
            return Err(MigrationError::Tls);
        }
        self.receive(rest)?;
        if magic != MAGIC {
            return Err(MigrationError::NotMigration);
        }
        let mut version = [0; size_of::<u32>()];
        self.receive(&mut version)?;
        match u32::from_le_bytes(version) {
            VERSION => Ok(()),
            found => Err(MigrationError::Version {
                known: VERSION,
                found,
            }),
        }
    }

    /// Sends a message with this body.
    pub(crate) fn send_message(&self, kind: Kind, body: &[u8]) -> Result<(), MigrationError> {
        let mut message = Vec::with_capacity(8 + body.len());
        message.extend_from_slice(&Head::bytes(kind, body.len()));
        message.extend_from_slice(body);
        self.send(&message)
    }

    /// Sends a message with a state file.
    pub(crate) fn send_state(&self, kind: Kind, state: &StateFile) -> Result<(), MigrationError> {
        let mut body = Vec::new();
        state.write_to(&mut body)?;
        if !kind.takes(body.len()) {
            let len = body.len();
            let reason = format!("its state has {len} bytes, which is more than {MAX_STATE}");
            return Err(MigrationError::Refused(reason));
        }
        self.send_message(kind, &body)
    }

    /// Says that this end cannot do its part.
    pub(crate) fn send_failure(&self, reason: &str) -> Result<(), MigrationError> {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let reason = reason.get(..end).unwrap_or_default();
        self.send_message(Kind::Failed, reason.as_bytes())
    }

    /// Receives the beginning of a message. One that says that the other end has failed is an error.
    pub(crate) fn receive_head(&self) -> Result<Head, MigrationError> {
        let mut bytes = [0; 8];
        self.receive(&mut bytes)?;
        let head = Head::parse(bytes)?;
        if head.kind == Kind::Failed {
            let reason = self.receive_body(head.len)?;
            let reason = String::from_utf8_lossy(&reason);
            // It is shown in one line.
            let is_shown = |it: &char| !it.is_control();
            let reason = reason.chars().filter(is_shown).collect();
            return Err(MigrationError::Refused(reason));
        }
        Ok(head)
    }

    /// Waits for a message of this kind, which has no body.
    pub(crate) fn expect(&self, kind: Kind) -> Result<(), MigrationError> {
        let head = self.receive_head()?;
        match head.kind == kind {
            true => Ok(()),
            false => Err(unexpected(head)),
        }
    }

    /// Receives the state file that is the body of a message.
    pub(crate) fn receive_state(&self, head: Head) -> Result<StateFile, MigrationError> {
        let body = self.receive_body(head.len)?;
        Ok(StateFile::read(&mut &*body, NAME.as_ref())?)
    }
}

/// Describes a message that has no place where it came.
pub(crate) fn unexpected(head: Head) -> MigrationError {
    let number = head.kind.number();
    MigrationError::Protocol(format!("a message of kind {number} is out of place"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_has_the_number_of_the_documentation() {
        let numbers: Vec<_> = KINDS.into_iter().map(Kind::number).collect();
        assert_eq!(numbers, (1..=16).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn a_head_is_read_as_it_was_written_or_refused(number in 0..18_u32, len: u32) {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            bytes[4..].copy_from_slice(&len.to_le_bytes());
            if let Ok(head) = Head::parse(bytes) {
                prop_assert_eq!(Head::bytes(head.kind, head.len), bytes);
                prop_assert!(head.len <= MAX_STATE as usize);
            }
        }
    }
}
