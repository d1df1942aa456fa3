//! Sections of saved state: what a part of a machine is rebuilt from.
//!
//! Each part (a device, a vCPU) describes its state by a type of its own that implements
//! [`SavedState`]. A [`Section`] is such a value as bytes, with its kind and version; in a file or
//! on a socket it also has a length and a checksum:
//!
//! | bytes | |
//! | --- | --- |
//! | 1 | length of the kind |
//! | 1 to 255 | kind, ASCII |
//! | 2 | version |
//! | 4 | length of the payload |
//! | any | payload: the value in the [postcard wire format](https://postcard.jamesmunns.com/wire-format) |
//! | 4 | CRC-32 (IEEE 802.3) of all the above |
//!
//! Numbers of the frame are little-endian. Sections come from files and from other hosts, so nothing
//! about them is trusted: a damaged one is an error, and reading it takes no more memory than its
//! bytes do.

#![forbid(unsafe_code)]

mod error;
mod section;

pub use error::{RestoreError, SaveError};
pub use section::{MAX_PAYLOAD, SavedState, Section};
