//! The configuration space (section 5.1.4).

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use crate::virtio::ConfigSpace;

/// A card's Ethernet address.
pub(super) type MacAddress = [u8; 6];

/// Offsets of the fields.
mod offset {
    pub const MAC: usize = 0;
    pub const STATUS: usize = 6;
    pub const MAX_QUEUE_PAIRS: usize = 8;
    pub const MTU: usize = 10;
}
/// Size in bytes.
const SIZE: usize = 12;

/// Makes the configuration space of a card with the address `mac`; the other fields may be zero.
pub(super) fn config_space(mac: MacAddress, max_queue_pairs: u16, mtu: u16) -> ConfigSpace {
    let config = ConfigSpace::new(vec![0; SIZE]);
    set_mac(&config, mac);
    set_link(&config, true);
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

/// Sets whether the driver is asked to announce the card to its network (section 5.1.6.5.4).
pub(super) fn set_announce(config: &ConfigSpace, announce: bool) {
    set_status(config, VIRTIO_NET_S_ANNOUNCE, announce);
}

/// Whether the driver is asked to announce the card.
pub(super) fn asks_for_announcement(config: &ConfigSpace) -> bool {
    status(config) & VIRTIO_NET_S_ANNOUNCE as u16 != 0
}

/// Sets whether the card has a link.
pub(super) fn set_link(config: &ConfigSpace, is_up: bool) {
    set_status(config, VIRTIO_NET_S_LINK_UP, is_up);
}

/// Whether the card has a link.
pub(super) fn has_link(config: &ConfigSpace) -> bool {
    status(config) & VIRTIO_NET_S_LINK_UP as u16 != 0
}

fn status(config: &ConfigSpace) -> u16 {
    u16::from_le_bytes(config.array(offset::STATUS as u64))
}

fn set_status(config: &ConfigSpace, bit: u32, is_set: bool) {
    let others = status(config) & !(bit as u16);
    let new = others | if is_set { bit as u16 } else { 0 };
    config.write(offset::STATUS, &new.to_le_bytes());
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
        let bytes = [2, 0, 0, 1, 2, 3, 1, 0, 8, 0, 0x28, 0x23];
        assert_eq!(config.array(0), bytes);
        assert_eq!(mac(&config), bytes[..6]);
        set_announce(&config, true);
        assert_eq!(config.array(6), [3, 0]);
        assert!(asks_for_announcement(&config));
        set_announce(&config, false);
        assert!(!asks_for_announcement(&config));
        assert_eq!(config.array(0), bytes);
        set_announce(&config, true);
        set_link(&config, false);
        assert_eq!(config.array(6), [2, 0]);
        assert!(!has_link(&config) && asks_for_announcement(&config));
        set_link(&config, true);
        assert!(has_link(&config));
    }
}
