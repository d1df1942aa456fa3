//! The metadata service: what the owner of a machine tells its guest, over HTTP on a link-local
//! address.
//!
//! [`Metadata`] is what the owner holds, and changes at any time. A [`MetadataService`] serves it to
//! the guest of one network device, by a [`MetadataNetwork`] that takes the frames for its address
//! before they reach the host. Nothing of that touches the host's own network.
//!
//! `answer.rs` has the protocol, `request.rs` and `response.rs` HTTP, `connection.rs` what of it a
//! connection keeps, `network.rs` TCP and what is below.

mod answer;
mod connection;
mod error;
mod network;
mod request;
mod response;
mod store;
mod token;

use std::fmt;
use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bantam_metrics::Counter;
use serde::Serialize;
use serde_json::Value;

use token::TokenAuthority;

pub use error::MetadataError;
pub use network::{CLAIM_SIZE, MAX_GUEST_FRAME_SIZE, MetadataNetwork};
pub use store::{Format, LookupError, MetadataStore};

/// Which requests of a guest are answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MetadataVersion {
    /// All of them. Tokens are given, but not required.
    #[default]
    V1,
    /// Those that have a token, which a guest asks for first: whoever can have a program in the guest
    /// fetch an address of their choice can then still not read metadata.
    V2,
}

/// What distinguishes one machine's metadata from another's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataOptions {
    /// Which requests are answered.
    pub version: MetadataVersion,
    /// Whether the guest gets text whatever it asks for, as of the EC2 instance metadata service.
    pub imds_compat: bool,
    /// Most bytes of all contents, in JSON without spaces.
    pub size_limit: usize,
}

impl MetadataOptions {
    /// The limit of size that is usual, in bytes.
    pub const DEFAULT_SIZE_LIMIT: usize = 51_200;
}

impl Default for MetadataOptions {
    fn default() -> MetadataOptions {
        MetadataOptions {
            version: MetadataVersion::default(),
            imds_compat: false,
            size_limit: MetadataOptions::DEFAULT_SIZE_LIMIT,
        }
    }
}

/// What services have done, all those of one machine together.
#[derive(Debug, Default, Serialize)]
pub struct MetadataMetrics {
    /// Frames of the guest that were taken from its network device.
    pub rx_accepted: Counter,
    /// Those of them that were dropped: malformed, too large, or with no room for an answer.
    pub rx_accepted_err: Counter,
    /// Those of them that were dropped as they were neither ARP nor whole TCP segments.
    pub rx_accepted_unusual: Counter,
    /// Packets of the guest, on a device with a service, that were too short for an Ethernet header.
    pub rx_bad_eth: Counter,
    /// Requests with a token that is not valid.
    pub rx_invalid_token: Counter,
    /// Requests without a token.
    pub rx_no_token: Counter,
    /// Frames of the guest that were processed.
    pub rx_count: Counter,
    /// Bytes of the frames that the guest has received.
    pub tx_bytes: Counter,
    /// Frames that were made for the guest.
    pub tx_count: Counter,
    /// Those of them that its driver had no buffers large enough for.
    pub tx_errors: Counter,
    /// Those of them that it has received.
    pub tx_frames: Counter,
    /// Connections that the guest has begun.
    pub connections_created: Counter,
    /// Those of them that have ended, however they did.
    pub connections_destroyed: Counter,
}

/// A machine's metadata: contents that its owner changes at any time, and what decides how its guest
/// reads them. Clones are the same metadata.
#[derive(Clone)]
pub struct Metadata(Arc<Shared>);

struct Shared {
    store: Mutex<MetadataStore>,
    tokens: TokenAuthority,
    version: MetadataVersion,
    imds_compat: bool,
    metrics: Arc<MetadataMetrics>,
}

impl Metadata {
    /// Metadata without contents.
    ///
    /// # Errors
    /// When the host gives no random numbers.
    pub fn new(options: &MetadataOptions) -> io::Result<Metadata> {
        Ok(Metadata(Arc::new(Shared {
            store: Mutex::new(MetadataStore::new(options.size_limit)),
            tokens: TokenAuthority::new(Instant::now())?,
            version: options.version,
            imds_compat: options.imds_compat,
            metrics: Arc::default(),
        })))
    }

    /// Replaces all contents.
    ///
    /// # Errors
    /// As [`MetadataStore::put`].
    pub fn put(&self, contents: Value) -> Result<(), MetadataError> {
        self.store().put(contents)
    }

    /// Changes the contents by a JSON merge patch.
    ///
    /// # Errors
    /// As [`MetadataStore::patch`].
    pub fn patch(&self, patch: Value) -> Result<(), MetadataError> {
        self.store().patch(patch)
    }

    /// All contents, if there are any yet.
    pub fn get(&self) -> Option<Value> {
        self.store().get().cloned()
    }

    /// What the services of this metadata have done.
    pub fn metrics(&self) -> &Arc<MetadataMetrics> {
        &self.0.metrics
    }

    fn store(&self) -> MutexGuard<'_, MetadataStore> {
        // Each change is made as a whole, so that a thread that panicked has left none half made.
        self.0.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self) -> &TokenAuthority {
        &self.0.tokens
    }

    fn version(&self) -> MetadataVersion {
        self.0.version
    }

    fn imds_compat(&self) -> bool {
        self.0.imds_compat
    }
}

impl fmt::Debug for Metadata {
    /// Neither contents nor keys, which are nobody else's business.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("version", &self.0.version)
            .field("imds_compat", &self.0.imds_compat)
            .finish_non_exhaustive()
    }
}

/// An IPv4 link-local address that a service may have: 169.254.1.0 to 169.254.254.255 (RFC 3927,
/// section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetadataAddress(Ipv4Addr);

impl MetadataAddress {
    /// The address.
    pub fn get(self) -> Ipv4Addr {
        self.0
    }
}

impl Default for MetadataAddress {
    /// 169.254.169.254, where programs look for metadata.
    fn default() -> MetadataAddress {
        MetadataAddress(Ipv4Addr::new(169, 254, 169, 254))
    }
}

impl TryFrom<Ipv4Addr> for MetadataAddress {
    type Error = MetadataError;

    fn try_from(address: Ipv4Addr) -> Result<MetadataAddress, MetadataError> {
        match address.octets() {
            [169, 254, 1..=254, _] => Ok(MetadataAddress(address)),
            _ => Err(MetadataError::Address(address)),
        }
    }
}

/// How one network device serves metadata.
#[derive(Debug, Clone)]
pub struct MetadataService {
    /// What is served. Several devices may share it.
    pub metadata: Metadata,
    /// The address that its guest finds it at.
    pub address: MetadataAddress,
}

/// Metadata with an object as contents, for tests.
#[cfg(test)]
fn test_metadata(version: MetadataVersion, contents: Value) -> Metadata {
    let options = MetadataOptions {
        version,
        ..MetadataOptions::default()
    };
    let metadata = Metadata::new(&options).unwrap();
    metadata.put(contents).unwrap();
    metadata
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_a_link_local_address() {
        for (address, valid) in [
            ([169, 254, 169, 254], true),
            ([169, 254, 1, 0], true),
            ([169, 254, 254, 255], true),
            ([169, 254, 0, 255], false),
            ([169, 254, 255, 0], false),
            ([10, 0, 0, 1], false),
            ([169, 253, 169, 254], false),
        ] {
            let address = Ipv4Addr::from(address);
            assert_eq!(
                MetadataAddress::try_from(address).is_ok(),
                valid,
                "{address}"
            );
        }
        assert!(MetadataAddress::try_from(MetadataAddress::default().get()).is_ok());
    }

    #[test]
    fn clones_are_the_same_metadata() {
        let metadata = test_metadata(MetadataVersion::V1, serde_json::json!({"a": 1}));
        metadata.clone().patch(serde_json::json!({"b": 2})).unwrap();
        let expected = serde_json::json!({"a": 1, "b": 2});
        assert_eq!(metadata.get(), Some(expected));
        assert!(!format!("{metadata:?}").contains("\"a\""));
    }

    #[test]
    fn metrics_are_named_as_others_name_them() {
        let metrics = serde_json::to_value(MetadataMetrics::default()).unwrap();
        let names: Vec<_> = metrics.as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "connections_created",
                "connections_destroyed",
                "rx_accepted",
                "rx_accepted_err",
                "rx_accepted_unusual",
                "rx_bad_eth",
                "rx_count",
                "rx_invalid_token",
                "rx_no_token",
                "tx_bytes",
                "tx_count",
                "tx_errors",
                "tx_frames",
            ]
        );
    }
}
