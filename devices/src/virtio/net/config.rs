//! The configuration space (section 5.1.4).

use crate::virtio::ConfigSpace;

/// A card's Ethernet address.
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

/// Makes the configuration space of a card with the address `mac`; the other fields may be zero.
pub(super) fn config_space(mac: MacAddress, max_queue_pairs: u16, mtu: u16) -> ConfigSpace {
    let config = ConfigSpace::new(vec![0; SIZE]);
    set_mac(&config, mac);
    config.write(offset::MAX_QUEUE_PAIRS, &max_queue_pairs.to_le_bytes());
    config.write(offset::MTU, &mtu.to_le_bytes());
    config
}

/// Returns the card's present address.
pub(super) fn mac(config: &ConfigSpace) -> MacAddress {
    config.array(offset::MAC as u64)
}

/// Changes the card's address.
pub(super) fn set_mac(config: &ConfigSpace, mac: MacAddress) {
    config.write(offset::MAC, &mac);
}

/// Whether `mac` can be the address of a card: neither a group address nor all zeroes.
pub(super) fn is_station_address(mac: MacAddress) -> bool {
    mac[0] & 1 == 0 && mac != [0; 6]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let config = config_space([2, 0, 0, 1, 2, 3], 8, 9000);
        let bytes = [2, 0, 0, 1, 2, 3, 0, 0, 8, 0, 0x28, 0x23];
        assert_eq!(config.array(0), bytes);
        assert_eq!(mac(&config), bytes[..6]);
    }
}
