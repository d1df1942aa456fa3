//! The configuration space (section 5.1.4).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A card's address in the Ethernet.
pub(super) type MacAddress = [u8; 6];

/// Offsets of the fields. The status, which is between the address and the number of queue pairs,
/// belongs to a feature that is not offered.
mod offset {
    pub const MAC: usize = 0;
    pub const MAX_QUEUE_PAIRS: usize = 8;
    pub const MTU: usize = 10;
}
/// Size in bytes.
const SIZE: usize = 12;

/// How often the driver can change its address before it resets the device.
const MAX_ADDRESS_CHANGES: usize = 255;

/// The configuration space, which the driver reads on a vCPU thread while the worker may change
/// it.
///
/// Readers borrow its bytes without a lock, so bytes that were once visible stay as they are: a
/// change makes another version, and there is room for so many.
pub(super) struct ConfigSpace {
    versions: Box<[OnceLock<[u8; SIZE]>]>,
    /// Index of the version that is visible.
    present: AtomicUsize,
}

impl ConfigSpace {
    /// Of a card with the address `mac`; the other fields may be zero.
    pub(super) fn new(mac: MacAddress, max_queue_pairs: u16, mtu: u16) -> ConfigSpace {
        let mut bytes = [0; SIZE];
        bytes[offset::MAC..][..mac.len()].copy_from_slice(&mac);
        bytes[offset::MAX_QUEUE_PAIRS..][..2].copy_from_slice(&max_queue_pairs.to_le_bytes());
        bytes[offset::MTU..][..2].copy_from_slice(&mtu.to_le_bytes());
        let mut versions = vec![OnceLock::new(); 1 + MAX_ADDRESS_CHANGES];
        versions[0] = OnceLock::from(bytes);
        ConfigSpace {
            versions: versions.into_boxed_slice(),
            present: AtomicUsize::new(0),
        }
    }

    /// As it is now.
    pub(super) fn bytes(&self) -> &[u8; SIZE] {
        self.versions
            .get(self.present.load(Ordering::Acquire))
            .and_then(OnceLock::get)
            .unwrap_or(&[0; SIZE])
    }

    /// The card's address as it is now.
    pub(super) fn mac(&self) -> MacAddress {
        let mut mac = [0; 6];
        mac.copy_from_slice(&self.bytes()[offset::MAC..][..6]);
        mac
    }

    /// Changes the card's address; `false` where it was changed too often.
    pub(super) fn set_mac(&self, mac: MacAddress) -> bool {
        let mut bytes = *self.bytes();
        bytes[offset::MAC..][..mac.len()].copy_from_slice(&mac);
        // The driver may go back and forth between the same few.
        let version = self
            .versions
            .iter()
            .position(|version| *version.get_or_init(|| bytes) == bytes);
        if let Some(version) = version {
            self.present.store(version, Ordering::Release);
        }
        version.is_some()
    }

    /// Shows the address again that the card began with.
    pub(super) fn restore_mac(&self) {
        self.present.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let config = ConfigSpace::new([2, 0, 0, 1, 2, 3], 8, 9000);
        assert_eq!(config.bytes(), &[2, 0, 0, 1, 2, 3, 0, 0, 8, 0, 0x28, 0x23]);
    }

    #[test]
    fn the_address_changes_and_comes_back() {
        let config = ConfigSpace::new([2; 6], 1, 1500);
        let before = config.bytes();
        for _ in 0..1000 {
            assert!(config.set_mac([4; 6]));
            assert!(config.set_mac([6; 6]));
        }
        assert_eq!(config.mac(), [6; 6]);
        assert_eq!(before[..6], [2; 6], "what was borrowed does not change");
        config.restore_mac();
        assert_eq!(config.mac(), [2; 6]);
    }

    #[test]
    fn an_address_that_changes_for_ever_is_refused_at_last() {
        let config = ConfigSpace::new([2; 6], 1, 1500);
        for number in 0..MAX_ADDRESS_CHANGES {
            assert!(config.set_mac([4, 0, 0, 0, 0, number as u8]));
        }
        assert!(!config.set_mac([6; 6]));
        assert_eq!(config.mac(), [4, 0, 0, 0, 0, 254]);
        config.restore_mac();
        assert_eq!(config.mac(), [2; 6]);
    }
}
