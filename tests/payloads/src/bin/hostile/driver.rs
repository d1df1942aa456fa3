//! A driver that does the right things in the wrong order.

use core::time::Duration;
use runtime::time;
use runtime::virtio::mmio::register;
use runtime::virtio::{Transport, device_id, status};

use crate::target::{Expected, Outcome, Session, Target};

const CONFIG_SIZE: u64 = 0x100;
const AFTER_RESET: Duration = Duration::from_millis(5);

pub fn attack(target: &Target) {
    let device = target.device;
    target.check("DRIVER_OK without FEATURES_OK", Expected::Anything, || {
        let session = Session::prepare(target)?;
        device.reset()?;
        device.attach_queue(&session.queue);
        device.write(
            register::STATUS,
            status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK,
        );
        session.notify();
        Ok(reaction(target))
    });
    target.check("features that are not offered", Expected::Notice, || {
        device.reset()?;
        device.write(register::STATUS, status::ACKNOWLEDGE);
        device.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        device.accept_features(u64::MAX);
        let before = status::ACKNOWLEDGE | status::DRIVER;
        device.write(register::STATUS, before | status::FEATURES_OK);
        let accepted = device.status() & status::FEATURES_OK != 0;
        Ok(if accepted {
            Outcome::Done
        } else {
            Outcome::Refused
        })
    });
    target.check("every status in turn", Expected::Anything, || {
        Session::open(target)?;
        for value in (1..=u32::from(u8::MAX)).rev() {
            device.write(register::STATUS, value);
        }
        device.write(register::STATUS, u32::MAX);
        device.write(register::STATUS, 1 << 8);
        Ok(reaction(target))
    });
    target.check(
        "initialization again without a reset",
        Expected::Anything,
        || {
            let mut session = Session::open(target)?;
            device.write(register::STATUS, status::ACKNOWLEDGE);
            device.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
            device.accept_features(session.features);
            device.write(
                register::STATUS,
                status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
            );
            device.attach_queue(&session.queue);
            device.set_driver_ok();
            session.lay_out();
            session.submit(0);
            Ok(reaction(target))
        },
    );
    target.check("queue moved while it is live", Expected::Anything, || {
        let mut session = Session::open(target)?;
        let other = session.other_queue();
        device.attach_queue(&other);
        session.lay_out();
        session.submit(0);
        Ok(reaction(target))
    });
    if target.request_queue().is_some() {
        attack_requests(target);
    }
}

fn attack_requests(target: &Target) {
    target.check_undisturbed("doorbells of queues that do not exist", |session| {
        for queue in [
            2,
            7,
            63,
            64,
            255,
            0x7fff,
            0xffff,
            0x1_0000,
            0x8000_0000,
            u32::MAX,
        ] {
            session.device.notify(queue);
        }
        Ok(())
    });
    target.check_undisturbed("doorbells without a request", |session| {
        (0..64).for_each(|_| session.notify());
        Ok(())
    });
    // Writes to the configuration space of other devices change their behaviour.
    if target.id == device_id::RNG {
        target.check_undisturbed("writes of the configuration space", |session| {
            for offset in 0..CONFIG_SIZE {
                session.device.write_byte(register::CONFIG + offset, 0xa5);
            }
            Ok(())
        });
    }
    target.check(
        "writes of the configuration space",
        Expected::Anything,
        || {
            let session = Session::open(target)?;
            for offset in (0..CONFIG_SIZE).step_by(4) {
                session.device.write(register::CONFIG + offset, 0xffff_ffff);
                session
                    .device
                    .write_half(register::CONFIG + offset + 1, 0xffff);
                session.device.write_byte(register::CONFIG + offset + 3, 0);
            }
            Ok(reaction(target))
        },
    );
    target.check(
        "reset while requests are under way",
        Expected::Notice,
        || {
            for _ in 0..20 {
                let mut session = Session::open(target)?;
                session.lay_out();
                for _ in 0..session.queue.size() {
                    session.queue.make_available(0);
                }
                session.notify();
                session.device.reset()?;
                session.clear_data();
                let used = session.queue.used_index();
                time::delay(AFTER_RESET);
                if !session.data_is_clear() || session.queue.used_index() != used {
                    return Ok(Outcome::WroteAfterReset);
                }
            }
            Ok(Outcome::Refused)
        },
    );
}

fn reaction(target: &Target) -> Outcome {
    if target.device.needs_reset() {
        Outcome::NeedsReset
    } else {
        Outcome::Silent
    }
}
