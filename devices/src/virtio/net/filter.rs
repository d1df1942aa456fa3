//! The receive filter: which frames the driver wants (section 5.1.6.5.1).

use serde::{Deserialize, Serialize};

use super::config::MacAddress;
use crate::tap::FrameFilter;

/// Most addresses that are kept of each half of a driver's address table.
pub(super) const MAX_ADDRESSES: usize = 64;

/// The address that every card listens to.
const BROADCAST: MacAddress = [0xff; 6];

/// A rule for a whole class of frames, set by a command of the class `VIRTIO_NET_CTRL_RX`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

/// Addresses of a driver's table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AddressList {
    pub addresses: Vec<MacAddress>,
    /// Whether these are all the addresses: only the start of a long table is kept.
    pub is_complete: bool,
}

impl AddressList {
    fn empty() -> AddressList {
        AddressList {
            addresses: Vec::new(),
            is_complete: true,
        }
    }
}

/// The rules that the driver has set. If they conflict, promiscuous mode takes precedence, and then the rules
/// that let no frame of a kind pass.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiveFilter {
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: AddressList,
    multicast: AddressList,
}

impl ReceiveFilter {
    /// Makes the filter for a driver that has set no rules, and so may want everything.
    pub(super) fn new() -> ReceiveFilter {
        ReceiveFilter {
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: AddressList::empty(),
            multicast: AddressList::empty(),
        }
    }

    pub(super) fn set_mode(&mut self, mode: Mode, on: bool) {
        *match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    pub(super) fn set_table(&mut self, unicast: AddressList, multicast: AddressList) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// Whether a driver can have set these rules: there are no more addresses than are kept.
    pub(super) fn is_valid(&self) -> bool {
        let lists = [&self.unicast, &self.multicast];
        lists
            .iter()
            .all(|list| list.addresses.len() <= MAX_ADDRESSES)
    }

    /// Translates the rules for a tap, for a card with the address `own`. A tap has no rule for "every
    /// unicast frame" or "every multicast frame except broadcasts", so it then hands out more than is wanted,
    /// as the standard permits.
    pub(super) fn for_tap(&self, own: MacAddress) -> FrameFilter {
        let all_unicast = !self.no_unicast && (self.all_unicast || !self.unicast.is_complete);
        if self.promiscuous || all_unicast {
            return FrameFilter::All;
        }
        // A tap filters only the first few exactly.
        let mut addresses = Vec::new();
        if !self.no_broadcast {
            addresses.push(BROADCAST);
        }
        if !self.no_unicast {
            addresses.push(own);
            addresses.extend(&self.unicast.addresses);
        }
        if !self.no_multicast {
            addresses.extend(&self.multicast.addresses);
        }
        FrameFilter::Only {
            addresses,
            all_multicast: !self.no_multicast
                && (self.all_multicast || !self.multicast.is_complete),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = [2, 0, 0, 0, 0, 1];
    const OTHER: MacAddress = [2, 0, 0, 0, 0, 2];
    const GROUP: MacAddress = [1, 0, 0x5e, 0, 0, 1];

    fn list(address: MacAddress, is_complete: bool) -> AddressList {
        AddressList {
            addresses: vec![address],
            is_complete,
        }
    }

    /// Makes a filter with `modes` on and the rest off, and a table of `OTHER` and `GROUP`.
    fn filter(modes: &[Mode], is_complete: bool) -> FrameFilter {
        let mut filter = ReceiveFilter::new();
        filter.set_mode(Mode::Promiscuous, false);
        filter.set_table(list(OTHER, is_complete), list(GROUP, is_complete));
        for &mode in modes {
            filter.set_mode(mode, true);
        }
        filter.for_tap(OWN)
    }

    fn only(addresses: &[MacAddress], all_multicast: bool) -> FrameFilter {
        FrameFilter::Only {
            addresses: addresses.to_vec(),
            all_multicast,
        }
    }

    #[test]
    fn a_driver_that_has_said_nothing_receives_everything() {
        assert_eq!(ReceiveFilter::new().for_tap(OWN), FrameFilter::All);
    }

    #[test]
    fn modes_and_table_decide() {
        use Mode::*;
        assert_eq!(
            filter(&[], true),
            only(&[BROADCAST, OWN, OTHER, GROUP], false)
        );
        for (modes, expected) in [
            (&[Promiscuous][..], FrameFilter::All),
            (&[Promiscuous, NoUnicast, NoMulticast], FrameFilter::All),
            (&[AllUnicast], FrameFilter::All),
            (&[AllMulticast], only(&[BROADCAST, OWN, OTHER, GROUP], true)),
            (&[NoMulticast], only(&[BROADCAST, OWN, OTHER], false)),
            (
                &[AllMulticast, NoMulticast],
                only(&[BROADCAST, OWN, OTHER], false),
            ),
            (&[AllUnicast, NoUnicast], only(&[BROADCAST, GROUP], false)),
            (&[NoBroadcast], only(&[OWN, OTHER, GROUP], false)),
            (&[NoBroadcast, NoUnicast, NoMulticast], only(&[], false)),
        ] {
            assert_eq!(filter(modes, true), expected, "{modes:?}");
        }
    }

    #[test]
    fn a_table_that_is_too_long_lets_all_of_its_kind_pass() {
        assert_eq!(filter(&[], false), FrameFilter::All);
        assert_eq!(
            filter(&[Mode::NoUnicast], false),
            only(&[BROADCAST, GROUP], true)
        );
    }
}
