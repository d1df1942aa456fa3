//! The files of a snapshot: what a machine was at one moment, for another to go on from.
//!
//! A snapshot is two files. The **state file** ([`StateFile`]) is small: facts about the snapshot ([`Facts`]), and
//! sections of state (`bantam-state`) that the monitor's parts have written. The **memory file** is as large as the
//! guest's memory, and sparse: regions of memory one after another, as they are, with holes for pages of zeroes. A page
//! at its end, the seal, has the id of the snapshot, which is in the state file as well, so that files of different
//! snapshots are not taken for one.
//!
//! A **differential** snapshot ([`Facts::base`]) has only the pages that were written since another. Its state file says
//! which pages those are; [`merge`] makes a full snapshot of it and of those that it is based on. A program that knows
//! nothing of these files can complete the memory file as well: it copies the data of the differential one, page of zeroes
//! and seal included, over a copy of the memory file that it is based on. By its [`Witness`]es, the state file recognizes
//! the result.
//!
//! The state file is:
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `BANTAMSS` |
//! | 4 | version of this format, 1, little-endian |
//! | any | sections: `snapshot` ([`Facts`]), then those of the machine, for a differential snapshot `snapshot pages` and `snapshot witness` |
//! | any | section `snapshot end`: the number of sections before it |
//!
//! A **working set** ([`write_working_set`]) may be beside them: the pages that a machine has needed first after the snapshot, so
//! that the next one finds them read already. It is a hint. The file is like a state file, with `BANTAMSW` at its beginning and a
//! section `working set`, which has the snapshot's id, in the place of facts.
//!
//! New files are written under another name, brought to stable storage, and then put in the place of earlier ones, so
//! that a program that is killed leaves the earlier snapshot or the new one.

mod error;
mod facts;
mod files;
mod memory_file;
mod memory_writer;
mod merge;
mod state_file;
mod witness;
mod working_set;
mod write_ring;

pub use error::SnapshotError;
pub use facts::{Facts, SnapshotId};
pub use files::{NewFile, SnapshotFiles, put_in_place};
pub use memory_file::MemoryFile;
pub use memory_writer::{CopiedPages, MemoryWriter};
pub use merge::merge;
pub use state_file::StateFile;
pub use witness::Witness;
pub use working_set::{read_working_set, write_working_set};
