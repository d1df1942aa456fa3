//! The version of the API.

/// The version of Firecracker's API that this API follows.
pub const API_VERSION: &str = "1.17.0";
