//! Sections of saved state, from which the parts of a machine are rebuilt.
//!
//! Each part (a device, a vCPU) has a type for its state, which implements [`SavedState`]. A
//! [`Section`] holds a value of such a type as bytes, with its kind and version; in a file or on a
//! socket it also has a length and a checksum:
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
//! Numbers in the frame are little-endian. Sections come from files and from other hosts, so they
//! are not trusted: a damaged section is an error, and reading one takes no more memory than its
//! bytes.

#![forbid(unsafe_code)]

mod error;
mod section;

pub use error::{RestoreError, SaveError};
pub use section::{MAX_PAYLOAD, SavedState, Section};
