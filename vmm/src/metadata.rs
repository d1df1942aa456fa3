//! The metadata of a machine, and the network devices that serve it.

use bantam_devices::metadata::{Metadata, MetadataAddress, MetadataOptions, MetadataService};

use crate::config::MetadataConfig;
use crate::error::Error;

/// Metadata, and where it is served.
pub(crate) struct MachineMetadata {
    pub(crate) metadata: Metadata,
    address: MetadataAddress,
    nets: Vec<usize>,
}

impl MachineMetadata {
    /// That which `config` describes, with its contents.
    pub(crate) fn new(config: &MetadataConfig) -> Result<MachineMetadata, Error> {
        let options = MetadataOptions {
            version: config.version,
            imds_compat: config.imds_compat,
            size_limit: config.size_limit,
        };
        let metadata = Metadata::new(&options).map_err(Error::resource("metadata tokens"))?;
        if let Some(contents) = &config.contents {
            metadata.put(contents.clone())?;
        }
        Ok(MachineMetadata {
            metadata,
            address: config.address,
            nets: config.nets.clone(),
        })
    }

    /// The service of the network device at `index`, if it has one.
    pub(crate) fn service(&self, index: usize) -> Option<MetadataService> {
        self.nets.contains(&index).then(|| MetadataService {
            metadata: self.metadata.clone(),
            address: self.address,
        })
    }
}
