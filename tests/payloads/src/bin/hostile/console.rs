//! Buffers and control messages that a console device does not expect.

use alloc::vec;
use runtime::virtio::console::{Channels, Console, console_feature, event};
use runtime::virtio::{Buffer, SplitQueue, Transport, device_id};

use crate::target::{Expected, QUEUE_SIZE, Target, wait_for_reaction};

pub fn attack(target: &Target) {
    if target.id != device_id::CONSOLE {
        return;
    }
    if target.device.offered_features() & console_feature::MULTIPORT == 0 {
        attack_console(target);
    } else {
        attack_channels(target);
    }
}

fn attack_console(target: &Target) {
    target.check("output of 16 MiB in a chain", Expected::Anything, || {
        let mut console = Console::open(target.device, QUEUE_SIZE)?;
        let chain = [Buffer {
            address: 1 << 20,
            length: 1 << 20,
            writable: false,
        }; QUEUE_SIZE as usize];
        console.port.transmit.add(&chain)?;
        console.port.transmit.kick(&target.device);
        Ok(wait_for_reaction(&target.device, &console.port.transmit))
    });
    target.check("output to be written", Expected::Anything, || {
        let mut console = Console::open(target.device, QUEUE_SIZE)?;
        let mut buffer = vec![0_u8; 64];
        console
            .port
            .transmit
            .add(&[Buffer::writable(&mut buffer)])?;
        console.port.transmit.kick(&target.device);
        Ok(wait_for_reaction(&target.device, &console.port.transmit))
    });
}

fn attack_channels(target: &Target) {
    for size in [0, 1, 7] {
        let name = alloc::format!("control message of {size} bytes");
        target.check(name, Expected::Notice, || {
            let mut channels = Channels::open(target.device, QUEUE_SIZE)?;
            let message = [0_u8; 8];
            channels
                .control_transmit
                .add(&[Buffer::readable(&message[..size])])?;
            channels.control_transmit.kick(&target.device);
            Ok(wait_for_reaction(
                &target.device,
                &channels.control_transmit,
            ))
        });
    }
    target.check("control messages that are none", Expected::Anything, || {
        let mut channels = Channels::open(target.device, QUEUE_SIZE)?;
        for port in [0, 1, 2, 16, 0x7fff_ffff, u32::MAX] {
            for event in (0..10).chain([u16::MAX]) {
                for value in [0, 1, u16::MAX] {
                    channels.tell(port, event, value)?;
                }
            }
        }
        Ok(wait_for_reaction(
            &target.device,
            &channels.control_transmit,
        ))
    });
    target.check(
        "ports opened and closed without end",
        Expected::Anything,
        || {
            let mut channels = Channels::open(target.device, QUEUE_SIZE)?;
            for round in 0..200_u16 {
                channels.tell(1, event::PORT_READY, 1)?;
                channels.tell(1, event::PORT_OPEN, round % 2)?;
                channels.tell(u32::MAX, event::DEVICE_READY, 1)?;
            }
            Ok(wait_for_reaction(
                &target.device,
                &channels.control_transmit,
            ))
        },
    );
    target.check(
        "control buffers that are too small",
        Expected::Notice,
        || {
            let features = target.device.initialise(console_feature::MULTIPORT)?;
            let mut queues: [SplitQueue; 2] = [
                target.device.set_up_queue(2, QUEUE_SIZE, features)?,
                target.device.set_up_queue(3, QUEUE_SIZE, features)?,
            ];
            target.device.set_driver_ok();
            let [receive, transmit] = &mut queues;
            let mut buffer = vec![0_u8; 7];
            receive.add(&[Buffer::writable(&mut buffer)])?;
            receive.kick(&target.device);
            let ready = [0xff_u8, 0xff, 0xff, 0xff, 0, 0, 1, 0];
            transmit.add(&[Buffer::readable(&ready)])?;
            transmit.kick(&target.device);
            Ok(wait_for_reaction(&target.device, receive))
        },
    );
}
