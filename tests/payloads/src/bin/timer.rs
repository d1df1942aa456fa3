//! Lets the interval timer (8254) count, and compares it with the processor's clock.
//!
//! Arguments: `first=control` accesses the timer's control port first, `first=system-control` reads
//! and writes system control port B first. Counter 2 counts from there on.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use core::time::Duration;

use runtime::system_call::{read_port_8, write_port_8};
use runtime::{arguments, payload, println, report, time};

const COUNTER_2: u16 = 0x42;
const CONTROL: u16 = 0x43;
const SYSTEM_CONTROL: u16 = 0x61;
/// Counter 2, low byte before high byte, mode 2 (rate generator).
const COUNT_IN_MODE_2: u8 = 0xb4;
const LATCH_COUNTER_2: u8 = 0x80;
const GATE: u8 = 1 << 0;
const TICKS_PER_SECOND: u64 = 1_193_182;
/// Well below the 55 ms after which the counter starts anew.
const TIME: Duration = Duration::from_millis(20);

payload!(check_timer);

fn check_timer() {
    match arguments::value("first") {
        Some("system-control") => {
            open_gate();
            write_port_8(CONTROL, COUNT_IN_MODE_2);
        }
        _ => {
            write_port_8(CONTROL, COUNT_IN_MODE_2);
            open_gate();
        }
    }
    write_port_8(COUNTER_2, 0xff);
    write_port_8(COUNTER_2, 0xff);
    let gate = read_port_8(SYSTEM_CONTROL) & GATE;
    report::check(
        "the gate is open",
        if gate == GATE {
            Ok(())
        } else {
            Err("it is closed")
        },
    );
    report::check("the counter counts", check_rate());
}

fn open_gate() {
    let value = read_port_8(SYSTEM_CONTROL);
    write_port_8(SYSTEM_CONTROL, value | GATE);
}

fn check_rate() -> Result<(), String> {
    // Measured before, as it takes time.
    time::ticks_per_second();
    let (before, start) = (count(), time::ticks());
    time::delay(TIME);
    let (after, end) = (count(), time::ticks());
    let counted = u64::from(before.wrapping_sub(after)) * 1_000_000 / TICKS_PER_SECOND;
    let passed = time::duration(start, end).as_micros() as u64;
    println!("{counted} us of {passed} us");
    // A busy host may stop the guest between the two clocks.
    if counted >= passed / 2 && counted <= passed * 2 {
        Ok(())
    } else {
        Err(format!("it counted {counted} us in {passed} us"))
    }
}

fn count() -> u16 {
    write_port_8(CONTROL, LATCH_COUNTER_2);
    u16::from_le_bytes([read_port_8(COUNTER_2), read_port_8(COUNTER_2)])
}
