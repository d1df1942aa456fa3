//! What the API knows of a resource.

use crate::fault::Fault;
use crate::metrics_groups::Group;
use crate::request::{Call, Request};

/// What clients find at a path.
pub(super) struct Resource {
    /// The first part of the path.
    pub(super) path: &'static str,
    /// Reads a request to it.
    pub(super) parse: fn(&Call<'_>) -> Result<Request, Fault>,
    /// The groups of metrics that are its own.
    pub(super) groups: &'static [Group],
}
