//! The report of a payload, for people and for the program that started it: a line for each check,
//! then `PASS` or `FAIL`, then the end of the machine.

use core::fmt::Display;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::system_call::{self, write_port_8};
use crate::{arguments, mmio, port, println, time};

/// Where Linux leaves [`WARM_BOOT`] before a restart, if it is told to after a panic.
const WARM_BOOT_WORD: u64 = 0x472;
const WARM_BOOT: u16 = 0x1234;

static FAILED: AtomicBool = AtomicBool::new(false);

/// Prints that the check `name` succeeded.
pub fn ok(name: impl Display) {
    println!("ok: {name}");
}

/// Prints that the check `name` failed, and why; the verdict will be `FAIL`.
pub fn fail(name: impl Display, reason: impl Display) {
    FAILED.store(true, Ordering::Relaxed);
    println!("FAIL: {name}: {reason}");
}

/// Prints the result of the check `name`.
pub fn check<E: Display>(name: impl Display, result: Result<(), E>) {
    match result {
        Ok(()) => ok(name),
        Err(reason) => fail(name, reason),
    }
}

/// The ways to finish.
const WAYS: [&str; 9] = [
    "reset",
    "poweroff",
    "triple-fault",
    "hang",
    "emulation-failure",
    "panic",
    "panic-hang",
    "panic-word",
    "number",
];

/// Prints the verdict, then ends the machine as the argument `finish=` says, one of [`WAYS`];
/// without it, by a reset.
pub fn finish() -> ! {
    let way = arguments::value("finish").unwrap_or("reset");
    if !WAYS.contains(&way) {
        fail(
            "finish",
            format_args!("there is no way to finish called '{way}'"),
        );
    }
    println!(
        "{}",
        if FAILED.load(Ordering::Relaxed) {
            "FAIL"
        } else {
            "PASS"
        }
    );
    match way {
        "poweroff" => {
            write_port_8(port::ACPI_SLEEP_CONTROL, port::ACPI_SOFT_OFF);
            still_running(way);
        }
        "triple-fault" => system_call::triple_fault(),
        "hang" => system_call::halt(),
        "panic" => write_port_8(port::PANIC_DEVICE, port::PANICKED),
        "panic-hang" => {
            write_port_8(port::PANIC_DEVICE, port::PANICKED);
            system_call::halt();
        }
        // SAFETY: the address is mapped, and this program keeps nothing in the first page.
        "panic-word" => unsafe { mmio::write_16(WARM_BOOT_WORD, WARM_BOOT) },
        "number" => {
            write_port_8(port::EXIT, arguments::parsed("number").unwrap_or(0));
            still_running(way);
        }
        "emulation-failure" => {
            system_call::execute_unknown_instruction(mmio::UNUSED_PAGE);
            still_running(way);
        }
        _ => {}
    }
    reset()
}

/// A monitor may let the processor run on for a moment before it reacts.
fn still_running(way: &str) {
    time::delay(time::Duration::from_millis(200));
    println!("FAIL: finish: the machine still runs after {way}");
}

/// Resets the machine by the keyboard controller, or by a triple fault where there is none.
pub fn reset() -> ! {
    write_port_8(port::I8042_COMMAND, port::I8042_PULSE_RESET_LINE);
    system_call::triple_fault()
}
