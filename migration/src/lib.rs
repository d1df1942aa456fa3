//! The stream by which a running machine moves to another process or host. It knows no machine.
//!
//! The **source** has the machine; the **receiver** has made room for it. They have one connection, a stream
//! socket ([`Connection`]). Each begins with the 8 bytes `BANTAMMG` and the version of the protocol, 3, as a
//! little-endian number of 4 bytes. All that follows is messages: the kind and the length of the body in
//! bytes, each a little-endian number of 4 bytes, and the body.
//!
//! | kind | from | message | body |
//! | --- | --- | --- | --- |
//! | 1 | source | offer | a state file ([`StateFile`](bantam_snapshot::StateFile)): what the machine is, for the receiver to check |
//! | 2 | receiver | accepted | none |
//! | 3 | source | pages | the address of the first one, 8 bytes little-endian, and their content |
//! | 4 | source | zeroes | the address of the first page of zeroes and their length in bytes, 8 bytes each |
//! | 5 | source | end of a round | none |
//! | 6 | receiver | round taken | none |
//! | 7 | source | state | a state file: what the machine is now, as it stands still |
//! | 8 | receiver | ready | none |
//! | 9 | source | take over | 1 byte: 1 if the machine is to run, 0 if it is to stay paused |
//! | 10 | receiver | taken over | none |
//! | 11 | both | failed | the reason, in UTF-8 |
//! | 12 | source | trial | as that of an offer. The receiver checks it, and answers as if it were one. That is all |
//! | 13 | source | others | before an offer: how many other connections there are, 1 byte, and a random key of 16 bytes |
//! | 14 | source | join | the first message of another connection: that key |
//! | 15 | source | end of pages | none. The last message of another connection |
//! | 16 | source | compressed pages | the address of the first one and their length in bytes, 8 bytes each, and their content as a frame of zstd |
//!
//! A page that the source has not sent is zero. The source sends all pages that are not, and then, round after
//! round, those that the machine has written meanwhile, until few are left. It lets the machine stand still,
//! sends the last pages, gives up the machine's disks and sends its state. The receiver takes the disks, builds the
//! machine and says that it is ready.
//!
//! **Several connections.** A source that wants more than one announces them, and each begins with the same 8 bytes and the version.
//! Then they take pages, zeroes and ends of rounds, and each end of a round is answered where it came. A source begins a round when all
//! connections have answered the end of the one before, so that no page overtakes a newer one.
//!
//! **One owner.** Until the source has sent `take over`, the machine is the source's: if the connection breaks, it goes on
//! there, and the receiver forgets it. From then on it is the receiver's. If the connection breaks before `taken over`,
//! the source does not know whether the receiver has it ([`HandOver::Unknown`]), and must not let its own go on.

mod address;
mod connection;
mod error;
mod incoming;
mod message;
mod outgoing;

pub use address::Address;
pub use connection::{Breaker, Connection, MAX_CONNECTIONS};
pub use error::MigrationError;
pub use incoming::Incoming;
pub use outgoing::{Compression, Counters, HandOver, Outgoing, Zeroes};
