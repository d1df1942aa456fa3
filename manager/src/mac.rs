//! MAC addresses of named machines.

use std::collections::HashSet;

use bantam_vmm::config::{MacAddress, MachineConfig};
use sha2::{Digest, Sha256};

/// Gives each network device without a MAC address one that derives from the machine's id and the place of the device. It is
/// locally administered, unicast, and the same each time.
pub(crate) fn give_mac_addresses(config: &mut MachineConfig, id: &str) {
    let given = config.nets.iter().filter_map(|net| net.mac);
    let mut taken: HashSet<_> = given.map(MacAddress::bytes).collect();
    for (place, net) in config.nets.iter_mut().enumerate() {
        if net.mac.is_some() {
            continue;
        }
        // A device that was at this place once may have its address elsewhere now.
        let candidates = (0_usize..).map(|turn| derive(id, place, turn));
        let free = candidates.filter(|bytes| !taken.contains(bytes));
        net.mac = free
            .filter_map(|bytes| MacAddress::try_from(bytes).ok())
            .next();
        taken.extend(net.mac.map(MacAddress::bytes));
    }
}

fn derive(id: &str, place: usize, turn: usize) -> [u8; 6] {
    let hash = Sha256::digest(format!("{id} {place} {turn}"));
    [0x02, hash[0], hash[1], hash[2], hash[3], hash[4]]
}

#[cfg(test)]
mod tests {
    use bantam_vmm::config::NetConfig;

    use super::*;

    fn addresses(nets: &[&str], id: &str) -> Vec<String> {
        let mut config = MachineConfig::new("/k");
        config.nets = nets
            .iter()
            .map(|text| text.parse::<NetConfig>().unwrap())
            .collect();
        give_mac_addresses(&mut config, id);
        let macs = config.nets.iter().map(|net| net.mac.unwrap().to_string());
        macs.collect()
    }

    #[test]
    fn addresses_derive_from_the_id_and_are_stable() {
        let first = addresses(&["user", "tap=t"], "one");
        assert_eq!(first, addresses(&["user", "tap=t"], "one"));
        assert!(first.iter().all(|mac| mac.starts_with("02:")), "{first:?}");
        assert_ne!(first[0], first[1]);
        assert_ne!(first, addresses(&["user", "tap=t"], "two"));
    }

    #[test]
    fn an_address_that_is_given_stays_and_is_not_given_again() {
        let mine = "user,mac=52:54:00:00:00:01";
        assert_eq!(addresses(&[mine], "one"), ["52:54:00:00:00:01"]);
        let first = addresses(&["user"], "one").remove(0);
        let moved = format!("user,mac={first}");
        let found = addresses(&["user", &moved], "one");
        assert_ne!(found[0], first);
        assert_eq!(found[1], first);
    }
}
