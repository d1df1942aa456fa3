//! The metadata of a machine, and the network devices that serve it.

use std::time::{Duration, Instant};

use bantam_devices::virtio::net::{FRAME_START_SIZE, LocalEndpoint, LocalService};
use bantam_metadata::{
    CLAIM_SIZE, MAX_GUEST_FRAME_SIZE, Metadata, MetadataAddress, MetadataNetwork, MetadataOptions,
    MetadataService,
};

use crate::config::{DeviceName, MetadataConfig};
use crate::error::Error;

/// The metadata, and where it is served.
pub(crate) struct MachineMetadata {
    pub(crate) metadata: Metadata,
    address: MetadataAddress,
    nets: Vec<DeviceName>,
}

impl MachineMetadata {
    /// Creates the metadata that `config` describes, with its contents.
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

    /// Returns the service that the network device called `name` offers, if it is to offer metadata.
    pub(crate) fn service(&self, name: &DeviceName) -> Option<LocalService> {
        self.nets.contains(name).then(|| {
            let service = MetadataService {
                metadata: self.metadata.clone(),
                address: self.address,
            };
            LocalService::new("the metadata service", move |mtu, now| {
                Ok(Box::new(Endpoint(MetadataNetwork::new(
                    &service, mtu, now,
                )?)))
            })
        })
    }
}

/// The metadata service as an endpoint of a network device.
struct Endpoint(MetadataNetwork);

const _: () = assert!(CLAIM_SIZE <= FRAME_START_SIZE);

impl LocalEndpoint for Endpoint {
    fn claims(&self, start: &[u8]) -> bool {
        self.0.claims(start)
    }

    fn max_frame_size(&self) -> usize {
        MAX_GUEST_FRAME_SIZE
    }

    fn accept(&mut self, frame: &mut [u8], now: Instant) {
        self.0.accept(frame, now);
    }

    fn reject(&mut self) {
        self.0.reject();
    }

    fn poll(&mut self, now: Instant) {
        self.0.poll(now);
    }

    fn wait_time(&mut self, now: Instant) -> Option<Duration> {
        self.0.wait_time(now)
    }

    fn next_frame(&self) -> Option<&[u8]> {
        self.0.next_frame()
    }

    fn take_frame(&mut self, delivered: bool) {
        self.0.take_frame(delivered);
    }
}
