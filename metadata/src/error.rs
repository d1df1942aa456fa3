//! Errors of the owner's changes to metadata.

use std::net::Ipv4Addr;

/// Why metadata was not changed, or cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The contents would be larger than the limit.
    #[error(
        "cannot keep metadata of {size} bytes: the limit is {limit}; shorten it, or raise the limit"
    )]
    TooLarge {
        /// Size in bytes, in JSON without spaces.
        size: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// There are no contents to patch.
    #[error("cannot patch the metadata: there is none yet; put some first")]
    NotInitialized,
    /// The service cannot have this address.
    #[error(
        "cannot serve metadata at {0}: it must be an IPv4 link-local address, 169.254.1.0 to \
         169.254.254.255"
    )]
    Address(Ipv4Addr),
}
