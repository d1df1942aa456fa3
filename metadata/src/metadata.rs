//! A machine's metadata, and how its guest has to ask for them.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::MetadataError;
use crate::metrics::MetadataMetrics;
use crate::store::MetadataStore;
use crate::token::TokenAuthority;

/// Which requests of a guest the service answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MetadataVersion {
    /// All of them. Tokens are issued, but not required.
    #[default]
    V1,
    /// Those with a token, for which a guest asks first. An attacker who can make a program in the
    /// guest fetch an address of their choice can then still not read metadata.
    V2,
}

/// The settings of a machine's metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataOptions {
    /// Which requests are answered.
    pub version: MetadataVersion,
    /// Whether the guest gets text whatever it asks for, as from the EC2 instance metadata service.
    pub imds_compat: bool,
    /// Largest size of the contents in bytes, in JSON without spaces.
    pub size_limit: usize,
}

impl MetadataOptions {
    /// The usual limit of the size, in bytes.
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

/// A machine's metadata: contents that its owner changes at any time, and settings that decide how
/// its guest reads them. Clones share the same metadata.
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
    /// Makes metadata without contents.
    ///
    /// # Errors
    /// If the host provides no random numbers.
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
    /// Those of [`MetadataStore::put`].
    pub fn put(&self, contents: Value) -> Result<(), MetadataError> {
        self.store().put(contents)
    }

    /// Changes the contents by a JSON merge patch.
    ///
    /// # Errors
    /// Those of [`MetadataStore::patch`].
    pub fn patch(&self, patch: Value) -> Result<(), MetadataError> {
        self.store().patch(patch)
    }

    /// Returns the contents, if there are any yet.
    pub fn get(&self) -> Option<Value> {
        self.store().get().cloned()
    }

    /// Returns the counters of the services of this metadata.
    pub fn metrics(&self) -> &Arc<MetadataMetrics> {
        &self.0.metrics
    }

    pub(crate) fn store(&self) -> MutexGuard<'_, MetadataStore> {
        // Each change is made as a whole, so a thread that panicked left no partial change.
        self.0.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn tokens(&self) -> &TokenAuthority {
        &self.0.tokens
    }

    pub(crate) fn version(&self) -> MetadataVersion {
        self.0.version
    }

    pub(crate) fn imds_compat(&self) -> bool {
        self.0.imds_compat
    }
}

impl fmt::Debug for Metadata {
    /// Shows neither contents nor keys, which are secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metadata")
            .field("version", &self.0.version)
            .field("imds_compat", &self.0.imds_compat)
            .finish_non_exhaustive()
    }
}

/// Makes metadata with an object as contents, for tests.
#[cfg(test)]
pub(crate) fn test_metadata(version: MetadataVersion, contents: Value) -> Metadata {
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
    fn clones_are_the_same_metadata() {
        let metadata = test_metadata(MetadataVersion::V1, serde_json::json!({"a": 1}));
        metadata.clone().patch(serde_json::json!({"b": 2})).unwrap();
        let expected = serde_json::json!({"a": 1, "b": 2});
        assert_eq!(metadata.get(), Some(expected));
        assert!(!format!("{metadata:?}").contains("\"a\""));
    }
}
