//! The limits of each direction, and the device's counters.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::*;
use crate::rate_limiter::{Limits, RateLimit};

const LIMIT: Duration = Duration::from_secs(20);
/// Size of the packets, header included, and of the frames in them.
const SIZE: usize = 112;
const FRAME_SIZE: u64 = 100;
/// Ten packets pass at once, and one that exceeds the limit; the others at a hundred a second.
const COUNT: usize = 30;
const LEAST_TIME: Duration = Duration::from_millis(180);

fn packets() -> Limits {
    Limits {
        operations: Some(RateLimit::per_second(100, Some(10))),
        bytes: None,
    }
}

fn bytes() -> Limits {
    Limits {
        operations: None,
        bytes: Some(RateLimit::per_second(
            100 * FRAME_SIZE,
            Some(10 * FRAME_SIZE),
        )),
    }
}

fn one_an_hour() -> Limits {
    Limits {
        operations: Some(RateLimit {
            size: 1,
            refill_time: Duration::from_secs(3600),
            one_time_burst: 0,
        }),
        bytes: None,
    }
}

fn limited(limits: &NetLimits) -> (Machine, NetHandle) {
    let (tap, host) = stand_in();
    let shared = Arc::new(Shared::new(limits).unwrap());
    let handle = NetHandle {
        shared: shared.clone(),
    };
    let machine = Machine::with(MERGE, host, |activation| {
        let config = Arc::new(config_space(MAC, 1, 1500));
        Box::new(
            Worker::new(
                rings(Arc::new(tap)),
                1500,
                MAC,
                config,
                shared,
                None,
                activation,
            )
            .unwrap(),
        )
    });
    (machine, handle)
}

fn metrics(handle: &NetHandle) -> Value {
    serde_json::to_value(handle.metrics()).unwrap()
}

impl Machine {
    /// Lets the device work at its own pace until `count` packets of a queue have been used. Returns how many
    /// turns that took.
    fn run_until(&mut self, count: usize, used: impl Fn(&mut Machine) -> usize) -> usize {
        let (start, mut done, mut turns) = (Instant::now(), 0, 0);
        while done < count {
            assert!(start.elapsed() < LIMIT, "only {done} have passed");
            self.manager.run_with_timeout(1000).unwrap();
            done += used(self);
            turns += 1;
        }
        turns
    }

    fn rest(&mut self) {
        let mut turns = 0;
        while self.manager.run_with_timeout(20).unwrap() > 0 {
            turns += 1;
            assert!(turns < 10, "the device spins");
        }
    }

    fn offer_packets(&mut self, count: usize) {
        for seed in 0..count {
            // After the receive buffers.
            let address = DATA + 0x10_0000 + (seed * SIZE) as u64;
            let bytes = packet(SIZE, seed as u8);
            self.memory
                .write_slice(&bytes, GuestAddress(address))
                .unwrap();
            self.transmit.offer(&[readable(address, SIZE as u32)]);
        }
        self.transmit.ring_doorbell();
    }
}

#[test]
fn reception_is_limited_without_spinning_or_loss() {
    for receive in [packets(), bytes()] {
        let limits = NetLimits {
            receive,
            ..NetLimits::default()
        };
        let (mut machine, handle) = limited(&limits);
        machine.offer_receive_buffers(&[2000; COUNT]);
        for seed in 0..COUNT {
            machine.host_sends(&packet(SIZE, seed as u8));
        }
        let start = Instant::now();
        let turns = machine.run_until(COUNT, |machine| machine.receive.take_used().len());
        assert!(start.elapsed() >= LEAST_TIME);
        assert!(turns <= 60, "{turns} turns");
        for seed in 0..COUNT {
            let expected = received(packet(SIZE, seed as u8), 1);
            assert!(machine.bytes(DATA + seed as u64 * 2000, SIZE) == expected);
        }
        // The other direction is not limited.
        machine.offer_packets(COUNT);
        machine.run_until(COUNT, |machine| machine.transmit.take_used().len());
        let metrics = metrics(&handle);
        assert!((1..=20).contains(&metrics["rx_rate_limiter_throttled"].as_u64().unwrap()));
        assert_eq!(metrics["tx_rate_limiter_throttled"], 0);
    }
}

#[test]
fn transmission_is_limited_without_spinning_or_loss() {
    for transmit in [packets(), bytes()] {
        let limits = NetLimits {
            transmit,
            ..NetLimits::default()
        };
        let (mut machine, handle) = limited(&limits);
        machine.offer_packets(COUNT);
        let start = Instant::now();
        let turns = machine.run_until(COUNT, |machine| machine.transmit.take_used().len());
        assert!(start.elapsed() >= LEAST_TIME);
        assert!(turns <= 60, "{turns} turns");
        for seed in 0..COUNT {
            assert_eq!(machine.host_receives(), Some(packet(SIZE, seed as u8)));
        }
        let metrics = metrics(&handle);
        assert!((1..=20).contains(&metrics["tx_rate_limiter_throttled"].as_u64().unwrap()));
        assert_eq!(metrics["rx_rate_limiter_throttled"], 0);
    }
}

#[test]
fn what_a_limit_holds_back_stays_where_it_is_until_the_limit_changes() {
    let limits = NetLimits {
        receive: one_an_hour(),
        transmit: one_an_hour(),
    };
    let (mut machine, handle) = limited(&limits);
    machine.offer_receive_buffers(&[2000; 5]);
    machine.offer_packets(5);
    for seed in 0..5 {
        machine.host_sends(&packet(SIZE, seed));
    }
    machine.rest();
    // One packet, and one that exceeds the limit.
    assert_eq!(machine.receive.take_used().len(), 2);
    assert_eq!(machine.transmit.take_used().len(), 2);
    for seed in 0..2 {
        assert_eq!(machine.host_receives(), Some(packet(SIZE, seed)));
    }
    // A driver that rings the doorbell gets no more.
    machine.receive.ring_doorbell();
    machine.transmit.ring_doorbell();
    machine.rest();
    assert_eq!(machine.host_receives(), None);

    handle
        .set_limits(&NetLimits {
            receive: Limits::default(),
            ..limits
        })
        .unwrap();
    machine.rest();
    assert_eq!(machine.receive.take_used().len(), 3);
    assert_eq!(machine.transmit.take_used().len(), 0);
    handle.set_limits(&NetLimits::default()).unwrap();
    assert_eq!(handle.limits(), NetLimits::default());
    machine.rest();
    assert_eq!(machine.transmit.take_used().len(), 3);
    let metrics = metrics(&handle);
    assert!(metrics["tx_remaining_reqs_count"].as_u64() >= Some(3));
    assert!(metrics["rx_event_rate_limiter_count"].as_u64() >= Some(1));
    assert!(metrics["tx_rate_limiter_event_count"].as_u64() >= Some(2));
}

#[test]
fn a_tap_that_vanishes_takes_no_account_of_limits() {
    let limits = NetLimits {
        transmit: one_an_hour(),
        ..NetLimits::default()
    };
    let (mut machine, _control) = limited(&limits);
    machine.offer_packets(5);
    machine.rest();
    machine.host = stand_in().1;
    machine.rest();
    machine.transmit.ring_doorbell();
    machine.receive.ring_doorbell();
    machine.rest();
    machine.offer_receive_buffers(&[2000; 3]);
    machine.rest();
    assert_eq!(machine.transmit.take_used().len(), 5);
    assert!(!machine.link.needs_reset());
}

#[test]
fn what_passes_is_counted() {
    for lone in [true, false] {
        let (mut machine, handle) = limited(&NetLimits::default());
        machine.offer_receive_buffers(&[2000; COUNT]);
        if lone {
            for seed in 0..8 {
                machine.host_sends(&packet(SIZE, seed));
                machine.rest();
                machine.offer_packets(1);
                machine.rest();
            }
        } else {
            for seed in 0..8 {
                machine.host_sends(&packet(SIZE, seed));
            }
            machine.offer_packets(8);
            machine.rest();
        }
        machine.transmit(&packet(5, 0), &[]);
        machine.rest();
        machine.transmit.ring_doorbell();
        machine.rest();
        let metrics = metrics(&handle);
        let expected = json!({
            "activate_fails": 0, "mac_address_updates": 0, "event_fails": 0,
            "rx_bytes_count": 8 * FRAME_SIZE, "rx_packets_count": 8, "rx_fails": 0,
            "tap_read_fails": 0, "tap_write_fails": 0, "tx_bytes_count": 8 * FRAME_SIZE,
            "tx_malformed_frames": 1, "tx_fails": 0, "tx_packets_count": 8,
            "rx_rate_limiter_throttled": 0, "tx_rate_limiter_throttled": 0,
            "rx_event_rate_limiter_count": 0, "tx_rate_limiter_event_count": 0,
        });
        for (name, value) in expected.as_object().unwrap() {
            assert_eq!(&metrics[name], value, "{name}");
        }
        for name in ["rx_count", "tx_count"] {
            let calls = metrics[name].as_u64().unwrap();
            let possible = if lone { 8..=8 } else { 1..=8 };
            assert!(possible.contains(&calls), "{name} {calls}");
        }
        assert!(metrics["no_tx_avail_buffer"].as_u64() >= Some(1));
        let times = &metrics["tap_write_agg"];
        assert!(times["sum_us"].as_u64() >= times["max_us"].as_u64());
    }
}
