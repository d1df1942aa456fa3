//! Takes the interrupt of the power button, after a line `ready`: finishes when it is pressed.
//!
//! Arguments: `ignore` goes on waiting after each press, with a line `pressed`.

#![no_std]
#![no_main]

use core::time::Duration;

use runtime::{arguments, interrupts, payload, println, report};

const POWER_BUTTON_GSI: u32 = 5;
const POWER_BUTTON_VECTOR: u8 = 0x45;
/// How long a press may take to arrive.
const TIMEOUT: Duration = Duration::from_secs(60);

payload!(wait_for_button);

fn wait_for_button() {
    interrupts::route(POWER_BUTTON_GSI, POWER_BUTTON_VECTOR);
    println!("ready");
    let mut seen = 0;
    loop {
        let is_new = || interrupts::count(POWER_BUTTON_VECTOR) > seen;
        if !interrupts::wait_until(TIMEOUT, is_new) {
            return report::fail("power button", "it was not pressed in time");
        }
        seen = interrupts::count(POWER_BUTTON_VECTOR);
        if !arguments::flag("ignore") {
            return report::ok("power button");
        }
        println!("pressed");
    }
}
