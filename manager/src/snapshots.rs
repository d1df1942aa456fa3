//! Snapshots of named machines.

use crate::error::Error;
use crate::machine::Machine;
use crate::name::MachineName;

impl Machine {
    /// Returns the names of the snapshots, in their order.
    pub fn snapshots(&self) -> Result<Vec<MachineName>, Error> {
        Ok(Vec::new())
    }
}
