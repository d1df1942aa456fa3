//! The version of the API.

/// The version of Firecracker's API that this one is like.
pub const API_VERSION: &str = "1.17.0";
