//! The metadata service that the network device of these tests offers.

use std::time::{Duration, Instant};

use bantam_devices::virtio::net::{LocalEndpoint, LocalService};
use bantam_metadata::{
    MAX_GUEST_FRAME_SIZE, Metadata, MetadataAddress, MetadataNetwork, MetadataOptions,
    MetadataService,
};

/// Makes a service without contents at the usual address.
pub fn metadata_service() -> LocalService {
    let service = MetadataService {
        metadata: Metadata::new(&MetadataOptions::default()).unwrap(),
        address: MetadataAddress::default(),
    };
    LocalService::new("the metadata service", move |mtu, now| {
        Ok(Box::new(Endpoint(MetadataNetwork::new(
            &service, mtu, now,
        )?)))
    })
}

struct Endpoint(MetadataNetwork);

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
