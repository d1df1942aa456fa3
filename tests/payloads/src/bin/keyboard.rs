//! Sets up the keyboard as its driver does, and waits for Ctrl-Alt-Del, after a line `ready`.
//!
//! Arguments: `mode=interrupt` waits halted, `mode=polled` (the default) polls.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::time::Duration;
use runtime::port::{I8042_COMMAND, I8042_DATA};
use runtime::system_call::{read_port_8, write_port_8};
use runtime::time::Deadline;
use runtime::{arguments, interrupts, payload, println, report};

const KEYBOARD_GSI: u32 = 1;
const KEYBOARD_VECTOR: u8 = 0x42;
/// How long keys may take to be pressed.
const KEY_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

const OUTPUT_BUFFER_FULL: u8 = 1 << 0;
const INPUT_BUFFER_FULL: u8 = 1 << 1;

const READ_COMMAND_BYTE: u8 = 0x20;
const WRITE_COMMAND_BYTE: u8 = 0x60;
const SELF_TEST: u8 = 0xaa;
const TEST_KEYBOARD_LINE: u8 = 0xab;
const ENABLE_KEYBOARD: u8 = 0xae;

/// Bits of the command byte.
const INTERRUPT: u8 = 1 << 0;
const TRANSLATE: u8 = 1 << 6;

/// Commands to the keyboard and its answers, translated to scan code set 1: reset, identify, set
/// LEDs, and enable scanning.
const SET_UP: [(u8, &[u8]); 5] = [
    (0xff, &[0xfa, 0xaa]),
    (0xf2, &[0xfa, 0xab, 0x41]),
    (0xed, &[0xfa]),
    (0x07, &[0xfa]),
    (0xf4, &[0xfa]),
];
/// Ctrl, Alt and Del pressed and released, in scan code set 1.
const CTRL_ALT_DEL: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

payload!(use_keyboard);

fn use_keyboard() {
    let interrupt_driven = match arguments::value("mode") {
        None | Some("polled") => false,
        Some("interrupt") => true,
        Some(mode) => return report::fail("mode", format!("there is no mode '{mode}'")),
    };
    report::check("keyboard controller", set_up_controller(interrupt_driven));
    report::check("keyboard", set_up_keyboard());
    println!("ready");
    report::check("Ctrl-Alt-Del", wait_for_keys(interrupt_driven));
}

fn set_up_controller(interrupt_driven: bool) -> Result<(), String> {
    while read_byte().is_some() {}
    for (test, passed) in [(SELF_TEST, 0x55), (TEST_KEYBOARD_LINE, 0x00)] {
        write(I8042_COMMAND, test)?;
        expect(&[passed])?;
    }
    write(I8042_COMMAND, READ_COMMAND_BYTE)?;
    let mut command_byte = wait_for_byte(ANSWER_TIMEOUT)?;
    if command_byte & TRANSLATE == 0 {
        return Err(String::from("translation is off"));
    }
    command_byte &= !INTERRUPT;
    if interrupt_driven {
        interrupts::route(KEYBOARD_GSI, KEYBOARD_VECTOR);
        command_byte |= INTERRUPT;
    }
    write(I8042_COMMAND, WRITE_COMMAND_BYTE)?;
    write(I8042_DATA, command_byte)?;
    write(I8042_COMMAND, ENABLE_KEYBOARD)
}

fn set_up_keyboard() -> Result<(), String> {
    for (command, answer) in SET_UP {
        write(I8042_DATA, command)?;
        expect(answer)?;
    }
    Ok(())
}

fn wait_for_keys(interrupt_driven: bool) -> Result<(), String> {
    // The answers' interrupts are taken before there are any of keys.
    interrupts::take_pending();
    let before = interrupts::count(KEYBOARD_VECTOR);
    let mut codes = Vec::new();
    while codes.len() < CTRL_ALT_DEL.len() {
        if !interrupt_driven {
            codes.push(wait_for_byte(KEY_TIMEOUT)?);
            continue;
        }
        let in_time = interrupts::wait_until(KEY_TIMEOUT, || {
            codes.extend(read_byte());
            codes.len() == CTRL_ALT_DEL.len()
        });
        if !in_time {
            return Err(format!("only {codes:x?} came within {KEY_TIMEOUT:?}"));
        }
    }
    if codes != CTRL_ALT_DEL {
        return Err(format!("the codes were {codes:x?}"));
    }
    let count = interrupts::count(KEYBOARD_VECTOR) - before;
    println!("{count} interrupts");
    if (count == 0) == interrupt_driven {
        return Err(format!("there were {count} interrupts"));
    }
    Ok(())
}

/// Writes to a port of the controller when it is ready to take it.
fn write(port: u16, value: u8) -> Result<(), String> {
    if read_port_8(I8042_COMMAND) & INPUT_BUFFER_FULL != 0 {
        return Err(String::from("the controller is busy"));
    }
    write_port_8(port, value);
    Ok(())
}

/// The byte to read.
fn read_byte() -> Option<u8> {
    (read_port_8(I8042_COMMAND) & OUTPUT_BUFFER_FULL != 0).then(|| read_port_8(I8042_DATA))
}

fn wait_for_byte(timeout: Duration) -> Result<u8, String> {
    let deadline = Deadline::after(timeout);
    loop {
        if let Some(byte) = read_byte() {
            return Ok(byte);
        }
        if deadline.passed() {
            return Err(format!("nothing came within {timeout:?}"));
        }
    }
}

fn expect(answer: &[u8]) -> Result<(), String> {
    for &byte in answer {
        let found = wait_for_byte(ANSWER_TIMEOUT)?;
        if found != byte {
            return Err(format!("{found:#x} came instead of {byte:#x}"));
        }
    }
    Ok(())
}
