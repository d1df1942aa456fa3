//! The control queue, with which the driver controls the device (section 5.1.6.5).

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use bantam_memory::{GuestBuffers, GuestMemory};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET,
    VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI,
    VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_NOMULTI, VIRTIO_NET_CTRL_RX_NOUNI,
    VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::DriverError;
use super::config::MacAddress;
use super::filter::{AddressList, MAX_ADDRESSES, Mode};
use crate::virtio::{Chain, DriverLink, VirtQueue};
use crate::worker::QueueProgress;

/// A command of the driver: a setting and its new value.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Whether a receive mode is on.
    Mode(Mode, bool),
    /// The addresses, besides its own, for which the card receives frames.
    AddressTable {
        unicast: AddressList,
        multicast: AddressList,
    },
    /// The card's own address.
    Address(MacAddress),
    /// The driver has seen that it is to announce the card.
    AnnounceSeen,
    /// How many pairs of queues are in use.
    QueuePairs(u16),
    /// The work on received packets that is left to the driver, as feature bits (section 5.1.6.5.6).
    Offloads(u64),
}

impl Command {
    /// Reads a command of a driver that has accepted `features`; `None` if it is not a command, or belongs to
    /// a feature that was not accepted.
    pub(super) fn read(bytes: &mut GuestBuffers, features: u64) -> Option<Command> {
        let [class, command] = take(bytes)?;
        let needs = |feature: u32| (features & 1 << feature != 0).then_some(());
        let command = match (u32::from(class), u32::from(command)) {
            (VIRTIO_NET_CTRL_RX, command) => {
                let (mode, feature) = match command {
                    VIRTIO_NET_CTRL_RX_PROMISC => (Mode::Promiscuous, VIRTIO_NET_F_CTRL_RX),
                    VIRTIO_NET_CTRL_RX_ALLMULTI => (Mode::AllMulticast, VIRTIO_NET_F_CTRL_RX),
                    VIRTIO_NET_CTRL_RX_ALLUNI => (Mode::AllUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                    VIRTIO_NET_CTRL_RX_NOMULTI => (Mode::NoMulticast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                    VIRTIO_NET_CTRL_RX_NOUNI => (Mode::NoUnicast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                    VIRTIO_NET_CTRL_RX_NOBCAST => (Mode::NoBroadcast, VIRTIO_NET_F_CTRL_RX_EXTRA),
                    _ => return None,
                };
                needs(feature)?;
                match take(bytes)? {
                    [on @ 0..=1] => Command::Mode(mode, on == 1),
                    _ => return None,
                }
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                needs(VIRTIO_NET_F_CTRL_RX)?;
                Command::AddressTable {
                    unicast: take_addresses(bytes)?,
                    multicast: take_addresses(bytes)?,
                }
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                needs(VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                Command::Address(take(bytes)?)
            }
            (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => {
                needs(VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                Command::AnnounceSeen
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                needs(VIRTIO_NET_F_MQ)?;
                Command::QueuePairs(u16::from_le_bytes(take(bytes)?))
            }
            (VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET) => {
                needs(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                Command::Offloads(u64::from_le_bytes(take(bytes)?))
            }
            _ => return None,
        };
        bytes.is_empty().then_some(command)
    }
}

fn take<const SIZE: usize>(bytes: &mut GuestBuffers) -> Option<[u8; SIZE]> {
    let mut taken = [0; SIZE];
    (bytes.read(&mut taken) == SIZE).then_some(taken)
}

/// Reads a number of addresses and the addresses. However many there are, only those that are kept are read.
fn take_addresses(bytes: &mut GuestBuffers) -> Option<AddressList> {
    let count = usize::try_from(u32::from_le_bytes(take(bytes)?)).ok()?;
    let size = count.checked_mul(size_of::<MacAddress>())?;
    let rest = bytes.len().checked_sub(size)?;
    let addresses = (0..count.min(MAX_ADDRESSES))
        .map(|_| take(bytes))
        .collect::<Option<_>>()?;
    bytes.advance(bytes.len() - rest);
    Some(AddressList {
        addresses,
        is_complete: count <= MAX_ADDRESSES,
    })
}

/// The queue, and the features negotiated for it.
pub(super) struct ControlQueue {
    queue: VirtQueue,
    chain: Chain,
    features: u64,
}

impl ControlQueue {
    pub(super) fn new(queue: VirtQueue, memory: &Arc<GuestMemory>, features: u64) -> ControlQueue {
        ControlQueue {
            queue,
            chain: Chain::new(memory),
            features,
        }
    }

    pub(super) fn doorbell(&self) -> RawFd {
        self.queue.as_raw_fd()
    }

    /// Returns how far the queue has come. Each command is answered before the next is taken.
    pub(super) fn progress(&self) -> QueueProgress {
        self.queue.progress()
    }

    /// Answers the commands in the queue. `obey` returns whether it has carried out a command.
    pub(super) fn serve(
        &mut self,
        link: &DriverLink,
        mut obey: impl FnMut(Command) -> Result<bool, DriverError>,
    ) -> Result<(), DriverError> {
        let features = self.features;
        self.queue.serve(&mut self.chain, link, |chain| {
            if chain.writable.is_empty() {
                return Err(DriverError::NoRoomForAnswer { head: chain.head });
            }
            let done = match Command::read(&mut chain.readable, features) {
                Some(command) => obey(command)?,
                None => false,
            };
            let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            Ok(chain.writable.write(&[answer as u8]) as u32)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn read(bytes: &[u8], features: u64) -> Option<Command> {
        let regions = [(GuestAddress(0), 0x1000)];
        let memory = Arc::new(GuestMemory::from_ranges(&regions).unwrap());
        memory.write_slice(bytes, GuestAddress(0)).unwrap();
        let mut buffers = GuestBuffers::new(memory);
        // In two parts, as drivers send it.
        let (head, rest) = (
            bytes.len().min(2) as u32,
            bytes.len().saturating_sub(2) as u32,
        );
        buffers.push(GuestAddress(0), head).unwrap();
        buffers.push(GuestAddress(u64::from(head)), rest).unwrap();
        Command::read(&mut buffers, features)
    }

    fn table(counts: [u32; 2]) -> Vec<u8> {
        let mut bytes = vec![1, 0];
        for (index, count) in counts.into_iter().enumerate() {
            bytes.extend(count.to_le_bytes());
            for number in 0..count {
                bytes.extend([2 - index as u8, 0, 0, 0, 0, number as u8]);
            }
        }
        bytes
    }

    #[test]
    fn every_command_is_understood_when_its_feature_was_accepted() {
        let modes = [
            (0, Mode::Promiscuous),
            (1, Mode::AllMulticast),
            (2, Mode::AllUnicast),
            (3, Mode::NoMulticast),
            (4, Mode::NoUnicast),
            (5, Mode::NoBroadcast),
        ];
        let modes = modes.into_iter().flat_map(|(command, mode)| {
            let feature = if command < 2 { 18 } else { 20 };
            [0, 1].map(|on| (vec![0, command, on], feature, Command::Mode(mode, on == 1)))
        });
        let list = |addresses: &[MacAddress]| AddressList {
            addresses: addresses.to_vec(),
            is_complete: true,
        };
        let commands = modes.chain([
            (
                table([2, 1]),
                18,
                Command::AddressTable {
                    unicast: list(&[[2, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 1]]),
                    multicast: list(&[[1, 0, 0, 0, 0, 0]]),
                },
            ),
            (
                vec![1, 1, 2, 3, 4, 5, 6, 7],
                23,
                Command::Address([2, 3, 4, 5, 6, 7]),
            ),
            (vec![3, 0], 21, Command::AnnounceSeen),
            (vec![4, 0, 3, 1], 22, Command::QueuePairs(0x103)),
            (
                vec![5, 0, 0x83, 0, 0, 0, 0, 0, 0xc0, 0],
                2,
                Command::Offloads(0xc0_0000_0000_0083),
            ),
        ]);
        for (bytes, feature, command) in commands {
            assert_eq!(read(&bytes, 0), None, "{command:?}");
            assert_eq!(read(&bytes, !(1 << feature)), None, "{command:?}");
            for len in 0..bytes.len() {
                assert_eq!(read(&bytes[..len], !0), None, "{command:?} cut at {len}");
            }
            let longer = [&bytes[..], &[0]].concat();
            assert_eq!(read(&longer, !0), None, "{command:?} and more");
            assert_eq!(read(&bytes, 1 << feature), Some(command));
        }
    }

    #[test]
    fn what_is_no_command_is_not_taken_for_one() {
        for bytes in [
            &[0, 6, 1][..],
            &[0, 0, 2],
            &[1, 2, 0],
            &[2, 0, 1, 0],
            &[3, 1],
            &[4, 1, 1, 0],
            &[5, 1, 0, 0, 0, 0, 0, 0, 0, 0],
            &[255, 255],
        ] {
            assert_eq!(read(bytes, !0), None, "{bytes:?}");
        }
        let endless = [1, 0, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 0];
        assert_eq!(read(&endless, !0), None);
    }

    #[test]
    fn of_a_long_table_the_start_is_kept() {
        let Some(Command::AddressTable { unicast, multicast }) = read(&table([65, 64]), !0) else {
            panic!("this is a table");
        };
        assert_eq!(unicast.addresses.len(), 64);
        assert!(!unicast.is_complete);
        assert_eq!(multicast.addresses.len(), 64);
        assert!(multicast.is_complete);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_command_or_not(
            class in 0u8..8,
            command in 0u8..8,
            rest in prop::collection::vec(any::<u8>(), 0..600),
            counts in prop::option::of((0u8..70, 0u8..70)),
            features in any::<u64>(),
        ) {
            let mut bytes = [&[class, command][..], &rest].concat();
            if let Some((unicast, multicast)) = counts {
                let second = 6 + usize::from(unicast) * 6;
                bytes.resize(second + 4 + usize::from(multicast) * 6, 0);
                bytes[2..6].copy_from_slice(&u32::from(unicast).to_le_bytes());
                bytes[second..second + 4].copy_from_slice(&u32::from(multicast).to_le_bytes());
            }
            match read(&bytes, features) {
                Some(Command::AddressTable { unicast, multicast }) => {
                    prop_assert!(unicast.addresses.len() <= MAX_ADDRESSES);
                    prop_assert!(multicast.addresses.len() <= MAX_ADDRESSES);
                }
                Some(Command::Address(mac)) => prop_assert_eq!(&mac[..], &bytes[2..]),
                _ => {}
            }
        }
    }
}
