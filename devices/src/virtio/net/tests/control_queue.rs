//! Commands of the driver, with a socket that preserves packet boundaries but supports no tap requests.

use super::*;

const COMMAND: u64 = DATA + 0x1_0000;
const ANSWER: u64 = DATA + 0x1_8000;
const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;
const ALL: u64 = CONTROL
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_RX_EXTRA
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_MQ;

impl Machine {
    /// Offers a command whose bytes are in parts of these sizes, with the rest in a last one.
    pub(super) fn offer_command(&mut self, command: &[u8], parts: &[u32]) -> u16 {
        self.memory
            .write_slice(command, GuestAddress(COMMAND))
            .unwrap();
        self.memory
            .write_slice(&[0x5a], GuestAddress(ANSWER))
            .unwrap();
        let mut left = command.len() as u32;
        let mut address = COMMAND;
        let mut buffers = Vec::new();
        for &len in parts.iter().chain([&u32::MAX]) {
            let len = len.min(left);
            buffers.push(readable(address, len));
            address += u64::from(len);
            left -= len;
        }
        buffers.push(writable(ANSWER, 1));
        self.control.offer(&buffers)
    }

    /// Gives a command, and returns the answer to it.
    pub(super) fn command(&mut self, command: &[u8]) -> u8 {
        let head = self.offer_command(command, &[2]);
        self.control.ring_doorbell();
        self.run();
        assert_eq!(self.control.take_used(), [(head, 1)]);
        self.bytes(ANSWER, 1)[0]
    }
}

/// Makes a machine whose driver has accepted the features of all commands, and its configuration space.
fn machine() -> (Machine, Arc<ConfigSpace>) {
    let (tap, host) = stand_in();
    let config = Arc::new(config_space(MAC, 1, 1500));
    let machine = Machine::with(ALL, host, |activation| {
        let shared = Arc::new(Shared::new(&NetLimits::default()).unwrap());
        Box::new(
            Worker::new(
                rings(Arc::new(tap)),
                1500,
                MAC,
                config.clone(),
                shared,
                None,
                activation,
            )
            .unwrap(),
        )
    });
    (machine, config)
}

#[test]
fn commands_are_answered() {
    let (mut machine, _) = machine();
    for (command, answer) in [
        (&[0, 0, 0][..], 0),
        (&[0, 5, 1], 0),
        // An unknown mode, an invalid state of a mode, too few bytes, too many bytes.
        (&[0, 6, 1], 1),
        (&[0, 0, 2], 1),
        (&[0, 0], 1),
        (&[0, 0, 0, 0], 1),
        (&[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], 0),
        (&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0], 1),
        // The only pair of queues, more than that, none.
        (&[4, 0, 1, 0], 0),
        (&[4, 0, 2, 0], 1),
        (&[4, 0, 0, 0], 1),
        // Offloads that were not negotiated.
        (&[5, 0, 1, 0, 0, 0, 0, 0, 0, 0], 1),
        // An unknown class, and an empty command.
        (&[77, 0, 0], 1),
        (&[], 1),
    ] {
        assert_eq!(machine.command(command), answer, "{command:?}");
        assert_eq!(machine.interrupts.take(), 1);
    }
    assert!(machine.control.wants_doorbell());
    assert!(!machine.link.needs_reset());
}

#[test]
fn the_address_that_the_driver_sets_is_visible_until_the_reset() {
    let (mut machine, config) = machine();
    for (mac, answer) in [
        ([2, 9, 8, 7, 6, 5], 0),
        ([3, 9, 8, 7, 6, 5], 1),
        ([0; 6], 1),
    ] {
        let command = [&[1, 1][..], &mac].concat();
        assert_eq!(machine.command(&command), answer, "{mac:?}");
        assert_eq!(config::mac(&config), [2, 9, 8, 7, 6, 5]);
    }
    drop(machine.manager.remove_subscriber(machine.worker).unwrap());
    assert_eq!(config::mac(&config), MAC);
}

#[test]
fn a_command_without_room_for_its_answer_needs_a_reset() {
    let (mut machine, _) = machine();
    machine.control.offer(&[readable(COMMAND, 3)]);
    machine.control.ring_doorbell();
    machine.run();
    assert!(machine.link.needs_reset());
}

#[test]
fn a_driver_that_knows_no_control_queue_has_none() {
    let mut machine = Machine::new(0);
    machine.offer_command(&[0, 0, 0], &[]);
    machine.control.ring_doorbell();
    machine.run();
    assert_eq!(machine.control.take_used(), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_commands_are_answered(
        commands in prop::collection::vec(
            (
                0u8..7, 0u8..7, prop::collection::vec(any::<u8>(), 0..40),
                prop::collection::vec(0u32..8, 0..6),
            ),
            1..20,
        ),
    ) {
        let (mut machine, _) = machine();
        for (class, command, rest, parts) in commands {
            let command = [&[class, command][..], &rest].concat();
            machine.offer_command(&command, &parts);
            machine.control.ring_doorbell();
            machine.run();
            prop_assert_eq!(machine.control.take_used().len(), 1);
            prop_assert!(machine.bytes(ANSWER, 1)[0] <= 1);
        }
        prop_assert!(!machine.link.needs_reset());
    }
}
