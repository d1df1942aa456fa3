//! The address of a metadata service, and what it serves.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::error::MetadataError;
use crate::metadata::Metadata;

/// An IPv4 link-local address that a service may have: 169.254.1.0 to 169.254.254.255 (RFC 3927,
/// section 2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Addr")]
pub struct MetadataAddress(Ipv4Addr);

impl MetadataAddress {
    /// Returns the address.
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
    /// The metadata to serve. Several devices may share it.
    pub metadata: Metadata,
    /// The address at which the guest finds it.
    pub address: MetadataAddress,
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
}
