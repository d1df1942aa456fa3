//! Uses the serial port in both directions.
//!
//! Arguments: `bytes=N` echoes N bytes of input and prints their FNV-1a checksum, after a line
//! `ready` that says when to send them; `mode=interrupt` waits for them halted, `mode=polled` (the
//! default) polls. `print-kib=N` prints N KiB as fast as the port takes them.

#![no_std]
#![no_main]

extern crate alloc;

use alloc::format;
use alloc::string::String;
use core::time::Duration;
use runtime::time::{self, Deadline};
use runtime::{arguments, interrupts, payload, println, report, serial};

const SERIAL_GSI: u32 = 4;
const SERIAL_VECTOR: u8 = 0x41;
const INPUT_TIMEOUT: Duration = Duration::from_secs(3);
const LINE: &[u8; 64] = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+\n";

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

payload!(use_serial_port);

fn use_serial_port() {
    if let Some(count) = arguments::parsed("bytes") {
        let interrupt_driven = match arguments::value("mode") {
            None | Some("polled") => false,
            Some("interrupt") => true,
            Some(mode) => return report::fail("mode", format!("there is no mode '{mode}'")),
        };
        report::check(
            format!("{count} bytes of input"),
            echo(count, interrupt_driven),
        );
    }
    if let Some(kib) = arguments::parsed::<usize>("print-kib") {
        print_kib(kib);
    }
}

fn echo(count: usize, interrupt_driven: bool) -> Result<(), String> {
    if interrupt_driven {
        interrupts::route(SERIAL_GSI, SERIAL_VECTOR);
        serial::interrupt_on_input(true);
    }
    println!("ready");
    let mut checksum = FNV_OFFSET;
    for received in 0..count {
        let mut byte = serial::read();
        if byte.is_none() && interrupt_driven {
            interrupts::wait_until(INPUT_TIMEOUT, || {
                byte = serial::read();
                byte.is_some()
            });
        } else if byte.is_none() {
            let deadline = Deadline::after(INPUT_TIMEOUT);
            while byte.is_none() && !deadline.passed() {
                byte = serial::read();
            }
        }
        let Some(byte) = byte else {
            return Err(format!(
                "byte {received} did not come within {INPUT_TIMEOUT:?}"
            ));
        };
        checksum = (checksum ^ u64::from(byte)).wrapping_mul(FNV_PRIME);
        serial::write(&[byte]);
    }
    println!();
    println!("checksum {checksum:#018x}");
    if interrupt_driven {
        serial::interrupt_on_input(false);
        let count = interrupts::count(SERIAL_VECTOR);
        println!("{count} interrupts");
        if count == 0 {
            return Err(String::from("they came without an interrupt"));
        }
    }
    Ok(())
}

fn print_kib(kib: usize) {
    let start = time::ticks();
    for _ in 0..kib * 1024 / LINE.len() {
        serial::write(LINE);
    }
    let elapsed = time::duration(start, time::ticks());
    println!("{kib} KiB printed in {} us", elapsed.as_micros());
    report::ok("output");
}
