//! The ids by which clients name devices.

use crate::fault::Fault;
use crate::text::printable;

/// Checks that a device can have this id.
pub(crate) fn check_id(id: &str) -> Result<(), Fault> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if id.is_empty() || !id.chars().all(valid) {
        return Err(Fault::Id { id: printable(id) });
    }
    Ok(())
}
