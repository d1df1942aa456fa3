//! Metadata.

use bantam_metadata::{MetadataAddress, MetadataOptions, MetadataVersion};
use serde_json::Value;

/// What the guest is told over HTTP on a link-local address, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetadataConfig {
    /// The network devices over which the guest reaches it, by their place in the configuration,
    /// counted from zero; at least one.
    pub nets: Vec<usize>,
    /// Which requests are answered.
    pub version: MetadataVersion,
    /// Where the guest finds it.
    pub address: MetadataAddress,
    /// Whether the guest gets text whatever it asks for.
    pub imds_compat: bool,
    /// Most bytes of all contents, in JSON without spaces.
    pub size_limit: usize,
    /// What there is at first. Without this, a guest finds nothing until something is put.
    pub contents: Option<Value>,
}

impl MetadataConfig {
    /// Metadata over `nets`, the rest as is usual: version 1 at 169.254.169.254, up to 51,200 bytes,
    /// and no contents yet.
    pub fn new(nets: Vec<usize>) -> Self {
        let MetadataOptions {
            version,
            imds_compat,
            size_limit,
        } = MetadataOptions::default();
        Self {
            nets,
            version,
            address: MetadataAddress::default(),
            imds_compat,
            size_limit,
            contents: None,
        }
    }
}
